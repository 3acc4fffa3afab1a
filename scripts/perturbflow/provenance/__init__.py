"""What every result was made of."""

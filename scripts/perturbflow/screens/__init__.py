"""From a file of any make to one schema."""

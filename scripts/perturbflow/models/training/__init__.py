"""How networks are trained: the loop, batches, conditions and building blocks."""

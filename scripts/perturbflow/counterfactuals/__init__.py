"""What-if questions: the warranty of a model, its answers, the search among them, and their figures."""

"""Models of environments, and what plans with them."""

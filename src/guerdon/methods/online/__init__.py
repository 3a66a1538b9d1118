"""Methods that learn from their own experience."""

"""Methods that learn from comparisons."""

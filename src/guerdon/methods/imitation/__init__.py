"""Methods that learn from demonstrations and take-overs."""

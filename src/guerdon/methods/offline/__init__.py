"""Methods that learn from recorded data and rewards."""

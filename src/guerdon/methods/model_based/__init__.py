"""Methods that use a known or learned model of the world."""

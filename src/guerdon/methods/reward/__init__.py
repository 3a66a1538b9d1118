"""Methods that learn the judge."""

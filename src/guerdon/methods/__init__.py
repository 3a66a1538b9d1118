"""One file a system, grouped by what it learns from. No method imports another."""

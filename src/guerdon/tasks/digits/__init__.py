"""Handwritten digits: a small world of real pictures."""

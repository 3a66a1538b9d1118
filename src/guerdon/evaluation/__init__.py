"""Figures that are computed from batches or from several runs."""

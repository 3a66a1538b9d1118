"""One experiment a system: its arms, its thresholds, its figures. Run by ``guerdon reproduce``."""

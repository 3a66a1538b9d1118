"""A run: its folder, seed, metrics, progress, checkpoints and resume."""

from __future__ import annotations

from guerdon.run.config import read_config
from guerdon.run.metrics import read_metrics, read_timings
from guerdon.run.run import Interrupted, Run

__all__ = ["Interrupted", "Run", "read_config", "read_metrics", "read_timings"]

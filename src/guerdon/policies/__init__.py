"""What acts: policies, each with ``sample``, ``distribution`` and ``log_prob``."""

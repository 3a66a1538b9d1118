"""Where steps come from: objects with ``collect(actor, n) -> Trajectories``."""

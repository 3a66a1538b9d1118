"""Who judges: objects with ``score(traj) -> [B]`` or ``[B, T]``."""

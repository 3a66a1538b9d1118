"""What estimates: modules with ``value(traj) -> [B, T]``."""

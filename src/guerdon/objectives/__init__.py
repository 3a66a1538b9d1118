"""Pure losses: arrays to a scalar, and the small objectives that `Role.update` takes."""

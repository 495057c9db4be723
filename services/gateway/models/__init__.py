"""Models: their registration, gate and rollback."""

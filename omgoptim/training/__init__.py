"""Training loop, losses, checkpoints, and care for compressed models while they train."""

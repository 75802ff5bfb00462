"""Training loop, losses, checkpoints, zero masks and fake quantization."""

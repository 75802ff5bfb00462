"""The one training loop, its losses, its checkpoints, and what keeps a compressed model healthy while it learns."""

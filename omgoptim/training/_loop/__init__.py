"""Parts of the training loop: state, steps, optimizer, loss, progress and checkpoints."""

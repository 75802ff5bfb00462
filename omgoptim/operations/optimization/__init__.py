"""Parts of `optimize`: steps, compression levels, the chain of steps, and the final choice."""

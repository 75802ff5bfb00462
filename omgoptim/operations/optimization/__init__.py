"""The parts of `optimize`: goal, floors, steps, levels of compression, and the final choice."""

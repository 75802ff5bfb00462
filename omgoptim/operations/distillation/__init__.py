"""The parts of `distill`: the student, its search, its training and the control."""

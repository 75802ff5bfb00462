"""Student, student search and training of `distill`."""

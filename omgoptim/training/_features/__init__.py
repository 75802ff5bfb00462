"""Distances between layers of a student and of its teacher, and which layers are compared."""

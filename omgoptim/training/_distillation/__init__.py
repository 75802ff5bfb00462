"""Distances between outputs of a student and of its teacher, and a cache of the teacher's."""

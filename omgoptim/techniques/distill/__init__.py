"""Ways to derive a student from its teacher."""

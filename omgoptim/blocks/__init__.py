"""Layers that take the place of larger ones. Public, and what an artifact of changed shape is rebuilt from."""

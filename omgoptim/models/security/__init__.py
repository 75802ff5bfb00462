"""Boundary to untrusted files and user code."""

"""Measurement of artifacts in fresh processes: size, operations, time, memory and quality."""

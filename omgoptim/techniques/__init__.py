"""Compression techniques: each changes a module or an ONNX program."""

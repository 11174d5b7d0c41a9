"""Tensors in, tensors out; no names and no files."""

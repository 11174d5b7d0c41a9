"""Bytes: reading and writing the files that hold tensors and documents."""

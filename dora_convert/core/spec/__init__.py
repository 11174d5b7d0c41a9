"""Adapter layouts described by data instead of code, as docs/custom-formats.md tells."""

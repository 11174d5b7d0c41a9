"""Numbers to what people read."""

"""Plan to bytes, and bytes back to numbers."""

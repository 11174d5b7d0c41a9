"""Take a DoRA adapter from any trainer and make it run anywhere."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]

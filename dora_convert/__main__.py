"""`python -m dora_convert`."""

from __future__ import annotations

from dora_convert.cli import main

if __name__ == "__main__":
    main()

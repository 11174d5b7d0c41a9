"""One file format of a plain LoRA a file; which stack reads which is in `planning/stacks.py`."""

from __future__ import annotations

from typing import Protocol

from dora_convert.core.pairs import LoraFile
from dora_convert.planning.lora import Lora
from dora_convert.registry import Registry

__all__ = ["LoraFormat", "loras"]


class LoraFormat(Protocol):
    """How a LoRA is stored; `loras/NAME.py` holds one as `FORMAT`."""

    title: str

    def lay_out(self, lora: Lora) -> LoraFile:
        """Every byte's place. Computes nothing, so that it can be asked before the work.

        Raises MismatchError with all that the format cannot hold, at once.
        """
        ...


loras: Registry[LoraFormat] = Registry("dora_convert.loras", "FORMAT")

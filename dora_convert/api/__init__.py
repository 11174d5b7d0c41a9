"""The use cases, one function each: what the commands call, and what a Python user imports.

torch is imported by the functions that compute, so that reading headers does without it.
"""

from __future__ import annotations

from dora_convert.api.inspecting import inspect
from dora_convert.api.merging import MergeOptions, Silent, merge
from dora_convert.api.projecting import LoraOptions, to_lora
from dora_convert.api.reading import ReadOptions, read_adapter
from dora_convert.api.verifying import verify

__all__ = [
    "LoraOptions",
    "MergeOptions",
    "ReadOptions",
    "Silent",
    "inspect",
    "merge",
    "read_adapter",
    "to_lora",
    "verify",
]

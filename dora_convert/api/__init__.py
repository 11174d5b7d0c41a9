"""The use cases, one function each: what the commands call, and what a Python user imports.

torch is imported by the functions that compute, so that reading headers does without it.
"""

from __future__ import annotations

from dora_convert.api.benching import BenchOptions, bench
from dora_convert.api.calibrating import collect_stats
from dora_convert.api.converting import ConvertOptions, convert
from dora_convert.api.correcting import ResidualOptions
from dora_convert.api.inspecting import inspect
from dora_convert.api.merging import MergeOptions, Silent, merge
from dora_convert.api.plotting import PlotOptions, plot
from dora_convert.api.projecting import LoraOptions, to_lora
from dora_convert.api.pushing import Consent, PushOptions, check_push, push
from dora_convert.api.reading import ReadOptions, read_adapter
from dora_convert.api.uploading import Upload, send_ahead
from dora_convert.api.verifying import verify

__all__ = [
    "BenchOptions",
    "Consent",
    "ConvertOptions",
    "LoraOptions",
    "MergeOptions",
    "PlotOptions",
    "PushOptions",
    "ReadOptions",
    "ResidualOptions",
    "Silent",
    "Upload",
    "bench",
    "check_push",
    "collect_stats",
    "convert",
    "inspect",
    "merge",
    "plot",
    "push",
    "read_adapter",
    "send_ahead",
    "to_lora",
    "verify",
]

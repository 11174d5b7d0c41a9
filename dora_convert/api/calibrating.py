"""`stats`: what a model's layers see of some text, for `to-lora` to weight errors by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dora_convert.api.building import build_model, read_lines
from dora_convert.core.lora import StatsReport
from dora_convert.errors import InputError
from dora_convert.hub.locate import local_path
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.mark import checkpoint_mark
from dora_convert.storage.selection import base_files
from dora_convert.storage.single import check_file, whole_file

__all__ = ["collect_stats"]


def collect_stats(
    base: Path, text: Path, output: Path, *, length: int = 512, overwrite: bool = False
) -> StatsReport:
    """Run the model over every line of `text`, cut to `length` tokens, and write the moments.

    Raises InputError (also where transformers is missing or cannot build the model) and
    OutputError. `output` appears when it is complete.
    """
    begun = time.perf_counter()
    checkpoint = open_checkpoint(local_path(base, base_files))
    check_file(output, overwrite=overwrite)
    lines = read_lines(text)
    model, tokenizer = build_model(checkpoint, "collecting statistics")
    from dora_convert.execution.stats import collect, save_stats

    tokens = 0

    def batches() -> Iterator[Any]:
        nonlocal tokens
        for line in lines:
            batch = tokenizer(line, truncation=True, max_length=length, return_tensors="pt")
            if batch["input_ids"].shape[1]:
                tokens += batch["input_ids"].shape[1]
                yield batch

    sketches = collect(model, batches())
    if not sketches:
        raise InputError("no linear layer of the model was reached", where=str(base))
    with whole_file(output) as file:
        save_stats(file, sketches, mark=checkpoint_mark(checkpoint))
    return StatsReport(
        output=str(output),
        base=str(base),
        modules=len(sketches),
        texts=len(lines),
        tokens=tokens,
        nbytes=output.stat().st_size,
        seconds=time.perf_counter() - begun,
    )

"""Jobs to shards: the base's own, or new ones of a given size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dora_convert.core.bundle import json_text
from dora_convert.core.plan import Job, Shard
from dora_convert.planning.merge import Outputs

__all__ = ["INDEX", "index_text", "own_shards", "sized_shards"]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def own_shards(outputs: Outputs, shards: Mapping[str, str]) -> tuple[Shard, ...]:
    """The files of the base, each with the tensors that it had; new tensors beside their kin."""
    files: dict[str, list[Job]] = {file: [] for file in sorted(set(shards.values()))}
    for name, job in outputs.jobs.items():
        files[shards[outputs.beside.get(name, name)]].append(job)
    kept = {file: jobs for file, jobs in files.items() if jobs}
    if len(kept) == 1:
        return (Shard(_SINGLE, tuple(next(iter(kept.values())))),)
    if len(kept) < len(files):
        return _numbered(list(kept.values()))
    return tuple(Shard(_safetensors_name(file), tuple(jobs)) for file, jobs in kept.items())


def sized_shards(outputs: Outputs, limit: int) -> tuple[Shard, ...]:
    """Files of at most `limit` bytes of tensor data, or of one tensor that is larger."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in outputs.jobs.values():
        nbytes = job.nbytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += nbytes
    return _numbered(groups)


def _numbered(groups: Sequence[Sequence[Job]]) -> tuple[Shard, ...]:
    total = len(groups)
    if total == 1:
        return (Shard(_SINGLE, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(jobs))
        for i, jobs in enumerate(groups, 1)
    )


def _safetensors_name(file: str) -> str:
    name = re.sub(r"\.(bin|gguf|pt|pth)$", ".safetensors", file)
    return re.sub(r"^pytorch_model(?=[-.])", "model", name)


def index_text(shards: Sequence[Shard]) -> str:
    """`model.safetensors.index.json`: total bytes of tensor data, and the shard of each tensor."""
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json_text(index)

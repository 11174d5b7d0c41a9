"""Jobs to shards: the base's own, or new ones of a given size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dora_convert.core.bundle import json_text
from dora_convert.core.plan import Job, Shard
from dora_convert.core.tensors import stored_name
from dora_convert.planning.merge import Outputs

__all__ = ["indexes", "own_shards", "sized_shards"]

_SUFFIX = ".safetensors"
_MODEL = "model"
# What diffusers calls the weights of one model, those of a variant (fp16) included.
_DIFFUSERS = re.compile(r"(?P<stem>diffusion_pytorch_model(?:\.\w+)?)(?:-\d+-of-\d+)?\.\w+")


def own_shards(
    outputs: Outputs, shards: Mapping[str, str], *, keep_name: bool = False
) -> tuple[Shard, ...]:
    """The files of the base, each with the tensors that it had; new tensors beside their kin.

    A single file is called as transformers or diffusers look for it, unless it is to `keep_name`.
    """
    files: dict[str, list[Job]] = {file: [] for file in sorted(set(shards.values()))}
    for name, job in outputs.jobs.items():
        files[shards[outputs.beside.get(name, name)]].append(job)
    kept = {file: jobs for file, jobs in files.items() if jobs}
    if len(kept) == 1:
        ((file, jobs),) = kept.items()
        name = _safetensors_name(file) if keep_name else _stem(file) + _SUFFIX
        return (Shard(name, tuple(jobs)),)
    if len(kept) < len(files):
        return _numbered(list(kept.values()), _stem(next(iter(kept))))
    return tuple(Shard(_safetensors_name(file), tuple(jobs)) for file, jobs in kept.items())


def sized_shards(outputs: Outputs, limit: int, shards: Mapping[str, str]) -> tuple[Shard, ...]:
    """Files of at most `limit` bytes of tensor data, or of one tensor that is larger.

    The models of a pipeline, in folders of their own in `shards`, share none.
    """
    by_stem: dict[str, list[Job]] = {}
    for name, job in outputs.jobs.items():
        file = shards.get(outputs.beside.get(name, name), "")
        by_stem.setdefault(_stem(file), []).append(job)
    return tuple(
        shard for stem, jobs in by_stem.items() for shard in _numbered(_grouped(jobs, limit), stem)
    )


def _grouped(jobs: Iterable[Job], limit: int) -> list[list[Job]]:
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        nbytes = job.nbytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += nbytes
    return groups


def _numbered(groups: Sequence[Sequence[Job]], stem: str) -> tuple[Shard, ...]:
    total = len(groups)
    if total == 1:
        return (Shard(stem + _SUFFIX, tuple(groups[0])),)
    return tuple(
        Shard(f"{stem}-{i:05d}-of-{total:05d}{_SUFFIX}", tuple(jobs))
        for i, jobs in enumerate(groups, 1)
    )


def _stem(file: str) -> str:
    """Folder and name, less number and suffix, of the files that take the place of this one."""
    folder, slash, name = file.rpartition("/")
    found = _DIFFUSERS.fullmatch(name)
    return folder + slash + (found["stem"] if found else _MODEL)


def _safetensors_name(file: str) -> str:
    name = re.sub(r"\.(bin|gguf|pt|pth)$", _SUFFIX, file)
    return re.sub(r"^pytorch_model(?=[-.])", _MODEL, name)


def indexes(shards: Sequence[Shard]) -> dict[str, str]:
    """`model.safetensors.index.json` of every folder with several shards, by its path.

    It has the total bytes of tensor data, and the shard of each tensor.
    """
    by_stem: dict[str, list[Shard]] = {}
    for shard in shards:
        by_stem.setdefault(_stem(shard.file), []).append(shard)
    return {
        f"{stem}{_SUFFIX}.index.json": _index(found)
        for stem, found in by_stem.items()
        if len(found) > 1
    }


def _index(shards: Sequence[Shard]) -> str:
    weight_map = {
        stored_name(spec.name): shard.file.rpartition("/")[2]
        for shard in shards
        for spec in shard.specs
    }
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json_text(index)

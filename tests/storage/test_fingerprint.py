"""What an interrupted run must have in common with the one that goes on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.core.plan import CarriedFile, Copy, Job, Plan, Shard, WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.storage.fingerprint import Fingerprint, difference, fingerprint, inputs_of
from dora_convert.storage.header import read_header

VERSIONS = {"dora-convert": "1.0", "torch": "2.10"}
OPTIONS = {"dtype": DType.BF16, "keep_dense": ("a", "b"), "scale": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "base"
    place.mkdir()
    save_file({"w": torch.ones(2, 3), "v": torch.zeros(3)}, place / "model.safetensors")
    (place / "tokenizer.json").write_text("{}")
    return place


def plan_of(folder: Path, text: str = "{}") -> Plan:
    refs = read_header(folder / "model.safetensors")
    jobs = tuple(Job(Copy(ref), ref.spec) for ref in refs.values())
    carried = CarriedFile("tokenizer.json", folder / "tokenizer.json")
    return Plan((Shard("a.safetensors", jobs),), (carried, WrittenFile("config.json", text)))


def mark(plan: Plan, **changes: object) -> Fingerprint:
    found, _ = fingerprint(plan, versions=VERSIONS, options={**OPTIONS, **changes})
    read: Fingerprint = json.loads(json.dumps(found))
    assert read == found  # as a journal gives it back
    return found


def test_equal(folder: Path) -> None:
    plan = plan_of(folder)
    assert mark(plan) == mark(plan_of(folder))
    assert mark(replace(plan, notes=("said",))) == mark(plan)
    moved = folder.rename(folder.with_name("moved"))
    assert mark(plan_of(moved)) == mark(plan_of(Path(os.path.relpath(moved)))) != {}


def test_differences(folder: Path) -> None:
    plan = plan_of(folder)
    was = mark(plan)
    newer, _ = fingerprint(plan, versions=VERSIONS | {"torch": "2.11"}, options=OPTIONS)
    assert difference(was, newer) == "torch was 2.10, now it is 2.11"
    assert difference(was, mark(plan, dtype=None)) == "--dtype was bf16, now it is not given"
    assert difference(was, mark(plan, scale=2.0)) == "--scale was not given, now it is 2.0"
    assert difference(was, mark(plan, keep_dense=["a"])) == (
        '--keep-dense was ["a", "b"], now it is ["a"]'
    )
    assert difference(was, mark(plan_of(folder, "other"))) == "what it would write is not the same"
    fewer = replace(plan, documents=plan.documents[1:])
    assert difference(was, mark(fewer)) == "tokenizer.json was among its inputs"
    assert difference(mark(fewer), was) == "tokenizer.json is a new input"


def test_header_that_was_changed_behind_its_time(folder: Path) -> None:
    file = folder / "model.safetensors"
    before, was = file.stat(), mark(plan_of(folder))
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"v"', b'"u"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert "model.safetensors was changed" in difference(was, mark(plan_of(folder)))


def test_commit_of_the_hub(folder: Path) -> None:
    """It names the contents: the same when they were fetched once more."""
    commit = folder.parent / "models--org--name" / "snapshots" / ("0123456789" * 4)
    commit.parent.mkdir(parents=True)
    folder.rename(commit)
    plan = plan_of(commit)
    was, inputs = fingerprint(plan, versions=VERSIONS, options=OPTIONS)
    assert was["inputs"]["tokenizer.json"] == ["org/name@" + "0123456789" * 4]
    for file in commit.iterdir():
        os.utime(file, (1, 1))
    assert mark(plan_of(commit)) == was
    inputs.require_unchanged()


@pytest.mark.parametrize("how", ["longer", "later"])
def test_unchanged(folder: Path, how: str) -> None:
    inputs = inputs_of(plan_of(folder))
    inputs.require_unchanged()
    file = folder / "tokenizer.json"
    stat = file.stat()
    if how == "longer":
        file.write_text("{ }")
        os.utime(file, ns=(0, stat.st_mtime_ns))
    else:
        os.utime(file, ns=(0, stat.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"tokenizer\.json was changed while it was read"):
        inputs.require_unchanged()

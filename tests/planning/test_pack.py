from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dora_convert import api
from dora_convert.core.plan import Copy, Job, Plan, WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.planning.merge import Outputs
from dora_convert.planning.pack import indexes, own_shards, sized_shards
from dora_convert.planning.planner import plan_merge

from ..core.values import adapter, checkpoint, dora, ref

INDEX = "model.safetensors.index.json"


def outputs(sizes: dict[str, int], beside: dict[str, str] | None = None) -> Outputs:
    """Bytes by name."""
    refs = {name: ref(name, size, dtype=DType.I8) for name, size in sizes.items()}
    return Outputs({n: Job(Copy(r), r.spec) for n, r in refs.items()}, beside or {})


def contents(shards: object) -> dict[str, list[str]]:
    assert isinstance(shards, tuple)
    return {shard.file: [spec.name for spec in shard.specs] for shard in shards}


def test_own_shards() -> None:
    places = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
    }
    found = own_shards(outputs({"a": 1, "b": 1, "c": 1, "new": 1}, {"new": "b"}), places)
    assert contents(found) == {
        "model-00001-of-00002.safetensors": ["a", "c"],
        "model-00002-of-00002.safetensors": ["b", "new"],
    }


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors", "pytorch_model.bin"])
def test_a_single_file_has_the_usual_name(file: str) -> None:
    assert contents(own_shards(outputs({"a": 1}), {"a": file})) == {"model.safetensors": ["a"]}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("model-00001-of-00002.pt", "model-00001-of-00002.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("my_pytorch_model-1.safetensors", "my_pytorch_model-1.safetensors"),
    ],
)
def test_pickles_get_safetensors_names(file: str, expected: str) -> None:
    found = own_shards(outputs({"a": 1, "b": 1}), {"a": file, "b": "z.safetensors"})
    assert contents(found) == {expected: ["a"], "z.safetensors": ["b"]}


def test_a_shard_that_became_empty_is_not_written() -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = own_shards(outputs({"a": 1, "b": 1}), {"a": names[0], "b": names[1], "gone": names[2]})
    assert contents(found) == {
        "model-00001-of-00002.safetensors": ["a"],
        "model-00002-of-00002.safetensors": ["b"],
    }


def test_sized_shards() -> None:
    found = sized_shards(outputs({"a": 4, "b": 4, "c": 3, "huge": 30, "d": 1}), 8, {})
    assert contents(found) == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["huge"],
        "model-00004-of-00004.safetensors": ["d"],
    }
    assert contents(sized_shards(outputs({"a": 4, "b": 4}), 8, {})) == {
        "model.safetensors": ["a", "b"]
    }


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_sized_shards_keep_the_limit_and_the_order(sizes: list[int], limit: int) -> None:
    names = {f"t{i:02}": size for i, size in enumerate(sizes)}
    shards = sized_shards(outputs(names), limit, {})
    assert [spec.name for shard in shards for spec in shard.specs] == list(names)
    assert all(shard.nbytes <= limit or len(shard.jobs) == 1 for shard in shards)
    for before, after in itertools.pairwise(shards):
        assert before.nbytes + after.jobs[0].output.nbytes > limit
    assert len({shard.file for shard in shards}) == len(shards)


def test_index() -> None:
    shards = sized_shards(outputs({"b": 5, "a": 7, "c": 2}), 7, {})
    assert json.loads(indexes(shards)[INDEX]) == {
        "metadata": {"total_size": 14},
        "weight_map": {
            "a": "model-00002-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
        },
    }


IMAGES = {
    "unet::a": "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet::b": "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae::a": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder::a": "text_encoder/pytorch_model.safetensors",
}


def test_models_of_a_pipeline_share_no_file() -> None:
    found = outputs(dict.fromkeys(IMAGES, 4))
    own = own_shards(found, IMAGES)
    assert {spec.name: shard.file for shard in own for spec in shard.specs} == IMAGES
    assert indexes(own) == {}
    sized = sized_shards(found, 4, IMAGES)
    assert contents(sized) == {
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": ["unet::a"],
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors": ["unet::b"],
        "vae/diffusion_pytorch_model.safetensors": ["vae::a"],
        "text_encoder/model.safetensors": ["text_encoder::a"],
    }
    ((name, text),) = indexes(sized).items()
    assert name == "unet/diffusion_pytorch_model.fp16.safetensors.index.json"
    assert json.loads(text)["weight_map"] == {
        "a": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    "file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors"]
)
def test_one_model_of_diffusers_keeps_its_name(file: str) -> None:
    assert contents(own_shards(outputs({"a": 1}), {"a": file})) == {file: ["a"]}


def test_a_file_that_no_config_says_how_to_load_keeps_its_name() -> None:
    found = own_shards(outputs({"a": 1}), {"a": "flux1-dev.safetensors"}, keep_name=True)
    assert contents(found) == {"flux1-dev.safetensors": ["a"]}


def plan(limit: int | None) -> Plan:
    base = checkpoint({"a.weight": (4, 4), "b.weight": (4, 4)}, dtype=DType.BF16)
    return plan_merge(adapter(dora("a", 4, 4)), base, max_shard_size=limit).plan


def test_an_index_only_where_there_are_several() -> None:
    assert INDEX not in [document.name for document in plan(None).documents]
    (index,) = [d for d in plan(32).documents if d.name == INDEX]
    assert isinstance(index, WrittenFile)
    assert json.loads(index.text)["metadata"]["total_size"] == plan(32).nbytes == 64


@pytest.mark.parametrize("limit", [None, 300])
def test_what_is_on_disk_is_what_was_planned(limit: int | None, tmp_path: Path) -> None:
    """Sizes, names and index, against files of a pickled base in two shards."""
    base, adapted = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapted.mkdir()
    tensors = {f"{n}.weight": torch.randn(8, 8).half() for n in "abc"}
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({k: tensors[k] for k in ("a.weight", "b.weight")}, base / files[0])
    torch.save({"c.weight": tensors["c.weight"]}, base / files[1])
    places = {"a.weight": files[0], "b.weight": files[0], "c.weight": files[1]}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    trained = {
        "b.lora_A.weight": torch.randn(2, 8),
        "b.lora_B.weight": torch.randn(8, 2),
        "b.lora_magnitude_vector": torch.rand(8) + 1,
    }
    save_file(trained, adapted / "adapter_model.safetensors")
    (adapted / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "use_dora": true}')
    out = tmp_path / "out"
    api.merge(
        adapted,
        out,
        base=base,
        options=api.ReadOptions(allow_pickle=True),
        how=api.MergeOptions(max_shard_size=limit, samples=None),
    )
    index = json.loads((out / INDEX).read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        data = (out / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        assert header.keys() == {n for n, f in index["weight_map"].items() if f == file}
        total += len(data) - 8 - length
    assert index["metadata"]["total_size"] == total == 3 * 8 * 8 * 2
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from dora_convert.core.tensors import Pickled
from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import open_checkpoint

from .conftest import INDEX, ONE, THREE, TWO, faults

Make: TypeAlias = Callable[..., Path]

# ------------------------------------------------------------------------------- which files


def test_indexed(sharded: Path, save: Make) -> None:
    save("consolidated.safetensors", "z")
    save("extra.safetensors", "a")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.root == sharded
    assert checkpoint.shards == {"a": ONE, "b": ONE, "c": TWO, "d": THREE}
    assert set(checkpoint.tensors) == {"a", "b", "c", "d"}
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.files == ("config.json",)
    assert open_checkpoint(sharded / INDEX).shards == checkpoint.shards


def test_index_of_another_name(tmp_path: Path, save: Make, write: Make) -> None:
    save("net.safetensors", "a")
    save("consolidated-1.safetensors", "b")
    write("net.safetensors.index.json", {"weight_map": {"a": "net.safetensors"}})
    write("adapter_model.safetensors.index.json", {"weight_map": {"z": "z.safetensors"}})
    write(
        "consolidated.safetensors.index.json", {"weight_map": {"b": "consolidated-1.safetensors"}}
    )
    assert open_checkpoint(tmp_path).shards == {"a": "net.safetensors"}
    write("net.fp16.safetensors.index.json", {"weight_map": {"a": "net.safetensors"}})
    assert faults(tmp_path) == ["net.fp16.safetensors.index.json", "net.safetensors.index.json"]


def test_a_plain_model_comes_before_a_foreign_index(
    tmp_path: Path, save: Make, write: Make
) -> None:
    save("consolidated-1.safetensors", "b")
    write(
        "consolidated.safetensors.index.json", {"weight_map": {"b": "consolidated-1.safetensors"}}
    )
    assert open_checkpoint(tmp_path).shards == {"b": "consolidated-1.safetensors"}
    save("weights.safetensors", "c")
    assert open_checkpoint(tmp_path).shards == {"c": "weights.safetensors"}
    save("model.safetensors", "a")
    assert open_checkpoint(tmp_path).shards == {"a": "model.safetensors"}


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ("model.safetensors model-00001-of-00001.safetensors x.safetensors", "model.safetensors"),
        (f"{ONE} {TWO} {THREE} x.safetensors consolidated.safetensors", f"{ONE} {TWO} {THREE}"),
        ("model-00001-of-00001.safetensors x.safetensors", "model-00001-of-00001.safetensors"),
        (
            "x.safetensors y.safetensors consolidated.safetensors adapter_model.safetensors "
            "adapters.safetensors ._x.safetensors",
            "x.safetensors y.safetensors",
        ),
        ("consolidated.safetensors adapter_model.safetensors", "consolidated.safetensors"),
        (
            "consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors",
            "consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors",
        ),
    ],
)
def test_unindexed(tmp_path: Path, save: Make, present: str, chosen: str) -> None:
    for file in present.split():
        save(file, f"in {file}")
    shards = open_checkpoint(tmp_path).shards
    assert sorted(shards.values()) == chosen.split()


@pytest.mark.parametrize(
    ("present", "fault"),
    [
        (f"{ONE} {THREE}", f"1 of 3 shards are missing: {TWO}"),
        (TWO, f"2 of 3 shards are missing: {ONE}, {THREE}"),
        (
            "m-00011-of-00020.safetensors",
            "19 of 20 shards are missing: "
            + ", ".join(f"m-{i:05}-of-00020.safetensors" for i in range(1, 9))
            + " and 11 more",
        ),
        (
            "m-00001-of-00001.safetensors m-00002-of-00001.safetensors",
            "m-00002-of-00001.safetensors has a number that does not exist in a set of 1",
        ),
        (
            "m-00000-of-00000.safetensors",
            "m-00000-of-00000.safetensors has a number that does not exist in a set of 0",
        ),
        ("m-00001-of-00001.safetensors n-00002-of-00002.safetensors", "1 of 2 shards are missing"),
        ("consolidated-00001-of-00002.safetensors", "1 of 2 shards are missing"),
    ],
)
def test_incomplete(tmp_path: Path, save: Make, present: str, fault: str) -> None:
    for file in present.split():
        save(file, f"in {file}")
    (found,) = faults(tmp_path)
    assert found.startswith(fault)


def test_one_shard_given_as_a_file(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded / ONE)
    assert checkpoint.shards == {"a": ONE, "b": ONE}
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.root == sharded
    assert checkpoint.files == ()


def test_config_may_be_absent(tmp_path: Path, save: Make) -> None:
    save("model.safetensors")
    assert open_checkpoint(tmp_path).config == {}


@pytest.mark.parametrize(
    ("files", "what", "hint"),
    [
        ([], "it holds nothing", "A base model is"),
        (["a.txt", "sub/x"], "it holds a.txt, sub/", "A base model is"),
        (["adapter_model.safetensors"], "it holds adapter_model.safetensors", "This is an adapter"),
        (["pytorch_model_optim.bin"], "it holds pytorch_model_optim.bin", "A base model is"),
    ],
)
def test_no_model(tmp_path: Path, write: Make, files: list[str], what: str, hint: str) -> None:
    for file in files:
        write(file, "")
    with pytest.raises(InputError, match="there is no base model in") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.what.endswith(what)
    assert caught.value.hint.startswith(hint)


def test_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no base model at org/name") as caught:
        open_checkpoint(Path("org/name"))
    assert "hf download org/name" in caught.value.hint


def test_other_file(write: Make) -> None:
    with pytest.raises(InputError, match=r"m\.onnx is neither a safetensors nor a GGUF file"):
        open_checkpoint(write("m.onnx", "ONNX"))


# ---------------------------------------------------------------------------------- pickles


def test_pickles(tmp_path: Path, write: Make) -> None:
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for i, file in enumerate(files):
        torch.save({f"t{i}": torch.ones(2)}, tmp_path / file)
    expected = {"t0": files[0], "t1": files[1]}
    assert "a pickle" in faults(tmp_path)[0]
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.shards == expected
    assert checkpoint.tensors["t0"].source == Pickled(tmp_path / files[0], "t0")
    write("pytorch_model.bin.index.json", {"weight_map": expected})
    assert "a pickle" in faults(tmp_path)[0]
    assert open_checkpoint(tmp_path, allow_pickle=True).shards == expected
    (tmp_path / files[1]).unlink()
    index = "pytorch_model.bin.index.json"
    assert faults(tmp_path, allow_pickle=True) == [
        f'{index} names "{files[1]}", which is not there'
    ]
    (tmp_path / index).unlink()
    assert faults(tmp_path, allow_pickle=True) == [f"1 of 2 shards are missing: {files[1]}"]


def test_single_pickle(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file)
    torch.save({"b": torch.ones(2)}, tmp_path / "training_args.bin")
    for path in (tmp_path, file):
        with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle") as caught:
            open_checkpoint(path)
        assert "--allow-pickle" in caught.value.hint
        checkpoint = open_checkpoint(path, allow_pickle=True)
        assert checkpoint.shards == {"a": "pytorch_model.bin"}


def test_an_index_of_safetensors_names_no_pickle(tmp_path: Path, write: Make) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    write(INDEX, {"weight_map": {"a": "m.bin"}})
    fault = f'{INDEX} names "m.bin", which is not a .safetensors file'
    assert faults(tmp_path, allow_pickle=True) == [fault]


# ------------------------------------------------------------------------ what is carried along


def test_carried_files(tmp_path: Path, save: Make, write: Make) -> None:
    save("in/model.safetensors")
    carried = [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "modules.json",
        "sub/deep/vocab.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]
    left = [
        "README.md",
        ".gitattributes",
        ".git/config",
        ".cache/huggingface/x.json",
        "adapter_config.json",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "m.gguf",
        "x.pt",
        "x.pth",
        "x.ckpt",
        "m.onnx",
        "m.onnx_data",
        "m.mlmodel",
        "m.tflite",
        "m.npz",
        "0.distcp",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors.index.json.bak.safetensors",
        "onnx/config.json",
        "openvino/x.xml",
        "original/params.json",
        "coreml/x/Manifest.json",
    ]
    for file in carried + left:
        write("in/" + file, "{}")
    write("secret", "{}")
    (tmp_path / "in/leak.json").symlink_to("../secret")
    (tmp_path / "in/dangling.json").symlink_to("nowhere")
    (tmp_path / "in/linked").symlink_to("..")
    (tmp_path / "in/alias.json").symlink_to("config.json")
    os.mkfifo(tmp_path / "in/pipe")
    files = open_checkpoint(tmp_path / "in").files
    assert files == tuple(sorted([*carried, "alias.json"]))


def test_the_kind_of_a_model_must_be_text(tmp_path: Path, save: Make, write: Make) -> None:
    save("model.safetensors")
    write(
        "config.json",
        {
            "model_type": ["llama"],
            "architectures": "LlamaForCausalLM",
            "text_config": {"model_type": 3, "inner": {"architectures": [None]}},
            "vision_config": None,
        },
    )
    assert faults(tmp_path) == [
        "config.json: 'model_type' must be a string, not ['llama']",
        "config.json: 'architectures' must be a list of strings",
        "config.json, \"text_config\": 'model_type' must be a string, not 3",
        'config.json, "text_config", "inner": \'architectures\' must be a list of strings, '
        "not [None]",
    ]

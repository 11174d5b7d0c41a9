"""Which files are asked for, by listings as the Hub has them."""

from __future__ import annotations

import pytest

from dora_convert.errors import InputError
from dora_convert.storage.selection import adapter_files, base_files

TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"]
LEFT = [".gitattributes", "README.md", "tf_model.h5", "onnx/model.onnx", "original/x.pth"]
BASES = {
    "one file": (["model.safetensors"], ["pytorch_model.bin", "consolidated.safetensors"]),
    "shards": (
        [
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ],
        ["consolidated.safetensors", "consolidated.safetensors.index.json", "pytorch_model.bin"],
    ),
    "pickles": (
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
        ["training_args.bin", "optimizer.pt"],
    ),
    "another name": (["weights.safetensors"], ["adapter_model.safetensors"]),
    "sentence-transformers": (
        ["model.safetensors", "2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"],
        ["openvino/openvino_model.bin"],
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_bases(name: str) -> None:
    needed, others = BASES[name]
    assert base_files([*needed, *others, *TEXTS, *LEFT]) == sorted([*needed, *TEXTS])


GGUFS = ["model-Q4_K.gguf", "model-Q8_0-00001-of-00002.gguf", "model-Q8_0-00002-of-00002.gguf"]


def test_a_gguf_base() -> None:
    """Where there is nothing else, and just one: each of them may be the size of a disk."""
    assert base_files([GGUFS[0], *TEXTS, *LEFT]) == sorted([GGUFS[0], *TEXTS])
    assert base_files([*GGUFS[1:], *TEXTS]) == sorted([*GGUFS[1:], *TEXTS])
    assert base_files([*GGUFS, *TEXTS, "model.safetensors"]) == sorted(
        ["model.safetensors", *TEXTS]
    )
    with pytest.raises(InputError, match="3 GGUF files may be the base model") as caught:
        base_files([*GGUFS, *TEXTS])
    assert caught.value.problems == tuple(GGUFS)
    assert "hf://ORG/NAME/FILE.gguf" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "also"), [(GGUFS[0], []), (GGUFS[1], GGUFS[2:]), (GGUFS[2], GGUFS[1:2])]
)
def test_a_gguf_file_comes_with_its_parts_and_documents(file: str, also: list[str]) -> None:
    beside = [*GGUFS, *TEXTS, ".gitattributes", "README.md"]
    assert base_files(beside, file=file) == sorted([file, *also, *TEXTS])


def test_a_file_comes_with_its_documents() -> None:
    beside = ["a.safetensors", "b.safetensors", "adapter_config.json", "README.md", "x.gguf"]
    assert adapter_files(beside, file="a.safetensors") == ["a.safetensors", "adapter_config.json"]


ADAPTERS = {
    "peft": (
        ["adapter_model.safetensors", "adapter_config.json"],
        ["adapter_model.bin", "optimizer.pt", "checkpoint-5/adapter_model.safetensors"],
    ),
    "peft, sharded": (
        ["adapter_model.safetensors.index.json", "adapter_model-00001-of-00002.safetensors"],
        ["other.safetensors"],
    ),
    "mlx": (["adapters.safetensors", "adapter_config.json"], ["0000100_adapters.safetensors"]),
    "pickled": (
        ["adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"],
        ["training_args.bin"],
    ),
    "diffusers": (["pytorch_lora_weights.safetensors"], []),
    "named freely": (["a.safetensors", "b.safetensors"], ["a.bin"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    needed, others = ADAPTERS[name]
    found = adapter_files([*needed, *others, "tokenizer.json", *LEFT])
    assert found == sorted([*needed, "tokenizer.json"])


def test_files_of_a_described_adapter() -> None:
    names = ["x_1.pt", "x_2.pt", "adapter_model.safetensors", "y.pt", "my_config.json"]
    assert adapter_files(names, ["x_*.pt"]) == ["my_config.json", "x_1.pt", "x_2.pt"]


def test_nothing() -> None:
    assert adapter_files([]) == base_files([]) == []

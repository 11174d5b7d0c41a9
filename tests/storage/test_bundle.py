from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.core.tensors import Pickled, Slice
from dora_convert.errors import InputError
from dora_convert.storage.bundle import open_bundle

Make: TypeAlias = Callable[..., Path]


def test_folder(tmp_path: Path, save: Make, write: Make) -> None:
    file = save("adapter_model.safetensors", "a", "b")
    save("other.safetensors", "c")
    write("adapter_config.json", {"r": 8})
    write("preprocessor_config.json", {"x": 1})
    write("broken_config.json", "{")
    write("large_config.json", '{"a": "' + "x" * (1 << 20) + '"}')
    write("tokenizer.json", {"y": 1})
    bundle = open_bundle(tmp_path)
    assert bundle.root == tmp_path
    assert sorted(bundle.tensors) == ["a", "b"]
    assert bundle.documents == {
        "adapter_config.json": {"r": 8},
        "preprocessor_config.json": {"x": 1},
    }
    source = bundle.tensors["a"].source
    assert isinstance(source, Slice)
    assert source.file == file


@pytest.mark.parametrize(
    "name", ["adapters.safetensors", "pytorch_lora_weights.safetensors"]
)  # mlx-lm, diffusers
def test_names_of_other_programs(tmp_path: Path, save: Make, name: str) -> None:
    save(name, "a")
    save("0000100_adapters.safetensors", "b")
    assert list(open_bundle(tmp_path).tensors) == ["a"]


def test_single_safetensors_file_in_a_folder(tmp_path: Path, save: Make) -> None:
    save("my_lora.safetensors", "a")
    assert list(open_bundle(tmp_path).tensors) == ["a"]
    save("my_other.safetensors", "b")
    with pytest.raises(InputError, match=r"2 files in .* may be the adapter") as caught:
        open_bundle(tmp_path)
    assert caught.value.problems == ("my_lora.safetensors", "my_other.safetensors")


def test_file(save: Make, write: Make) -> None:
    file = save("x/lora.safetensors", "a")
    save("x/adapter_model.safetensors", "b")
    write("x/adapter_config.json", {"r": 8})
    bundle = open_bundle(file)
    assert list(bundle.tensors) == ["a"]
    assert bundle.root == file.parent
    assert bundle.documents == {"adapter_config.json": {"r": 8}}


def test_pickle(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.ones(2)}, file)
    for path in (tmp_path, file):
        with pytest.raises(InputError, match=r"in adapter_model\.bin, a pickle") as caught:
            open_bundle(path)
        assert "--allow-pickle" in caught.value.hint
        bundle = open_bundle(path, allow_pickle=True)
        assert bundle.tensors["a"].source == Pickled(file, "a")


def test_safetensors_come_before_a_pickle(tmp_path: Path, save: Make) -> None:
    torch.save({"b": torch.ones(2)}, tmp_path / "adapter_model.bin")
    save("adapter_model.safetensors", "a")
    assert list(open_bundle(tmp_path, allow_pickle=True).tensors) == ["a"]


def test_second_file_of_llava(tmp_path: Path) -> None:
    """Its trainer saves the magnitudes beside the adapter."""
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "non_lora_trainables.bin")
    assert sorted(open_bundle(tmp_path, allow_pickle=True).tensors) == ["a", "b"]
    file = tmp_path / "adapter_model.bin"
    assert sorted(open_bundle(file, allow_pickle=True).tensors) == ["a"]
    torch.save({"a": torch.ones(2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(InputError) as caught:
        open_bundle(tmp_path, allow_pickle=True)
    assert caught.value.problems == ('adapter_model.bin and non_lora_trainables.bin both hold "a"',)


def test_files_that_are_asked_for(tmp_path: Path, save: Make, write: Make) -> None:
    save("adapter_model.safetensors", "a")
    save("x_1.safetensors", "b")
    save("x_2.safetensors", "c")
    write("settings.json", {"r": 8})
    write("other.json", {"r": 9})
    found = open_bundle(tmp_path, files=["x_*.safetensors", "y"], config="settings.json")
    assert sorted(found.tensors) == ["b", "c"]
    assert found.documents == {"settings.json": {"r": 8}}
    assert list(open_bundle(tmp_path / "x_1.safetensors", files=["y"]).tensors) == ["b"]
    with pytest.raises(InputError, match=r"no file in .* is called y or z: it holds adapter_model"):
        open_bundle(tmp_path, files=["y", "z"])
    write("settings.json", "{")
    with pytest.raises(InputError, match=r"settings\.json is not valid JSON"):
        open_bundle(tmp_path, files=["x_1*"], config="settings.json")
    with pytest.raises(InputError, match="neither a safetensors file nor a torch pickle"):
        open_bundle(tmp_path, files=["other.json"])


def test_pickle_that_is_asked_for(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "mine.pth")
    with pytest.raises(InputError, match=r"in mine\.pth, a pickle"):
        open_bundle(tmp_path, files=["*.pth"])
    assert list(open_bundle(tmp_path, files=["*.pth"], allow_pickle=True).tensors) == ["a"]


def test_values_of_tensors_with_one_number(tmp_path: Path) -> None:
    """Of all element types that a module's alpha may have; what is not finite has none."""
    values = {
        "f32": torch.tensor(16.5),
        "f64": torch.tensor([0.1], dtype=torch.float64),
        "f16": torch.tensor([[2.5]], dtype=torch.float16),
        "bf16": torch.tensor(-3.0, dtype=torch.bfloat16),
        "i64": torch.tensor(8),
        "i32": torch.tensor(7, dtype=torch.int32),
        "u8": torch.tensor(8, dtype=torch.uint8),
        "nan": torch.tensor(float("nan")),
        "inf": torch.tensor(float("inf"), dtype=torch.bfloat16),
        "two": torch.ones(2),
        "none": torch.ones(0),
    }
    others = ("u8", "nan", "inf", "two", "none")
    expected = {n: t.item() for n, t in values.items() if n not in others}
    save_file(values, tmp_path / "adapter_model.safetensors")
    assert open_bundle(tmp_path).scalars == expected
    torch.save(values | {"c64": torch.tensor(1j)}, tmp_path / "a.pt")
    assert open_bundle(tmp_path / "a.pt", allow_pickle=True).scalars == expected | {"u8": 8.0}


def test_sharded(tmp_path: Path, save: Make, write: Make) -> None:
    save("adapter_model-00001-of-00002.safetensors", "a")
    save("adapter_model-00002-of-00002.safetensors", "b")
    index = "adapter_model.safetensors.index.json"
    shards = {
        "a": "adapter_model-00001-of-00002.safetensors",
        "b": "adapter_model-00002-of-00002.safetensors",
    }
    write(index, {"metadata": {"total_size": 48}, "weight_map": shards})
    assert sorted(open_bundle(tmp_path).tensors) == ["a", "b"]
    assert sorted(open_bundle(tmp_path / index).tensors) == ["a", "b"]
    write(index, {"weight_map": {**shards, "c": "../c.safetensors"}})
    with pytest.raises(InputError) as caught:
        open_bundle(tmp_path)
    assert caught.value.problems == (
        f'{index} names "../c.safetensors", which is not a plain file name',
    )


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "it holds nothing"),
        (["README.md", "checkpoint-5/x"], "it holds README.md, checkpoint-5/"),
        ([f"f{i}" for i in range(12)], "it holds f0, f1, f10, f11, f2, f3, f4, f5 and 4 more"),
    ],
)
def test_no_adapter(tmp_path: Path, write: Make, files: list[str], found: str) -> None:
    for file in files:
        write(file, "")
    with pytest.raises(InputError, match="there is no adapter in") as caught:
        open_bundle(tmp_path)
    assert caught.value.what.endswith(found)


def test_broken_config(tmp_path: Path, save: Make, write: Make) -> None:
    save("adapter_model.safetensors")
    write("adapter_config.json", "{")
    with pytest.raises(InputError, match=r"adapter_config\.json is not valid JSON"):
        open_bundle(tmp_path)


def test_all_faults_at_once(tmp_path: Path, write: Make) -> None:
    write("adapter_model.safetensors", "{}")
    write("adapter_config.json", "{")
    with pytest.raises(InputError, match="2 things are wrong with the files in") as caught:
        open_bundle(tmp_path)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("org/name", "Download it first: hf download org/name --local-dir name"),
        ("org/na.me-2", "Download it first: hf download org/na.me-2 --local-dir na.me-2"),
        ("name", ""),
        ("./org/name", "Download it first: hf download org/name --local-dir name"),
        ("../org/name", ""),
        ("../name", ""),
        ("a/b/c", ""),
        ("/org/name", ""),
        ("a\0b", ""),
    ],
)
def test_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no adapter at") as caught:
        open_bundle(Path(name))
    assert caught.value.hint == hint


def test_other_file(write: Make) -> None:
    with pytest.raises(InputError, match=r"x\.gguf is neither a safetensors file nor"):
        open_bundle(write("x.gguf", "GGUF"))


def test_links_out_of_the_folder(tmp_path: Path, save: Make, write: Make) -> None:
    secret = write("secret/any.json", {"password": "x"})
    save("in/adapter_model.safetensors")
    (tmp_path / "in/other_config.json").symlink_to(secret)
    assert open_bundle(tmp_path / "in").documents == {}
    (tmp_path / "in/adapter_config.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"adapter_config\.json is a link to a file outside"):
        open_bundle(tmp_path / "in")


def test_hub_cache(tmp_path: Path, save: Make, write: Make) -> None:
    repo = "hub/models--org--name"
    save(f"{repo}/blobs/aaaa")
    write(f"{repo}/blobs/bbbb", {"r": 8})
    snapshot = tmp_path / repo / "snapshots" / "f00"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/aaaa")
    (snapshot / "adapter_config.json").symlink_to("../../blobs/bbbb")
    bundle = open_bundle(snapshot)
    assert list(bundle.tensors) == ["w"]
    assert bundle.documents == {"adapter_config.json": {"r": 8}}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path, save: Make) -> None:
    file = save("adapter_model.safetensors")
    file.chmod(0)
    with pytest.raises(InputError, match="permission is denied"):
        open_bundle(tmp_path)


def test_a_checkpoint_of_megatron(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(InputError, match="torch-dist checkpoint") as caught:
        open_bundle(tmp_path)
    assert "gathered" in caught.value.hint

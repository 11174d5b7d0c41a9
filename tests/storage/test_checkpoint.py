from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from dora_convert.core.tensors import Pickled
from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import open_checkpoint

Make: TypeAlias = Callable[..., Path]

INDEX = "model.safetensors.index.json"
ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


@pytest.fixture
def sharded(tmp_path: Path, save: Make, write: Make) -> Path:
    save(ONE, "a", "b")
    save(TWO, "c")
    save(THREE, "d")
    write(INDEX, {"metadata": {}, "weight_map": {"a": ONE, "b": ONE, "c": TWO, "d": THREE}})
    write("config.json", {"model_type": "llama"})
    return tmp_path


def faults(path: Path, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, **options)
    error = caught.value
    assert error.where
    return list(error.problems) or [error.what]


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
        (["m.gguf", "README.md"], "it holds README.md, m.gguf", "GGUF"),
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
    with pytest.raises(InputError, match=r"m\.gguf is neither a safetensors file nor"):
        open_checkpoint(write("m.gguf", "GGUF"))


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


# ------------------------------------------------------------------------------ the index lies


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ("{", "is not valid JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', 'gives the key "a" twice'),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}}', "names no tensor"),
    ],
)
def test_unusable_index(tmp_path: Path, write: Make, index: str, what: str) -> None:
    write(INDEX, index)
    assert what in faults(tmp_path)[0]


def test_all_faults_are_told_at_once(sharded: Path, save: Make, write: Make) -> None:
    (sharded / THREE).unlink()
    save(TWO, "b", "e")
    save("odd.safetensors", "f")
    write("odd.safetensors", "{}")
    places = {"a": ONE, "b": ONE, "c": TWO, "d": THREE, "f": "odd.safetensors"}
    write(INDEX, {"weight_map": places})
    write("config.json", "[]")
    found = faults(sharded)
    assert found[0].startswith("odd.safetensors is too short")
    assert found[1:] == [
        f'{ONE} and {TWO} both hold "b"',
        f'{INDEX} names "{THREE}", which is not there',
        f'{TWO} does not hold what {INDEX} says it does: "c"',
        f'{INDEX} is stale: {TWO} holds tensors it does not name there: "b", "e"',
        "config.json must hold a JSON object",
    ]


def test_tensor_in_another_shard(sharded: Path, write: Make) -> None:
    write(INDEX, {"weight_map": {"a": ONE, "b": ONE, "c": THREE, "d": TWO}})
    assert faults(sharded) == [
        f'{TWO} does not hold what {INDEX} says it does: "d"',
        f'{INDEX} is stale: {TWO} holds tensors it does not name there: "c"',
        f'{THREE} does not hold what {INDEX} says it does: "c"',
        f'{INDEX} is stale: {THREE} holds tensors it does not name there: "d"',
    ]


def test_a_second_model_beside_the_index(sharded: Path, save: Make) -> None:
    save("model.safetensors", "a")
    assert faults(sharded) == [
        f"model.safetensors is there beside {INDEX}, which does not name it: delete one of them"
    ]


def test_an_index_may_name_the_single_file(tmp_path: Path, save: Make, write: Make) -> None:
    save("model.safetensors", "a")
    write(INDEX, {"weight_map": {"a": "model.safetensors"}})
    assert open_checkpoint(tmp_path).shards == {"a": "model.safetensors"}


def test_one_tensor_in_two_files(tmp_path: Path, save: Make) -> None:
    save("x.safetensors", "a", "b", "c")
    save("y.safetensors", "c", "b", "d")
    assert faults(tmp_path) == ['x.safetensors and y.safetensors both hold "b", "c"']


def test_a_single_fault_keeps_its_hint(tmp_path: Path, write: Make) -> None:
    write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a git-lfs pointer") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == f"git -C {tmp_path} lfs pull"


# ------------------------------------------------------------------------ out of the folder


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "sub/../../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "x\x1b.safetensors",
        "\ud800.safetensors",
        "..",
        ".",
        "",
    ],
)
def test_names_that_are_refused(
    tmp_path: Path, save: Make, write: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save("x.safetensors", "a")
    save("in/sub/x.safetensors", "a")
    write("in/" + INDEX, {"weight_map": {"a": name}})
    opened = watched(monkeypatch)
    (fault,) = faults(tmp_path / "in")
    assert fault.endswith("which is not a plain file name")
    assert opened == [str(tmp_path / "in" / INDEX)]


def test_absolute_name(
    tmp_path: Path, save: Make, write: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save("x.safetensors", "a")
    write("in/" + INDEX, {"weight_map": {"a": str(file)}})
    opened = watched(monkeypatch)
    assert faults(tmp_path / "in") == [f'{INDEX} names "{file}", which is not a plain file name']
    assert opened == [str(tmp_path / "in" / INDEX)]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that is opened from now on."""
    names: list[str] = []
    real = os.open

    def watch(path: Any, *args: Any, **options: Any) -> int:
        names.append(os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", watch)
    return names


def test_links_that_leave(
    tmp_path: Path, save: Make, write: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    outside = save("x.safetensors", "a")
    write("in/" + INDEX, {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    (folder / "a.safetensors").symlink_to("../x.safetensors")
    (folder / "b.safetensors").symlink_to(outside)
    opened = watched(monkeypatch)
    assert faults(folder) == [
        f'{INDEX} names "{file}.safetensors", which is a link to a file outside of the folder'
        for file in "ab"
    ]
    assert opened == [str(folder / INDEX)]


@pytest.mark.parametrize("link", ["model.safetensors", INDEX, "config.json"])
def test_no_other_file_may_leave_either(tmp_path: Path, save: Make, write: Make, link: str) -> None:
    save("in/model.safetensors" if link == "config.json" else "in/model-1.safetensors")
    target = write("secret", '{"weight_map": {"w": "model-1.safetensors"}}')
    (tmp_path / "in" / link).symlink_to(target)
    assert faults(tmp_path / "in") == [f"{link} is a link to a file outside of its folder"]


def test_links_inside_the_folder(tmp_path: Path, save: Make) -> None:
    save("in/store/x", "a")
    (tmp_path / "in/model.safetensors").symlink_to("store/x")
    (tmp_path / "link").symlink_to("in")
    assert list(open_checkpoint(tmp_path / "link").tensors) == ["a"]
    assert list(open_checkpoint(tmp_path / "link/model.safetensors").tensors) == ["a"]


def test_broken_link_and_folder(tmp_path: Path, write: Make) -> None:
    (tmp_path / "a.safetensors").symlink_to("nowhere")
    (tmp_path / "b.safetensors").mkdir()
    os.mkfifo(tmp_path / "c.safetensors")
    write(INDEX, {"weight_map": {name: f"{name}.safetensors" for name in "abc"}})
    assert faults(tmp_path) == [
        "b.safetensors is a folder, not a file",
        "c.safetensors is a device, pipe or socket, not a file",
        f'{INDEX} names "a.safetensors", which is not there',
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_hub_cache(tmp_path: Path, save: Make, write: Make, shared: bool) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    save("hub/blobs/aa/aaaa" if shared else "hub/models--org--name/blobs/1111", "a")
    save("hub/models--org--name/blobs/2222", "b")
    write("hub/models--org--name/blobs/3333", {"x": 1})
    if shared:  # a blob of the repository may be a link into the store of the whole cache
        (repo / "blobs/1111").symlink_to("../../blobs/aa/aaaa")
    snapshot = repo / "snapshots" / "f00"
    (snapshot / "1_Pooling").mkdir(parents=True)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (snapshot / files[0]).symlink_to("../../blobs/1111")
    (snapshot / files[1]).symlink_to("../../blobs/2222")
    (snapshot / "config.json").symlink_to("../../blobs/3333")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/3333")
    write("hub/models--org--name/blobs/4444", {"weight_map": {"a": files[0], "b": files[1]}})
    (snapshot / INDEX).symlink_to("../../blobs/4444")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.shards == {"a": files[0], "b": files[1]}
    assert checkpoint.config == {"x": 1}
    assert checkpoint.files == ("1_Pooling/config.json", "config.json")
    (snapshot / files[1]).unlink()
    (snapshot / files[1]).symlink_to("../../../secret")
    assert faults(snapshot)[0].endswith("which is a link to a file outside of the folder")


def test_a_folder_named_blobs_is_not_enough(tmp_path: Path, save: Make) -> None:
    save("blobs/1111", "a")
    (tmp_path / "other/snapshots/f00").mkdir(parents=True)
    (tmp_path / "other/snapshots/f00/model.safetensors").symlink_to("../../../blobs/1111")
    assert "outside of its folder" in faults(tmp_path / "other/snapshots/f00")[0]


# ------------------------------------------------------------------------ what is carried along


def test_carried_files(tmp_path: Path, save: Make, write: Make) -> None:
    save("in/model.safetensors")
    carried = [
        "1_Pooling/config.json",
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
        "2_Dense/model.safetensors",
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

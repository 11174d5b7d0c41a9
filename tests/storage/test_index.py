from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import open_checkpoint

from .conftest import INDEX, ONE, THREE, TWO, faults

Make: TypeAlias = Callable[..., Path]

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


def test_more_files_than_any_model_has(tmp_path: Path, write: Make) -> None:
    write(INDEX, {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10_001)}})
    assert faults(tmp_path) == [f"{INDEX} names more than 10000 files"]


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
    long = "d" * 300
    write(INDEX, {"weight_map": {name: f"{name}.safetensors" for name in ("a", "b", "c", long)}})
    assert faults(tmp_path)[:3] == [
        "b.safetensors is a folder, not a file",
        "c.safetensors is a device, pipe or socket, not a file",
        f'{INDEX} names "a.safetensors", which is not there',
    ]
    assert faults(tmp_path)[3].endswith('ddd...", which is not there')


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

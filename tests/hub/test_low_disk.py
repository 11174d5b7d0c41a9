"""Merges from hub to hub, of a model that the disk could not hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import CANARY, contents, results, stocked
from tests.hub.server import Fault, LoopbackHub
from tests.hub.test_locate import Login, failed
from tests.hub.test_push import weights_of
from tests.hub.test_ranges import LAYERS, box, digests, sent, size

__all__ = ["box"]

REPO = "alice/model"

IN_PARTS = """
from dora_convert.hub import partly
partly._SMALL = 0
from dora_convert.cli import main
main()
"""

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _logged_in(token: Login) -> None:
    token(CANARY)


@pytest.fixture
def expected(box: Sandbox) -> dict[str, bytes]:
    """The merge of the folders."""
    place = box.root / "local"
    result = box.run("merge", box.adapter, "-b", box.base, "-o", place)
    assert result.code == 0, result.err
    return results(place)


@pytest.fixture
def merge(hub: LoopbackHub, box: Sandbox) -> Callable[..., Result]:
    stocked(hub, box)

    def merge(*options: object) -> Result:
        return box.run("merge", "me/dora", "-o", box.out, "--low-disk", *options)

    return merge


def room(*places: Path) -> int:
    """Bytes on the disk, where holes take none and what has two names counts once."""
    found = {}
    for place in places:
        for folder, _, names in os.walk(place):
            for name in names:
                try:
                    state = Path(folder, name).lstat()
                except FileNotFoundError:  # it goes while we look
                    continue
                found[state.st_ino] = state.st_blocks * 512
    return sum(found.values())


@contextmanager
def watched(*places: Path) -> Iterator[list[int]]:
    """What these take, again and again."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(room(*places))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_from_hub_to_hub(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    largest = max(digests(box).values())
    places = Path(constants.HF_HUB_CACHE), box.root / "out.partial"
    with watched(*places) as seen:
        result = merge("--push-to-hub", REPO, "-q")
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    repo = hub.repos[REPO]
    assert weights_of(repo.files()) == expected
    assert len(repo.commits) == 2  # the Hub's own, and ours
    # One shard on its way in, one on its way out; and the adapter, documents and headers.
    assert largest < max(seen) < 2.1 * largest + 300_000 < size(box)
    # Each once, but for what was looked at before.
    assert size(box) <= sent(hub, box) <= 1.1 * size(box)
    assert not box.out.exists()
    assert not list(box.root.glob("*.partial"))
    assert not list(places[0].glob(".dora-convert-*"))
    assert not list(places[0].glob("models--someone--some-model/blobs/*/*"))


def test_to_a_folder(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    result = merge("--json")
    assert result.code == 0, result.err
    assert results(box.out) == expected
    assert result.json["verification"]["modules"] == LAYERS
    assert not list(Path(constants.HF_HUB_CACHE).glob(".dora-convert-*"))


def test_weights_that_are_carried_along(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """Modules of sentence-transformers come with weights of their own, in no shard."""
    dense = {"2_Dense/model.safetensors": os.urandom(5000), "2_Dense/config.json": b"{}"}
    hub.repos["someone/some-model"].put(dense)
    assert merge("--push-to-hub", REPO).code == 0
    assert dense.items() <= hub.repos[REPO].files().items()


@pytest.mark.parametrize("limit", ["1MB", "100MB"])
def test_other_shards_than_the_base_has(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result], limit: str
) -> None:
    place = box.root / "local"
    option = ("--max-shard-size", limit)
    assert box.run("merge", box.adapter, "-b", box.base, "-o", place, *option).code == 0
    assert merge("--push-to-hub", REPO, *option).code == 0
    assert weights_of(hub.repos[REPO].files()) == results(place)


def test_folders_can_be_merged_so_too(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes]
) -> None:
    result = box.merge("--low-disk", "--push-to-hub", REPO)
    assert result.code == 0, result.err
    assert weights_of(hub.repos[REPO].files()) == expected
    assert digests(box)  # the base is where it was


def test_a_flipped_bit_on_the_way(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    shard = list(digests(box))[2]
    hub.faults = [Fault(f"GET /cdn/{shard}", times=99, flip=True)]
    failed(merge("--push-to-hub", REPO, "-q"), "model-00003-of-00004.safetensors was changed")
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}
    assert not list(box.root.glob("*.partial"))


@pytest.mark.parametrize("place", ["PUT /lfs/", "POST .*/commit/", "GET /cdn/{}"])
def test_a_failure_shows_nothing_and_is_gone_on_from(
    hub: LoopbackHub,
    box: Sandbox,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    place: str,
) -> None:
    hub.faults = [Fault(place.format(list(digests(box))[-1]), times=99, status=500)]
    failed(merge("--push-to-hub", REPO, "-q"), "out of order (status 500)")
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}
    hub.faults = []
    assert merge("--push-to-hub", REPO).code == 0
    assert weights_of(hub.repos[REPO].files()) == expected
    assert len(hub.repos[REPO].commits) == 2


def test_killed_and_started_again(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    repo = hub.create(REPO)
    second = hashlib.sha256(expected["model-00002-of-00004.safetensors"]).hexdigest()
    hub.faults = [Fault(f"PUT /lfs/{second}", stall=True)]
    home = box.root / "home"
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY}
    command = [sys.executable, "-c", IN_PARTS, "merge", "me/dora", "-o", str(box.out)]
    process = subprocess.Popen(
        [*command, "--low-disk", "--push-to-hub", REPO],
        env=os.environ | places | {"HF_HUB_DISABLE_XET": "1"},
    )
    while not hub.requests(f"PUT /lfs/{second}"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.released.set()
    assert repo.files() == {}
    hub.log.clear()
    assert merge("--push-to-hub", REPO).code == 0
    assert weights_of(repo.files()) == expected
    assert len(repo.commits) == 2
    assert len(hub.requests("PUT /lfs/")) == LAYERS - 1  # the first was there already
    assert not list(box.root.glob("*.partial"))


def test_rows_that_are_not_defined(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """A wrong magnitude in the last shard: what was sent before is never seen."""
    tensors = box.load_adapter()
    path = f"base_model.model.model.layers.{LAYERS - 1}.self_attn.q_proj.lora_magnitude_vector"
    tensors[path][3] = float("nan")
    box.save_adapter(tensors)
    hub.create("me/dora", contents(box.adapter))
    result = merge("--push-to-hub", REPO, "-q")
    assert result.code == 4, result
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}


def test_what_is_there_needs_consent(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    old = {"model.safetensors": b"old", "config.json": b"{}", "LICENSE": b"mine"}
    repo = hub.create(REPO, old)
    result = merge("--push-to-hub", REPO, "-q")
    failed(result, "model.safetensors would be replaced", "--yes", code=5)
    assert not hub.requests("/cdn/|PUT")
    assert merge("--push-to-hub", REPO, "--yes").code == 0
    assert repo.files()["LICENSE"] == b"mine"
    assert "model.safetensors" not in repo.files()


def test_pull_request(
    hub: LoopbackHub, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    theirs = hub.create("other/model", {"model.safetensors": b"theirs"})
    result = merge("--push-to-hub", "other/model", "--create-pr")
    assert result.out == f"{hub.url}/other/model/discussions/1\n", result.err
    assert theirs.files() == {"model.safetensors": b"theirs"}
    assert weights_of(theirs.files("refs/pr/1")) == expected


def test_a_dry_run(hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]) -> None:
    assert merge("--push-to-hub", REPO, "--dry-run").code == 0
    assert REPO not in hub.repos
    assert sent(hub, box) < 0.1 * size(box)


def test_quantised_results(merge: Callable[..., Result]) -> None:
    failed(merge("--quantize", "fp8_dynamic", "-q"), "low_disk takes a shard at a time", code=3)


def test_xet(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    box: Sandbox,
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.xet_store = box.root / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert merge("--push-to-hub", REPO).code == 0
    assert weights_of(hub.repos[REPO].files()) == expected
    assert not hub.requests("/lfs/")


def test_on_a_disk_smaller_than_the_model(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes]
) -> None:
    """A file system of its own, so that nothing that takes room is overlooked."""
    stocked(hub, box)
    disk = box.root / "disk"
    disk.mkdir()
    room = 2 * max(digests(box).values()) + (1 << 21)
    assert room < size(box)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("mounting a file system takes rights that are not there")
    command = [sys.executable, "-c", IN_PARTS, "merge", "me/dora", "-o", str(disk / "out")]
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(disk / "home"), "HF_TOKEN": CANARY}
    places |= {"HF_HUB_DISABLE_XET": "1", "TMPDIR": str(disk)}
    try:
        whole = subprocess.run(
            command, env=os.environ | places, capture_output=True, text=True, check=False
        )
        assert whole.returncode == 5, whole.stderr  # it does not fit
        shutil.rmtree(disk / "home")
        done = subprocess.run(
            [*command, "--low-disk", "--push-to-hub", REPO],
            env=os.environ | places,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert weights_of(hub.repos[REPO].files()) == expected
    assert CANARY not in done.stdout + done.stderr

"""Merges from hub to hub, of a model that the disk could not hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from dora_convert.api import streaming
from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import (
    CANARY,
    PUSHING,
    contents,
    less_card,
    results,
    stocked,
    undefine_last_layer,
)
from tests.hub.server import Fault, LoopbackHub
from tests.hub.test_locate import failed
from tests.hub.test_ranges import LAYERS, box, digests, sent, size
from tests.reliability.nursery import Nursery

__all__ = ["box"]

REPO = "alice/model"
BLOCK = 4096  # of a file system

IN_PARTS = """
from dora_convert.hub import partly
partly._SMALL = 0
from dora_convert.cli import main
main()
"""

pytestmark = PUSHING


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


def size_of(folder: Path) -> int:
    return sum(len(data) for data in contents(folder).values())


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
    assert less_card(repo.files()) == expected
    assert len(repo.commits) == 2  # the Hub's own, and ours
    # One shard on its way in, one on its way out; the adapter; and small files, a block for each.
    beside = size_of(box.adapter) + 24 * BLOCK
    assert largest < max(seen) <= 2 * (largest + BLOCK) + beside < 0.6 * size(box)
    # Each once, but for what was looked at before.
    assert size(box) <= sent(hub, box) <= 1.1 * size(box)
    assert not box.out.exists()
    assert not list(box.root.glob("*.partial"))
    assert not list(places[0].glob(".dora-convert-*"))
    assert not list(places[0].glob("models--someone--some-model/blobs/*/*"))


def test_rows_are_looked_at_together(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """Of each module 32 rows are read before the merge, in four requests and not in 32."""
    assert merge().code == 0
    for digest in digests(box):
        # A header, in two steps at most; four places; the whole file, after which no more.
        assert len(hub.requests(f"GET /cdn/{digest}")) <= 2 + 4 + 1


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
    assert less_card(hub.repos[REPO].files()) == results(place)


def test_folders_can_be_merged_so_too(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes]
) -> None:
    result = box.merge("--low-disk", "--push-to-hub", REPO)
    assert result.code == 0, result.err
    assert less_card(hub.repos[REPO].files()) == expected
    assert digests(box)  # the base is where it was


def test_a_flipped_bit_on_the_way(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    shard = list(digests(box))[2]
    hub.faults = [Fault(f"GET /cdn/{shard}", times=99, flip=True)]
    words = "2 of 4 shards are sent already: the same command continues"
    result = merge("--push-to-hub", REPO, "-q")
    failed(result, "model-00003-of-00004.safetensors was changed", words)
    assert hub.repos[REPO].files() == {}
    assert not list(box.root.glob("*.partial/files/*"))
    hub.faults = []
    assert merge("--push-to-hub", REPO).code == 0
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
    assert less_card(hub.repos[REPO].files()) == expected
    assert len(hub.repos[REPO].commits) == 2


@pytest.fixture
def killed(hub: LoopbackHub, box: Sandbox, nursery: Nursery) -> Callable[..., None]:
    """A merge into the repository that is killed at its first request of this kind."""

    def killed(mark: str, *options: str, repo: str = REPO) -> None:
        storage = "0" if hub.xet_store else "1"
        hub.faults, hub.log[:] = [Fault(mark, stall=True)], []
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(box.root / "home"), "HF_TOKEN": CANARY}
        ended = nursery.killed_once(
            lambda: hub.requests(mark),
            *("merge", "me/dora", "-o", box.out, "--low-disk", "--push-to-hub", repo, *options),
            code=IN_PARTS,
            environment=os.environ | places | {"HF_HUB_DISABLE_XET": storage},
        )
        assert ended.code == -signal.SIGKILL

    return killed


def test_killed_and_started_again(
    hub: LoopbackHub,
    box: Sandbox,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    killed: Callable[..., None],
) -> None:
    """What was sent is neither fetched, nor made, nor sent again; the journal holds no secret."""
    repo = hub.create(REPO)
    second = hashlib.sha256(expected["model-00002-of-00004.safetensors"]).hexdigest()
    killed(f"PUT /lfs/{second}")
    hub.released.set()
    assert repo.files() == {}
    left = b"".join(contents(box.root / "out.partial").values())
    assert b"model-00001-of-00004.safetensors" in left
    assert CANARY.encode() not in left
    hub.log.clear()
    hub.moved.clear()
    result = merge("--push-to-hub", REPO, "--json")
    assert result.code == 0, result.err
    assert result.json["kept"] == 1
    assert result.json["verification"]["modules"] == LAYERS
    assert less_card(repo.files()) == expected
    assert len(repo.commits) == 2
    assert len(hub.requests("PUT /lfs/")) == LAYERS - 1
    first, nbytes = next(iter(digests(box).items()))
    assert hub.nbytes(f"GET /cdn/{first}") < 0.1 * nbytes
    assert not list(box.root.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("is_pull", [False, True])
def test_killed_at_many_points(
    hub: LoopbackHub,
    box: Sandbox,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    killed: Callable[..., None],
    is_pull: bool,
) -> None:
    """Each run gets one step further; nobody sees anything before the last."""
    name, options = ("other/model", ("--create-pr",)) if is_pull else (REPO, ())
    repo = hub.create(name)
    shards = [data for file, data in expected.items() if file.endswith(".safetensors")]
    puts = [f"PUT /lfs/{hashlib.sha256(data).hexdigest()}" for data in shards]
    for mark in ("GET /cdn/", "POST .*/preupload/", *puts, "POST .*/commit/"):
        killed(mark, *options, repo=name)
        assert repo.files() == {}
        assert not repo.pulls
    hub.released.set()
    hub.faults, hub.log[:] = [], []
    assert merge("--push-to-hub", name, *options).code == 0
    assert less_card(repo.files("refs/pr/1" if is_pull else "main")) == expected
    assert len(repo.commits) == 2
    assert not hub.requests("PUT /lfs/")
    assert not list(box.root.glob("*.partial"))


def test_stopped_with_a_folder_as_output(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    third = list(digests(box))[2]
    hub.faults = [Fault(f"GET /cdn/{third}", times=99, flip=True)]
    failed(merge("-q"), "2 of 4 shards are kept in out.partial: the same command continues")
    hub.faults = []
    hub.moved.clear()
    result = merge("--json")
    assert result.code == 0, result.err
    assert result.json["kept"] == 2
    assert results(box.out) == expected
    assert sent(hub, box) < 0.6 * size(box)


def test_another_command_is_not_continued(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    hub.faults = [Fault("POST .*/commit/", times=99, status=500)]
    failed(merge("--push-to-hub", REPO, "-q"), "4 of 4 shards are sent already")
    hub.faults = []
    failed(merge("--push-to-hub", "alice/other", "-q"), "--push-to-hub was alice/model", code=5)
    failed(merge("--push-to-hub", REPO, "--revision", "v2", "-q"), "now it is alice/model", code=5)
    assert merge("--push-to-hub", "alice/other", "--restart").code == 0
    assert less_card(hub.repos["alice/other"].files()) == expected


def test_what_was_sent_is_lost(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    """The Hub forgets contents that no commit names, and says so when one does."""
    hub.faults = [Fault("POST .*/commit/", times=99, status=500)]
    failed(merge("--push-to-hub", REPO, "-q"), "out of order")
    hub.faults = []
    hub.repos[REPO].held.clear()
    failed(merge("--push-to-hub", REPO, "-q"), "refused", "--restart sends all shards anew")
    assert hub.repos[REPO].files() == {}
    assert merge("--push-to-hub", REPO, "--restart").code == 0
    assert less_card(hub.repos[REPO].files()) == expected


def test_rows_that_are_not_defined(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """A wrong magnitude in the last shard: what was sent before is never seen."""
    undefine_last_layer(box, LAYERS)
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
    assert less_card(theirs.files("refs/pr/1")) == expected


def test_one_pull_request_only(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    """The line breaks just after it was opened, and nobody hears of it."""
    theirs = hub.create("other/model", {"model.safetensors": b"theirs"})
    hub.faults = [Fault("POST .*/commit/", late=True, last=True)]
    failed(merge("--push-to-hub", "other/model", "--create-pr", "-q"), "cannot be reached")
    assert theirs.pulls == ["refs/pr/1"]
    hub.is_down = False
    hub.log.clear()
    result = merge("--push-to-hub", "other/model", "--create-pr")
    assert result.out == f"{hub.url}/other/model/discussions/1\n", result.err
    assert theirs.pulls == ["refs/pr/1"]
    assert less_card(theirs.files("refs/pr/1")) == expected
    assert not hub.requests("PUT|/commit/")


def test_a_dry_run(hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]) -> None:
    assert merge("--push-to-hub", REPO, "--dry-run").code == 0
    assert REPO not in hub.repos
    assert sent(hub, box) < 0.1 * size(box)


@pytest.mark.parametrize(
    ("scheme", "is_sent"),
    [
        ("fp8_dynamic", True),
        ("fp8_dynamic", False),
        ("nf4", True),
        ("nvfp4a16", True),
        # Neither the scheme nor the place is new here.
        pytest.param("nf4", False, marks=pytest.mark.slow),
        pytest.param("nvfp4a16", False, marks=pytest.mark.slow),
    ],
)
def test_quantised_results(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result], scheme: str, is_sent: bool
) -> None:
    place, options = box.root / "local", ("--quantize", scheme, "--json")
    local = box.run("merge", box.adapter, "-b", box.base, "-o", place, *options)
    assert local.code == 0, local.err
    result = merge(*options, *(("--push-to-hub", REPO) if is_sent else ()))
    assert result.code == 0, result.err
    made = hub.repos[REPO].files() if is_sent else contents(box.out)
    assert less_card(made) == results(place)
    assert result.json["survival"] == local.json["survival"]


def test_quantised_and_stopped(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """What was measured of the first shards is in the report of the last run."""
    place, options = box.root / "local", ("--quantize", "fp8_dynamic", "--json")
    local = box.run("merge", box.adapter, "-b", box.base, "-o", place, *options)
    hub.faults = [Fault(f"GET /cdn/{list(digests(box))[2]}", times=99, flip=True)]
    assert merge("--push-to-hub", REPO, *options).code == 6
    hub.faults = []
    result = merge("--push-to-hub", REPO, *options)
    assert result.json["kept"] == 2
    assert result.json["survival"] == local.json["survival"]
    assert less_card(hub.repos[REPO].files()) == results(place)


def test_quantised_too_coarsely(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    options = ("--quantize", "nf4", "--min-survival", "1", "--push-to-hub", REPO)
    failed(merge(*options, "-q"), "nf4 keeps less than 100% of the update", code=7)
    assert hub.repos[REPO].files() == {}
    assert not hub.requests("/commit/")
    assert not list(box.root.glob("*.partial"))


def test_one_scale_in_two_shards(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """q, k and v are multiplied as one, so NVFP4 has one scale of them."""
    options = ("--quantize", "nvfp4a16", "--max-shard-size", "100kB")
    failed(merge(*options, "-q"), "have one scale", "--max-shard-size", code=3)
    failed(merge(*options, "-q", "--dry-run"), "have one scale", code=3)
    failed(merge("--quantize", "nf4", "--residual-rank", "2", "-q"), "does without it", code=3)


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
    assert less_card(hub.repos[REPO].files()) == expected
    assert not hub.requests("/lfs/")


def test_xet_killed_and_started_again(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    box: Sandbox,
    merge: Callable[..., Result],
    killed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the contents lie in the newer storage, they are named by their sha256."""
    hub.xet_store = box.root / "store"
    repo = hub.create(REPO)
    killed("POST .*/commit/")
    hub.released.set()
    assert repo.files() == {}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.faults, hub.log[:] = [], []
    result = merge("--push-to-hub", REPO, "--json")
    assert result.code == 0, result.err
    assert result.json["kept"] == LAYERS
    assert less_card(repo.files()) == expected
    assert not hub.requests("xet-write-token|/lfs/")


def test_changed_by_somebody_else_meanwhile(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is committed on top of what was not looked at; the next run sends no shard again."""
    repo, write_sums, others = hub.create(REPO), streaming.write_sums, [{"notes.txt": b"theirs"}]

    def late(folder: Path, known: Mapping[str, str]) -> None:
        if others:
            repo.put(others.pop())
        write_sums(folder, known)

    monkeypatch.setattr(streaming, "write_sums", late)
    failed(merge("--push-to-hub", REPO, "-q"), "was changed on the Hub meanwhile")
    assert repo.files() == {"notes.txt": b"theirs"}
    hub.log.clear()
    assert merge("--push-to-hub", REPO, "--yes").code == 0
    assert less_card(repo.files()) == {**expected, "notes.txt": b"theirs"}
    assert not hub.requests("PUT /lfs/")


def test_on_a_disk_smaller_than_the_model(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], nursery: Nursery
) -> None:
    """A file system of its own, so that nothing that takes room is overlooked."""
    stocked(hub, box)
    disk = box.root / "disk"
    disk.mkdir()
    # Two shards, and the adapter with the small files: 2.06 shards, as these are small.
    room = 2 * max(digests(box).values()) + size_of(box.adapter) + 48 * BLOCK
    assert room < 0.6 * size(box)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("mounting a file system takes rights that are not there")
    command = ["merge", "me/dora", "-o", disk / "out"]
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(disk / "home"), "HF_TOKEN": CANARY}
    places |= {"HF_HUB_DISABLE_XET": "1", "TMPDIR": str(disk)}
    how = {"code": IN_PARTS, "environment": os.environ | places}
    try:
        whole = nursery.run(*command, **how)
        assert whole.code == 5, whole.err  # it does not fit
        shutil.rmtree(disk / "home")
        done = nursery.run(*command, "--low-disk", "--push-to-hub", REPO, **how)
        assert done.code == 0, done.err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert less_card(hub.repos[REPO].files()) == expected
    assert CANARY not in done.out + done.err

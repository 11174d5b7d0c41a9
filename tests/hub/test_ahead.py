"""Shards that are sent while the next ones are merged. What is seen is still one commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from huggingface_hub import constants

from dora_convert import api
from dora_convert.errors import InputError
from dora_convert.hub import ahead
from dora_convert.storage import staging
from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import CANARY, PUSHING, less_card, results, undefine_last_layer
from tests.hub.server import Fault, LoopbackHub, sha256
from tests.hub.test_locate import failed
from tests.hub.test_ranges import LAYERS, box
from tests.reliability.nursery import Nursery

__all__ = ["box"]

REPO = "alice/model"
PUT = "PUT /lfs/"

pytestmark = PUSHING


@pytest.fixture
def merge(hub: LoopbackHub, box: Sandbox) -> Callable[..., Result]:
    def merge(*options: object) -> Result:
        return box.merge("--push-to-hub", REPO, "-q", *options)

    return merge


@pytest.fixture
def shards(box: Sandbox) -> list[str]:
    """Hashes of the shards of the merge, made without a Hub."""
    place = box.root / "local"
    assert box.run("merge", box.adapter, "-b", box.base, "-o", place).code == 0
    return [sha256(file.read_bytes()) for file in sorted(place.glob("*.safetensors"))]


def arguments(box: Sandbox) -> list[str]:
    place = ("-b", str(box.base), "-o", str(box.out), "--push-to-hub", REPO, "--workers", "1")
    return ["merge", str(box.adapter), *place]


def command(box: Sandbox) -> list[str]:
    return [sys.executable, "-m", "dora_convert", *arguments(box)]


def environment(hub: LoopbackHub, box: Sandbox) -> dict[str, str]:
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(box.root / "home"), "HF_TOKEN": CANARY}
    return os.environ | places | {"HF_HUB_DISABLE_XET": "1"}


def test_sent_before_the_result_is_complete(
    hub: LoopbackHub,
    box: Sandbox,
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last shard is held back until another is on the Hub; none is on it twice."""
    seen: list[int] = []
    publish = staging.Staging.publish

    def published(self: staging.Staging) -> None:
        seen.append(len(hub.requests(PUT)))
        assert hub.repos[REPO].files() == {}
        publish(self)

    monkeypatch.setattr(staging.Staging, "publish", published)
    assert merge().code == 0
    assert seen[0] >= 1
    assert len(hub.requests(PUT)) == LAYERS
    assert len(hub.requests("/commit/")) == 1
    assert less_card(hub.repos[REPO].files()) == results(box.out)
    assert hub.log.index(f"POST /api/models/{REPO}/commit/main") > max(
        i for i, line in enumerate(hub.log) if line.startswith(PUT)
    )


@pytest.mark.parametrize(
    ("place", "times"), [(PUT, 6), ("POST .*/preupload/", 6), ("POST .*/repos/create", 1)]
)
def test_a_failed_shard_is_sent_at_the_end(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result], place: str, times: int
) -> None:
    """The client tries some requests six times by itself; then the push at the end does."""
    hub.faults = [Fault(place, times=times, status=500)]
    assert merge().code == 0
    assert less_card(hub.repos[REPO].files()) == results(box.out)
    assert len(hub.repos[REPO].commits) == 2


def test_the_result_is_there_though_nothing_can_be_sent(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result], shards: list[str]
) -> None:
    hub.faults = [Fault(PUT, times=999, status=500)]
    result = merge()
    failed(result, "out of order (status 500)", f"dora-convert push {box.out} {REPO}")
    assert [sha256(f.read_bytes()) for f in sorted(box.out.glob("*.safetensors"))] == shards
    assert hub.repos[REPO].files() == {}
    hub.faults = []
    assert box.run("push", box.out, REPO).code == 0
    assert less_card(hub.repos[REPO].files()) == results(box.out)


def test_without_memory_for_a_thread_all_is_sent_at_the_end(
    hub: LoopbackHub,
    box: Sandbox,
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def require_room(threads: int) -> None:
        raise MemoryError("can't start new thread")

    monkeypatch.setattr(ahead, "require_room", require_room)
    assert merge().code == 0
    assert less_card(hub.repos[REPO].files()) == results(box.out)
    assert len(hub.requests(PUT)) == LAYERS


def test_a_failed_merge_commits_nothing(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    """A magnitude of the last shard is not defined: what was sent before is seen by nobody."""
    undefine_last_layer(box, LAYERS)
    assert merge("--workers", "1").code == 4
    assert not hub.requests("/commit/")
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}
    assert not box.out.exists()


@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_while_a_shard_is_sent(
    hub: LoopbackHub, box: Sandbox, nursery: Nursery, shards: list[str], name: signal.Signals
) -> None:
    """The program does not wait for the line; the same command goes on, and sends the rest."""
    repo = hub.create(REPO)
    hub.faults = [Fault(f"{PUT}{shards[1]}", stall=True)]
    process = subprocess.Popen(command(box), env=environment(hub, box), stderr=subprocess.PIPE)
    while not hub.requests(f"{PUT}{shards[1]}"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(name)
    process.communicate(timeout=30)
    hub.released.set()
    assert process.returncode in (-9, 130, 143)
    assert repo.files() == {}
    hub.log.clear()
    # The merge itself may have been done already.
    done = nursery.run(*arguments(box), "--overwrite", environment=environment(hub, box))
    assert done.code == 0, done.err
    assert less_card(repo.files()) == results(box.out)
    assert len(repo.commits) == 2
    assert len(hub.requests(PUT)) == LAYERS - 1
    assert CANARY not in done.err


@pytest.mark.slow
def test_killed_at_many_points(hub: LoopbackHub, box: Sandbox, shards: list[str]) -> None:
    """After each there is the old tree or the whole new one, and the last run completes it."""
    repo = hub.create(REPO)
    marks = [*(f"{PUT}{digest}" for digest in shards), "POST .*/commit/", "POST .*/preupload/"]
    for mark in marks:
        hub.faults, hub.log[:] = [Fault(mark, stall=True)], []
        process = subprocess.Popen(
            [*command(box), "--overwrite"], env=environment(hub, box), stderr=subprocess.DEVNULL
        )
        while not hub.requests(mark) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert repo.files() == {}
    hub.released.set()
    hub.faults = []
    done = subprocess.run(
        [*command(box), "--overwrite"],
        env=environment(hub, box),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert less_card(repo.files()) == results(box.out)
    assert len(repo.commits) == 2


def test_somebody_pushed_while_it_was_merged(
    hub: LoopbackHub,
    box: Sandbox,
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit goes on top of theirs, which is compared, and needs consent, as with any push."""
    hub.create(REPO)
    publish = staging.Staging.publish

    def published(self: staging.Staging) -> None:
        hub.repos[REPO].put({"notes.txt": b"theirs"})
        publish(self)

    monkeypatch.setattr(staging.Staging, "publish", published)
    assert merge().code == 0
    files = hub.repos[REPO].files()
    assert files.pop("notes.txt") == b"theirs"
    assert less_card(files) == results(box.out)


def test_branch_and_pull_request(
    hub: LoopbackHub, box: Sandbox, merge: Callable[..., Result]
) -> None:
    repo = hub.create(REPO)
    assert merge("--revision", "v2").code == 0
    assert less_card(repo.files("v2")) == results(box.out)
    theirs = hub.create("other/model")
    result = box.merge("--push-to-hub", "other/model", "--create-pr", "--overwrite", "-q")
    assert result.code == 0, result.err
    assert less_card(theirs.files("refs/pr/1")) == results(box.out)
    assert len(hub.requests(PUT)) == 2 * LAYERS


def test_xet(
    hub: LoopbackHub,
    box: Sandbox,
    merge: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.xet_store = box.root / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert merge().code == 0
    assert less_card(hub.repos[REPO].files()) == results(box.out)
    assert len(hub.requests("/commit/")) == 1
    assert not hub.requests("/lfs/")


def test_one_for_each_kind_of_merge(hub: LoopbackHub, box: Sandbox) -> None:
    ahead = api.send_ahead(REPO)
    with pytest.raises(InputError, match="an Upload takes the shards"):
        api.merge(
            box.adapter,
            box.out,
            base=box.base,
            how=api.MergeOptions(low_disk=True),
            upload=ahead,
        )
    assert not box.out.exists()
    with pytest.raises(InputError, match="is no name of a repository"):
        api.send_ahead("model")
    assert not hub.log

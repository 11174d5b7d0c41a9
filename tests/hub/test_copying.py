"""Shards that the Hub has already: it copies them itself, and what is sent is counted."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import PUSHING, contents, less_card, results
from tests.hub.server import Fault, LoopbackHub, sha256
from tests.hub.test_ranges import LAYERS, box

__all__ = ["box"]

REPO, BASE = "alice/model", "alice/base"
TOUCHED = 1  # of LAYERS shards

pytestmark = PUSHING


@pytest.fixture
def merge(hub: LoopbackHub, box: Sandbox) -> Callable[..., Result]:
    """An adapter of the first layer; the other shards come out as transformers wrote them."""
    for file in box.base.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})
    tensors = box.load_adapter()
    box.save_adapter({name: t for name, t in tensors.items() if "layers.0." in name})
    box.configure(box.adapter, base_model_name_or_path=BASE)
    hub.create("me/dora", contents(box.adapter))
    hub.create(BASE, contents(box.base), xet=True)
    box.save_adapter(tensors)

    def merge(*options: object, repo: str = REPO) -> Result:
        place = ("-o", box.out, "--push-to-hub", repo)
        return box.run("merge", "me/dora", "--base", BASE, *place, *options)

    return merge


@pytest.fixture
def expected(box: Sandbox, merge: Callable[..., Result]) -> dict[str, bytes]:
    """The merge of the folders."""
    tensors, place = box.load_adapter(), box.root / "local"
    box.save_adapter({name: t for name, t in tensors.items() if "layers.0." in name})
    assert box.run("merge", box.adapter, "-b", box.base, "-o", place).code == 0
    box.save_adapter(tensors)
    found = results(place)
    held = {sha256(data) for data in contents(box.base).values()}
    shards = [sha256(data) for name, data in found.items() if name.endswith(".safetensors")]
    assert len([digest for digest in shards if digest in held]) == LAYERS - TOUCHED
    return found


def sent(hub: LoopbackHub) -> int:
    return len(hub.requests("PUT /lfs/"))


@pytest.mark.parametrize("how", [(), ("--low-disk",)])
def test_between_repositories(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    how: tuple[str, ...],
) -> None:
    result = merge(*how, "--json")
    assert result.code == 0, result.err
    assert less_card(hub.repos[REPO].files()) == expected
    assert sent(hub) == TOUCHED
    pushed = json.loads(result.out)["pushed"]
    assert len(pushed["copied"]) == LAYERS - TOUCHED
    assert not {*pushed["copied"]}.intersection(pushed["sent"])
    assert pushed["nbytes"] < sum(map(len, expected.values())) / 2
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize("how", [(), ("--low-disk", "--yes")])
def test_within_a_repository(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    how: tuple[str, ...],
) -> None:
    """To a branch of the base's own repository, in the old storage too."""
    hub.repos[BASE].xet = False
    result = merge("--revision", "merged", "--yes", *how, repo=BASE)
    assert result.code == 0, result.err
    assert expected.items() <= less_card(hub.repos[BASE].files("merged")).items()
    assert sent(hub) == TOUCHED


@pytest.mark.parametrize("why", ["old storage", "refused", "out of order"])
@pytest.mark.parametrize("how", [(), ("--low-disk",)])
def test_what_is_not_copied_is_sent(
    hub: LoopbackHub,
    expected: dict[str, bytes],
    merge: Callable[..., Result],
    how: tuple[str, ...],
    why: str,
) -> None:
    if why == "old storage":
        hub.repos[BASE].xet = False
    else:
        status = 403 if why == "refused" else 500
        hub.faults = [Fault("lfs-files/duplicate", times=99, status=status)]
    assert merge(*how).code == 0
    assert less_card(hub.repos[REPO].files()) == expected
    assert sent(hub) == LAYERS


def test_push_of_a_folder(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], merge: Callable[..., Result]
) -> None:
    """The card of a result says what it was made of."""
    assert merge().code == 0
    hub.log.clear()
    assert box.run("push", box.out, "alice/another").code == 0
    assert less_card(hub.repos["alice/another"].files()) == expected
    assert sent(hub) == TOUCHED

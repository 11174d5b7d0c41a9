"""Commands that look at a base without having all of it: what the server sends is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dora_convert.hub import partly
from tests.cli.sandbox import Sandbox
from tests.hub.conftest import CANARY, READER, contents, results, stocked
from tests.hub.server import Fault, LoopbackHub, sha256
from tests.hub.test_locate import Login, failed
from tests.reliability.nursery import Nursery

WIDE, DEEP, LAYERS = 256, 1024, 4
SHAPES = {
    "self_attn.q_proj": (WIDE, WIDE),
    "self_attn.k_proj": (WIDE, WIDE),
    "self_attn.v_proj": (WIDE, WIDE),
    "self_attn.o_proj": (WIDE, WIDE),
    "mlp.gate_proj": (DEEP, WIDE),
    "mlp.up_proj": (DEEP, WIDE),
    "mlp.down_proj": (WIDE, DEEP),
}


@pytest.fixture
def box(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A Llama of 13 MB in four shards, and an adapter of the q projections."""
    monkeypatch.setattr(partly, "_SMALL", 0)
    random = torch.Generator().manual_seed(5)
    places, adapter = {}, {}
    box.weights.unlink()
    for layer in range(LAYERS):
        tensors = {
            f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=random) * 0.02
            for name, shape in SHAPES.items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(WIDE)
        path = f"model.layers.{layer}.self_attn.q_proj"
        key, weight = f"base_model.model.{path}", tensors[f"{path}.weight"]
        adapter[f"{key}.lora_A.weight"] = torch.randn((4, WIDE), generator=random) * 0.05
        adapter[f"{key}.lora_B.weight"] = torch.randn((WIDE, 4), generator=random) * 0.02
        adapter[f"{key}.lora_magnitude_vector"] = weight.norm(dim=1) * 1.02
        if layer == 0:
            tensors["model.embed_tokens.weight"] = torch.randn((64, WIDE), generator=random)
            tensors["lm_head.weight"] = torch.randn((64, WIDE), generator=random)
            tensors["model.norm.weight"] = torch.ones(WIDE)
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        save_file(tensors, box.base / file)
        places |= dict.fromkeys(tensors, file)
    box.index(places)
    box.save_adapter(adapter)
    box.configure(box.adapter, target_modules=["q_proj"])
    box.configure(
        box.base,
        hidden_size=WIDE,
        intermediate_size=DEEP,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        vocab_size=64,
    )
    return box


TARGETED = LAYERS * WIDE * WIDE * 4


def sent(hub: LoopbackHub, box: Sandbox) -> int:
    """Bytes of the base's weights that the server sent."""
    return sum(hub.nbytes(f"GET /cdn/{digest}") for digest in digests(box))


def digests(box: Sandbox) -> Mapping[str, int]:
    files = sorted(box.base.glob("*.safetensors"))
    return {sha256(file.read_bytes()): file.stat().st_size for file in files}


def size(box: Sandbox) -> int:
    return sum(digests(box).values())


def lora(box: Sandbox, *options: object, out: str = "lora") -> dict[str, bytes]:
    place = box.root / out
    result = box.run("to-lora", "me/dora", "--rank", "4", "-o", place, *options)
    assert result.code == 0, result.err
    return results(place)


@pytest.fixture
def expected(box: Sandbox) -> dict[str, bytes]:
    place = box.root / "local"
    result = box.run("to-lora", box.adapter, "-b", box.base, "--rank", "4", "-o", place)
    assert result.code == 0, result.err
    return results(place)


def test_to_lora_moves_what_it_needs(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes]
) -> None:
    stocked(hub, box)
    assert lora(box) == expected
    assert TARGETED <= sent(hub, box) <= 1.05 * TARGETED < 0.1 * size(box)
    # With all else that was said about the base.
    everything = hub.nbytes("someone/some-model") + sent(hub, box)
    assert everything <= 1.05 * TARGETED
    assert not hub.strangers
    assert not list(Path(constants.HF_HUB_CACHE).glob(".dora-convert-*"))


def test_inspect_and_dry_run_too(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    here = box.run("inspect", box.adapter, "--base", box.base, "--json").json
    there = box.run("inspect", "me/dora", "--base", "someone/some-model", "--json").json
    assert there["groups"] == here["groups"]
    assert there["total"] == here["total"]
    assert TARGETED <= sent(hub, box) <= 1.05 * TARGETED
    hub.moved.clear()
    dry = ("-o", box.out, "--dry-run", "--json")
    here = box.run("merge", box.adapter, "-b", box.base, *dry).json
    there = box.run("merge", "me/dora", *dry).json
    assert there["files"] == here["files"]
    assert TARGETED <= sent(hub, box) <= 1.05 * TARGETED
    assert not box.out.exists()


def test_one_file(hub: LoopbackHub, box: Sandbox) -> None:
    """A single file of weights, named as such."""
    stocked(hub, box)
    ref = "hf://someone/some-model/model-00001-of-00004.safetensors"
    result = box.run("inspect", "me/dora", "--base", ref, "--include", "*.0.self_attn.q_proj")
    assert result.code == 0, result.err
    assert sent(hub, box) <= 1.05 * TARGETED / LAYERS


def test_what_is_in_the_cache_is_taken_from_there(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(hub, box)
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    hf_hub_download("someone/some-model", "model-00002-of-00004.safetensors")
    hub.moved.clear()
    assert lora(box) == expected
    assert sent(hub, box) <= 1.05 * TARGETED * 3 / LAYERS
    assert box.run("merge", "me/dora", "-o", box.out).code == 0  # all of it
    hub.moved.clear()
    assert lora(box, out="once-more") == expected
    assert sent(hub, box) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora(box, out="offline") == expected


def test_what_takes_all_is_fetched_whole(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    assert box.run("merge", "me/dora", "-o", box.out).code == 0
    assert sent(hub, box) == size(box)


def test_pickles_are_fetched_whole(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("me/base", {"pytorch_model.bin": b"x" * 100, "config.json": b"{}"})
    failed(box.run("inspect", box.adapter, "-b", "me/base"), "--allow-pickle", code=3)


def test_a_quantised_base(hub: LoopbackHub, box: Sandbox) -> None:
    """The parts of a coded weight, and what says how to decode it."""
    made = box.root / "made"
    done = box.run("merge", box.adapter, "-b", box.base, "-o", made, "--quantize", "w8a16")
    assert done.code == 0, done.err
    hub.create("someone/coded", contents(made))
    hub.create("me/dora", contents(box.adapter))
    there = box.run("inspect", "me/dora", "--base", "someone/coded", "--json")
    here = box.run("inspect", box.adapter, "--base", made, "--json")
    assert there.code == here.code == 0, there.err
    assert there.json["total"] == here.json["total"]
    files = [data for name, data in contents(made).items() if name.endswith(".safetensors")]
    moved = sum(hub.nbytes(f"GET /cdn/{sha256(data)}") for data in files)
    assert 0 < moved < 0.2 * sum(map(len, files))


def test_faults_that_pass(hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes]) -> None:
    stocked(hub, box)
    shard = f"GET /cdn/{next(iter(digests(box)))}"
    hub.faults = [
        Fault(shard, status=503),
        Fault(shard, cut=True),  # half of it came
        Fault(shard),
        Fault("GET .*/resolve/.*00002", status=502),
    ]
    assert lora(box) == expected
    assert all(not fault.times for fault in hub.faults)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("GET /cdn/{}", whole=True), "sends whole files where a part is asked for"),
        (Fault("GET /cdn/{}", other=True), "another part of the file"),
        (Fault("GET /cdn/{}", old=True), "another file than the one that was asked for"),
        (Fault("GET /cdn/{}", times=99, status=500), "out of order (status 500)"),
        (Fault("GET /cdn/{}", times=99, status=416), "refused someone/some-model (status 416)"),
        (Fault("GET /cdn/{}", times=99, status=429), "too many requests"),
        (Fault("GET /cdn/{}", times=99), "cannot be reached, or broke off"),
        (Fault("GET /cdn/{}", times=99, cut=True), "cannot be reached, or broke off"),
        (Fault("GET /cdn/{}", times=99, status=403), "may not do this with someone/some-model"),
    ],
    ids=["whole", "other", "old", "500", "416", "429", "line", "cut", "403"],
)
def test_faults_that_stay(hub: LoopbackHub, box: Sandbox, fault: Fault, words: str) -> None:
    stocked(hub, box)
    shard = next(iter(digests(box)))
    hub.faults = [Fault(fault.match.format(shard), **_others(fault))]
    result = box.run("to-lora", "me/dora", "--rank", "4", "-o", box.root / "lora")
    failed(result, words)
    assert not (box.root / "lora").exists()
    assert sent(hub, box) <= 1.05 * TARGETED + digests(box)[shard]
    assert not list(Path(constants.HF_HUB_CACHE).glob(".dora-convert-*"))


def _others(fault: Fault) -> dict[str, object]:
    names = ("times", "status", "cut", "whole", "other", "old")
    return {name: getattr(fault, name) for name in names}


def test_a_mirror_without_ranges_sends_nothing_for_nothing(hub: LoopbackHub, box: Sandbox) -> None:
    """The first answer ends it: no shard is taken whole unasked."""
    stocked(hub, box)
    hub.faults = [Fault(f"GET /cdn/{digest}", times=99, whole=True) for digest in digests(box)]
    result = box.run("inspect", "me/dora", "-b", "someone/some-model")
    failed(result, "sends whole files", "hf download someone/some-model")
    assert len(hub.requests("|".join(digests(box)))) <= LAYERS
    # As the hint says.
    hub.faults = []
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    snapshot_download("someone/some-model")
    hub.faults = [Fault("GET /cdn/", times=99, status=500)]
    hub.create("me/dora", contents(box.adapter))
    hub.faults = []
    assert box.run("inspect", "me/dora", "-b", "someone/some-model").code == 0


def test_private_and_gated(hub: LoopbackHub, box: Sandbox, token: Login) -> None:
    hub.create("alice/dora", contents(box.adapter), private=True)
    hub.create("alice/base", contents(box.base), private=True)
    token(READER)
    result = box.run("inspect", "alice/dora", "--base", "alice/base")
    assert result.code == 0, result.err
    assert not hub.strangers
    hub.create("someone/gated", contents(box.base), gated=True)
    failed(box.run("inspect", "alice/dora", "-b", "someone/gated"), "someone/gated is gated")


def test_a_broken_header(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    name = "model-00003-of-00004.safetensors"
    broken = (1 << 60).to_bytes(8, "little") + (box.base / name).read_bytes()[8:]
    hub.repos["someone/some-model"].put({name: broken})
    result = box.run("inspect", "me/dora", "-b", "someone/some-model")
    failed(result, f"{name} is not a safetensors file", code=3)


def test_what_a_killed_run_leaves_is_swept_away(
    hub: LoopbackHub, box: Sandbox, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(hub, box)
    home = box.root / "home"
    shard = next(iter(digests(box)))
    hub.faults = [Fault(f"GET /cdn/{shard}", stall=True)]
    code = (
        "from dora_convert.hub import partly\npartly._SMALL = 0\n"
        "from dora_convert.cli import main\nmain()"
    )
    nursery.killed_once(
        lambda: hub.requests(f"GET /cdn/{shard}"),
        *("inspect", "me/dora", "-b", "someone/some-model"),
        code=code,
        environment=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY},
    )
    hub.released.set()
    (left,) = (home / "hub").glob(".dora-convert-*")
    assert CANARY.encode() not in b"".join(contents(home).values())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(partly, "_SETTLED", -1)
    assert box.run("inspect", "me/dora", "-b", "someone/some-model").code == 0
    assert not left.exists()


def test_other_runs_are_left_alone(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir()
    with partly._own_folder(cache) as theirs:
        os.utime(theirs, (0, 0))
        lora(box)
        assert theirs.exists()
    assert not theirs.exists()


def test_without_hard_links(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(partly.os, "link", refuse)
    stocked(hub, box)
    assert lora(box) == expected


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_xet(
    hub: LoopbackHub,
    box: Sandbox,
    expected: dict[str, bytes],
    token: Login,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contents in the Hub's newer storage are read in parts the same way."""
    token(CANARY)
    hub.xet_store = box.root / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert box.run("push", box.base, "alice/base").code == 0
    assert hub.requests("xet-write-token")
    hub.create("me/dora", contents(box.adapter))
    assert lora(box, "--base", "alice/base") == expected
    assert TARGETED <= sent(hub, box) <= 1.05 * TARGETED


def test_json_of_a_failure(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    hub.faults = [Fault(f"GET /cdn/{next(iter(digests(box)))}", whole=True)]
    result = box.run("inspect", "me/dora", "-b", "someone/some-model", "--json")
    assert json.loads(result.err)["exit_code"] == 6

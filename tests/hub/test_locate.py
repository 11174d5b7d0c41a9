"""Commands with refs where folders go. What must come out is what the folders give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import CANARY, READER, contents, results, stocked
from tests.hub.server import Fault, LoopbackHub
from tests.quant.gguf_files import random_blocks, write_config, write_tensors

Login = Callable[[str], None]


def failed(result: Result, *words: str, code: int = 6) -> None:
    """One message, with these words and without the token."""
    assert result.code == code, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith("Note: reading ")]
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in result.err, (word, result.err)
    for secret in (CANARY, READER, "Bearer", "Traceback", "injected"):
        assert secret not in result.err


def merged(box: Sandbox, adapter: object, *options: object) -> Result:
    result = box.run("merge", adapter, "-o", box.out, *options)
    assert result.code == 0, result.err
    return result


@pytest.fixture
def expected(box: Sandbox) -> dict[str, bytes]:
    """The merge of the folders."""
    merged(box, box.adapter, "--base", box.base)
    found = results(box.out)
    shutil.rmtree(box.out)
    return found


@pytest.mark.parametrize("options", [(), ("--base", "someone/some-model@main")])
def test_merge_from_the_hub(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], options: tuple[str, ...]
) -> None:
    stocked(hub, box)
    result = merged(box, "me/dora", *options)
    assert results(box.out) == expected
    commit = hub.repos["someone/some-model"].refs["main"]
    ref = options[-1] if options else "someone/some-model"
    assert f"Note: reading {ref} of the Hub, at commit {commit}\n" in result.err
    # Before the work, which may end otherwise.
    assert result.err.index("Note: reading") < result.err.index("merged ")
    report = box.run(
        "merge", "me/dora", *options, "-o", box.out, "--dry-run", "--overwrite", "--json"
    )
    assert report.json["base"] == f"someone/some-model@{commit}"


def test_the_other_commands(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    remote, local = box.root / "remote", box.root / "local"
    rank = ("--rank", "4", "-o")
    assert box.run("to-lora", "me/dora", *rank, remote).code == 0
    assert box.run("to-lora", box.adapter, "-b", box.base, *rank, local).code == 0
    assert results(remote) == results(local)
    merged(box, "me/dora")
    assert box.run("verify", box.out, "--adapter", "me/dora", "--all").code == 0
    assert box.run("inspect", "me/dora", "--base", "someone/some-model").code == 0
    converted = box.root / "converted"
    done = box.run(
        "convert", "me/dora", "-b", "someone/some-model", "--to", "peft", "-o", converted
    )
    assert done.code == 0, done.err


def test_an_existing_path_wins(
    hub: LoopbackHub, box: Sandbox, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("me/dora", {"adapter_model.safetensors": b"not this one"})
    shutil.copytree(box.adapter, box.root / "me" / "dora")
    monkeypatch.chdir(box.root)
    merged(box, "me/dora", "--base", box.base)
    assert results(box.out) == expected
    assert not hub.log


def test_what_was_fetched_is_not_asked_for_again(hub: LoopbackHub, box: Sandbox) -> None:
    stocked(hub, box)
    merged(box, "me/dora")
    assert len(hub.requests("GET /cdn/")) == 2  # the weights of each
    first = contents(box.out)
    hub.log.clear()
    merged(box, "me/dora", "--overwrite")
    assert contents(box.out) == first
    assert not hub.requests("/cdn/|/resolve/")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("folder", ["", "quantised/"])
def test_a_gguf_file(hub: LoopbackHub, box: Sandbox, parts: int, folder: str) -> None:
    """By its name, in the root or a folder: with its other parts and what goes along."""
    here = box.root / "gguf"
    here.mkdir()
    write_config(here)
    (here / "tokenizer.model").write_bytes(b"pieces")
    norm, up = np.ones(64, np.float32), random_blocks(Kind.Q8_0, 96, 64)
    tensors = {"blk.0.ffn_up.weight": (up, Kind.Q8_0), "output_norm.weight": (norm, Kind.F32)}
    names = ["m.gguf"] if parts == 1 else ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    if parts == 1:
        write_tensors(here / names[0], tensors, "llama")
    for name, key in zip(names, tensors, strict=False) if parts == 2 else ():
        write_tensors(here / name, {key: tensors[key]}, "llama")
    base = here / names[0]
    adapter = box.root / "dora"
    adapter.mkdir()
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    made = {"A.weight": (2, 64), "B.weight": (96, 2), "magnitude_vector": (96,)}
    save_file(
        {key + n: torch.rand(s) for n, s in made.items()}, adapter / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["up_proj"]})
    )
    files = {**contents(here), "other.gguf": b"another model", "README.md": b"# GGUF"}
    hub.create("some/gguf", {folder + name: data for name, data in files.items()})

    merged(box, adapter, "--base", base)
    expected = results(box.out)
    assert {"tokenizer.model", "config.json"} <= set(expected)
    shutil.rmtree(box.out)
    ref = f"hf://some/gguf/{folder}"
    assert box.run("inspect", adapter, "--base", ref + names[-1]).code == 0
    merged(box, adapter, "--base", ref + names[0])
    assert results(box.out) == expected
    assert not hub.requests("other")
    which = box.run("merge", adapter, "--base", ref.rstrip("/"), "-o", box.root / "no")
    failed(which, f"{parts + 1} GGUF files may be the base", "hf://ORG/NAME/FILE.gguf", code=3)
    assert not hub.requests("other")


def test_revision_and_subfolder(hub: LoopbackHub, box: Sandbox) -> None:
    files = contents(box.adapter)
    repo = hub.create("me/dora")
    inside = {f"runs/last/{name}": data for name, data in files.items()}
    commit = repo.put(inside, "trained")
    for ref in ("hf://me/dora@trained/runs/last", f"hf://me/dora@{commit}/runs/last"):
        result = box.run("inspect", ref, "--json")
        assert (result.code, result.json["modules"]) == (0, 4), result.err
    failed(box.run("inspect", "hf://me/dora/runs/last"), "there is no model in me/dora/runs/last")
    failed(box.run("inspect", "me/dora@nowhere"), "me/dora has no revision nowhere")
    file = "hf://me/dora@trained/runs/last/adapter_model.safetensors"
    assert box.run("inspect", file).code == 0


def test_only_what_is_needed_is_fetched(hub: LoopbackHub, box: Sandbox) -> None:
    box.split()
    others = {
        "pytorch_model.bin": b"pickle",
        "pytorch_model.bin.index.json": b"{}",
        "consolidated.safetensors": b"x",
        "onnx/model.onnx": b"x",
        "tf_model.h5": b"x",
        "README.md": b"x",
    }
    needed = {"tokenizer.json": b"{}", "sub/vocab.txt": b"a"}
    hub.create("someone/some-model", contents(box.base) | others | needed)
    beside = {"optimizer.bin": b"x", "training_args.bin": b"x", "checkpoint-5/x.safetensors": b"x"}
    hub.create("me/dora", contents(box.adapter) | beside)
    merged(box, "me/dora")
    assert {"tokenizer.json", "sub/vocab.txt"} < contents(box.out).keys()
    asked = {line.split("/", 5)[-1] for line in hub.requests("^HEAD .*/resolve/")}
    adapter = contents(box.adapter).keys()
    assert asked == contents(box.base).keys() | adapter | needed.keys()


def test_pickles_where_there_is_nothing_else(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("me/base", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    result = box.run("merge", box.adapter, "-b", "me/base", "-o", box.out)
    failed(result, "--allow-pickle", code=3)
    assert hub.requests("resolve/.*/pytorch_model.bin")


def test_private(hub: LoopbackHub, box: Sandbox, token: Login) -> None:
    stocked(hub, box)
    hub.repos["alice/dora"] = hub.repos.pop("me/dora")
    hub.repos["alice/dora"].name, hub.repos["alice/dora"].private = "alice/dora", True
    failed(box.run("inspect", "alice/dora"), "no model alice/dora", "no token was sent", "HF_TOKEN")
    token(READER)
    assert box.run("inspect", "alice/dora").code == 0


def test_stored_login(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("alice/dora", contents(box.adapter), private=True)
    Path(constants.HF_TOKEN_PATH).write_text(READER)
    assert box.run("inspect", "alice/dora").code == 0


def test_no_such_model(hub: LoopbackHub, box: Sandbox, token: Login) -> None:
    failed(box.run("inspect", "me/nothing"), "there is no model me/nothing on the Hub")
    token(READER)
    failed(box.run("inspect", "me/nothing"), "the token that was sent has no access")
    token("hf_canaryWRONG")
    result = box.run("inspect", "me/nothing")
    failed(result, "does not accept the token", "/settings/tokens")
    assert "hf_canaryWRONG" not in result.err


def test_gated(hub: LoopbackHub, box: Sandbox, token: Login) -> None:
    hub.create("me/dora", contents(box.adapter), gated=True)
    failed(box.run("inspect", "me/dora"), "me/dora is gated", f"{hub.url}/me/dora", "hf auth login")
    token(READER)
    failed(box.run("inspect", "me/dora"), "me/dora is gated", "Accept its terms")


def test_offline(hub: LoopbackHub, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    stocked(hub, box)
    merged(box, "me/dora")
    first = contents(box.out)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merged(box, "me/dora", "--overwrite")
    assert contents(box.out) == first
    failed(box.run("inspect", "me/other"), "me/other is not in the cache", "HF_HUB_OFFLINE")
    failed(box.run("inspect", "me/dora@v2"), "me/dora@v2 is not in the cache")
    assert not hub.log


def test_faults_that_pass(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("me/dora", contents(box.adapter))
    hub.faults += [
        Fault("GET /api/models/me/dora/tree", status=502),
        Fault("GET /cdn/", status=503),
    ]
    assert box.run("inspect", "me/dora").code == 0
    assert all(not fault.times for fault in hub.faults)


def test_faults_that_stay(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("me/dora", contents(box.adapter))
    hub.faults = [Fault("GET /cdn/", times=99, status=500)]
    failed(box.run("inspect", "me/dora"), "the Hub is out of order (status 500)")
    hub.faults = [Fault("GET /api/models/me/dora/tree", times=99, status=403)]
    failed(box.run("inspect", "me/dora"), "the token that was sent may not do this with me/dora")
    hub.faults = [Fault("GET /api/models/me/dora/tree", times=99)]
    failed(box.run("inspect", "me/dora"), "cannot be reached, or broke off", "HF_HUB_OFFLINE=1")


def test_a_flipped_bit_on_the_way(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("me/dora", contents(box.adapter))
    hub.faults = [Fault("GET /cdn/", flip=True)]
    failed(box.run("inspect", "me/dora"), "adapter_model.safetensors of me/dora was changed")
    assert box.run("inspect", "me/dora").code == 0  # it is not in the cache


def test_json(hub: LoopbackHub, box: Sandbox) -> None:
    result = box.run("inspect", "me/nothing", "--json")
    assert (result.code, result.out) == (6, "")
    assert json.loads(result.err)["exit_code"] == 6


def test_the_adapters_own_tokenizer(hub: LoopbackHub, box: Sandbox) -> None:
    """It goes with the result, as from a folder."""
    hub.create("someone/some-model", contents(box.base) | {"tokenizer.json": b"{}"})
    own = {"tokenizer.json": b'{"of": "the adapter"}'}
    hub.create("me/dora", contents(box.adapter) | own)
    merged(box, "me/dora")
    assert contents(box.out)["tokenizer.json"] == own["tokenizer.json"]

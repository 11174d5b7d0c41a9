"""A pipeline of several models as a base on the Hub, and as what is sent there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.errors import OutputError
from dora_convert.storage.shards import ShardWriter
from tests.cli.sandbox import Result
from tests.hub.conftest import PUSHING, contents, less_card
from tests.hub.server import LoopbackHub

pytestmark = PUSHING

FIXTURES = Path(__file__).parents[2] / "fixtures" / "diffusers"
WEIGHTS = "diffusion_pytorch_model.safetensors"
REPO = "alice/merged"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The transformer in two shards, another model in one, and what a Hub has beside them."""
    base = tmp_path / "pipeline"
    tensors = load_file(FIXTURES / "flux_base.safetensors")
    names = sorted(tensors)
    places = {
        name: f"diffusion_pytorch_model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors"
        for i, name in enumerate(names)
    }
    for part in ("transformer", "vae", "tokenizer"):
        (base / part).mkdir(parents=True)
    for file in set(places.values()):
        held = {name: tensors[name] for name in names if places[name] == file}
        save_file(held, base / "transformer" / file)
    index = {"metadata": {}, "weight_map": places}
    (base / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (base / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    save_file({"decoder.conv_in.weight": torch.ones(8, 64)}, base / "vae" / WEIGHTS)
    (base / "tokenizer" / "vocab.json").write_text("{}")
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    parts |= {"vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    return base


@pytest.fixture
def expected(base: Path, tmp_path: Path, run: Callable[..., Result]) -> dict[str, bytes]:
    """The files of the same merge from the disk."""
    out = tmp_path / "local"
    assert run("merge", FIXTURES / "flux_meta", "-b", base, "-o", out).code == 0
    return less_card(contents(out))


@pytest.fixture
def merge(
    hub: LoopbackHub, base: Path, tmp_path: Path, run: Callable[..., Result]
) -> Callable[..., Result]:
    # For other programs, and far larger than what is needed.
    more = {"transformer/model.onnx": b"0" * 1000, "flux1-dev.safetensors": b"0" * 1000}
    hub.create("someone/pipeline", contents(base) | more)
    hub.create("me/style", contents(FIXTURES / "flux_meta"))

    def merge(*options: object) -> Result:
        return run("merge", "me/style", "-b", "someone/pipeline", "-o", tmp_path / "out", *options)

    return merge


def fetched(hub: LoopbackHub) -> int:
    return len(hub.requests(r"GET /someone/pipeline/resolve/.*\.onnx|flux1-dev"))


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_from_the_hub(
    hub: LoopbackHub,
    merge: Callable[..., Result],
    expected: dict[str, bytes],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    result = merge(*options)
    assert result.code == 0, result.err
    assert less_card(contents(tmp_path / "out")) == expected
    assert fetched(hub) == 0


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_to_the_hub(
    hub: LoopbackHub,
    merge: Callable[..., Result],
    expected: dict[str, bytes],
    options: tuple[str, ...],
) -> None:
    result = merge("--push-to-hub", REPO, "-q", *options)
    assert result.code == 0, result.err
    assert less_card(hub.repos[REPO].files()) == expected


def test_a_look_at_it(
    hub: LoopbackHub, merge: Callable[..., Result], run: Callable[..., Result]
) -> None:
    assert merge("--dry-run").code == 0
    result = run("inspect", "me/style", "--base", "someone/pipeline")
    assert result.code == 0, result.err
    assert "(fits)" in result.out
    assert fetched(hub) == 0


def test_stopped_between_two_models(
    base: Path,
    tmp_path: Path,
    run: Callable[..., Result],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was finished in the folder of one stays, alone; the next run adds the rest."""
    out, files = tmp_path / "out", tmp_path / "out.partial" / "files"
    command = ("merge", FIXTURES / "flux_meta", "-b", base, "-o", out, "--workers", "1", "--json")
    seal, sealed = ShardWriter.seal, []

    def failing(writer: ShardWriter) -> str:
        if sealed:
            raise OutputError("the disk is full", where=str(writer.file))
        sealed.append(writer.file)
        return seal(writer)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "seal", failing)
        assert run(*command).code == 5
    assert not out.exists()
    kept = [path for path in files.rglob("*") if path.is_file()]
    assert kept == sealed
    assert {path for path in files.rglob("*") if path.is_dir()} == {sealed[0].parent}
    result = run(*command)
    assert (result.code, json.loads(result.out)["kept"]) == (0, 1), result.err
    assert less_card(contents(out)) == expected

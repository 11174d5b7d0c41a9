"""Results that go to the Hub when they are made, and their cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tests.cli.sandbox import Result, Sandbox
from tests.hub.conftest import CANARY, PUSHING, READER, contents, less_card, stocked
from tests.hub.server import Fault, LoopbackHub
from tests.hub.test_locate import Login, failed

REPO = "alice/model"

pytestmark = PUSHING

MAKING: dict[str, Sequence[str]] = {
    "merge": (),
    "to-lora": ("--rank", "4"),
    "convert": ("--to", "peft"),
}


@pytest.fixture
def make(hub: LoopbackHub, box: Sandbox) -> Callable[..., Result]:
    """A command on the Hub's adapter and base, its result pushed."""
    stocked(hub, box)
    hub.repos["someone/some-model"].put({"README.md": b"---\nlicense: mit\n---\n"})

    def make(command: str, *options: object, repo: str = REPO) -> Result:
        base = () if command == "convert" else ("--base", "someone/some-model")
        place = ("-o", box.out, "--push-to-hub", repo)
        return box.run(command, "me/dora", *base, *MAKING[command], *place, *options)

    return make


def data_of(card: bytes) -> dict[str, object]:
    found: dict[str, object] = ModelCard(card.decode()).data.to_dict()
    return found


@pytest.mark.parametrize("command", MAKING)
def test_made_and_pushed(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result], command: str
) -> None:
    result = make(command, "--private", "--commit-message", "made of me/dora")
    assert result.code == 0, result.err
    assert result.out == f"{box.out}\n{hub.url}/{REPO}\n"
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.titles[repo.refs["main"]] == "made of me/dora"
    assert less_card(repo.files()) == less_card(contents(box.out))
    for secret in (CANARY, str(box.root), "127.0.0.1"):
        assert secret not in repo.files()["README.md"].decode()
        assert secret not in result.err
    # What is there is what was made: sending it once more is nothing.
    again = box.run("push", box.out, REPO, "--json")
    assert (again.code, again.json["sent"]) == (0, []), again.err


@pytest.mark.parametrize("command", MAKING)
def test_as_json(hub: LoopbackHub, make: Callable[..., Result], command: str) -> None:
    report = make(command, "--json").json
    assert report["pushed"]["repo"] == REPO
    assert report["pushed"]["commit"] == hub.repos[REPO].refs["main"]
    assert "README.md" in report["pushed"]["sent"]


def test_branch_and_pull_request(hub: LoopbackHub, make: Callable[..., Result]) -> None:
    repo = hub.create(REPO)
    assert make("merge", "--revision", "v2").code == 0
    assert repo.files() == {}
    assert "model.safetensors" in repo.files("v2")
    theirs = hub.create("other/model", {"model.safetensors": b"theirs"})
    result = make("merge", "--create-pr", "--overwrite", repo="other/model")
    assert result.out.endswith(f"{hub.url}/other/model/discussions/1\n"), result.err
    assert theirs.files() == {"model.safetensors": b"theirs"}
    assert theirs.pulls == ["refs/pr/1"]


# ------------------------------------------------------------------- refused before any work


def refused(hub: LoopbackHub, box: Sandbox, result: Result, *words: str, code: int = 6) -> None:
    failed(result, *words, code=code)
    assert not box.out.exists()
    assert not hub.requests("/cdn/|/me/dora/|^(PUT|POST)")


@pytest.mark.parametrize("command", MAKING)
def test_no_login(
    hub: LoopbackHub,
    box: Sandbox,
    make: Callable[..., Result],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, box, make(command), "pushing needs a login")


def test_no_right(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result], token: Login
) -> None:
    hub.create("other/model")
    refused(hub, box, make("merge", repo="other/model"), "may not do this with other/model")
    refused(hub, box, make("merge", repo="other/new"), "may not make other/new", "that of alice")
    refused(hub, box, make("merge", "--create-pr", repo="other/new"), "no model other/new")
    token(READER)
    refused(hub, box, make("merge"), "may not make alice/model")
    hub.create(REPO)
    refused(hub, box, make("to-lora", "--rank", "8"), "may not do this with alice/model")
    token("hf_canaryWRONG")
    refused(hub, box, make("merge"), "does not accept the token")


def test_a_foreign_model(hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]) -> None:
    theirs = {"model.safetensors": b"theirs", "README.md": b"# Theirs\n"}
    repo = hub.create(REPO, theirs)
    refused(hub, box, make("merge"), "holds another model", "model.safetensors", "--yes", code=5)
    assert repo.files() == theirs
    result = make("merge", "--yes")
    assert result.code == 0, result.err
    assert less_card(repo.files()) == less_card(contents(box.out))
    assert "# Theirs\n" in repo.files()["README.md"].decode()


def test_options_that_need_it(box: Sandbox, hub: LoopbackHub) -> None:
    for option in (["--private"], ["--create-pr"], ["--revision", "x"], ["--yes"]):
        result = box.merge(*option)
        assert result.code == 2
        assert "goes with --push-to-hub" in result.err
    assert box.merge("--push-to-hub", REPO, "--create-pr", "--revision", "x").code == 2
    failed(box.merge("--push-to-hub", "model"), "is no name of a repository", code=3)
    assert not hub.log


def test_a_dry_run_sends_nothing(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]
) -> None:
    result = make("merge", "--dry-run")
    assert (result.code, result.out) == (0, "")
    assert REPO not in hub.repos
    assert not hub.requests("^(PUT|POST)")


def test_nothing_made_is_nothing_sent(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]
) -> None:
    """A plain LoRA stays as it is."""
    factors = {n: t for n, t in box.load_adapter().items() if "magnitude" not in n}
    box.save_adapter(factors)
    box.configure(box.adapter, use_dora=False)
    hub.create("me/dora", contents(box.adapter))
    place = ("-o", box.out, "--push-to-hub", REPO)
    result = box.run("to-lora", "me/dora", "--base", "someone/some-model", *place)
    assert (result.code, result.out) == (0, "")
    assert REPO not in hub.repos


# ---------------------------------------------------------------------------- when it fails late


def test_the_result_stays_where_the_push_fails(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]
) -> None:
    hub.faults = [Fault("POST .*/commit/", times=99, status=500)]
    result = make("merge", "-q")
    assert (result.code, result.out) == (6, "")
    assert f"The result is in {box.out}; to send it from there: " in result.err
    assert f"dora-convert push {box.out} {REPO}\n" in result.err
    assert hub.repos[REPO].files() == {}
    hub.faults = []
    assert box.run("push", box.out, REPO).code == 0
    assert less_card(hub.repos[REPO].files()) == less_card(contents(box.out))


def test_our_own_is_replaced_only_with_consent(
    hub: LoopbackHub, make: Callable[..., Result]
) -> None:
    assert make("merge").code == 0
    first = hub.repos[REPO].files()
    assert make("merge", "--overwrite").code == 0  # the same: nothing to replace
    assert len(hub.repos[REPO].commits) == 2
    result = make("merge", "--overwrite", "--scale", "0.5", "-q")
    failed(result, "model.safetensors would be replaced", "--yes", code=5)
    assert hub.repos[REPO].files() == first
    assert make("merge", "--overwrite", "--scale", "0.5", "--yes").code == 0
    assert hub.repos[REPO].files()["model.safetensors"] != first["model.safetensors"]


# ---------------------------------------------------------------------------------------- cards


def test_card_of_a_merge(hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]) -> None:
    assert make("merge").code == 0
    base = hub.repos["someone/some-model"].refs["main"]
    adapter = hub.repos["me/dora"].refs["main"]
    pushed = hub.repos[REPO].files()["README.md"]
    assert data_of(pushed) == {
        "base_model": "someone/some-model",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["dora-convert", "dora", "merged"],
        "license": "mit",
        "pipeline_tag": "text-generation",
    }
    text = pushed.decode()
    assert f"| base | someone/some-model@{base} |" in text
    assert f"| adapter | me/dora@{adapter} |" in text
    assert "| modules merged | 4 |" in text
    assert "rows of 4 modules |" in text
    assert f'from_pretrained("{REPO}")' in text
    assert "# model\n" in text
    own = contents(box.out)["README.md"].decode()
    assert "| modules merged | 4 |" in own
    assert "someone/some-model" in own
    sums = dict(
        line.split("  ")[::-1]
        for line in hub.repos[REPO].files()["SHA256SUMS"].decode().splitlines()
    )
    assert "README.md" in sums  # the one on the Hub, which is another
    for name, digest in sums.items():
        assert hashlib.sha256(hub.repos[REPO].files()[name]).hexdigest() == digest


def test_card_of_a_quantised_merge(hub: LoopbackHub, make: Callable[..., Result]) -> None:
    result = make("merge", "--quantize", "fp8_dynamic", "--json")
    assert result.code == 0, result.err
    report = result.json
    pushed = hub.repos[REPO].files()["README.md"]
    assert data_of(pushed)["base_model_relation"] == "quantized"
    kept = report["survival"]["total"]["kept"]
    assert f"| kept by the fp8_dynamic grid | {kept:.1%} of the update |" in pushed.decode()


def test_card_of_a_lora(hub: LoopbackHub, make: Callable[..., Result]) -> None:
    report = make("to-lora", "--json").json
    pushed = hub.repos[REPO].files()["README.md"]
    data = data_of(pushed)
    assert data["library_name"] == "peft"
    assert data["base_model_relation"] == "adapter"
    assert "lora" in data["tags"]  # type: ignore[operator]
    text = pushed.decode()
    rank = json.loads(hub.repos[REPO].files()["adapter_config.json"])["r"]
    assert f"| rank | {rank} |" in text
    assert f"| misses | {report['residual']:.2%} of the adapter's update |" in text


def test_card_of_a_lora_for_llama_cpp(hub: LoopbackHub, make: Callable[..., Result]) -> None:
    result = make("to-lora", "--to", "gguf")
    assert result.code == 0, result.err
    files = hub.repos[REPO].files()
    (name,) = (name for name in files if name.endswith(".gguf"))
    text = files["README.md"].decode()
    assert f"$ hf download {REPO} --local-dir model\n" in text
    assert f"--lora model/{name}\n" in text


def test_words_that_somebody_wrote_are_kept(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result]
) -> None:
    """On the Hub where the output has none of its own, else in the output."""
    repo = hub.create(REPO, {"README.md": b"---\nlanguage: de\n---\n# Mine\n\nWords.\n"})
    assert make("merge").code == 0
    text = repo.files()["README.md"].decode()
    assert "# Mine\n\nWords.\n" in text
    assert "language: de" in text
    assert "| modules merged | 4 |" in text
    own = box.out / "README.md"
    own.write_text(own.read_text() + "\nWritten after the merge.\n")
    assert box.run("push", box.out, REPO, "--yes").code == 0
    text = repo.files()["README.md"].decode()
    assert "Written after the merge." in text
    assert "| modules merged | 4 |" in text


@pytest.mark.parametrize("command", MAKING)
def test_cards_of_local_work_tell_of_no_place(box: Sandbox, command: str) -> None:
    base = () if command == "convert" else ("-b", box.base)
    made = box.run(command, box.adapter, *base, *MAKING[command], "-o", box.out)
    assert made.code == 0, made.err
    text = (box.out / "README.md").read_text()
    assert str(box.root) not in text
    assert box.root.name not in text
    assert "base_model" not in data_of(text.encode())
    first = (box.out / "README.md").read_bytes()
    again = box.root / "elsewhere"
    assert box.run(command, box.adapter, *base, *MAKING[command], "-o", again).code == 0
    assert (again / "README.md").read_bytes() == first


def test_xet(
    hub: LoopbackHub, box: Sandbox, make: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.xet_store = box.root / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert make("merge").code == 0
    assert less_card(hub.repos[REPO].files()) == less_card(contents(box.out))
    assert not hub.requests("/lfs/")


def test_failures_are_json_too(hub: LoopbackHub, make: Callable[..., Result]) -> None:
    result = make("merge", "--json", repo="other/new")
    assert (result.code, result.out) == (6, "")
    assert json.loads(result.err)["exit_code"] == 6
    assert Path(constants.HF_HUB_CACHE).exists() is False

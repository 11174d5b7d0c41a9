"""Pushes by the real client. What counts is what the Hub holds afterwards."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from dora_convert import api
from dora_convert.errors import OutputError
from dora_convert.hub.push import Changes
from tests.cli.sandbox import Result, Sandbox, make_base
from tests.hub.conftest import CANARY, PUSHING, READER, contents, less_card
from tests.hub.server import Fault, LoopbackHub
from tests.hub.test_locate import failed
from tests.reliability.nursery import Nursery

REPO = "alice/model"

pytestmark = PUSHING


@pytest.fixture
def push(hub: LoopbackHub, box: Sandbox) -> Callable[..., Result]:
    """Push the base, which is as good as a merge of it; the licence of its own base is known."""
    hub.create("someone/origin", {"README.md": b"---\nlicense: apache-2.0\n---\n"})

    def push(*options: object, folder: Path = box.base, repo: str = REPO) -> Result:
        return box.run("push", folder, repo, "--base", "someone/origin", *options)

    return push


def test_push_to_a_new_repository(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    box.split()
    before = contents(box.base)
    result = push("--private")
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    repo = hub.repos[REPO]
    assert repo.private
    assert less_card(repo.files()) == before
    assert len(repo.commits) == 2  # the Hub's own, and ours
    assert contents(box.base) == before
    card = repo.files()["README.md"].decode()
    assert "base_model: someone/origin\n" in card
    assert "license: apache-2.0\n" in card
    for secret in (CANARY, str(box.root), "127.0.0.1"):
        assert secret not in card + result.err


def test_large_files_first_and_one_commit(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    assert push().code == 0
    commit = hub.log.index(f"POST /api/models/{REPO}/commit/main")
    puts = [i for i, line in enumerate(hub.log) if line.startswith("PUT /lfs/")]
    assert puts
    assert max(puts) < commit
    assert len(hub.requests("/commit/")) == 1


def test_once_more_is_nothing(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    assert push().code == 0
    commits, hub.log[:] = dict(hub.repos[REPO].commits), []
    result = push()
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n")
    assert "sent 0 files" in result.err
    assert hub.repos[REPO].commits == commits
    assert not hub.requests("^(PUT|POST)")


def test_another_model_is_not_overwritten(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    box.split()
    old = contents(box.base)
    repo = hub.create(REPO, {**old, "LICENSE": b"mine", "notes.txt": b"x"})
    single = box.root / "single"
    single.mkdir()
    box.base = single
    box.save_base(make_base(seed=1))
    (single / "config.json").write_text('{"model_type": "other"}')
    failed(
        push(folder=single),
        f"{REPO} holds another model",
        "config.json would be replaced",
        "model-00001-of-00002.safetensors would be removed",
        "--yes",
        code=5,
    )
    assert repo.files() == {**old, "LICENSE": b"mine", "notes.txt": b"x"}
    assert not hub.requests("^(PUT|POST)")
    assert push("--yes", folder=single).code == 0
    assert less_card(repo.files()) == {
        **contents(single),
        "LICENSE": b"mine",
        "notes.txt": b"x",
    }
    assert len(repo.commits) == 3


def test_dry_run(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    result = push("-n")
    assert (result.code, result.out) == (0, "")
    assert "files: README.md, config.json, model.safetensors" in result.err
    assert REPO not in hub.repos
    assert not hub.requests("^(PUT|POST)")
    report = push("-n", "--json").json
    assert report["sent"] == ["README.md", "config.json", "model.safetensors"]
    assert report["dry_run"] is True


def test_branch(hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]) -> None:
    repo = hub.create(REPO, {"config.json": b"{}"})
    result = push("--revision", "v2", "--yes", "--commit-message", "second")
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}/tree/v2\n"), result.err
    assert less_card(repo.files("v2")) == contents(box.base)
    assert repo.files() == {"config.json": b"{}"}
    assert repo.titles[repo.refs["v2"]] == "second"


def test_pull_request(hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]) -> None:
    repo = hub.create("someone/theirs", {"config.json": b"{}"})
    failed(push("--yes", repo="someone/theirs"), "may not do this", "--create-pr")
    assert repo.files() == {"config.json": b"{}"}
    result = push("--create-pr", repo="someone/theirs")
    assert (result.code, result.out) == (0, f"{hub.url}/someone/theirs/discussions/1\n"), result.err
    assert repo.pulls == ["refs/pr/1"]
    assert less_card(repo.files("refs/pr/1")) == contents(box.base)
    assert repo.files() == {"config.json": b"{}"}
    assert push("--create-pr", "--revision", "x").code == 2


@pytest.mark.parametrize("is_cut", [False, True])
def test_one_pull_request_only(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result], is_cut: bool
) -> None:
    """The answer to the first is lost, and what it made is found. Another is another."""
    repo = hub.create("someone/theirs", {"config.json": b"{}"})
    address = f"{hub.url}/someone/theirs/discussions/1\n"
    if is_cut:  # for good: nothing can be asked afterwards
        hub.faults = [Fault("POST .*/commit/", late=True, last=True)]
        failed(push("--create-pr", repo="someone/theirs"), "cannot be reached, or broke off")
        hub.is_down = False
    else:
        hub.faults = [Fault("POST .*/commit/", late=True)]
        assert push("--create-pr", repo="someone/theirs").out == address
    assert repo.pulls == ["refs/pr/1"]
    # Somebody else's, of the same title and contents, is not ours.
    repo.refs["refs/pr/2"], repo.authors["refs/pr/2"] = repo.refs["refs/pr/1"], "bob"
    result = push("--create-pr", repo="someone/theirs")
    assert (result.code, result.out) == (0, address), result.err
    assert "sent 0 files" in result.err
    assert len(repo.pulls) == 2
    assert push("--create-pr", "--commit-message", "x", repo="someone/theirs").code == 0
    (box.base / "more.txt").write_text("more")
    assert push("--create-pr", repo="someone/theirs").code == 0
    assert len(repo.pulls) == 4
    assert "more.txt" in repo.files("refs/pr/4")


def test_changed_by_somebody_else_meanwhile(
    hub: LoopbackHub, push: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_convert.api import pushing  # noqa: PLC0415

    repo = hub.create(REPO)
    look = pushing.look_at

    def late(*args: object) -> object:
        target = look(*args)  # type: ignore[arg-type]
        repo.put({"theirs.txt": b"x"})
        return target

    monkeypatch.setattr(pushing, "look_at", late)
    failed(push(), f"{REPO} was changed on the Hub meanwhile; nothing was pushed")
    assert repo.files() == {"theirs.txt": b"x"}


def test_lost_answer_to_the_commit(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    hub.faults = [Fault("POST .*/commit/", late=True)]
    result = push()
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    assert less_card(hub.repos[REPO].files()) == contents(box.base)
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("PUT /lfs/", times=99, status=500), "out of order (status 500)"),
        (Fault("POST .*/commit/", times=99, status=500), "out of order (status 500)"),
        (Fault("POST .*/commit/", times=99), "cannot be reached, or broke off"),
        (Fault("POST .*/preupload/", times=99, status=429), "too many requests"),
        (Fault("POST .*/preupload/", times=99, status=403), "may not do this with alice/model"),
    ],
    ids=lambda value: value.match if isinstance(value, Fault) else "",
)
def test_a_failure_leaves_nothing_half(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result], fault: Fault, words: str
) -> None:
    hub.create(REPO)
    hub.faults = [fault]
    failed(push(), words)
    assert hub.repos[REPO].files() == {}
    hub.faults = []
    assert push().code == 0  # and then goes on
    assert less_card(hub.repos[REPO].files()) == contents(box.base)


def test_the_hub_holds_something_else(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    class Forgetful(dict[str, bytes]):
        def __getitem__(self, oid: str) -> bytes:
            return super().__getitem__(oid)[:-1] + b"!"

    hub.objects = Forgetful()
    failed(push(), "holds other files than were sent", "model.safetensors: sha256", code=7)


@pytest.mark.parametrize("place", ["PUT /lfs/", "POST .*/preupload/", "POST .*/commit/"])
def test_killed_and_started_again(
    hub: LoopbackHub, box: Sandbox, nursery: Nursery, push: Callable[..., Result], place: str
) -> None:
    box.split()
    repo = hub.create(REPO)
    hub.faults = [Fault(place, stall=True)]
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(box.root / "home"), "HF_TOKEN": CANARY}
    nursery.killed_once(
        lambda: hub.requests(place),
        *("push", box.base, REPO),
        environment=os.environ | variables | {"HF_HUB_DISABLE_XET": "1"},
    )
    hub.released.set()
    assert repo.files() == {}
    assert push().code == 0
    assert less_card(repo.files()) == contents(box.base)
    assert len(repo.commits) == 2


class Terminal(io.StringIO):
    """Where somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("n\n", 5), ("\n", 5), ("", 130)])
def test_the_question_on_a_terminal(
    hub: LoopbackHub,
    push: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    code: int,
) -> None:
    repo = hub.create(REPO, {"config.json": b"{}"})
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    result = push()
    assert result.code == code, result
    assert "config.json would be replaced" in result.err
    assert result.out == (f"{hub.url}/{REPO}\n" if code == 0 else "")
    assert (repo.files()["config.json"] == b"{}") == (code != 0)
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert push("--json").code == (0 if code == 0 else 5)  # a program is not asked


@pytest.mark.parametrize("answer", [True, False])
def test_consent(hub: LoopbackHub, box: Sandbox, answer: bool) -> None:
    repo = hub.create(REPO, {"config.json": b"{}", "model.safetensors.index.json": b"{}"})
    asked = []

    def consent(changes: Changes) -> bool:
        asked.append((changes.replaced, changes.removed))
        return answer

    if answer:
        report = api.push(box.base, REPO, consent=consent)
        assert report.commit == repo.refs["main"]
        assert report.removed == ("model.safetensors.index.json",)
        assert less_card(repo.files()) == contents(box.base)
    else:
        with pytest.raises(OutputError):
            api.push(box.base, REPO, consent=consent)
        assert len(repo.files()) == 2
    assert asked == [(("config.json",), ("model.safetensors.index.json",))]


def test_no_login(
    hub: LoopbackHub, push: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    failed(push(), "pushing needs a login", "hf auth login")
    assert not hub.log


def test_a_token_that_only_reads(
    hub: LoopbackHub, push: Callable[..., Result], token: Callable[[str], None]
) -> None:
    token(READER)
    failed(push(), "may not do this with alice/model", "--create-pr")
    assert REPO not in hub.repos


def test_public_stays_public(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    hub.create(REPO)
    failed(push("--private"), f"{REPO} exists and is public")
    assert hub.repos[REPO].files() == {}


@pytest.mark.parametrize("repo", ["model", "alice/model@main", "hf://alice/model", "a/b/c", ""])
def test_bad_names(hub: LoopbackHub, push: Callable[..., Result], repo: str) -> None:
    failed(push(repo=repo), "is no name of a repository", code=3)
    assert not hub.log


def test_what_is_no_output(hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]) -> None:
    empty = box.root / "empty"
    empty.mkdir()
    failed(push(folder=empty), "holds no weights", code=3)
    failed(push(folder=box.weights), "is a file", code=3)
    failed(push(folder=box.root / "none"), "there is no folder at", code=3)
    (box.base / "link.txt").symlink_to("/etc/passwd")
    failed(push(), "link to a file outside", code=3)
    assert not hub.log


def test_hidden_files_stay_here(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    (box.base / ".cache").mkdir()
    (box.base / ".cache" / "x").write_text("x")
    (box.base / ".env").write_text(CANARY)
    assert push().code == 0
    assert hub.repos[REPO].files().keys() == {"README.md", "config.json", "model.safetensors"}


def test_an_existing_card_is_kept(hub: LoopbackHub, push: Callable[..., Result]) -> None:
    card = "---\nlicense: mit\nlanguage: de\n---\n# Mine\n\nWords.\n"
    repo = hub.create(REPO, {"README.md": card.encode()})
    assert push().code == 0
    text = repo.files()["README.md"].decode()
    assert text.startswith("---\nlicense: mit\nlanguage: de\nbase_model: someone/origin\n")
    assert "# Mine\n\nWords.\n" in text
    assert "apache" not in text


def test_an_adapter(hub: LoopbackHub, box: Sandbox) -> None:
    box.configure(box.adapter, base_model_name_or_path="/home/me/secret-place")
    result = box.run("push", box.adapter, REPO)
    assert result.code == 0, result.err
    assert "the card names no base model: /home/me/secret-place is not one of the Hub" in result.err
    files = hub.repos[REPO].files()
    assert less_card(files) == contents(box.adapter)
    assert "secret-place" not in files["README.md"].decode()


def test_xet(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's newer storage, by its own client and a store in a folder."""
    hub.xet_store = box.root / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push().code == 0
    assert less_card(hub.repos[REPO].files()) == contents(box.base)
    assert "sent 0 files" in push().err
    result = box.run("merge", box.adapter, "--base", REPO, "-o", box.out)
    assert result.code == 0, result.err
    assert hub.requests("xet-write-token")
    assert hub.requests("xet-read-token")
    assert not hub.requests("/lfs/|/cdn/")


def test_a_base_that_is_not_there(hub: LoopbackHub, box: Sandbox) -> None:
    result = box.run("push", box.base, REPO, "--base", "someone/nothing")
    assert result.code == 0, result.err
    assert "names no base model: someone/nothing is not one of the Hub" in result.err
    assert "base_model" not in hub.repos[REPO].files()["README.md"].decode()


def test_repositories_of_others(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    failed(push("--create-pr", repo="someone/nothing"), "there is no model someone/nothing")
    failed(push(repo="someone/nothing"), "may not do this with someone/nothing")
    hub.create("someone/theirs", private=True)
    failed(push(repo="someone/theirs"), "may not do this with someone/theirs")


@pytest.mark.parametrize("front", ["license: [", "- a", "license: unheard-of"])
def test_metadata_that_the_hub_refuses(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result], front: str
) -> None:
    (box.base / "README.md").write_text(f"---\n{front}\n---\n")
    hub.create(REPO)
    hub.faults = [Fault("validate-yaml", status=400)]
    failed(push(), "does not accept the metadata of README.md", code=3)
    assert hub.repos[REPO].files() == {}
    assert not hub.requests("PUT /lfs/")  # told before the weights are sent


def test_where_the_pushed_model_is_read_again(
    hub: LoopbackHub, box: Sandbox, push: Callable[..., Result]
) -> None:
    assert push("--private").code == 0
    result = box.run("merge", box.adapter, "--base", REPO, "-o", box.out)
    assert result.code == 0, result.err
    sums = {hashlib.sha256(data).hexdigest() for data in hub.repos[REPO].files().values()}
    assert hashlib.sha256(box.weights.read_bytes()).hexdigest() in sums

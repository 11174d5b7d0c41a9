"""What only a process of its own shows: what is imported and opened, and what the environment says.

In these processes every socket, and every import of the Hub's client, which the one that they are
forked from has not imported, is seen by an audit hook of the interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import click
import pytest

from dora_convert.cli import cli
from tests.cli.sandbox import Sandbox
from tests.cli.test_weighting import texts
from tests.hub.conftest import CANARY, READER, contents
from tests.hub.server import Fault, LoopbackHub
from tests.reliability.nursery import Ended, Nursery

__all__ = ["texts"]

WATCHED = """
import sys
def watch(event, args):
    if event.startswith("socket.") or (event == "import" and args[0] == "huggingface_hub"):
        sys.__stderr__.write(f"SEEN {event} {args[0]}\\n")
sys.addaudithook(watch)
from dora_convert.cli import main
main()
"""


Run: TypeAlias = Callable[..., Ended]


@pytest.fixture
def run(nursery: Nursery) -> Run:
    """The program, in an environment that names no Hub but that of `variables`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}

    def run(*arguments: object, code: str = WATCHED, **variables: str) -> Ended:
        return nursery.run(*arguments, code=code, environment=kept | variables)

    return run


def local_work(box: Sandbox) -> Iterator[list[object]]:
    """Every command on folders, but for `push` and for what transformers runs."""
    base = ("--base", box.base)
    rank = ("--rank", "4", "-o")
    yield ["inspect", box.adapter, *base]
    yield ["merge", box.adapter, *base, "-o", box.out, "--dry-run"]
    yield ["merge", box.adapter, *base, "-o", box.out]
    yield ["merge", box.adapter, *base, "-o", box.root / "coded", "--quantize", "fp8_dynamic"]
    yield ["verify", box.out, "--adapter", box.adapter, *base]
    yield ["to-lora", box.adapter, *base, *rank, box.root / "lora"]
    yield ["to-lora", box.adapter, *base, *rank, box.root / "gguf", "--to", "gguf"]
    yield ["convert", box.adapter, "--to", "peft", "-o", box.root / "peft"]
    yield ["bench", box.adapter, *base, "--sample", "1kB", "--folder", box.root]
    yield ["plot", box.adapter, *base, "-o", box.root / "plot.svg"]
    yield ["formats"]
    yield ["completion", "bash"]


def test_all_local_commands_are_here(box: Sandbox) -> None:
    tried = {str(arguments[0]) for arguments in local_work(box)}
    assert tried == set(cli.list_commands(click.Context(cli))) - {"push", "stats"}


def test_local_work_knows_no_hub(run: Run, box: Sandbox) -> None:
    for arguments in local_work(box):
        done = run(*arguments)
        assert done.code == 0, done.err
        assert "SEEN" not in done.err, arguments


def test_statistics_open_no_socket(run: Run, box: Sandbox, texts: Path) -> None:
    """Though transformers, which they are collected with, brings the Hub's client along."""
    file = box.root / "stats.safetensors"
    done = run("stats", box.base, "--text", texts, "-o", file)
    assert done.code == 0, done.err
    assert file.exists()
    for event in ("connect", "getaddrinfo", "sendto"):
        assert f"SEEN socket.{event}" not in done.err


@pytest.mark.slow
def test_local_work_without_a_network(box: Sandbox) -> None:
    """In a namespace that has no interface, so that nothing could be sent by another library."""
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this system makes no network namespaces")
    for arguments in local_work(box):
        command = [*alone, sys.executable, "-m", "dora_convert", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_watch_sees(run: Run, hub: LoopbackHub, box: Sandbox) -> None:
    done = run("inspect", "me/nothing", HF_ENDPOINT=hub.url, HF_HOME=str(box.root / "home"))
    assert done.code == 6
    assert "SEEN import huggingface_hub" in done.err
    assert "SEEN socket.connect" in done.err


def test_the_environment_is_obeyed(run: Run, hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("alice/dora", contents(box.adapter), private=True)
    home = box.root / "home"
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    done = run("inspect", "alice/dora", **places)
    assert done.code == 6
    assert "no token was sent" in done.err
    done = run("inspect", "alice/dora", **places, HF_TOKEN=READER)
    assert done.code == 0, done.err
    assert list((home / "hub").glob("models--alice--dora/snapshots/*/adapter_model.safetensors"))
    assert not hub.requests("agent-harnesses")  # the client's telemetry
    hub.log.clear()
    done = run("inspect", "alice/dora", **places, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.err
    assert not hub.log
    done = run("inspect", "alice/dora@other", **places, HF_HUB_OFFLINE="1")
    assert done.code == 6
    assert "HF_HUB_OFFLINE" in done.err


def test_no_line_but_the_error(run: Run, hub: LoopbackHub, box: Sandbox) -> None:
    """Neither the client's own warnings nor its bars are in what a program reads."""
    hub.create("me/dora", contents(box.adapter))
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(box.root / "home")}
    done = run("inspect", "me/dora@none", "--json", **places)
    lines = [line for line in done.err.splitlines() if not line.startswith("SEEN")]
    assert json.loads("\n".join(lines))["exit_code"] == 6
    done = run("inspect", "me/dora", "--json", **places)
    assert json.loads(done.out)["modules"] == 4
    assert not [line for line in done.err.splitlines() if not line.startswith("SEEN")]


def test_the_token_is_nowhere(run: Run, hub: LoopbackHub, box: Sandbox) -> None:
    """Not in what is printed nor in any file, whatever the Hub answers."""
    home = box.root / "home"
    hub.create("alice/dora", contents(box.adapter), private=True)
    hub.create("alice/base", contents(box.base), private=True)
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY, "HF_DEBUG": "1"}
    places["HF_HUB_DISABLE_XET"] = "1"
    inputs = ("alice/dora", "--base", "alice/base", "--verbose")
    sent = ("--push-to-hub", "alice/new", "--yes", "--overwrite", "-o", box.out)
    streamed = ("--push-to-hub", "alice/streamed", "-o", box.root / "streamed")
    hub.faults = [Fault("POST .*/other/commit/", times=99, status=500)]
    for code, *arguments in (
        (0, "inspect", *inputs),
        (0, "inspect", "alice/dora", "--json"),
        (6, "inspect", "alice/none", "--verbose"),
        (0, "merge", *inputs, *sent),
        (6, "merge", *inputs, "--push-to-hub", "alice/other", "-o", box.root / "other"),
        (6, "merge", *inputs, "--push-to-hub", "someone/theirs", "-o", box.root / "none"),
        (0, "merge", *inputs, "--low-disk", *streamed),
        (0, "verify", box.out, "--adapter", "alice/dora", "--base", "alice/base", "--verbose"),
        (0, "to-lora", *inputs, *sent, "--rank", "4"),
        (0, "convert", *inputs, *sent, "--to", "peft"),
        (0, "push", box.adapter, "alice/more", "--verbose"),
        (6, "push", box.adapter, "someone/theirs", "--json"),
    ):
        done = run(*arguments, **places)
        assert done.code == code, (arguments, done.err)
        assert CANARY not in done.out + done.err, arguments
    assert hub.repos.keys() > {"alice/new", "alice/more", "alice/streamed"}
    everything = b"".join(contents(box.root).values())
    pushed = b"".join(
        data
        for repo in hub.repos.values()
        for tree in repo.commits.values()
        for data in tree.values()
    )
    assert CANARY.encode() not in everything + pushed
    assert not hub.strangers  # nor was it sent to the host of the contents


def test_no_option_takes_a_token() -> None:
    """The list of processes, and the shell's history, would have it."""
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert not [opt for param in command.params for opt in param.opts if "token" in opt]


def test_ranges_keep_the_token_too(run: Run, hub: LoopbackHub, box: Sandbox) -> None:
    home = box.root / "home"
    hub.create("alice/base", contents(box.base), private=True)
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY, "HF_DEBUG": "1"}
    places["HF_HUB_DISABLE_XET"] = "1"
    for faults in (
        [],
        [Fault("GET /cdn/", whole=True)],
        [Fault("GET /cdn/", times=99, status=403)],
    ):
        hub.faults = faults
        code = "from dora_convert.hub import partly\npartly._SMALL = 0\n" + WATCHED
        done = run("inspect", box.adapter, "--base", "alice/base", "--verbose", code=code, **places)
        assert done.code == (6 if faults else 0), done.err
        assert CANARY not in done.out + done.err
    assert not hub.strangers
    assert CANARY.encode() not in b"".join(contents(box.root).values())


def test_help_of_push_is_light(run: Run) -> None:
    done = run("push", "--help")
    assert done.code == 0
    assert "SEEN" not in done.err


def test_a_name_that_is_a_folder_opens_no_socket(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "dora").symlink_to(box.adapter)
    kept = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", WATCHED, "inspect", "me/dora"]
    done = subprocess.run(
        command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "SEEN" not in done.stderr

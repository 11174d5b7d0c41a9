"""What only a process of its own shows: what is imported and opened, and what the environment says.

In these processes every import and every socket is seen by an audit hook of the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cli.sandbox import Sandbox
from tests.hub.conftest import CANARY, READER, contents
from tests.hub.server import LoopbackHub

WATCHED = """
import sys
def watch(event, args):
    if event.startswith("socket.") or (event == "import" and args[0] == "huggingface_hub"):
        sys.__stderr__.write(f"SEEN {event} {args[0]}\\n")
sys.addaudithook(watch)
from dora_convert.cli import main
main()
"""


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, in an environment that names no Hub but that of `variables`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(
        command, env=kept | variables, capture_output=True, text=True, check=False, timeout=120
    )


def test_local_work_knows_no_hub(box: Sandbox) -> None:
    lora = box.root / "lora"
    for arguments in (
        ["inspect", box.adapter, "--base", box.base],
        ["merge", box.adapter, "--base", box.base, "-o", box.out],
        ["verify", box.out, "--adapter", box.adapter, "--base", box.base],
        ["to-lora", box.adapter, "--base", box.base, "--rank", "4", "-o", lora],
        ["convert", box.adapter, "--to", "peft", "-o", box.root / "peft"],
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert "SEEN" not in done.stderr


def test_the_watch_sees(hub: LoopbackHub, box: Sandbox) -> None:
    done = run("inspect", "me/nothing", HF_ENDPOINT=hub.url, HF_HOME=str(box.root / "home"))
    assert done.returncode == 6
    assert "SEEN import huggingface_hub" in done.stderr
    assert "SEEN socket.connect" in done.stderr


def test_the_environment_is_obeyed(hub: LoopbackHub, box: Sandbox) -> None:
    hub.create("alice/dora", contents(box.adapter), private=True)
    home = box.root / "home"
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    done = run("inspect", "alice/dora", **places)
    assert done.returncode == 6
    assert "no token was sent" in done.stderr
    done = run("inspect", "alice/dora", **places, HF_TOKEN=READER)
    assert done.returncode == 0, done.stderr
    assert list((home / "hub").glob("models--alice--dora/snapshots/*/adapter_model.safetensors"))
    assert not hub.requests("agent-harnesses")  # the client's telemetry
    hub.log.clear()
    done = run("inspect", "alice/dora", **places, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.log
    done = run("inspect", "alice/dora@other", **places, HF_HUB_OFFLINE="1")
    assert done.returncode == 6
    assert "HF_HUB_OFFLINE" in done.stderr


def test_no_line_but_the_error(hub: LoopbackHub, box: Sandbox) -> None:
    """Neither the client's own warnings nor its bars are in what a program reads."""
    hub.create("me/dora", contents(box.adapter))
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(box.root / "home")}
    done = run("inspect", "me/dora@none", "--json", **places)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("SEEN")]
    assert json.loads("\n".join(lines))["exit_code"] == 6
    done = run("inspect", "me/dora", "--json", **places)
    assert json.loads(done.stdout)["modules"] == 4
    assert not [line for line in done.stderr.splitlines() if not line.startswith("SEEN")]


def test_the_token_is_nowhere(hub: LoopbackHub, box: Sandbox) -> None:
    """Not in what is printed nor in any file, whatever the Hub answers."""
    home = box.root / "home"
    hub.create("alice/dora", contents(box.adapter), private=True)
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY, "HF_DEBUG": "1"}
    for arguments in (
        ["inspect", "alice/dora", "--verbose"],
        ["inspect", "alice/none", "--verbose"],
        ["push", box.adapter, "alice/new", "--verbose"],
        ["push", box.adapter, "someone/theirs", "--json"],
    ):
        done = run(*arguments, **places)
        assert done.returncode in (0, 6), done.stderr
        assert CANARY not in done.stdout + done.stderr
    assert "alice/new" in hub.repos
    everything = b"".join(contents(box.root).values())
    pushed = b"".join(hub.repos["alice/new"].files().values())
    assert CANARY.encode() not in everything + pushed


def test_help_of_push_is_light() -> None:
    done = run("push", "--help")
    assert done.returncode == 0
    assert "SEEN" not in done.stderr


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

"""The real client against the loopback Hub; nothing here leaves the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from dora_convert.hub import client
from tests.cli.conftest import box, run
from tests.cli.sandbox import Sandbox
from tests.hub.server import LoopbackHub

__all__ = [
    "CANARY",
    "PUSHING",
    "READER",
    "box",
    "contents",
    "hub",
    "less_card",
    "results",
    "run",
    "token",
    "undefine_last_layer",
]

CANARY, READER = "hf_canaryWRITE", "hf_canaryREAD"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub of our own, an empty cache, nobody logged in."""
    # What the client takes from the environment when it is imported, which it was long ago.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))
    # The client waits up to half a minute before it gives up.
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Log in for what follows."""
    return lambda value: monkeypatch.setenv("HF_TOKEN", value)


# For tests that push: as somebody who may. The warning is of the client's own way with its library.
PUSHING = [
    pytest.mark.usefixtures("_logged_in"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture
def _logged_in(token: Callable[[str], None]) -> None:
    token(CANARY)


def undefine_last_layer(box: Sandbox, layers: int) -> None:
    """Give the adapter a magnitude that is no number, in the last layer of the base."""
    tensors = box.load_adapter()
    path = f"base_model.model.model.layers.{layers - 1}.self_attn.q_proj.lora_magnitude_vector"
    tensors[path][3] = float("nan")
    box.save_adapter(tensors)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def results(folder: Path) -> dict[str, bytes]:
    """All files of an output but its card, which says where adapter and base are from."""
    return less_card(contents(folder))


def less_card(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files but the card, and the list of hashes without the card's line."""
    left = {name: data for name, data in files.items() if name != "README.md"}
    if "SHA256SUMS" in left:
        lines = left["SHA256SUMS"].splitlines(keepends=True)
        left["SHA256SUMS"] = b"".join(li for li in lines if not li.endswith(b"  README.md\n"))
    return left


def stocked(server: LoopbackHub, box: Sandbox) -> None:
    """`me/dora` and its base `someone/some-model`, as the sandbox has them."""
    server.create("me/dora", contents(box.adapter))
    server.create("someone/some-model", contents(box.base))

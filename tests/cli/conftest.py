from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from dora_convert.cli import cli
from dora_convert.cli.boundary import run as boundary
from tests.cli.sandbox import Result, Sandbox


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process, through the boundary that the program has."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = boundary(cli, [str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def box(tmp_path: Path, run: Callable[..., Result]) -> Sandbox:
    return Sandbox(tmp_path, run)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE, which the client reads when it is imported, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

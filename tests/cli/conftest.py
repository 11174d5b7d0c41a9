from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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

"""Inputs that were hard once, or are near to such: replayed, and none is a surprise."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
FILES = sorted(file for file in CORPUS.glob("*/*") if file.is_file())
# All others are refused.
TAKEN = {
    "header/usual",
    "header/odd",
    "header/null",
    "index/usual",
    "model_config/usual",
    "model_config/nested",
    "model_config/section",
    "peft_config/pattern",
    "peft_config/usual",
    "pickle/legacy",
    "pickle/zip",
    "quantized/hqq",
    "quantized/modelopt",
    "quantized/torchao",
    "spec/peft",
}


def test_every_parser_has_files() -> None:
    assert {file.parent.name for file in FILES} == TARGETS.keys()
    assert sum(file.stat().st_size for file in FILES) < 1 << 20


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_replay(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = TARGETS[file.parent.name](file.read_bytes(), tmp_path)
    assert taken == (f"{file.parent.name}/{file.name}" in TAKEN)
    assert not (tmp_path / "ran-by-pickle").exists()

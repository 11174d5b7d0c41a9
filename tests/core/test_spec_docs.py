"""The descriptions in the documentation are ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dora_convert.core.spec.parsing import parse
from dora_convert.formats import example_spec, formats

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "custom-formats.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block: str) -> None:
    assert parse(block, name="mine", file="mine.toml").linear


def test_every_key_of_the_example_is_explained() -> None:
    """By its name in the text, unless the example's own comment is all there is to it."""
    keys = set(re.findall(r"^\[*([a-z_]+)\b.*[\]=]", example_spec(), re.MULTILINE))
    assert {"tensors", "scale", "rename", "embedding"} <= keys
    plain = {"title", "base_model", "note", "names", "why", "trainer", "base", "lora"}
    assert {key for key in keys - plain if key not in TEXT} == set()


def test_built_in_descriptions_name_their_source() -> None:
    files = sorted((ROOT / "dora_convert" / "formats").glob("[!_]*.toml"))
    assert {file.stem for file in files} <= set(formats.names())
    assert len(files) >= 6
    for file in files:
        assert re.search(r"^# Source: \S+", file.read_text(), re.MULTILINE), file.name

from __future__ import annotations

from pathlib import Path

import pytest

from dora_convert.hub.refs import Ref, parse_ref

READ = {
    "org/name": Ref("org/name"),
    "org/name@v1.0": Ref("org/name", "v1.0"),
    "org/na.me-2@refs/pr/3": Ref("org/na.me-2", "refs/pr/3"),
    "org/name@feature/x": Ref("org/name", "feature/x"),
    "hf://org/name": Ref("org/name"),
    "hf://org/name/": Ref("org/name"),
    "hf://org/name@main": Ref("org/name", "main"),
    "hf://org/name/checkpoint-500": Ref("org/name", None, "checkpoint-500"),
    "hf://org/name@4f2c1e9/a/b": Ref("org/name", "4f2c1e9", "a/b"),
    "hf://org/name@refs/pr/3/a": Ref("org/name", "refs/pr/3", "a"),
}
NONE = [
    "name",
    "./org/name",
    "/org/name",
    "../org/name",
    "org/name/sub",
    "org/name@",
    "org/../name",
    "hf://name",
    "hf://org/name/../other",
    "hf:///org/name",
    "",
    ".",
    "org/na me",
]


@pytest.mark.parametrize("text", READ)
def test_refs(text: str) -> None:
    assert parse_ref(text) == READ[text]
    # As a command and a Python user hand it on.
    assert parse_ref(str(Path(text))) == READ[text]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_ref(text: str) -> None:
    assert parse_ref(text) is None


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        (Ref("a/b"), "a/b"),
        (Ref("a/b", "v1"), "a/b@v1"),
        (Ref("a/b", None, "sub/x"), "a/b/sub/x"),
        (Ref("a/b", "v1", "sub"), "a/b@v1/sub"),
    ],
)
def test_how_it_is_shown(ref: Ref, text: str) -> None:
    assert str(ref) == text

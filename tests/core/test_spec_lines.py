from __future__ import annotations

import tomllib

import pytest

from dora_convert.core.spec.lines import line_of, lines_of_keys

TEXT = '''\
# a comment with = and [ brackets ]
title = "a = [b" # and one behind
long = """
[not.a.header]
key = "no key"
"""
list = [
  "x", # ]
  { inner = 1 },
]
dotted.key = 1
"quoted.key = 1" = 2

[table]
a = { b = 1, c = { d = 2 } }

[table.sub]
'literal]' = 1
[[array]]
x = 1

  [[array]]
  x = 2
[array.below]
y = 3
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("long",), 3),
        (("list",), 7),
        (("list", 1, "inner"), 7),
        (("dotted",), 11),
        (("dotted", "key"), 11),
        (("quoted.key = 1",), 12),
        (("table",), 14),
        (("table", "a"), 15),
        (("table", "a", "c", "d"), 15),
        (("table", "sub"), 17),
        (("table", "sub", "literal]"), 18),
        (("array",), 19),
        (("array", 0), 19),
        (("array", 0, "x"), 20),
        (("array", 1), 22),
        (("array", 1, "x"), 23),
        (("array", 1, "below"), 24),
        (("array", 1, "below", "y"), 25),
        (("absent",), 1),
        (("table", "absent"), 14),
    ],
)
def test_lines(path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(TEXT)
    assert line_of(lines_of_keys(TEXT), path) == line


@pytest.mark.parametrize("text", ["", "\n\n# only a comment", "a = 1", "[a]"])
def test_short_texts(text: str) -> None:
    assert len(lines_of_keys(text)) == len(tomllib.loads(text))


def test_windows_line_ends() -> None:
    assert lines_of_keys("# x\r\na = 1\r\n[b]\r\nc = 2\r\n") == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
    }

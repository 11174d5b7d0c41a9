"""Files that are broken by a seeded hand: in their bytes, and as documents that still parse."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["mutated_document", "mutated_header", "mutated_text"]

_TOKEN = re.compile(rb'"[^"]*"|[\w.+-]+|[\[\]{}(),:=]')
_PIECES = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\t", b"\0", b"\x7f", b"\xff"),
    *(b"0", b"1", b"8", b"00", b"-1", b"2.0", b"1e1", b"1e999", b"true", b"null", b"NaN", b"{}"),
    *(b"[]", b'"a"', b'"b"', b'""', b'"dtype"', b'"shape"', b'"__metadata__"', b'"F32"', b'"F4"'),
    *(b"18446744073709551616", b"18446744073709551615", b"9223372036854775808"),
    *(b"9223372036854775807", b"\\ud800", b"\\ud83d\\ude00", b"\\u0061", b"\xc3\xa9", b"../x"),
    *(b',"z":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', b"[" * 300, b'{"a":' * 300),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**9, 2**63, 10**40, 0.5, -0.0, 1e999, float("nan")),
    *("", "x", "LORA", "\ud800", "a\x1b[2J", "../x", "(a|b)*", "(", "x" * 3000),
    *([], [None], [1], ["x"], ["("], {}, {"a": 1}, {"x": None}, {"": {}}, {"q_proj": 10**30}),
    *(["LlamaForCausalLM"], {"model_type": [1]}, {"quant_method": "gptq", "bits": 4}),
    json.loads("[" * 60 + "]" * 60),
)


def mutated_text(chance: random.Random, text: bytes) -> bytes:
    """One to three small changes."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        tokens = list(_TOKEN.finditer(text))
        start = chance.randrange(len(text) + 1)
        end = min(start + chance.randrange(6), len(text))
        kind = chance.randrange(5)
        piece = chance.choice(_PIECES)
        if kind == 0 and tokens:
            start, end = chance.choice(tokens).span()
        elif kind == 1:
            end = start
        elif kind == 2:
            piece = b""
        elif kind == 3 and tokens:
            piece = chance.choice(tokens)[0]
        elif kind == 4 and start < end:
            piece = bytes([text[start] ^ 1 << chance.randrange(8)])
            end = start + 1
        text = text[:start] + piece + text[end:]
    return text


def mutated_header(chance: random.Random, file: bytes) -> bytes:
    """A safetensors file with a changed header, whose length is mostly right."""
    size = int.from_bytes(file[:8], "little")
    text, data = mutated_text(chance, file[8 : 8 + size]), file[8 + size :]
    kind = chance.randrange(12)
    if kind == 0:
        data = data[:-1] if chance.randrange(2) else data + b"\0"
    wrong = (0, size, size + 1, len(text) + len(data) + 1, 2**32, 2**63, 2**64 - 1)
    length = chance.choice(wrong) if kind == 1 else len(text)
    return length.to_bytes(8, "little") + text + data


def mutated_document(chance: random.Random, text: bytes) -> bytes:
    """A JSON document with other values, more keys or fewer."""
    document = json.loads(text)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.choice(list(_places(document)))
        value = copy.deepcopy(chance.choice(_VALUES))
        if not place:
            if not chance.randrange(20):
                document = value
            elif isinstance(document, dict):
                document[chance.choice((*document, "x"))] = value
            continue
        *above, key = place
        holder = document
        for step in above:
            holder = holder[step]
        if chance.randrange(3):
            holder[key] = value
        else:
            del holder[key]
    return json.dumps(document).encode()


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if len(at) < 5 and isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*at, key))

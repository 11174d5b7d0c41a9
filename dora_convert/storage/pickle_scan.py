"""A pickle looked through before it is loaded: how much it would build, and how deep.

An instruction of one byte makes an object of seventy, and a tuple that holds another twice, which
holds another twice, takes for ever to be hashed. A dictionary of tensors needs little of either.
"""

from __future__ import annotations

import io
import pickletools
import struct
from typing import IO

__all__ = ["LARGEST", "is_excessive"]

LARGEST = 64 << 20  # bytes of a pickle, or of several that follow one another
_MOST_VALUES = 2_000_000  # 50,000 tensors
_DEEPEST = 8
_MARK = -1


def is_excessive(raw: bytes, *, pickles: int = 1) -> bool:
    """Whether the first so many pickles in `raw` ask for more than a dictionary of tensors may.

    Raises ValueError for what is no pickle.
    """
    stream = io.BytesIO(raw)
    return any(_is_excessive(stream) for _ in range(pickles) if stream.tell() < len(raw))


def _is_excessive(pickle: IO[bytes]) -> bool:
    stack: list[int] = []  # for each value how deep in tuples it goes
    memo: dict[object, int] = {}
    made = 0
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
                continue
            taken = _take(stack, opcode.stack_before)
            recalled = opcode.name in ("GET", "BINGET", "LONG_BINGET")
            depth = memo.get(argument, 0) if recalled else _depth(opcode, taken)
            stack += [depth] * len(opcode.stack_after)
            made += 4 if opcode.stack_after == [pickletools.pyset] else len(opcode.stack_after)
            if made > _MOST_VALUES or depth > _DEEPEST:
                return True
    except (IndexError, struct.error, UnicodeError) as error:
        raise ValueError(str(error)) from error
    return False


def _take(stack: list[int], before: list[pickletools.StackObject]) -> list[int]:
    """Pop what the instruction takes; with a mark, all down to that."""
    taken = []
    if pickletools.markobject in before:
        while (depth := stack.pop()) != _MARK:
            taken.append(depth)
        before = before[: before.index(pickletools.markobject)]
    return taken + [stack.pop() for _ in before]


def _depth(opcode: pickletools.OpcodeInfo, taken: list[int]) -> int:
    """How deep in tuples the value goes that the instruction makes of those that it takes."""
    if opcode.stack_after == [pickletools.markobject]:
        return _MARK
    if opcode.stack_after == [pickletools.pytuple]:
        return max(taken, default=0) + 1
    return max(taken, default=0) if opcode.name == "DUP" else 0

"""Every error that this package raises on purpose.

* DoraConvertError
  x InputError              exit 3   unreadable, unknown, ambiguous, corrupt or unsafe input
    + UnknownNameError               no plug-in has that name
  x MismatchError           exit 4   adapter and base do not fit; carries *all* problems
  x OutputError             exit 5   exists, no space, no permission, locked
  x HubError                exit 6   network, not found, not allowed
  x VerificationError       exit 7   the result differs from a recomputation

A bug is none of these: it flies, and the command line says that it is one.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DoraConvertError",
    "HubError",
    "InputError",
    "MismatchError",
    "OutputError",
    "UnknownNameError",
    "VerificationError",
]


class DoraConvertError(Exception):
    """*what* in one plain sentence, *where* (file, tensor, both sides), *problems*, *hint*."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | Sequence[str] = (),
        problems: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = (where,) if isinstance(where, str) else tuple(where)
        self.problems = tuple(problems)
        self.hint = hint


class InputError(DoraConvertError):
    """An input cannot be read, is not understood, or cannot be trusted."""

    exit_code = 3


class UnknownNameError(InputError):
    """No format, quantizer or command is called that."""

    def __init__(self, kind: str, name: str, known: Sequence[str], close: Sequence[str]) -> None:
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        super().__init__(f"there is no {kind} named {name!r}", hint=hint)


class MismatchError(DoraConvertError):
    """Adapter and base do not belong together."""

    exit_code = 4


class OutputError(DoraConvertError):
    """The result cannot be written where it was asked for."""

    exit_code = 5


class HubError(DoraConvertError):
    """The Hugging Face Hub could not be reached or refused."""

    exit_code = 6


class VerificationError(DoraConvertError):
    """A result was recomputed and is not what it should be."""

    exit_code = 7

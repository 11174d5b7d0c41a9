"""Results that are not defined, told in one way by all who may meet them."""

from __future__ import annotations

from collections.abc import Mapping

from dora_convert.errors import MismatchError
from dora_convert.maths.dora import RowFaults

__all__ = ["raise_faults"]

_LEAVE_OUT = "--exclude leaves such modules as they are in the base."


def raise_faults(
    found: Mapping[str, RowFaults], what: str, *, keep_zero_rows: bool = False, hint: str = ""
) -> None:
    """Raise MismatchError with a line for each tensor or module that has faults, if any has.

    With `keep_zero_rows` rows of norm 0 are none. `hint` says what may be done about them.
    """
    problems, zero, nonfinite = [], False, False
    for name, faults in sorted(found.items()):
        if faults.nonfinite:
            nonfinite = True
            problems.append(
                f"{name}: {faults.nonfinite} rows are NaN or infinite, in the base or once the "
                "update is added"
            )
        if faults.zero and not keep_zero_rows:
            zero = True
            problems.append(
                f"{name}: {faults.zero} rows are zero in the base, but have a magnitude"
            )
        if faults.overflow:
            problems.append(f"{name}: {faults.overflow} values are too large for float16")
    if problems:
        hints = (hint if zero else "", _LEAVE_OUT if nonfinite else "")
        raise MismatchError(what, problems=problems, hint=" ".join(filter(None, hints)))

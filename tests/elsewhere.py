"""A device that is none: tensors that refuse to meet the host's, and a queue that takes its time.

The arithmetic is torch's own on the CPU, so that results have to be the CPU's bit for bit. What a
real device does is kept: its tensors are made where the call says `device=`, other tensors than
single numbers do not mix with them, each belongs to the queue that it was made in and is of no use
outside, a copy to the host has not happened before it is waited for, and a copy from the host may
still be reading when the next block arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ELSEWHERE", "MixedDevicesError", "Queue", "There"]

# Known to torch by name, and to no build of it: what escapes the stand-in finds no kernel.
ELSEWHERE = torch.device("lazy")

_aten = torch.ops.aten
_CROSSING = (_aten._to_copy.default, _aten.copy_.default)


class MixedDevicesError(AssertionError):
    """What a real device would refuse, or get wrong."""


class There(Tensor):
    """A tensor of the device; `here` are its numbers."""

    here: Tensor
    queue: Queue

    @staticmethod
    def __new__(cls, here: Tensor, queue: Queue) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        made.here, made.queue = here, queue
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"There({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        raise MixedDevicesError(f"{func} outside of the queue that its tensors are in")


class Queue(TorchDispatchMode):
    """A worker's own, as `Transport` has it.

    `waits`: how often the host waited for a value, or for a copy that nobody enqueued.
    """

    device = ELSEWHERE
    pinned = False

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []
        self.open = 0
        self.waits: list[str] = []

    def active(self) -> Queue:
        return self

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.open += 1
        if isinstance(target, There):
            assert not isinstance(source, There)
            seen = source.clone()
            target.here.copy_(source)
            self.waiting.append(partial(self._unchanged, source, seen))
        else:
            assert isinstance(source, There), "from the host to the host"
            seen = source.here.clone()
            target.fill_(0xAB)
            self.waiting.append(partial(self._arrive, target, seen))

    def mark(self) -> Callable[[], None]:
        count = len(self.waiting)

        def wait() -> None:
            for i in range(count):
                self.waiting[i]()
                self.waiting[i] = _done

        return wait

    def release(self) -> None:
        self.waiting = []

    def _unchanged(self, source: Tensor, seen: Tensor) -> None:
        same = source.contiguous().view(torch.uint8).equal(seen.contiguous().view(torch.uint8))
        assert same, "read into while on its way"
        self.open -= 1

    def _arrive(self, target: Tensor, seen: Tensor) -> None:
        target.copy_(seen)
        self.open -= 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        tensors = list(_tensors((args, list(given.values()))))
        there = [t for t in tensors if isinstance(t, There)]
        self._check(func, tensors, there)
        device = given.get("device")
        goes = ELSEWHERE.type == torch.device(device).type if device is not None else bool(there)
        if device is not None:
            given["device"] = torch.device("cpu")
        out = func(*map(_here, args), **{key: _here(value) for key, value in given.items()})
        if func is _aten._local_scalar_dense.default and there:
            self.waits.append(str(func))
            return out
        crosses = func in _CROSSING and goes != all(isinstance(t, There) for t in tensors)
        # From memory that is not pinned, a copy has read its source when the call is over.
        if crosses and not (goes and given.get("non_blocking")):
            self.waits.append(str(func))
        if func is _aten.copy_.default:
            return args[0]
        if not goes:
            return out

        return self._placed(out, there)

    def _placed(self, out: Any, there: Sequence[There]) -> Any:
        if isinstance(out, (list, tuple)):
            return type(out)(self._placed(each, there) for each in out)
        # What was changed in place is still the same tensor.
        same = next((t for t in there if t.here is out), None)
        return There(out, self) if same is None else same

    def _check(self, func: Any, tensors: Sequence[Tensor], there: Sequence[There]) -> None:
        if any(t.queue is not self for t in there):
            raise MixedDevicesError(f"{func} on a tensor of another queue")
        host = [t for t in tensors if not isinstance(t, There) and t.dim()]
        if there and host and func not in _CROSSING:
            raise MixedDevicesError(
                f"{func} mixes the device with the host: {[t.shape for t in host]}"
            )


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _tensors(each)


def _here(given: Any) -> Any:
    if isinstance(given, There):
        return given.here
    return type(given)(map(_here, given)) if isinstance(given, (list, tuple)) else given


def _done() -> None:
    pass

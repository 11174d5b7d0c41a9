"""The devices that a merge can be computed on, by name, and which of them pays."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dora_convert.core.plan import Copy, Merge, Plan, Quantise, ScaleBias
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.execution.bench import dropped
from dora_convert.execution.kernels import work_dtype
from dora_convert.execution.lanes import BLOCK_BYTES, Buffers, DeviceBuffers, Transport
from dora_convert.execution.units import Unit, is_two_pass, units

__all__ = ["CudaTransport", "DirectTransport", "lanes", "named", "named_for_products", "pays"]

# Large enough that starting a copy or a kernel costs nothing beside it.
_DEVICE_BLOCK = 16 << 20
# What a block needs on a device, in its own size: 4 for bfloat16, 12 for float16, up to 15 where it
# is decoded or quantised.
_COPIES = 16
_HOST = (torch.device("cpu"),)
_SMALL_FLOATS = {DType.F8_E4M3, DType.F8_E5M2}


class CudaTransport:
    """A stream of its own for every worker; host memory is pinned."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def active(self) -> AbstractContextManager[object]:
        """See `Transport`."""
        return torch.cuda.stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Transport`."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """See `Transport`."""
        # A blocking event sleeps; the other kind would spin on the core that reads and writes.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait

    def release(self) -> None:
        """See `Transport`."""
        torch.cuda.empty_cache()


class DirectTransport:
    """A device without queues that the host can use, such as Apple's: every copy is waited for."""

    pinned = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> AbstractContextManager[object]:
        """See `Transport`."""
        return nullcontext()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Transport`."""
        target.copy_(source)

    def mark(self) -> Callable[[], None]:
        """See `Transport`."""
        return lambda: None

    def release(self) -> None:
        """See `Transport`."""


def named(text: str, plan: Plan, *, workers: int) -> Sequence[torch.device]:
    """The devices of `--device`: `cpu`, `cuda`, `cuda:0,cuda:2`, `mps`, or `auto`.

    Raises InputError for one that torch does not know or that is not there.
    """
    if text == "auto":
        return _measured(plan, workers)
    try:
        devices = [torch.device(part.strip()) for part in text.split(",")]
    except RuntimeError:
        raise InputError(
            f"{text!r} is no device", hint="Say cpu, cuda, cuda:0,cuda:1, mps or auto."
        ) from None
    for device in devices:
        _check(device, plan)
    return devices


def named_for_products(text: str, plan: Plan, *, workers: int) -> Sequence[torch.device]:
    """As `named`, for work that multiplies the plan's weights again and again, as to-lora does.

    Raises InputError for mps too, which has no float64.
    """
    if text == "auto":
        found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return found if found and _products(found[0]) < _products(_HOST[0]) / workers else _HOST
    devices = named(text, plan, workers=workers)
    if any(device.type == "mps" for device in devices):
        raise InputError(
            "low-rank factors need float64, which mps does not have", hint="Leave --device out."
        )
    return devices


def _products(device: torch.device) -> float:
    """Seconds of the usual work of one thread: a weight widened, and multiplied from both sides."""
    weight = torch.ones((2048, 2048), dtype=torch.bfloat16).to(device)
    x = torch.ones((2048, 32)).to(device)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        wide = weight.float()
        (wide.T @ (wide @ x)).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def lanes(
    devices: Sequence[torch.device], *, workers: int, max_memory: int | None
) -> Callable[[], Buffers]:
    """What makes the buffers of one worker after the other, shared out over the devices.

    `max_memory`: bytes that all workers together may take on a device, by default half of what
    is free there.
    """
    turns = itertools.cycle(devices)
    lock = threading.Lock()

    def make() -> Buffers:
        with lock:
            device = next(turns)
        if device.type == "cpu":
            return Buffers()
        share = _share(device, -(-workers // len(devices)), max_memory)
        block = min(_DEVICE_BLOCK, max(BLOCK_BYTES, share // _COPIES))
        return DeviceBuffers(_transport(device), block, max(0, share - _COPIES * block))

    return make


def pays(nbytes: int, *, disk: float, host: float, device: float) -> bool:
    """Whether a device saves a tenth of the time or more, by rates in bytes a second.

    Neither can be faster than the disk.
    """
    return nbytes / min(disk, device) < 0.9 * nbytes / min(disk, host)


def _transport(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else DirectTransport(device)


def _share(device: torch.device, workers: int, max_memory: int | None) -> int:
    """Bytes of the device for each worker."""
    if max_memory is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
        max_memory = free // 2
    return max_memory // workers


def _check(device: torch.device, plan: Plan) -> None:
    if device.type == "cpu":
        return
    if device.type not in ("cuda", "mps"):
        raise InputError(f"merging on {device} is not supported", hint="Say cpu, cuda or mps.")
    there = torch.cuda.device_count() if device.type == "cuda" else int(_has_mps())
    if (device.index or 0) >= there:
        raise InputError(
            f"there is no device {device}: torch {torch.__version__} sees {there} of this kind",
            hint="Install a build of torch for your device, or leave --device out.",
        )
    if device.type == "mps" and _needs_double(plan):
        raise InputError(
            "this base has to be merged in float64, which mps does not have",
            hint="Leave --device out; or merge into bfloat16 weights.",
        )
    if device.type == "mps" and _has_small_floats(plan):
        raise InputError(
            "the base or the result holds floats of 8 bits, which mps does not have",
            hint="Leave --device out.",
        )


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _needs_double(plan: Plan) -> bool:
    """Sums over rows, and what a bias is scaled by, are float64 whatever the weights are."""
    return any(
        isinstance(job.op, ScaleBias)
        or is_two_pass(job)
        or (
            isinstance(job.op, Merge | Quantise)
            and work_dtype(job.op.base.spec.dtype, job.output.dtype) is torch.float64
        )
        for job in plan.jobs
    )


def _has_small_floats(plan: Plan) -> bool:
    jobs = [job for job in plan.jobs if not isinstance(job.op, Copy)]
    stored = {ref.stored.dtype for job in jobs for ref in job.slices}
    written = {spec.dtype for job in jobs for spec in job.stored}
    return not _SMALL_FLOATS.isdisjoint(stored | written)


def _measured(plan: Plan, workers: int) -> Sequence[torch.device]:
    """Devices that merge some of the plan's own blocks faster than the CPU does, else the CPU."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not found and _has_mps() and not (_needs_double(plan) or _has_small_floats(plan)):
        found = [torch.device("mps")]
    able = (unit for unit in units(plan) if isinstance(unit.job.op, Merge | Quantise))
    sample = list(itertools.islice(able, 2 * workers))
    if not found or not sample:
        return _HOST
    # The first pass brings the blocks into the page cache, at the disk's rate or the CPU's.
    rates = [_rate(sample, _HOST, workers) for _ in range(2)]
    _rate(sample[:1], found, 1)  # loads the device's libraries
    device = _rate(sample, found, workers)
    paid = pays(plan.nbytes, disk=rates[0], host=rates[1], device=device)
    return found if paid else _HOST


def _rate(sample: Sequence[Unit], devices: Sequence[torch.device], workers: int) -> float:
    """Bytes a second at which units are read, merged and dropped."""
    make = lanes(devices, workers=workers, max_memory=None)
    return sum(unit.nbytes for unit in sample) / dropped(sample, workers, make)

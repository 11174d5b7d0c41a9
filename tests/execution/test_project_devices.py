"""Low-rank factors with products on a device, with a stand-in for it and its queue."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.lora import RankChoice
from dora_convert.core.plan import Piece, Plan
from dora_convert.errors import InputError
from dora_convert.execution.devices import named_for_products
from dora_convert.execution.lanes import Buffers, DeviceBuffers
from dora_convert.execution.project import Part, Search, project
from dora_convert.maths.weighting import Weight
from tests.elsewhere import Queue

from .conftest import Store, exact, module
from .test_project import Kept, adapted, normal

Modules = dict[str, list[Part]]
OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN
# Large ones are iterated, small ones decomposed; "d" is stored in two tensors.
SHAPES = {"a": (420, 380, OUT), "b": (390, 410, IN), "c": (30, 40, OUT), "d": (400, 380, OUT)}


@pytest.fixture
def modules(store: Store) -> tuple[Modules, dict[str, Tensor]]:
    parts: Modules = {}
    dense = {}
    for i, (path, (rows, columns, axis)) in enumerate(SHAPES.items()):
        weight, tensors = adapted(rows, columns, seed=10 * i, axis=axis)
        cuts = [0, rows // 3, rows] if path == "d" else [0, rows]
        parts[path] = []
        for start, stop in itertools.pairwise(cuts):
            own = tensors | {"up": tensors["up"][start:stop]}
            own |= {"m": tensors["m"][start:stop]} if axis is OUT else {}
            base = store(f"{path}{start}.safetensors", w=weight[start:stop])["w"]
            made = module(store(f"{path}{start}_adapter.safetensors", **own), axis)
            parts[path].append((base, Piece(0, stop - start, made)))
        dense[path] = exact(weight, **tensors, dim=1 if axis is OUT else 0) - weight.double()
    return parts, dense


def weights(path: str) -> tuple[Weight, bool]:
    """Moments for one, gains for the others; "b" is stored `[in, out]`."""
    inputs = SHAPES[path][0 if path == "b" else 1]
    diagonal = (1 + normal(inputs, seed=3).abs()).double()
    factor = normal(inputs, 5, seed=4).double() if path == "a" else None
    return Weight(factor, diagonal), path == "b"


def made(queues: list[Queue], kept_bytes: int) -> Callable[[], Buffers]:
    def make() -> Buffers:
        queues.append(Queue())
        return DeviceBuffers(queues[-1], 20_000, kept_bytes)

    return make


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exactly", [False, True])
def test_the_same_factors_from_a_device(
    modules: tuple[Modules, dict[str, Tensor]], *, kept_bytes: int, weighted: bool, exactly: bool
) -> None:
    parts, dense = modules
    search = Search(exact=exactly, weights=weights if weighted else None)
    queues: list[Queue] = []
    ours, theirs = Kept(), Kept()
    choice = RankChoice(rank=8)
    there = project(parts, choice, ours, workers=2, search=search, lanes=made(queues, kept_bytes))
    here = project(parts, choice, theirs, workers=2, search=search)
    assert sum(len(queue.waiting) for queue in queues) > 40  # copies to the device
    for path, update in dense.items():
        # Blocks are cut otherwise, so that sums differ by rounding.
        assert there[path].square == pytest.approx(float(update.square().sum()), rel=1e-5)
        torch.testing.assert_close(there[path].singular, here[path].singular, rtol=1e-4, atol=1e-5)
        gap = ours.product(path, 8) - theirs.product(path, 8)
        assert float(gap.norm()) <= 2e-3 * float(update.norm()), path
        missed = float((update - ours.product(path, 8)).norm() / update.norm())
        assert there[path].residual(8) == pytest.approx(missed, rel=1e-3)


def test_a_module_is_begun_anew_where_memory_runs_out(
    modules: tuple[Modules, dict[str, Tensor]],
) -> None:
    class Scarce(DeviceBuffers):
        """Weights do not find place as a whole, and only at the second block."""

        def upload(self, kind: str, stored: Tensor) -> Tensor:
            if self.kept_bytes > 4096 and kind.endswith(".1"):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().upload(kind, stored)

    parts, _ = modules
    ours, theirs = Kept(), Kept()
    choice = RankChoice(rank=8)
    lanes = lambda: Scarce(Queue(), 64 << 20, 1 << 30)  # noqa: E731
    some = {"a": parts["a"], "d": parts["d"]}
    there = project(some, choice, ours, workers=1, lanes=lanes)
    here = project(some, choice, theirs, workers=1)
    for path in some:
        torch.testing.assert_close(there[path].singular, here[path].singular, rtol=1e-4, atol=1e-5)


def test_products_on_devices_that_are_not_there() -> None:
    plan = Plan((), ())
    assert named_for_products("cpu", plan, workers=2) == [torch.device("cpu")]
    if not torch.cuda.is_available():
        assert list(named_for_products("auto", plan, workers=2)) == [torch.device("cpu")]
    with pytest.raises(InputError, match="is no device"):
        named_for_products("gpu", plan, workers=2)
    with pytest.raises(InputError, match="not supported"):
        named_for_products("meta", plan, workers=2)


def test_mps_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(InputError, match="float64"):
        named_for_products("mps", Plan((), ()), workers=2)

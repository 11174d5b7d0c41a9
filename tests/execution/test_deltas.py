"""All forms of updates through the engine: against LyCORIS' own weights, and against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.deltas import Delta, Hadamard, Kronecker, LowRank, Tucker
from dora_convert.core.lora import RankChoice
from dora_convert.core.plan import Merge, Piece, Plan
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError
from dora_convert.execution import formula, units
from dora_convert.execution.fit import doras
from dora_convert.execution.lanes import Buffers, DeviceBuffers
from dora_convert.execution.measure import module_sums
from dora_convert.execution.project import Search, project, residuals
from dora_convert.execution.run import run
from dora_convert.execution.update import open_update
from dora_convert.execution.verify import verify
from dora_convert.maths.lowrank import Factors
from dora_convert.maths.weighting import Weight
from dora_convert.storage.header import read_header
from dora_convert.storage.reader import Reader
from tests.elsewhere import Queue

from .conftest import Recorder, Store, check_update, near, plan_of, random, written

CASES = Path(__file__).parents[2] / "fixtures" / "lycoris"
LAYERS = {
    "lora_unet_conv_in": "conv_in",
    "lora_unet_conv_shortcut": "conv_shortcut",
    "lora_unet_down_blocks_0_to_out_0": "down_blocks.0.to_out.0",
    "lora_unet_down_blocks_0_to_q": "down_blocks.0.to_q",
}
OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and units of some rows of a layer, and no weight is kept."""
    monkeypatch.setattr(Buffers, "block_bytes", 700)
    monkeypatch.setattr(Buffers, "kept_bytes", 0)
    monkeypatch.setattr(units, "_UNIT_BYTES", 1500)
    monkeypatch.setattr(formula, "_BLOCK", 200)


@dataclass(frozen=True)
class Layer:
    base: TensorRef
    module: DoraModule
    weight: Tensor  # W, flattened, float64
    expected: Tensor  # W'


def stored_delta(refs: Mapping[str, TensorRef]) -> tuple[Delta, int | None]:
    """From a layer's tensors, and the rank that alpha is over, by LyCORIS' own names."""
    if "lora_up.weight" in refs:
        down, up = refs["lora_down.weight"].matrix(), refs["lora_up.weight"].matrix()
        mid = refs.get("lora_mid.weight")
        return (LowRank(down, up) if mid is None else Tucker(down, mid, up)), up.spec.shape[1]
    if "hada_w1_a" in refs:
        halves = []
        for n in (1, 2):
            a, b, mid = (refs.get(f"hada_{key}") for key in (f"w{n}_a", f"w{n}_b", f"t{n}"))
            assert a is not None
            assert b is not None
            halves.append(LowRank(b, a) if mid is None else Tucker(b, mid, a.transposed()))
        return Hadamard(*halves), b.spec.shape[0]
    if "lokr_w2" in refs:
        return Kronecker(refs["lokr_w1"], refs["lokr_w2"].matrix()), None
    down, up = refs["lokr_w2_b"], refs["lokr_w2_a"]
    return Kronecker(refs["lokr_w1"], LowRank(down, up)), up.spec.shape[1]


def layer_of(case: Path, name: str) -> Layer:
    file = case / "adapter.safetensors"
    refs = {
        key.removeprefix(f"{name}."): ref
        for key, ref in read_header(file).items()
        if key.startswith(f"{name}.")
    }
    delta, rank = stored_delta(refs)
    alpha = float(load_file(file)[f"{name}.alpha"])
    base = read_header(case / "base.safetensors")[f"{LAYERS[name]}.weight"]
    magnitude = refs["dora_scale"]
    axis = OUT if "_out" in case.name else IN
    assert magnitude.spec.shape[0 if axis is OUT else 1] == magnitude.spec.numel
    module = DoraModule(
        path=name,
        delta=delta,
        magnitude=magnitude.reshaped(magnitude.spec.numel),
        axis=axis,
        scaling=1.0 if rank is None else alpha / rank,
    )
    weight = load_file(case / "base.safetensors")[f"{LAYERS[name]}.weight"]
    expected = load_file(case / "expected.safetensors")[name]
    return Layer(base.matrix(), module, *(t.flatten(1).double() for t in (weight, expected)))


@pytest.fixture(params=sorted(path.name for path in CASES.iterdir() if path.is_dir()))
def case(request: pytest.FixtureRequest) -> Path:
    return CASES / str(request.param)


def plan_for(case: Path) -> tuple[Plan, dict[str, Layer]]:
    layers = {name: layer_of(case, name) for name in LAYERS}
    jobs = {
        name: (
            Merge(layer.base, (Piece(0, len(layer.weight), layer.module),)),
            DType.F32,
            layer.base.stored.shape,
        )
        for name, layer in layers.items()
    }
    return plan_of(jobs), layers


def test_there_are_all_cases() -> None:
    assert len([path for path in CASES.iterdir() if path.is_dir()]) == 12


def test_merged_as_lycoris_does(case: Path, tmp_path: Path) -> None:
    plan, layers = plan_for(case)
    run(plan, tmp_path, workers=2, listener=Recorder())
    got = written(tmp_path)
    for name, layer in layers.items():
        assert got[name].shape == layer.base.stored.shape
        torch.testing.assert_close(
            got[name].flatten(1).double(), layer.expected, rtol=1e-5, atol=1e-6
        )
    files = dict.fromkeys(got, tmp_path / "model.safetensors")
    assert not verify(plan, files, samples=None).differences
    assert not verify(plan, files, samples=3).differences


def test_a_device_gives_the_cpus_bytes(case: Path, tmp_path: Path) -> None:
    plan, _ = plan_for(case)
    for name, lanes in (("cpu", Buffers), ("device", lambda: DeviceBuffers(Queue(), 700))):
        (tmp_path / name).mkdir()
        run(plan, tmp_path / name, workers=1, listener=Recorder(), lanes=lanes)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("device", "cpu"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_check_recomputes_what_lycoris_gives(case: Path, tmp_path: Path) -> None:
    """Its own road: LyCORIS' weights pass but for their rounding, and one wrong value does not."""
    plan, _ = plan_for(case)
    file = case / "expected.safetensors"
    tensors = load_file(file)

    def differences(file: Path) -> tuple[str, ...]:
        files = dict.fromkeys(tensors, file)
        return verify(plan, files, samples=None, tolerance=5000).differences

    assert differences(file) == ()
    for name, tensor in tensors.items():
        wrong = tensor.clone()
        wrong.view(-1)[-2] += 0.01
        save_file({**tensors, name: wrong}, tmp_path / "wrong.safetensors")
        assert differences(tmp_path / "wrong.safetensors") == (
            f"{name}: 1 values are not the recomputed ones",
        )


@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_lycoris_change(case: Path, name: str) -> None:
    layer = layer_of(case, name)
    change = layer.expected - layer.weight
    piece = Piece(0, len(change), layer.module)
    with open_update(layer.base, piece, Reader(), Buffers()) as update:
        rows, columns = change.shape
        near(update.times(torch.eye(columns)), change, 1e-5)
        near(update.transposed_times(torch.eye(rows)), change.T, 1e-5)
        near(update.round_trip(torch.eye(columns))[1], change.T @ change, 1e-5)
        assert update.square == pytest.approx(float(change.square().sum()), rel=1e-5)
        near(update.row_squares, change.square().sum(dim=1), 1e-5)
        near(update.column_squares, change.square().sum(dim=0), 1e-5)


def test_factors_and_what_they_miss(case: Path) -> None:
    """At every rank the best there is, by torch's own singular values."""
    _, layers = plan_for(case)
    parts = {
        name: [(layer.base, Piece(0, len(layer.weight), layer.module))]
        for name, layer in layers.items()
    }
    for rank in (3, 10**6):
        found: dict[str, Factors] = {}
        project(parts, RankChoice(rank=rank), found.__setitem__, workers=2)
        for name, layer in layers.items():
            change, factors = layer.expected - layer.weight, found[name]
            values = torch.linalg.svdvals(change)
            missed = change - (factors.left * factors.singular) @ factors.right
            best = float(values[rank:].square().sum().sqrt())
            assert float(missed.norm()) == pytest.approx(best, rel=0.01, abs=1e-4)
            left = factors.left * factors.singular
            plain, _ = residuals(parts[name], left, factors.right, None)
            assert plain == pytest.approx(best / float(change.norm()), rel=0.01, abs=1e-4)


def test_figures(case: Path) -> None:
    plan, layers = plan_for(case)
    sums = module_sums(plan, workers=2)
    for name, layer in layers.items():
        change = layer.expected - layer.weight
        assert sums[name].effect == pytest.approx(float(change.square().sum()), rel=1e-5)
        assert sums[name].base == pytest.approx(float(layer.weight.square().sum()), rel=1e-5)
        magnitude = layer.module.magnitude
        assert magnitude is not None
        assert sums[name].rows == magnitude.spec.numel


def test_factors_of_large_layers(store: Store) -> None:
    """Found by iteration, which no factor of the update can start: as good as the best there is."""
    shapes = {"a1": (230, 2), "b1": (2, 250), "a2": (230, 3), "b2": (3, 250)}
    tensors = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {"l": random(10, 5, seed=8), "r": random(23, 50, seed=9), "m": torch.ones(230)}
    refs, base = store("adapter.safetensors", **tensors), store(w=random(230, 250, seed=10))["w"]
    pair = LowRank(refs["b1"], refs["a1"]), LowRank(refs["b2"], refs["a2"])
    parts, changes = {}, {}
    for name, delta in (("h", Hadamard(*pair)), ("k", Kronecker(refs["l"], refs["r"]))):
        module = DoraModule(name, delta, refs["m"], OUT, 0.05)
        parts[name] = [(base, Piece(0, 230, module))]
        t = {key: tensor.double() for key, tensor in tensors.items()}
        dense = torch.kron(t["l"], t["r"])
        dense = (t["a1"] @ t["b1"]) * (t["a2"] @ t["b2"]) if name == "h" else dense
        weight = random(230, 250, seed=10).double()
        v = weight + 0.05 * dense
        changes[name] = v / v.norm(dim=1, keepdim=True) - weight
    moments = Weight(random(250, 250, seed=11).double(), None)
    for search in (Search(), Search(weights=lambda _: (moments, False))):
        found: dict[str, Factors] = {}
        project(parts, RankChoice(rank=4), found.__setitem__, workers=2, search=search)
        for name, factors in found.items():
            seen = torch.eye(250).double() if search.weights is None else moments.factor
            assert seen is not None
            missed = (changes[name] - (factors.left * factors.singular) @ factors.right) @ seen
            best = torch.linalg.svdvals(changes[name] @ seen)[4:].norm()
            assert float(missed.norm()) <= 1.003 * float(best)


# Forms that the cases above lack, on a `[6 channels, 3, 3]` kernel of 12 outputs.
TENSORS = {
    "up1": random(12, 2, seed=1),
    "down1": random(2, 54, seed=2),
    "up2": random(12, 3, seed=3),
    "down2": random(4, 6, seed=4),
    "mid2": random(3, 4, 3, 3, seed=5),
    "left": random(4, 2, seed=6),
    "left_up": random(4, 1, seed=7),
    "left_down": random(1, 2, seed=8),
    "right_up": random(3, 2, seed=9),
    "right_down": random(2, 27, seed=10),
    "tucker_down": random(5, 3, seed=11),
    "tucker_mid": random(2, 5, 3, 3, seed=12),
}
Refs = Mapping[str, TensorRef]


def tucker(down: Tensor, mid: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("om,mnkl,ni->oikl", up, mid, down).flatten(1)


def form(name: str) -> tuple[Callable[[Refs], Delta], Tensor]:
    t = {key: tensor.double() for key, tensor in TENSORS.items()}
    mixed = tucker(t["down2"], t["mid2"], t["up2"])
    right = t["right_up"] @ t["right_down"]
    thick = tucker(t["tucker_down"], t["tucker_mid"], t["right_up"])
    forms: dict[str, tuple[Callable[[Refs], Delta], Tensor]] = {
        "low rank": (lambda r: LowRank(r["down1"], r["up1"]), t["up1"] @ t["down1"]),
        "tucker": (lambda r: Tucker(r["down2"], r["mid2"], r["up2"]), mixed),
        "hadamard": (
            lambda r: Hadamard(
                LowRank(r["down1"], r["up1"]), Tucker(r["down2"], r["mid2"], r["up2"])
            ),
            (t["up1"] @ t["down1"]) * mixed,
        ),
        "kronecker": (
            lambda r: Kronecker(r["left"], LowRank(r["right_down"], r["right_up"])),
            torch.kron(t["left"], right),
        ),
        "kronecker of products": (
            lambda r: Kronecker(
                LowRank(r["left_down"], r["left_up"]),
                Tucker(r["tucker_down"], r["tucker_mid"], r["right_up"]),
            ),
            torch.kron(t["left_up"] @ t["left_down"], thick),
        ),
    }
    return forms[name]


@dataclass(frozen=True)
class Subject:
    base: TensorRef  # more rows than the module has
    piece: Piece
    weight: Tensor
    delta: Tensor  # scaled
    expected: Tensor


NAMES = ["low rank", "tucker", "hadamard", "kronecker", "kronecker of products"]
KINDS = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest, store: Store) -> Callable[..., Subject]:
    """A module of 12 rows, of which the base has some: all, or 5 from its third row on."""

    def made(
        axis: MagnitudeAxis, dtype: torch.dtype, *, is_part: bool = False, factors: bool = False
    ) -> Subject:
        build, delta = form(request.param)
        offset, count = (2, 5) if is_part else (0, 12)
        weight = random(count + (4 if is_part else 0), 54, seed=20, dtype=dtype)
        start = 3 if is_part else 0
        magnitude = random(12 if axis is OUT else 6, seed=21).abs() + 0.5
        delta = 0.25 * delta[offset : offset + count]
        own = weight[start : start + count].double()
        v = (own + delta).view(count, 6, 3, 3)
        m = magnitude.double()
        m = m[offset : offset + count].view(-1, 1, 1, 1) if axis is OUT else m.view(1, 6, 1, 1)
        norm = v.square().sum(dim=(1, 2, 3) if axis is OUT else (0, 2, 3), keepdim=True).sqrt()
        expected = weight.double().clone()
        expected[start : start + count] = (m * v if factors else m * v / norm).flatten(1)
        refs = store("adapter.safetensors", m=magnitude, **TENSORS)
        kind = MagnitudeKind.FACTOR if factors else MagnitudeKind.NORM
        module = DoraModule("layer", build(refs), refs["m"], axis, 0.25, magnitude_is=kind)
        piece = Piece(start, start + count, module, offset)
        return Subject(store(w=weight)["w"], piece, weight, delta, expected)

    return made


CHOICES = [(OUT, False), (OUT, True), (IN, False)]  # of an axis, and whether it is a part


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("axis", "is_part"), CHOICES)
def test_merged_by_the_formula(
    make: Callable[..., Subject],
    tmp_path: Path,
    axis: MagnitudeAxis,
    dtype: torch.dtype,
    *,
    is_part: bool,
    factors: bool,
) -> None:
    subject = make(axis, dtype, is_part=is_part, factors=factors)
    shape = tuple(subject.weight.shape)
    plan = plan_of({"w": (Merge(subject.base, (subject.piece,)), KINDS[dtype], shape)})
    out = tmp_path / "out"
    out.mkdir()
    run(plan, out, workers=2, listener=Recorder())
    got = written(out)["w"].double()
    # Rounded once; float32 sums before that where bfloat16 is written.
    step = torch.finfo(dtype).eps * subject.expected.abs()
    slack = 1e-5 if dtype is torch.bfloat16 else 1e-12
    assert bool(((got - subject.expected).abs() <= 0.5001 * step + slack).all())
    assert not verify(plan, {"w": out / "model.safetensors"}, samples=None).differences


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("axis", "is_part"), CHOICES)
def test_the_update_by_the_formula(
    make: Callable[..., Subject],
    axis: MagnitudeAxis,
    dtype: torch.dtype,
    *,
    is_part: bool,
    factors: bool,
) -> None:
    subject = make(axis, dtype, is_part=is_part, factors=factors)
    span = slice(subject.piece.start, subject.piece.stop)
    change = (subject.expected - subject.weight.double())[span]
    with open_update(subject.base, subject.piece, Reader(), Buffers()) as update:
        check_update(update, change, subject.delta, 1e-11 if dtype is torch.float32 else 2e-5)


@pytest.mark.parametrize(("axis", "is_part"), CHOICES)
def test_without_a_magnitude_the_weight_is_not_looked_at(
    make: Callable[..., Subject], store: Store, axis: MagnitudeAxis, *, is_part: bool
) -> None:
    subject = make(axis, torch.float32, is_part=is_part)
    base = store(w=torch.full_like(subject.weight, torch.nan))["w"]
    piece = replace(subject.piece, module=replace(subject.piece.module, magnitude=None))
    with open_update(base, piece, Reader(), Buffers()) as update:
        check_update(update, subject.delta, subject.delta, 1e-11)


@pytest.mark.parametrize("make", ["hadamard", "kronecker"], indirect=True)
def test_what_is_no_product_cannot_be_fitted(make: Callable[..., Subject]) -> None:
    subject = make(OUT, torch.float32)
    with pytest.raises(InputError, match="layer is no product of two matrices"):
        doras({"layer": [(subject.base, subject.piece)]}, ())

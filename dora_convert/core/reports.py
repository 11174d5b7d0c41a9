"""What the api returns: numbers and names, ready for a table or for JSON."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Activity",
    "BenchReport",
    "ConvertReport",
    "Figures",
    "Group",
    "Inspection",
    "MergeReport",
    "Residual",
    "ResidualFigures",
    "Rounding",
    "Stage",
    "Survival",
    "SurvivalFigures",
    "Verification",
]


@dataclass(frozen=True, slots=True)
class Stage:
    """Something that a merge does, alone or with what comes before it, over so many bytes."""

    name: str
    seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Activity:
    """A stage of a merge. `seconds`: of all threads. `busy`: the share of the time it went on."""

    stage: str
    seconds: float
    busy: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """How fast a merge is here. `of_copy`: its time over that of copying the same bytes.

    `limit`: what it waits for: `disk`, or `arithmetic`. `nbytes`: of the whole result, from which
    `seconds` is extrapolated. `activities`: of the merge, where its timeline was asked for.
    """

    stages: tuple[Stage, ...]
    of_copy: float
    limit: str
    nbytes: int
    seconds: float
    devices: tuple[str, ...]
    workers: int
    activities: tuple[Activity, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """How far modules moved from the base. Ratios of Frobenius norms, unless said otherwise.

    `update`: ||scaling up down|| / ||W||. `effect`: ||W' - W|| / ||W||. `magnitude_shift`: mean
    |m - ||W||| over mean ||W||, the paper's ΔM made relative. `direction_shift`: mean of
    1 - cos(V, W), the paper's ΔD. `magnitude_bias`, `magnitude_spread`: mean and standard
    deviation of log(m / ||W||). `rounding_loss`: ||Q(W') - W'|| / ||W' - W|| for the storage type
    `stored_as`. `kept`: the share of the update that is still there after rounding, by projection.
    """

    update: float
    effect: float
    magnitude_shift: float
    magnitude_bias: float
    magnitude_spread: float
    direction_shift: float
    rounding_loss: float
    kept: float
    stored_as: str


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that share the last part of their path, or a single module."""

    name: str
    modules: int
    kinds: tuple[str, ...]  # DoRA, LoRA, magnitude
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # [out, in] of the layer
    dtypes: tuple[str, ...]
    nbytes: int
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an adapter is and, with a base, what it does."""

    adapter: str
    format: str
    kind: str
    base_model: str | None
    base: str | None
    modules: int
    nbytes: int
    groups: tuple[Group, ...]
    replaced: tuple[str, ...]
    token_rows: int
    total: Figures | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rounding:
    """What one rounding to the output's type did, over the rows that were recomputed.

    `loss` and `kept` as in `Figures`; `off`: share of elements that are not the float64 result
    correctly rounded.
    """

    loss: float
    kept: float
    off: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What was recomputed, and what came out different.

    `hashed`: files whose sha256 was compared with the one that was kept with the output. `notes`
    say what was taken for granted.
    """

    tensors: int
    modules: int
    rows: int
    compared_bytes: int
    differences: tuple[str, ...]
    rounding: Rounding | None
    hashed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SurvivalFigures:
    """What a quantised result is to the update T = W' - W, with Q quantisation and decoding.

    `kept`: the share of T in Q(W') - W, by projection onto T. `noise`: ||Q(W') - W'|| / ||T||, all
    that is not as it should be; it is 1 where the result is the base again. `plain_noise` is that
    of the scheme alone, ||Q(W) - W|| / ||T||: what is lost without any adapter. `error` and
    `plain_error` are the same two numbers relative to ||W'|| and ||W||. `codes_changed`: the share
    of codes of Q(W') that are not those of Q(W). All over a part of each module's rows: the first
    block, and every eighth.
    """

    kept: float
    noise: float
    plain_noise: float
    error: float
    plain_error: float
    codes_changed: float


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of the adapter a quantised merge holds, in all and by module path."""

    scheme: str
    total: SurvivalFigures
    modules: dict[str, SurvivalFigures]


@dataclass(frozen=True, slots=True)
class ResidualFigures:
    """A quantised result Q(W') alone, and with a low-rank pair P beside it.

    `error`: ||Q(W') - W'|| / ||W'||; `kept`: the share of T = W' - W in Q(W') - W, by projection.
    `corrected_error` and `corrected_kept` are those of Q(W') + P. All over whole modules.
    """

    error: float
    corrected_error: float
    kept: float
    corrected_kept: float


@dataclass(frozen=True, slots=True)
class Residual:
    """A LoRA of W' - Q(W') of the adapted modules, at one rank, by module path."""

    rank: int
    total: ResidualFigures
    modules: dict[str, ResidualFigures]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A finished (or, for a dry run, planned) merge. Sizes in bytes, times in seconds.

    `kept`: shards that an earlier, interrupted run of the same command had finished already.
    `survival` is None where nothing was stored in a quantisation scheme, `residual` where no LoRA
    was written beside it.
    """

    output: str
    adapter: str
    base: str
    format: str
    merged: int
    replaced: int
    untouched: int
    shards: int
    nbytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    verification: Verification | None
    dry_run: bool
    survival: Survival | None = None
    residual: Residual | None = None
    kept: int = 0


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """An adapter in another layout: read as `source`, written as `format`. Size in bytes."""

    output: str
    adapter: str
    source: str
    format: str
    modules: int
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

"""Survey how far the factors of `to-lora` miss by more than the best of their rank, by spectrum.

`python benchmarks/spectra.py [--real BASE ADAPTER]...`. Every case is a list of singular values, a
rank and a random start. The values are made up, or those of the updates that a PEFT adapter with
DoRA makes of the linear layers of BASE, from full decompositions in float64. Of any matrix the
search finds as much as of the diagonal one with the same singular values, since its start has no
direction of its own. The best that there is misses the norm of all further values (Eckart and
Young, 1936). Left out is what `to-lora` decomposes in full.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from merge import say, table
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dora_convert.maths.krylov import krylov_factors, spans_everything

RANKS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 100, 128)
LIMIT = 0.002  # what is promised of the excess
_TINIEST = 1e-9  # of the norm: below, rounding is all that is missed


@dataclass(frozen=True)
class Spectrum:
    """Singular values, falling, float64; `kind` is the row that it counts for."""

    kind: str
    name: str
    values: Tensor


@dataclass(frozen=True)
class Found:
    """`excess`: what is missed over the least that can be, less 1; `columns`: multiplied in all."""

    kind: str
    name: str
    rank: int
    excess: float
    columns: int


@dataclass
class Diagonal:
    """A matrix with these singular values, in the precision of a 16-bit base's update or more."""

    values: Tensor
    columns: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), len(self.values)

    def times(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.values.unsqueeze(1) * x.to(self.values.dtype)

    transposed_times = times


def made_up(size: int) -> Iterator[Spectrum]:
    """What falls slowly, or not in the way that an estimate of what is left expects."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    for power in (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0):
        yield Spectrum("power", f"power {power:g}", index**-power)
    for scale in (30, 60, 100, 200, 500, 1500):
        yield Spectrum("exponential", f"exponential {scale}", torch.exp(-index / scale))
    for width in (60, 160, 400):
        yield Spectrum("normal", f"normal {width}", torch.exp(-((index / width) ** 2) / 2))
    yield Spectrum("linear", "linear", 1 - (index - 1) / size)
    yield Spectrum("logarithm", "logarithm", 1 / torch.log(index + 1))
    for equal in (8, 20, 40, 60, 100, 200):
        head = 1 - index * 1e-4
        for level in (0.5, 0.1):
            slow = torch.where(index <= equal, head, level * index**-0.1)
            yield Spectrum("nearly equal", f"{equal} nearly equal, tail from {level:g}", slow)
            fast = torch.where(index <= equal, head, level * torch.exp(-index / 1500))
            yield Spectrum("nearly equal", f"{equal} nearly equal, tail falls from {level:g}", fast)
    for equal in (50, 100, 200):
        falling = torch.where(index <= equal, 1 - index * 1e-3, 0.05 * index**-0.1)
        yield Spectrum("plateau", f"plateau of {equal}", falling)
    for step in (16, 50):  # not equal to the last bit
        stairs = 0.7 ** ((index - 1) // step) * (1 - index * 1e-6)
        yield Spectrum("stairs", f"stairs of {step}", stairs)
    yield from _random(size)


def _random(size: int) -> Iterator[Spectrum]:
    """Noise alone, and updates as a DoRA's: `c BA + (c - 1) W`."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    weight = normal(size, size)
    yield Spectrum("noise", "noise", torch.linalg.svdvals(weight))
    low = normal(size, 16) @ normal(16, size) * 0.05
    for spread in (0.003, 0.02, 0.1):
        c = 1 + spread * normal(size, 1)
        update = c * low + (c - 1) * weight
        yield Spectrum("DoRA", f"DoRA, spread {spread:g}", torch.linalg.svdvals(update))


def real(base: Path, adapter: Path) -> Iterator[Spectrum]:
    """Of every linear layer with a magnitude, from the paper's formula in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise SystemExit(f"{adapter}: layers with a rank or an alpha of their own are not known")
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    tensors = load_file(adapter / "adapter_model.safetensors")
    places = {name: file for file in sorted(base.glob("*.safetensors")) for name in _names(file)}
    suffix = ".lora_magnitude_vector"
    for key in sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix)):
        path = key.removeprefix("base_model.model.")
        name = f"{path}.weight"
        if name not in places:
            raise SystemExit(f"{base} has no {name}, of which {adapter} is an adapter")
        with safe_open(places[name], "pt") as file:
            weight = file.get_tensor(name).double()
        down, up = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
        direction = weight + scaling * up @ down
        c = tensors[key + suffix].double().unsqueeze(1) / direction.norm(dim=1, keepdim=True)
        yield Spectrum(adapter.name, path, torch.linalg.svdvals(c * direction - weight))


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def search(spectrum: Spectrum, rank: int, seed: int, dtype: torch.dtype) -> Found | None:
    """One case; None where `to-lora` would decompose in full, or where nothing is to be missed."""
    operator = Diagonal(spectrum.values.to(dtype))
    values = operator.values.double()
    square = float(values.square().sum())
    best = float(values[rank:].norm())
    if spans_everything(operator.shape, rank) or best < _TINIEST * square**0.5:
        return None
    generator = torch.Generator().manual_seed(seed)
    factors = krylov_factors(operator, rank, generator, square)
    missed = torch.diag(values) - factors.left * factors.singular @ factors.right
    excess = float(missed.norm()) / best - 1
    return Found(spectrum.kind, spectrum.name, rank, excess, operator.columns)


def report(found: Sequence[Found]) -> str:
    """A row of each kind, the worst cases, and how many there are above what is promised."""
    kinds: dict[str, list[Found]] = defaultdict(list)
    for case in found:
        kinds[case.kind].append(case)
    rows = []
    for kind, cases in [*kinds.items(), ("all", list(found))]:
        worst = max(cases, key=lambda case: case.excess)
        columns = f"{median(case.columns / case.rank for case in cases):.1f}"
        middle = f"{median(case.excess for case in cases):.3%}"
        where = f"{worst.name}, rank {worst.rank}"
        rows.append([kind, f"{len(cases)}", middle, f"{worst.excess:.3%}", where, columns])
    head = ["spectra", "cases", "median excess", "worst excess", "of", "columns by rank, median"]
    above = sorted((c for c in found if c.excess > LIMIT), key=lambda case: -case.excess)
    lines = [f"- {case.name}, rank {case.rank}: {case.excess:.3%}" for case in above]
    counts = f"{len(above)} of {len(found)} cases are more than {LIMIT:.1%} above the optimum"
    return "\n".join([table(head, rows), "", counts, *lines])


def survey(
    spectra: Iterator[Spectrum], ranks: Sequence[int], seeds: int, dtype: torch.dtype
) -> Iterator[Found]:
    for spectrum in spectra:
        for rank in ranks:
            for seed in range(seeds):
                found = search(spectrum, rank, seed, dtype)
                if found is not None:
                    yield found
        say(spectrum.name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", nargs=2, type=Path, action="append", default=[])
    parser.add_argument("--size", type=int, default=1000, help="values of those made up")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--seeds", type=int, default=1, help="random starts of each")
    parser.add_argument("--single", action="store_true", help="products in float32")
    parser.add_argument("--tiny", action="store_true", help="only try the script")
    options = parser.parse_args(arguments)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    size, ranks = (200, [8]) if options.tiny else (options.size, ranks)
    dtype = torch.float32 if options.single else torch.float64
    # Those first, of which something may be amiss.
    spectra = chain(*(real(base, adapter) for base, adapter in options.real), made_up(size))
    found = list(survey(spectra, ranks, options.seeds, dtype))
    print(report(found))


if __name__ == "__main__":
    main()

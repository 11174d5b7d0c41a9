"""The interfaces to implement in order to extend the tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterFormat", "Dequantizer", "Folding", "Listener", "Quantizer"]


class AdapterFormat(Protocol):
    """One layout of adapter files; `formats/NAME.py` holds one as `FORMAT`.

    `weights` is the file that its trainer writes the tensors to; a torch pickle by its suffix.
    """

    title: str
    weights: str

    def detect(self, bundle: Bundle) -> bool:
        """Whether the files are of this format; at most one format may say so."""
        ...

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """Canonical layout, scaling resolved, every tensor accounted for.

        `axis` is the user's word on what a magnitude belongs to, where format and shape do not
        decide. Raises InputError with all that is wrong, at once.
        """
        ...

    def write(self, adapter: Adapter) -> Bundle:
        """The same adapter in this layout: names and views only, and the documents beside.

        Raises InputError with everything that this layout cannot hold, at once.
        """
        ...


class Listener(Protocol):
    """Told how a run goes; may be called from several threads."""

    def started(self, nbytes: int) -> None:
        """So many bytes are to be written, or gone through where little is written."""
        ...

    def advanced(self, nbytes: int) -> None:
        """So many more are done."""
        ...

    def sealed(self, file: str) -> None:
        """A shard is complete on disk."""
        ...


class Dequantizer(Protocol):
    """One quantisation scheme, read; `quant/NAME.py` holds one as `QUANTIZER`.

    Blocks may lie on any device, and the arithmetic stays there. `on_host`: the roles of parts
    that are given on the host all the same, because something there has to look at them.
    """

    title: str
    on_host: tuple[str, ...]

    def detect(self, config: Json) -> bool:
        """Whether config.json says that weights of this scheme are in the checkpoint."""
        ...

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """The weights stored in this scheme, by the name that the dense one would have.

        `load` reads a small tensor's bytes, for schemes that keep a shape in one. Raises
        InputError with all that is wrong: a part that is missing, shapes that disagree.
        """
        ...

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """What rows `start:stop` need of each part, None meaning all of it.

        Parts that are left out are not needed. For a weight that is written it is the place of
        what `quantize` returns.
        """
        ...

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """Rows `start:stop` as a new float32 `[stop - start, in]`; `parts` are their windows.

        Rounded to `weight.dense.dtype` it equals what the scheme's own library returns.
        """
        ...


@runtime_checkable
class Quantizer(Dequantizer, Protocol):
    """A scheme that can be written too.

    One weight: `layout`; for every block `quantize`, in any order; then `constants`. Where
    `surveys`, every block is shown to `survey` as well, and `gather` makes one statistic of all
    that came out, in row order. Where `two_pass`, `quantize` needs it, hence before any block;
    elsewhere `constants` alone do, and `surveyed` is the role of the part whose places in `windows`
    are also those of the numbers that `survey` gives.
    `returns` is the type that the scheme's library decodes to, None for the weight's own.
    """

    surveys: bool
    two_pass: bool
    surveyed: str | None
    returns: DType | None

    def takes(self, dense: TensorSpec) -> bool:
        """Whether the scheme's convention quantises a tensor of this name and rank."""
        ...

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """All tensors that `dense`, `[out, in]`, will become.

        Raises InputError where the scheme cannot hold that shape.
        """
        ...

    def row_multiple(self, weight: QuantizedWeight) -> int:
        """Blocks start at multiples of it; the last one may end anywhere."""
        ...

    def fused(self, name: str) -> str | None:
        """Weights with the same answer share one statistic; None: it has its own."""
        ...

    def survey(self, rows: Tensor) -> Tensor:
        """A block's part of the statistic."""
        ...

    def gather(self, surveys: Sequence[Tensor]) -> Tensor:
        """The statistic, from all blocks in row order."""
        ...

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The windows of a block `rows [n, in]`, computed in its own element type.

        A block in `weight.dense.dtype` gives the bytes of the scheme's own library, which rounds
        between the steps; a float32 block is rounded once.
        """
        ...

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The parts that belong to no row."""
        ...

    def config(self, kept_dense: Sequence[str]) -> Json:
        """Entries of config.json; `kept_dense` are the modules that could be and are not."""
        ...


@runtime_checkable
class Folding(Quantizer, Protocol):
    """A scheme whose scales belong to one row each, so that a row's factor can go into them.

    A base that is stored in it then keeps its codes where only the length of a row changes.
    `folds` are the roles of the parts that a factor multiplies. `folds_best`: whether that leaves
    less noise than new scales do, as measured on such a base.
    """

    folds: tuple[str, ...]
    folds_best: bool

    def quantize_under(
        self, weight: QuantizedWeight, rows: Tensor, scales: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The windows of a block under given scales, the parts of `folds` in float32.

        They are rounded to their stored type before or after the codes are made, as `quantize`
        does it.
        """
        ...

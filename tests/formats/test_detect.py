"""What holds for every registered format."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_convert.core.bundle import Bundle
from dora_convert.errors import InputError
from dora_convert.formats import detect, formats
from dora_convert.storage.bundle import open_bundle

from ..core.values import bundle

FIXTURES = Path(__file__).parents[2] / "fixtures"
ADAPTERS = {
    **{f"peft/{p.name}": "peft" for p in sorted((FIXTURES / "peft").iterdir()) if p.is_dir()},
    "nvidia": "nvidia",
    "minilm": "peft",
}
KEY = "base_model.model.q"


def adapter(name: str) -> Bundle:
    folder = FIXTURES / name
    inner = folder / "adapter"
    return open_bundle(inner if inner.exists() else folder, allow_pickle=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_exactly_one_format_detects_it(name: str) -> None:
    held = adapter(name)
    found = [known for known in formats.names() if formats.get(known).detect(held)]
    assert found == [ADAPTERS[name]]
    assert detect(held) == ADAPTERS[name]


def test_every_format_has_an_adapter_here() -> None:
    assert set(ADAPTERS.values()) == set(formats.names())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_tensor_too_much_is_an_error_in_every_format(name: str) -> None:
    held = adapter(name)
    extra = bundle({"some.thing": (3,)}, None).tensors
    more = Bundle(held.root, {**held.tensors, **extra}, held.documents)
    plugin = formats.get(ADAPTERS[name])
    assert plugin.read(held).modules
    with pytest.raises(InputError) as caught:
        plugin.read(more)
    assert caught.value.problems == ("some.thing [3] is not understood",)


@pytest.mark.parametrize("name", formats.names())
def test_every_format_has_a_title(name: str) -> None:
    assert formats.get(name).title


def test_neither() -> None:
    held = bundle({"model.norm.weight": (3,)}, {"peft_type": "LOHA"})
    with pytest.raises(InputError, match="not an adapter in a known format") as caught:
        detect(held)
    assert "model.norm.weight" in caught.value.where[1]
    assert "nvidia, peft" in caught.value.hint


def test_neither_and_empty() -> None:
    with pytest.raises(InputError, match="not an adapter in a known format") as caught:
        detect(bundle({}, None))
    assert "none" in caught.value.where[1]


def test_both() -> None:
    """A PEFT config beside magnitudes under NVIDIA's name: which scaling rules hold is open."""
    tensors = {
        f"{KEY}.lora_A.weight": (2, 3),
        f"{KEY}.lora_B.weight": (3, 2),
        f"{KEY}.weight_m_wdecomp.weight": (3, 1),
    }
    with pytest.raises(InputError, match="more than one adapter format fits: nvidia, peft"):
        detect(bundle(tensors, {"peft_type": "LORA"}))

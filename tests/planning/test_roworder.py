"""Which order rows of q and k are in, by family and evidence; views are checked by their shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter, DoraModule, RowOrder
from dora_convert.core.evidence import Moments, Sample, Stretch, Subject
from dora_convert.core.heads import reordered
from dora_convert.errors import MismatchError
from dora_convert.planning.roworder import (
    head_rows,
    in_base_order,
    in_torchtune_order,
    unclear,
)

from ..core.values import adapter, dora, ref

SAME, INTERLEAVED, HALVED = RowOrder.SAME, RowOrder.INTERLEAVED, RowOrder.HALVED
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
DIM = 8  # with 4 both orders are one
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": DIM}
LLAMA = {"model_type": "llama", **SHAPE}
QWEN = {"model_type": "qwen2", **SHAPE}
OTHER = {"model_type": "something", **SHAPE}


def moments(correlation: float) -> Moments:
    return Moments(900, 1.0, 1.0, correlation)


AS_GIVEN = {SAME: moments(0.9), INTERLEAVED: moments(0.0), HALVED: moments(0.0)}
TURNED = {SAME: moments(0.0), INTERLEAVED: moments(0.9), HALVED: moments(0.0)}
NOISE = {SAME: moments(0.0), INTERLEAVED: moments(0.05), HALVED: moments(0.0)}


def module(path: str, up: RowOrder = SAME, magnitude: RowOrder = SAME) -> DoraModule:
    return replace(dora(path, 16, 16), up_order=up, magnitude_order=magnitude)


NATIVE = adapter(*(module(path, INTERLEAVED, INTERLEAVED) for path in (Q, K)), module(V))
EXPORT = adapter(*(module(path, SAME, INTERLEAVED) for path in (Q, K)), module(V))
PLAIN = adapter(module(Q), module(K), module(V))


def orders(found: Adapter) -> set[tuple[RowOrder, RowOrder]]:
    """The orders that the rows of q and k were taken out of."""
    seen = set()
    for path in (Q, K):
        before, after = dora(path, 16, 16), found.modules[path]
        assert before.delta is not None
        assert after.delta is not None
        assert before.magnitude is not None
        assert after.delta.down == before.delta.down
        assert (after.up_order, after.magnitude_order) == (SAME, SAME)
        up = [o for o in RowOrder if reordered(before.delta.up, o, DIM) == after.delta.up]
        m = [o for o in RowOrder if reordered(before.magnitude, o, DIM) == after.magnitude]
        seen |= set(zip(up, m, strict=True))
    assert found.modules[V] == dora(V, 16, 16)
    return seen


@pytest.mark.parametrize(
    ("held", "config", "evidence", "expected"),
    [
        # By the family, where the norms do not tell; and where they say the same.
        (NATIVE, LLAMA, NOISE, (INTERLEAVED, INTERLEAVED)),
        (NATIVE, LLAMA, TURNED, (INTERLEAVED, INTERLEAVED)),
        (NATIVE, LLAMA, {}, (INTERLEAVED, INTERLEAVED)),
        (NATIVE, QWEN, {}, (SAME, SAME)),
        (NATIVE, QWEN, AS_GIVEN, (SAME, SAME)),
        (EXPORT, LLAMA, {}, (SAME, INTERLEAVED)),
        (EXPORT, LLAMA, TURNED, (SAME, INTERLEAVED)),
        (EXPORT, QWEN, {}, (HALVED, SAME)),
        (EXPORT, QWEN, AS_GIVEN, (HALVED, SAME)),
        # Someone has put the magnitudes in order.
        (EXPORT, LLAMA, AS_GIVEN, (SAME, SAME)),
        # By the norms alone.
        (NATIVE, OTHER, TURNED, (INTERLEAVED, INTERLEAVED)),
        (NATIVE, OTHER, AS_GIVEN, (SAME, SAME)),
        (EXPORT, OTHER, TURNED, (SAME, INTERLEAVED)),
        # Not said to be torchtune's.
        (PLAIN, LLAMA, TURNED, (SAME, INTERLEAVED)),
        (PLAIN, LLAMA, AS_GIVEN, (SAME, SAME)),
        (PLAIN, LLAMA, NOISE, (SAME, SAME)),
        (PLAIN, {}, {}, (SAME, SAME)),
    ],
)
def test_orders(
    held: Adapter,
    config: Mapping[str, Any],
    evidence: Mapping[RowOrder, Moments],
    expected: tuple[RowOrder, RowOrder],
) -> None:
    found = in_base_order(held, config, evidence)
    assert orders(found) == {expected}
    told = "order" in " ".join(found.notes)
    assert told == (expected != (SAME, SAME) or (held is EXPORT and config is LLAMA))


@pytest.mark.parametrize(
    ("held", "config", "evidence"),
    [
        (NATIVE, OTHER, NOISE),
        (NATIVE, OTHER, {}),
        (EXPORT, OTHER, NOISE),
        # Whether lora_B was moved cannot be seen in the magnitudes.
        (EXPORT, OTHER, AS_GIVEN),
        # The norms deny what the family does.
        (NATIVE, LLAMA, AS_GIVEN),
        (NATIVE, QWEN, TURNED),
        (EXPORT, QWEN, TURNED),
        (NATIVE, {**LLAMA, "text_config": {"model_type": "qwen2"}}, {}),
    ],
)
def test_undecided(
    held: Adapter, config: Mapping[str, Any], evidence: Mapping[RowOrder, Moments]
) -> None:
    with pytest.raises(MismatchError, match="is not clear") as caught:
        in_base_order(held, config, evidence)
    assert "adapter_model.pt" in caught.value.hint


@pytest.mark.parametrize("wrong", [{"head_dim": 3}, {"num_attention_heads": None}, {"head_dim": 6}])
def test_heads_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="head by head") as caught:
        in_base_order(NATIVE, LLAMA | wrong, {})
    assert [p.partition(":")[0] for p in caught.value.problems] == [Q, K]


def test_head_rows() -> None:
    assert head_rows(LLAMA) == DIM
    assert head_rows({"text_config": LLAMA}) == DIM
    assert head_rows({"head_dim": 8}) is None
    assert head_rows({**LLAMA, "head_dim": 5}) is None


def test_plain_lora_of_torchtune() -> None:
    """It has no magnitude, and its lora_B is in the same order."""
    bare = replace(
        dora(Q, 16, 16, magnitude=False), up_order=INTERLEAVED, magnitude_order=INTERLEAVED
    )
    found = in_base_order(adapter(bare), LLAMA, {}).modules[Q]
    assert bare.delta is not None
    assert found.delta is not None
    assert found.delta.up == reordered(bare.delta.up, INTERLEAVED, DIM)


@pytest.mark.parametrize("config", [LLAMA, QWEN])
def test_into_torchtunes_order_and_back(config: dict[str, Any]) -> None:
    there = in_torchtune_order(PLAIN, config)
    for path in (Q, K):
        assert there.modules[path].up_order is INTERLEAVED
        assert there.modules[path].magnitude_order is INTERLEAVED
    assert there.modules[V] == PLAIN.modules[V]
    back = in_base_order(there, config, {}).modules[Q]
    before = PLAIN.modules[Q]
    assert back.magnitude is not None
    assert before.magnitude is not None
    if config is LLAMA:
        once = reordered(before.magnitude, HALVED, DIM)
        assert back.magnitude == reordered(once, INTERLEAVED, DIM)
    else:
        assert back.magnitude == before.magnitude


def test_torchtunes_order_of_an_unknown_family() -> None:
    with pytest.raises(MismatchError, match="of something is not known"):
        in_torchtune_order(PLAIN, OTHER)
    assert in_torchtune_order(adapter(module(V)), OTHER) == adapter(module(V))


def subject(held: DoraModule) -> Subject:
    return Subject(held, (Stretch(ref("w", 16, 16), 0, 16),))


def sample(held: DoraModule, correlation: float) -> Sample:
    return Sample(subject(held), 1.0, 0.1, 1.0, 0.1, 0.1, 0.1, moments(correlation))


def test_what_is_measured() -> None:
    ours = [subject(m) for m in PLAIN.modules.values()]
    good = [sample(m, 0.9) for m in PLAIN.modules.values()]
    bad = [sample(PLAIN.modules[path], c) for path, c in ((Q, 0.0), (K, 0.1), (V, 0.9))]
    assert unclear(ours, good, DIM) == []
    assert [s.module.path for s in unclear(ours, bad, DIM)] == [Q, K]
    # Nothing to compare with.
    assert unclear(ours, bad[:2], DIM) == []
    marked = [subject(m) for m in NATIVE.modules.values()]
    assert [s.module.path for s in unclear(marked, [], DIM)] == [Q, K]
    assert unclear(marked, [], 3) == []

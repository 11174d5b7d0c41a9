"""Groups and layers of module paths, as people call them."""

from __future__ import annotations

from dora_convert.report.places import Place, places


def test_llama() -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    paths = [f"model.layers.{i}.{name}" for i in (0, 10) for name in names]
    assert places([*paths, "lm_head"]) == {
        "model.layers.0.self_attn.q_proj": Place("q_proj", 0),
        "model.layers.0.self_attn.k_proj": Place("k_proj", 0),
        "model.layers.0.mlp.down_proj": Place("down_proj", 0),
        "model.layers.10.self_attn.q_proj": Place("q_proj", 10),
        "model.layers.10.self_attn.k_proj": Place("k_proj", 10),
        "model.layers.10.mlp.down_proj": Place("down_proj", 10),
        "lm_head": Place("lm_head", None),
    }


def test_names_that_end_alike_are_told_apart() -> None:
    ends = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    found = places(f"encoder.layer.3.{end}" for end in ends)
    assert [place.group for place in found.values()] == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "layer.*.output.dense",
    ]
    assert {place.layer for place in found.values()} == {3}


def test_experts_are_one_group() -> None:
    found = places(f"model.layers.1.mlp.experts.{i}.w1" for i in range(3))
    assert set(found.values()) == {Place("w1", 1)}


def test_encoder_and_decoder_are_two() -> None:
    paths = [f"{half}.block.2.layer.0.SelfAttention.q" for half in ("encoder", "decoder")]
    assert list(places(paths).values()) == [
        Place("encoder.block.*.layer.*.SelfAttention.q", 2),
        Place("decoder.block.*.layer.*.SelfAttention.q", 2),
    ]


def test_names_of_little_else_than_numbers() -> None:
    found = places(["0", "net.2", "dense", "head.dense", "x." + "9" * 5000])
    assert found["0"] == Place("*", 0)
    assert found["net.2"] == Place("net.*", 2)
    assert found["dense"] == Place("dense", None)
    assert found["head.dense"] == Place("head.dense", None)
    assert found["x." + "9" * 5000].layer is None
    assert len({place.group for place in found.values()}) == 5
    assert places([]) == {}

"""What becomes of tied embeddings, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, TokenRows
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Copy, Merge, Op, PatchRows, WrittenFile
from dora_convert.planning.families import is_tied
from dora_convert.planning.planner import Proposal, plan_merge

from ..core.values import adapter, checkpoint, dora, ref

EMBED, HEAD = "model.embed_tokens", "lm_head"
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
UNTIED = TIED | {"tie_word_embeddings": False}
SILENT = {"architectures": ["LlamaForCausalLM"]}


def base(config: dict[str, Any], *, head: bool = False, **others: Sequence[int]) -> Checkpoint:
    shapes: dict[str, Sequence[int]] = {f"{EMBED}.weight": (20, 8), "model.norm.weight": (8,)}
    if head:
        shapes[f"{HEAD}.weight"] = (20, 8)
    return checkpoint(shapes | others, config)


def embed() -> DoraModule:
    return dora(EMBED, 20, 8, axis=MagnitudeAxis.IN)


def head() -> DoraModule:
    return dora(HEAD, 20, 8)


def whole(*paths: str, rows: int = 20) -> dict[str, Any]:
    return {"replaced": {f"{p}.weight": ref(f"trained.{p}", rows, 8) for p in paths}}


def rows(*paths: str) -> dict[str, Any]:
    return {"token_rows": {path: TokenRows((3, 1), ref("rows", 2, 8)) for path in paths}}


def plan(found: Adapter, checkpoint: Checkpoint) -> Proposal:
    proposal = plan_merge(found, checkpoint)
    assert proposal.problems == ()
    return proposal


def ops(proposal: Proposal) -> dict[str, Op]:
    return {job.output.name: job.op for job in proposal.plan.jobs}


def only_problem(found: Adapter, checkpoint: Checkpoint) -> str:
    (problem,) = plan_merge(found, checkpoint).problems
    return problem


def unties(proposal: Proposal) -> bool:
    written = [d for d in proposal.plan.documents if isinstance(d, WrittenFile)]
    assert len(written) <= 1
    return bool(written) and '"tie_word_embeddings": false' in written[0].text


def source(op: Op) -> str:
    assert isinstance(op, Copy | Merge | PatchRows)
    return (op.source if isinstance(op, Copy) else op.base).stored.name


# Adapted ends: each is merged from the shared weight


def test_input_adapted() -> None:
    proposal = plan(adapter(embed()), base(TIED))
    found = ops(proposal)
    assert isinstance(found[f"{EMBED}.weight"], Merge)
    assert found[f"{HEAD}.weight"] == Copy(base(TIED).tensors[f"{EMBED}.weight"])
    assert unties(proposal)
    assert any("were tied" in note for note in proposal.plan.notes)


def test_input_adapted_on_a_copy_of_its_own() -> None:
    """A resized vocabulary: the head had the copy's values, not those of the smaller base."""
    module = dora(EMBED, 23, 8, axis=MagnitudeAxis.IN, weight=ref("copy", 23, 8))
    proposal = plan(adapter(module), base(TIED))
    found = ops(proposal)
    assert source(found[f"{EMBED}.weight"]) == source(found[f"{HEAD}.weight"]) == "copy"
    shapes = {job.output.name: job.output.shape[0] for job in proposal.plan.jobs}
    assert shapes[f"{EMBED}.weight"] == shapes[f"{HEAD}.weight"] == 23


def test_head_adapted_and_replaced() -> None:
    told = only_problem(adapter(head(), **whole(HEAD)), base(TIED))
    assert f"{HEAD}.weight is both adapted and replaced" in told


def test_head_adapted() -> None:
    proposal = plan(adapter(head()), base(TIED))
    found = ops(proposal)
    assert isinstance(found[f"{EMBED}.weight"], Copy)
    assert isinstance(found[f"{HEAD}.weight"], Merge)
    assert source(found[f"{HEAD}.weight"]) == f"{EMBED}.weight"
    assert unties(proposal)


@pytest.mark.parametrize("keeps_ties", [False, True])
def test_both_adapted(keeps_ties: bool) -> None:
    proposal = plan(adapter(embed(), head(), keeps_ties=keeps_ties), base(TIED))
    found = ops(proposal)
    for path in (EMBED, HEAD):
        assert isinstance(found[f"{path}.weight"], Merge)
        assert source(found[f"{path}.weight"]) == f"{EMBED}.weight"
    assert unties(proposal)


def test_new_head_goes_into_the_shard_of_its_source() -> None:
    shards = {f"{EMBED}.weight": "model-00002-of-00002.safetensors"}
    held = base(TIED)
    held = checkpoint(
        held.tensors,
        TIED,
        shards={"model.norm.weight": "model-00001-of-00002.safetensors"} | shards,
    )
    second = plan(adapter(embed()), held).plan.shards[1]
    assert [spec.name for spec in second.specs] == [f"{EMBED}.weight", f"{HEAD}.weight"]


# Ends that were trained whole


def test_input_replaced() -> None:
    proposal = plan(adapter(**whole(EMBED)), base(TIED))
    found = ops(proposal)
    assert source(found[f"{EMBED}.weight"]) == f"trained.{EMBED}"
    assert found[f"{HEAD}.weight"] == Copy(base(TIED).tensors[f"{EMBED}.weight"])
    assert unties(proposal)


def test_head_replaced() -> None:
    proposal = plan(adapter(**whole(HEAD)), base(TIED))
    found = ops(proposal)
    assert found[f"{EMBED}.weight"] == Copy(base(TIED).tensors[f"{EMBED}.weight"])
    assert source(found[f"{HEAD}.weight"]) == f"trained.{HEAD}"
    assert unties(proposal)


def test_both_replaced() -> None:
    proposal = plan(adapter(**whole(EMBED, HEAD)), base(TIED))
    assert {source(op) for name, op in ops(proposal).items() if "norm" not in name} == {
        f"trained.{EMBED}",
        f"trained.{HEAD}",
    }
    assert unties(proposal)


@pytest.mark.parametrize("paths", [(EMBED, HEAD), (EMBED,), (HEAD,)])
def test_both_replaced_as_one(paths: tuple[str, ...]) -> None:
    """Also where an adapter holds the one tensor under one of its names only."""
    proposal = plan(adapter(keeps_ties=True, **whole(*paths)), base(TIED))
    found = ops(proposal)
    assert f"{HEAD}.weight" not in found
    assert source(found[f"{EMBED}.weight"]) == f"trained.{paths[0]}"
    assert not unties(proposal)


@pytest.mark.parametrize("config", [TIED, SILENT])
@pytest.mark.parametrize("paths", [(EMBED, HEAD), (EMBED,), (HEAD,)])
def test_both_replaced_as_one_where_both_are_stored(
    paths: tuple[str, ...], config: dict[str, Any]
) -> None:
    proposal = plan(adapter(keeps_ties=True, **whole(*paths)), base(config, head=True))
    found = ops(proposal)
    for path in (EMBED, HEAD):
        expected = path if path in paths else paths[0]
        assert source(found[f"{path}.weight"]) == f"trained.{expected}"
    assert not unties(proposal)


def test_sizes_of_a_resized_vocabulary() -> None:
    proposal = plan(adapter(**whole(EMBED, HEAD, rows=23)), base(TIED))
    shapes = {job.output.name: job.output.shape[0] for job in proposal.plan.jobs}
    assert shapes[f"{EMBED}.weight"] == shapes[f"{HEAD}.weight"] == 23


@pytest.mark.parametrize("path", [EMBED, HEAD])
def test_one_end_resized(path: str) -> None:
    """The other end's new rows are nowhere to be had."""
    told = only_problem(adapter(**whole(path, rows=23)), base(TIED))
    assert "[23, 8]" in told
    assert "[20, 8]" in told
    told = only_problem(adapter(**whole(path, rows=23)), base(UNTIED, head=True))
    assert "[23, 8]" in told


# Trained token rows


def test_token_rows_stay_tied() -> None:
    proposal = plan(adapter(**rows(EMBED)), base(TIED))
    assert isinstance(ops(proposal)[f"{EMBED}.weight"], PatchRows)
    assert f"{HEAD}.weight" not in ops(proposal)
    assert not unties(proposal)


def test_token_rows_under_both_names() -> None:
    """PEFT writes the rows of a tied head of a resized model too."""
    proposal = plan(adapter(**rows(EMBED, HEAD)), base(TIED))
    assert f"{HEAD}.weight" not in ops(proposal)


def test_token_rows_go_to_both_ends_where_both_are_stored() -> None:
    found = ops(plan(adapter(**rows(EMBED)), base(TIED, head=True)))
    assert isinstance(found[f"{EMBED}.weight"], PatchRows)
    assert isinstance(found[f"{HEAD}.weight"], PatchRows)
    assert source(found[f"{HEAD}.weight"]) == f"{HEAD}.weight"


def test_token_rows_of_an_untied_model() -> None:
    found = ops(plan(adapter(**rows(EMBED)), base(UNTIED, head=True)))
    assert isinstance(found[f"{EMBED}.weight"], PatchRows)
    assert isinstance(found[f"{HEAD}.weight"], Copy)


def test_token_rows_where_the_config_does_not_say() -> None:
    told = only_problem(adapter(**rows(EMBED)), base(SILENT, head=True))
    assert "tie_word_embeddings" in told
    assert f"{HEAD}.weight" not in ops(plan(adapter(**rows(EMBED)), base(SILENT)))


@pytest.mark.parametrize("other", [adapter(head()), adapter(**whole(HEAD))])
def test_token_rows_beside_another_change(other: Adapter) -> None:
    """Whether the head was changed from the old rows or the new ones is not in the file."""
    found = adapter(*other.modules.values(), replaced=other.replaced, **rows(EMBED))
    assert "which rows that one had" in only_problem(found, base(TIED))
    assert plan(found, base(UNTIED, head=True))


# Models that are not tied, or not of that kind


@pytest.mark.parametrize("found", [adapter(embed()), adapter(head()), adapter(embed(), head())])
def test_untied(found: Adapter) -> None:
    proposal = plan(found, base(UNTIED, head=True))
    merged = {name for name, op in ops(proposal).items() if isinstance(op, Merge)}
    assert merged == {f"{path}.weight" for path in found.modules}
    assert not unties(proposal)


@pytest.mark.parametrize("found", [adapter(embed()), adapter(head()), adapter(**whole(EMBED))])
def test_stored_twice(found: Adapter) -> None:
    """Both ends are on disk, the config says tied: loading would overwrite one with the other."""
    for config in (TIED, SILENT):
        proposal = plan(found, base(config, head=True))
        assert unties(proposal)
        changed = {f"{p}.weight" for p in found.modules} | set(found.replaced)
        for name in {f"{EMBED}.weight", f"{HEAD}.weight"} - changed:
            assert source(ops(proposal)[name]) == name


@pytest.mark.parametrize("name", ["LlamaModel", "BertModel", "LlamaForSequenceClassification"])
def test_no_head_at_all(name: str) -> None:
    config = {"architectures": [name], "tie_word_embeddings": True}
    proposal = plan(adapter(embed()), base(config))
    assert f"{HEAD}.weight" not in ops(proposal)
    assert not unties(proposal)
    told = only_problem(adapter(head()), base(config))
    assert f"the base has no tensor {HEAD}.weight" in told


def test_head_of_a_model_without_any_config() -> None:
    assert "has no tensor" in only_problem(adapter(head()), base({}))
    assert "tie_word_embeddings" in only_problem(adapter(embed()), base({}))


def test_untied_head_under_a_name_that_is_not_known() -> None:
    config = UNTIED | {"architectures": ["RwkvForCausalLM"]}
    found = ops(plan(adapter(embed()), base(config, **{"head.weight": (20, 8)})))
    assert set(found) == {f"{EMBED}.weight", "head.weight", "model.norm.weight"}


def test_head_beside_one_that_is_stored() -> None:
    told = only_problem(adapter(dora("a.b.c.lm_head", 20, 8)), base(TIED, head=True))
    assert "has no tensor a.b.c.lm_head.weight" in told


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        (TIED, False, True),
        (TIED, True, True),
        (UNTIED, False, False),
        (UNTIED, True, False),
        (SILENT, False, True),
        (SILENT, True, None),
        ({}, False, None),
        ({}, True, None),
        ({"architectures": ["InternVLChatModel"], "tie_word_embeddings": True}, False, True),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, False, True),
        ({"architectures": ["GPT2LMHeadModel"]}, False, True),
        ({"architectures": ["ViTForImageClassification"]}, False, False),
        ({"architectures": ["ViTModel"], "tie_word_embeddings": True}, False, False),
        (SILENT | {"text_config": {"tie_word_embeddings": True}}, False, True),
        (SILENT | {"text_config": {"tie_word_embeddings": True}}, True, True),
        (UNTIED | {"text_config": {"tie_word_embeddings": True}}, False, True),
        (UNTIED | {"text_config": {"tie_word_embeddings": True}}, True, None),
        (UNTIED | {"text_config": {}}, True, None),
        (UNTIED | {"text_config": {"tie_word_embeddings": False}}, True, False),
    ],
)
def test_is_tied(config: dict[str, Any], stored: bool, expected: bool | None) -> None:
    assert is_tied(config, head_stored=stored) is expected


# Models that use the embedding in more places


BART = {
    "architectures": ["BartForConditionalGeneration"],
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
}


def test_encoder_decoder() -> None:
    shared = "model.shared"
    held = checkpoint({f"{shared}.weight": (20, 8), "model.fc.weight": (8, 8)}, BART)
    for found in (
        adapter(dora(shared, 20, 8, axis=MagnitudeAxis.IN)),
        adapter(dora(HEAD, 20, 8)),
        adapter(**whole(shared)),
        adapter(**whole(HEAD)),
    ):
        assert "encoder-decoder" in only_problem(found, held)
    assert plan(adapter(dora("model.fc", 8, 8)), held)
    assert plan(adapter(**rows(shared)), held)


def test_encoder_decoder_that_only_ties_its_inputs() -> None:
    config = BART | {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    held = checkpoint({"shared.weight": (20, 8), "lm_head.weight": (20, 8)}, config)
    told = only_problem(adapter(dora("shared", 20, 8, axis=MagnitudeAxis.IN)), held)
    assert "encoder-decoder" in told
    assert plan(adapter(dora(HEAD, 20, 8)), held)


BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}


@pytest.mark.parametrize("flag", [{}, {"tie_word_embeddings": True}])
def test_masked_language_model(flag: dict[str, Any]) -> None:
    path = "bert.embeddings.word_embeddings"
    held = checkpoint({f"{path}.weight": (20, 8), "bert.pooler.dense.weight": (8, 8)}, BERT | flag)
    module = dora(path, 20, 8, axis=MagnitudeAxis.IN)
    assert "masked language model" in only_problem(adapter(module), held)
    assert "masked language model" in only_problem(adapter(**whole(path)), held)
    assert plan(adapter(dora("bert.pooler.dense", 8, 8)), held)
    untied = checkpoint(held.tensors, BERT | {"tie_word_embeddings": False})
    assert plan(adapter(module), untied)

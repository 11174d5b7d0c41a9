from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dora_convert.core import assembly
from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, TokenRows
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Merge
from dora_convert.core.tensors import DType
from dora_convert.planning.match import Matching, match
from dora_convert.planning.names import Rows, module_tensors
from dora_convert.planning.planner import plan_merge

from ..core.values import adapter, checkpoint, dora, magnitude_only, ref

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens", "lm_head"
Q = "model.layers.0.self_attn.q_proj"


def llama(**others: Sequence[int]) -> Checkpoint:
    shapes: dict[str, Sequence[int]] = {
        f"{EMBED}.weight": (20, 8),
        f"{HEAD}.weight": (20, 8),
        f"{Q}.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.norm.weight": (8,),
    }
    return checkpoint(shapes | others, LLAMA)


def problems(
    found: Adapter, base: Checkpoint, *, transposed: Sequence[str] = ()
) -> tuple[str, ...]:
    return plan_merge(found, base, transposed=transposed).problems


def only_problem(found: Adapter, base: Checkpoint, **options: Any) -> str:
    (problem,) = problems(found, base, **options)
    return problem


def fits(found: Adapter, base: Checkpoint, **options: Any) -> Matching:
    matching = match(found, base, **options)
    assert matching.problems == []
    return matching


# Names


def test_same_names() -> None:
    matching = fits(adapter(dora(Q, 8, 8)), llama())
    assert [target.rows for target in matching.targets] == [(Rows(f"{Q}.weight", 0, 8),)]
    assert matching.notes == []


def test_near_misses_are_named() -> None:
    found = adapter(dora("model.layers.0.self_attn.q_prj", 8, 8), dora(Q, 8, 8))
    told = only_problem(found, llama())
    assert told.startswith("model.layers.0.self_attn.q_prj: the base has no tensor")
    assert f"nearest: {Q}.weight" in told


def test_a_layer_too_many() -> None:
    told = only_problem(adapter(dora(Q.replace("0", "1"), 8, 8), dora(Q, 8, 8)), llama())
    assert f"nearest: {Q}.weight" in told


def test_all_faults_at_once() -> None:
    found = adapter(
        dora(Q, 8, 9),
        dora("model.layers.0.mlp.up_proj", 8, 12),
        dora("model.layers.0.self_attn.k_proj", 4, 8),
        dora("model.layers.7.mlp.up_proj", 12, 8),
        replaced={"model.norm.weight": ref("n", 9), "model.nrm.weight": ref("n", 8)},
        token_rows={EMBED: TokenRows((1, 20), ref("rows", 2, 8))},
    )
    told = problems(found, llama())
    assert [problem.partition(":")[0] for problem in told] == [
        Q,
        "model.layers.0.mlp.up_proj",
        "model.layers.7.mlp.up_proj",
        "model.norm.weight",
        "model.nrm.weight",
        EMBED,
    ]
    assert told[0] == f"{Q}: adapter [8, 9], base [8, 8]"
    assert "--transposed GLOB" in told[1]
    assert "--transposed" not in told[0]
    assert "token 20 was trained, the base has 20 tokens" in told[5]


@pytest.mark.parametrize(
    ("ours", "theirs", "verb"),
    [
        ("", "transformer.", "'transformer.' added"),
        ("transformer.", "", "'transformer.' stripped"),
        ("a.b.", "", "'a.b.' stripped"),
        ("", "a.b.", "'a.b.' added"),
    ],
)
def test_prefixes(ours: str, theirs: str, verb: str) -> None:
    base = checkpoint({f"{theirs}h.{i}.fc.weight": (6, 8) for i in range(2)})
    found = adapter(*(dora(f"{ours}h.{i}.fc", 6, 8) for i in range(2)))
    matching = fits(found, base)
    assert [t.rows[0].tensor for t in matching.targets] == list(base.tensors)
    assert any(verb in note for note in matching.notes)


def test_prefix_beside_a_head_without_one() -> None:
    base = checkpoint({"h.0.fc.weight": (6, 8), "lm_head.weight": (20, 8)})
    found = adapter(dora("transformer.h.0.fc", 6, 8), dora("lm_head", 20, 8))
    rows = {t.module.path: t.rows[0].tensor for t in fits(found, base).targets}
    assert rows == {"transformer.h.0.fc": "h.0.fc.weight", "lm_head": "lm_head.weight"}


def test_prefix_that_could_be_two() -> None:
    """The same layer in two towers: taking the first would be a guess."""
    base = checkpoint({f"{t}.layers.0.q.weight": (8, 8) for t in ("vision", "text")})
    told = only_problem(adapter(dora("layers.0.q", 8, 8)), base)
    assert "'vision.'" in told
    assert "'text.'" in told


def test_prefix_that_one_more_layer_decides() -> None:
    shapes = {f"{t}.layers.0.q.weight": (8, 8) for t in ("vision", "text")}
    base = checkpoint(shapes | {"text.layers.1.q.weight": (8, 8)})
    found = adapter(dora("layers.0.q", 8, 8), dora("layers.1.q", 8, 8))
    assert {t.rows[0].tensor for t in fits(found, base).targets} == {
        "text.layers.0.q.weight",
        "text.layers.1.q.weight",
    }


def test_two_names_for_the_same_rows_are_no_choice() -> None:
    """LLaVA's text model has one name on disk and another as a module."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    disk = "language_model.model.layers.0.self_attn.q_proj"
    base = checkpoint({f"{disk}.weight": (8, 8)}, config)
    for path in (disk, "model.language_model.layers.0.self_attn.q_proj"):
        (target,) = fits(adapter(dora(path, 8, 8)), base).targets
        assert target.rows == (Rows(f"{disk}.weight", 0, 8),)
    (target,) = fits(adapter(dora("layers.0.self_attn.q_proj", 8, 8)), base).targets
    assert target.rows == (Rows(f"{disk}.weight", 0, 8),)


# Stored in other pieces than the module


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def test_conversion_that_cannot_be_done_by_rows() -> None:
    """All experts of a layer are one module in transformers 5."""
    shapes = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": s
        for e in range(2)
        for w, s in {"w1": (12, 8), "w3": (12, 8), "w2": (8, 12)}.items()
    }
    base = checkpoint(shapes, MIXTRAL)
    told = problems(adapter(dora("model.layers.0.mlp.experts.gate_up_proj", 12, 8)), base)
    assert len(told) == 1
    assert told[0].startswith("model.layers.0.mlp.experts.gate_up_proj: ")
    # Each expert by itself is a matrix like any other.
    single = "model.layers.0.block_sparse_moe.experts.1.w1"
    assert fits(adapter(dora(single, 12, 8)), base).targets[0].rows[0].tensor == f"{single}.weight"


def test_rows_in_another_order() -> None:
    """The rotary embedding of the stored weights pairs other rows than the module's does."""
    base = checkpoint({"x.self_attn.in_proj.weight": (24, 8)}, {"model_type": "gradium_phonon_tts"})
    for part in "qk":
        told = only_problem(adapter(dora(f"x.self_attn.{part}_proj", 8, 8)), base)
        assert "reordering the rows" in told
    (target,) = fits(adapter(dora("x.self_attn.v_proj", 8, 8)), base).targets
    assert target.rows == (Rows("x.self_attn.in_proj.weight", 16, 24),)


GTE = {"model_type": "gte", "architectures": ["GteModel"], "num_attention_heads": 2}


def gte() -> Checkpoint:
    shapes: dict[str, Sequence[int]] = {
        "encoder.layer.0.attention.qkv_proj.weight": (24, 8),
        "encoder.layer.0.attention.o_proj.weight": (8, 8),
    }
    return checkpoint(shapes, GTE)


def fused_parts() -> tuple[str, list[str]]:
    """Module names of the three parts, by asking for them."""
    base = gte()
    shapes = {name: r.spec.shape for name, r in base.tensors.items()}
    found = module_tensors(base.config, shapes)
    cut = [n for n, o in found.items() if isinstance(o, tuple) and o[0].stop - o[0].start == 8]
    return "encoder.layer.0.attention.qkv_proj.weight", sorted(n for n in cut if "o_proj" not in n)


def test_parts_of_a_fused_tensor() -> None:
    whole, parts = fused_parts()
    assert len(parts) == 3
    found = adapter(*(dora(n.removesuffix(".weight"), 8, 8) for n in parts[1:]))
    proposal = plan_merge(found, gte())
    assert proposal.problems == ()
    (job,) = (job for job in proposal.plan.jobs if isinstance(job.op, Merge))
    assert job.output.name == whole
    assert job.output.shape == (24, 8)
    assert isinstance(job.op, Merge)
    assert [(p.stop - p.start, p.offset) for p in job.op.pieces] == [(8, 0), (8, 0)]
    assert job.op.pieces[0].stop <= job.op.pieces[1].start


def test_part_and_whole_overlap() -> None:
    whole, parts = fused_parts()
    found = adapter(
        dora(whole.removesuffix(".weight"), 24, 8), dora(parts[0].removesuffix(".weight"), 8, 8)
    )
    assert f"are both stored in {whole}" in only_problem(found, gte())


def test_magnitude_per_input_of_a_part() -> None:
    """Its norm runs over rows that belong to other modules."""
    _, parts = fused_parts()
    module = dora(parts[0].removesuffix(".weight"), 8, 8, axis=MagnitudeAxis.IN)
    assert "needs the whole weight" in only_problem(adapter(module), gte())


def test_replacing_a_part() -> None:
    _, parts = fused_parts()
    told = only_problem(adapter(replaced={parts[0]: ref("w", 8, 8)}), gte())
    assert "cut or fused" in told


def test_own_copy_of_a_part() -> None:
    _, parts = fused_parts()
    module = dora(parts[0].removesuffix(".weight"), 8, 8, weight=ref("copy", 8, 8))
    assert "goes with a fused tensor" in only_problem(adapter(module), gte())


# Orientation


def gpt2(**config: Any) -> Checkpoint:
    shapes: dict[str, Sequence[int]] = {
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_proj.weight": (8, 8),
        "h.0.mlp.c_fc.weight": (8, 32),
        "wte.weight": (20, 8),
    }
    return checkpoint(shapes, GPT2 | config)


def test_conv1d_is_turned_whether_square_or_not() -> None:
    found = adapter(
        dora("transformer.h.0.attn.c_attn", 24, 8), dora("transformer.h.0.attn.c_proj", 8, 8)
    )
    wide, square = (target.module for target in fits(found, gpt2()).targets)
    assert wide.delta is not None
    assert wide.delta.shape == (8, 24)
    assert wide.axis is square.axis is MagnitudeAxis.IN
    assert square.delta is not None
    assert square.delta.down.stored.name.endswith(".B")


def test_conv1d_of_a_model_that_is_not_known() -> None:
    base = gpt2(model_type="mine")
    found = adapter(dora("transformer.h.0.attn.c_attn", 24, 8))
    assert "say so with --transposed GLOB" in only_problem(found, base)
    (target,) = fits(found, base, transposed=["*.c_attn"]).targets
    assert target.module.axis is MagnitudeAxis.IN


def test_square_conv1d_of_a_model_that_is_not_known() -> None:
    """Shapes are silent; the trainer's word is there that some layer is stored [in, out]."""
    base = gpt2(model_type="mine")
    module = dora("transformer.h.0.attn.c_proj", 8, 8)
    told = only_problem(adapter(module, meets_transposed=True), base)
    assert "--transposed" in told
    (target,) = fits(adapter(module, meets_transposed=True), base, transposed=["*"]).targets
    assert target.module.axis is MagnitudeAxis.IN
    (target,) = fits(adapter(module), base).targets
    assert target.module.axis is MagnitudeAxis.OUT


def test_transposed_is_not_used_for_others() -> None:
    found = adapter(dora("model.layers.0.mlp.up_proj", 12, 8))
    told = only_problem(found, llama(), transposed=["*up_proj"])
    assert told.endswith("stored [in, out]")
    assert "adapter [12, 8], base [12, 8]" in told


# Shapes and types


def test_convolution() -> None:
    base = checkpoint({"conv.weight": (6, 4, 3, 3)})
    told = only_problem(adapter(dora("conv", 6, 4 * 9)), base)
    assert "adapter [6, 36], base [6, 4, 3, 3]" in told


def test_a_kernel_of_one_element_is_as_good_as_none() -> None:
    fits(adapter(dora("conv", 6, 4)), checkpoint({"conv.weight": (6, 4, 1, 1)}))
    fits(adapter(convolution("linear", 6, 4, 1, 1)), checkpoint({"linear.weight": (6, 4)}))


def convolution(path: str, out: int, inner: int, *kernel: int) -> DoraModule:
    ones = (1,) * len(kernel)
    problems: list[str] = []
    delta = assembly.convolution(
        path, ref("A", 4, inner, *kernel), ref("B", out, 4, *ones), problems
    )
    assert problems == []
    return DoraModule(path, delta, ref("m", out), MagnitudeAxis.OUT, 1.0)


def test_kernel_that_only_flattens_to_the_same() -> None:
    base = checkpoint({"conv.weight": (6, 4, 2, 3)})
    fits(adapter(convolution("conv", 6, 4, 2, 3)), base)
    for inner, kernel in ((4, (3, 2)), (8, (1, 3)), (4, (6,)), (4, (1, 2, 3))):
        assert only_problem(adapter(convolution("conv", 6, inner, *kernel)), base)


def test_magnitude_alone() -> None:
    base = llama()
    assert fits(adapter(magnitude_only("model.layers.0.mlp.up_proj", 12)), base).targets
    told = only_problem(adapter(magnitude_only("model.layers.0.mlp.up_proj", 8)), base)
    assert told == "model.layers.0.mlp.up_proj: magnitude [8], base [12, 8]"


def test_a_vector_is_no_weight() -> None:
    told = only_problem(adapter(dora("model.norm", 8, 8)), llama())
    assert "model.norm.weight have no common row length" in told


@pytest.mark.parametrize("dtype", [DType.U8, DType.F8_E4M3, DType.I32])
def test_quantised_weight(dtype: DType) -> None:
    base = checkpoint({f"{Q}.weight": ref(f"{Q}.weight", 8, 8, dtype=dtype)}, LLAMA)
    assert f"is stored as {dtype.label}" in only_problem(adapter(dora(Q, 8, 8)), base)
    replaced = adapter(replaced={f"{Q}.weight": ref("w", 8, 8)})
    assert f"the base stores {dtype.label}" in only_problem(replaced, base)
    base = checkpoint({f"{EMBED}.weight": ref("e", 20, 8, dtype=dtype)}, LLAMA)
    patched = adapter(token_rows={EMBED: TokenRows((1,), ref("rows", 1, 8))})
    assert f"stored as {dtype.label}" in only_problem(patched, base)


# The adapter's own copy of the base weight


def test_own_copy() -> None:
    module = dora(Q, 8, 8, weight=ref("copy", 8, 8))
    proposal = plan_merge(adapter(module), llama())
    assert proposal.problems == ()
    (job,) = (job for job in proposal.plan.jobs if job.output.name == f"{Q}.weight")
    assert isinstance(job.op, Merge)
    assert job.op.base.stored.name == "copy"


@pytest.mark.parametrize("shape", [(9, 8), (8, 9), (8,), (8, 8, 1), (0, 8)])
def test_own_copy_of_another_size(shape: tuple[int, ...]) -> None:
    """It would make the update fit, and the checkpoint not."""
    out, inner = (*shape, 8)[:2]
    told = problems(adapter(dora(Q, out, inner, weight=ref("copy", *shape))), llama())
    assert f"{Q}: the adapter's own base weight {list(shape)}, base [8, 8]" in told


def test_own_copy_of_an_embedding_that_was_resized() -> None:
    embed = dora(EMBED, 23, 8, axis=MagnitudeAxis.IN, weight=ref("e", 23, 8))
    head = dora(HEAD, 23, 8, weight=ref("h", 23, 8))
    proposal = plan_merge(adapter(embed, head), llama())
    assert proposal.problems == ()
    shapes = {job.output.name: job.output.shape for job in proposal.plan.jobs}
    assert shapes[f"{EMBED}.weight"] == shapes[f"{HEAD}.weight"] == (23, 8)
    told = only_problem(adapter(embed), llama())
    assert "[23, 8]" in told
    assert "[20, 8]" in told


# Tensors that were trained whole


def test_replaced_weights() -> None:
    norm = ref("n", 8, dtype=DType.BF16)
    proposal = plan_merge(adapter(replaced={"model.norm.weight": norm}), llama())
    assert proposal.problems == ()
    outputs = {job.output.name: job.output for job in proposal.plan.jobs}
    assert outputs["model.norm.weight"].dtype is DType.F32


def test_replaced_under_a_prefix() -> None:
    base = checkpoint({"h.0.fc.weight": (6, 8), "ln_f.weight": (8,)})
    found = adapter(
        dora("transformer.h.0.fc", 6, 8), replaced={"transformer.ln_f.weight": ref("n", 8)}
    )
    assert fits(found, base).replaced.keys() == {"ln_f.weight"}


def test_both_adapted_and_replaced() -> None:
    found = adapter(dora(Q, 8, 8), replaced={f"{Q}.weight": ref("w", 8, 8)})
    assert only_problem(found, llama()) == f"{Q}.weight is both adapted ({Q}) and replaced"


def test_both_patched_and_something_else() -> None:
    rows = {EMBED: TokenRows((1,), ref("rows", 1, 8))}
    found = adapter(replaced={f"{EMBED}.weight": ref("w", 20, 8)}, token_rows=rows)
    assert "both replaced and patched" in only_problem(found, llama())
    found = adapter(dora(EMBED, 20, 8, axis=MagnitudeAxis.IN), token_rows=rows)
    assert "both adapted" in only_problem(found, llama())


def test_replaced_twice_under_two_names() -> None:
    base = checkpoint({"h.0.fc.weight": (6, 8), "ln_f.weight": (8,)})
    names = ("transformer.ln_f.weight", "ln_f.weight")
    found = adapter(dora("transformer.h.0.fc", 6, 8), replaced={n: ref(n, 8) for n in names})
    assert "replaced twice" in only_problem(found, base)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_new_heads(task: str) -> None:
    heads = {n: ref(n, 3, 8) for n in ("score.weight", "classifier.dense.weight")}
    heads["score.bias"] = ref("score.bias", 3)
    assert fits(adapter(replaced=heads, task=task), llama()).replaced.keys() == heads.keys()
    assert len(problems(adapter(replaced=heads, task="CAUSAL_LM"), llama())) == 3


def test_bias_of_a_classifier_that_is_not_found() -> None:
    """A new head has a weight; a bias alone has a name that was not found."""
    name = "model.layers.0.self_atn.q_proj.bias"
    told = only_problem(adapter(replaced={name: ref(name, 8)}, task="SEQ_CLS"), llama())
    assert f"{name}: the base has no such tensor" in told


def test_only_a_head_may_change_its_size() -> None:
    base = llama(**{"score.weight": (2, 8)})
    head = adapter(replaced={"score.weight": ref("s", 5, 8)}, task="SEQ_CLS")
    assert fits(head, base).replaced
    norm = adapter(replaced={"model.norm.weight": ref("n", 9)}, task="SEQ_CLS")
    assert only_problem(norm, base) == "model.norm.weight: adapter [9], base [8]"
    wide = adapter(replaced={"score.weight": ref("s", 5, 9)}, task="SEQ_CLS")
    assert only_problem(wide, base) == "score.weight: adapter [5, 9], base [2, 8]"
    other = adapter(replaced={"score.weight": ref("s", 5, 8)})
    assert only_problem(other, base) == "score.weight: adapter [5, 8], base [2, 8]"


# Token rows


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (TokenRows((1, 2), ref("r", 2, 9)), "trained rows [2, 9], base [20, 8]"),
        (TokenRows((1, 20), ref("r", 2, 8)), "token 20 was trained"),
        (TokenRows((1,), ref("r", 1, 8), ref("w", 23, 9)), "trained rows [1, 8], base [20, 8]"),
        (TokenRows((23,), ref("r", 1, 8), ref("w", 23, 8)), "token 23 was trained"),
    ],
)
def test_token_rows_that_do_not_fit(rows: TokenRows, told: str) -> None:
    assert told in only_problem(adapter(token_rows={EMBED: rows}), llama())


def test_token_rows_of_a_resized_embedding() -> None:
    rows = TokenRows((22,), ref("r", 1, 8), ref("w", 23, 8))
    head = {f"{HEAD}.weight": ref("h", 23, 8)}
    proposal = plan_merge(adapter(token_rows={EMBED: rows}, replaced=head), llama())
    assert proposal.problems == ()
    shapes = {job.output.name: job.output.shape for job in proposal.plan.jobs}
    assert shapes[f"{EMBED}.weight"] == (23, 8)


def test_token_rows_of_what_is_no_embedding() -> None:
    rows = {"model.embd": TokenRows((1,), ref("r", 1, 8))}
    assert "has no embedding model.embd.weight" in only_problem(adapter(token_rows=rows), llama())

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dora_convert.planning import names
from dora_convert.planning.names import Origin, Rows, Unsupported, module_tensors

ROOT = Path(__file__).parents[2]
KNOWN: dict[str, Any] = json.loads((ROOT / "tests/data/module_names.json").read_text())
LIVE = ("llava_mixtral", "qwen2_5_vl", "vit_classifier", "phimoe", "gte", "molmo2_text")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole(name: str, rows: int) -> tuple[Rows, ...]:
    return (Rows(name, 0, rows),)


def refusal(origin: Origin) -> str:
    assert isinstance(origin, Unsupported)
    return origin.reason


def differences(case: dict[str, Any]) -> dict[str, Any]:
    """Module tensors that do not come from where transformers put them."""
    stored = {name: tuple(shape) for name, shape in case["stored"].items()}
    found = module_tensors(case["config"], stored)
    out = {}
    for name, expected in case["modules"].items():
        # Module names are looked for among the stored ones too; what is mapped goes first.
        origin = found.get(name) or whole(name, stored[name][0])
        got = origin if isinstance(origin, tuple) else None
        if got != (expected and tuple(Rows(*run) for run in expected)):
            out[name] = (expected, origin)
    return out


@pytest.mark.parametrize("name", KNOWN)
def test_as_transformers_saves_it(name: str) -> None:
    assert differences(KNOWN[name]) == {}


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_that_is_not_in_the_model(name: str) -> None:
    case = KNOWN[name]
    stored = {key: tuple(shape) for key, shape in case["stored"].items()}
    assert module_tensors(case["config"], stored).keys() <= case["modules"].keys()


def test_known_cases_hold_every_kind() -> None:
    runs = [run for case in KNOWN.values() for run in case["modules"].values()]
    assert None in runs
    assert any(len(run) > 1 for run in runs if run)
    assert any(run[0][1] > 0 for run in runs if run)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_as_transformers_saves_it_today(name: str) -> None:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = json.loads(json.dumps(script("make_module_names").make(name)))
    assert case == KNOWN[name]
    assert differences(case) == {}


@pytest.mark.slow
def test_table_is_that_of_the_installed_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = (ROOT / "dora_convert/planning/names.json").read_text()
    if json.loads(written)["transformers"] != transformers.__version__:
        pytest.skip("the table was made with another transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script("dump_name_rules").main(tmp_path / "names.json")
    assert (tmp_path / "names.json").read_text() == written


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "none_such", "architectures": ["NoneSuch"]}, {"model_type": "llama"}],
)
def test_no_rules_nothing_renamed(config: dict[str, Any]) -> None:
    assert module_tensors(config, {"model.layers.0.mlp.up_proj.weight": (8, 4)}) == {}


def test_no_tensors() -> None:
    assert module_tensors({"model_type": "llava"}, {}) == {}


def test_null_sections_of_a_config() -> None:
    config = {"model_type": "llava", "architectures": None, "text_config": None}
    found = module_tensors(config, {"language_model.model.norm.weight": (4,)})
    assert found == {
        "model.language_model.norm.weight": whole("language_model.model.norm.weight", 4)
    }


def test_old_names_hold_for_any_model() -> None:
    found = module_tensors({}, {"bert.LayerNorm.gamma": (4,), "conv.weight_g": (), "x": ()})
    assert found == {
        "bert.LayerNorm.weight": whole("bert.LayerNorm.gamma", 4),
        "conv.parametrizations.weight.original0": whole("conv.weight_g", 1),
    }


def test_model_type_stands_in_for_an_unknown_class() -> None:
    stored = {"encoder.layer.0.attention.attention.query.weight": (4, 4)}
    found = module_tensors({"model_type": "vit"}, stored)
    assert list(found) == ["layers.0.attention.q_proj.weight"]
    assert module_tensors({"model_type": "vit", "architectures": ["MyViT"]}, stored) == found


def test_language_model_of_a_multimodal_checkpoint() -> None:
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_5_text"},
    }
    stored = "model.language_model.layers.0.mlp.up_proj.weight"
    found = module_tensors(config, {stored: (8, 4)})
    assert found == {"model.layers.0.mlp.up_proj.weight": whole(stored, 8)}


def test_base_model_on_disk_without_the_prefix() -> None:
    """A part's rules hold for names that lack the prefix of the base model, too."""
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    stored = {"encoder.layer.0.output.dense.weight": (4, 8)}
    assert list(module_tensors(config, stored)) == ["layers.0.mlp.fc2.weight"]


def test_rules_of_a_part_stay_inside_it() -> None:
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "mixtral"},
    }
    found = module_tensors(
        config,
        {
            "language_model.model.layers.0.block_sparse_moe.gate.weight": (2, 4),
            "vision_tower.layers.0.block_sparse_moe.gate.weight": (2, 4),
        },
    )
    assert list(found) == [
        "model.language_model.layers.0.mlp.gate.weight",
        "model.vision_tower.layers.0.block_sparse_moe.gate.weight",
    ]


def test_prefix_that_hub_checkpoints_have() -> None:
    config = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    stored = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert module_tensors(config, {stored: (8, 4)}) == {
        "encoder.layers.0.mlp.fc1.weight": whole(stored, 8)
    }


def test_two_stored_tensors_for_one_module_are_refused() -> None:
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    found = module_tensors(config, {"embed_out.weight": (8, 4), "lm_head.weight": (8, 4)})
    assert list(found) == ["lm_head.weight"]
    assert "lm_head.weight, embed_out.weight" in refusal(found["lm_head.weight"])


def test_reordered_rows_are_refused_and_their_neighbour_is_not() -> None:
    stored = "vision_tower.encoder.blocks.0.wqkv.weight"
    config = {"model_type": "kimi_k25", "architectures": ["Kimi_K25ForConditionalGeneration"]}
    found = module_tensors(config, {stored: (12, 4)})
    by_leaf = {name.split(".")[-2]: origin for name, origin in found.items()}
    assert "reordering the rows" in refusal(by_leaf["q_proj"])
    assert "reordering the rows" in refusal(by_leaf["k_proj"])
    assert by_leaf["v_proj"] == (Rows(stored, 8, 12),)


def test_paired_names_move_only_together() -> None:
    config = {"model_type": "kimi_k25", "architectures": ["Kimi_K25ForConditionalGeneration"]}
    block = "vision_tower.encoder.blocks.0"
    both = module_tensors(config, {f"{block}.norm1.weight": (4,), f"{block}.norm0.weight": (4,)})
    alone = module_tensors(config, {f"{block}.norm1.weight": (4,)})
    assert len({name.split(".")[-2] for name in both}) == 2
    assert [name.split(".")[-2] for name in alone] == ["norm1"]


def test_layer_numbers_that_are_shifted() -> None:
    config = {"model_type": "inkling2_text", "architectures": ["Inkling2ForCausalLM"]}
    stored = "model.attn_res.attn_queries.3"
    found = module_tensors(config, {stored: (4,)})
    assert found == {"model.layers.4.attention_input.query": whole(stored, 4)}


@pytest.mark.parametrize(("rows", "fits"), [(16, True), (18, False)])
def test_cut_needs_rows_that_divide(rows: int, fits: bool) -> None:
    config = {
        "model_type": "molmo2_text",
        "architectures": ["Molmo2TextModel"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    found = module_tensors(config, {"blocks.0.self_attn.att_proj.weight": (rows, 4)})
    assert len(found) == 3
    assert all(isinstance(origin, tuple) == fits for origin in found.values())


def test_cut_by_heads_needs_to_know_them() -> None:
    config = {"model_type": "molmo2_text", "architectures": ["Molmo2TextModel"]}
    found = module_tensors(config, {"blocks.0.self_attn.att_proj.weight": (16, 4)})
    assert all("by cutting along axis 0" in refusal(origin) for origin in found.values())


def test_part_of_what_is_joined_is_refused() -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    stored = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    found = module_tensors(config, {stored: (8, 4)})
    reason = refusal(found["model.layers.0.mlp.experts.gate_up_proj"])
    assert stored in reason
    assert "stacking experts" in reason


def test_every_operation_of_the_table_can_be_told() -> None:
    rules = json.loads((ROOT / "dora_convert/planning/names.json").read_text())["rules"]
    operations = {
        operation["name"]
        for entry in rules.values()
        if not isinstance(entry, str)
        for rule in entry
        for operation in rule.get("operations", ())
    }
    assert operations == names._TOLD.keys()

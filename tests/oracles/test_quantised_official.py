"""Whole results against what the official libraries make of the dense merge: bytes, logits."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from dora_convert import api
from tests.quant.engine import same_bytes
from tests.quant.test_compressed import FLOATS, PRESETS, official, official_fp4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from .models import Trained, outputs, quiet, tokens, train
from .test_quantised_output import MODULES, tiny

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
BITS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """In float32, so that the dense merge is what is quantised, and not a rounding of it."""
    folder = tmp_path_factory.mktemp("float32")
    return train(folder, tiny().float(), tokens(), target_modules=MODULES)


@pytest.fixture(scope="module")
def dense(case: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "dense"
    api.merge(case.adapter, out, base=case.base)
    return out


def by_bitsandbytes(dense: Path, out: Path, scheme: str) -> None:
    config = BitsAndBytesConfig(**BITS[scheme])
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(out)  # before any forward, which may repack the weights


def fused(name: str) -> list[str]:
    """The layers that vLLM makes one of, so that they share the scale of the tensor."""
    path, _, kind = name.removesuffix(".weight").rpartition(".")
    groups = (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"])
    group = next((g for g in groups if kind in g), [kind])
    return [f"{path}.{each}.weight" for each in group]


def by_parts(dense: Path, out: Path, scheme: str) -> None:
    """Each linear layer by the library's function, and the library's words in the config."""
    shutil.copytree(dense, out)
    stored: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    dense_weights = load_file(dense / "model.safetensors")
    for name, weight in dense_weights.items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
        elif scheme == "fp8":
            fp8 = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
            stored |= Fp8Quantize(SimpleNamespace(quantization_config=fp8)).convert({name: weight})
            words = fp8.to_dict()
        else:
            if scheme in FLOATS:
                partners = [dense_weights[other] for other in fused(name) if other != name]
                parts, _, plan = official_fp4(scheme, weight, *partners)
            else:
                parts, _, plan = official(*PRESETS[scheme], weight)
            stored |= {name.removesuffix("weight") + key[2:]: t for key, t in parts.items()}
            words = QuantizationConfig(
                config_groups={"group_0": plan},
                format=FLOATS[scheme] if scheme in FLOATS else PRESETS[scheme][1],
                ignore=["lm_head"],
                quantization_status="compressed",
            ).model_dump(mode="json")
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": words}))


def logits(folder: Path, case: Trained, dtype: torch.dtype) -> Tensor:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # In eval mode bitsandbytes repacks weights on some processors; nothing is dropped here.
    return outputs(model.train(), case.inputs)


@pytest.mark.parametrize("scheme", [*BITS, *PRESETS, *FLOATS, "fp8"])
@pytest.mark.filterwarnings("ignore")
def test_it_is_the_officially_quantised_model(
    scheme: str, case: Trained, dense: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    api.merge(case.adapter, ours, base=case.base, how=api.MergeOptions(quantize=scheme))
    (by_bitsandbytes if scheme in BITS else by_parts)(dense, theirs, scheme)
    got, want = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert got.keys() == want.keys()
    for name in want:
        if name.endswith("quant_state.bitsandbytes__nf4") and scheme == "nf4_dq":
            # JSON of a length that was not known before: spaces follow.
            assert bytes(got[name].tolist()).rstrip() == bytes(want[name].tolist())
        else:
            assert same_bytes(got[name], want[name]), name
    # The library decodes 4-bit floats to bfloat16, whatever the model is.
    dtype = torch.bfloat16 if scheme in FLOATS else torch.float32
    assert torch.equal(logits(ours, case, dtype), logits(theirs, case, dtype))


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_mlx_lm_quantises(case: Trained, dense: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    api.merge(case.adapter, ours, base=case.base, how=api.MergeOptions(quantize="mlx"))
    with mx.stream(mx.cpu):
        model, config = load_model(dense)
        model, config = quantize_model(model, config, group_size=64, bits=4)
        save_model(theirs, model)
        save_config(config, theirs / "config.json")
        got, want = (mx.load(str(folder / "model.safetensors")) for folder in (ours, theirs))
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype
            assert mx.array_equal(got[name], want[name]), name
        inputs = mx.array(case.inputs["input_ids"].numpy())
        results = [np.array(load_model(folder)[0](inputs)) for folder in (ours, theirs)]
    assert np.array_equal(*results)
    words = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    settings = [{k: w["quantization"][k] for k in ("bits", "group_size")} for w in words]
    assert settings[0] == settings[1]

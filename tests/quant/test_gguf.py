"""GGUF bases: every type against gguf's own decoding, names and shapes against the converter's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import DType
from dora_convert.errors import DoraConvertError, InputError, MismatchError
from dora_convert.execution.decoding import open_reader
from tests.quant.gguf_files import (
    KINDS,
    as_torch,
    permuted,
    random_blocks,
    write_config,
    write_tensors,
)

UP = "blk.0.ffn_up.weight"
Q = "blk.0.attn_q.weight"
NAMES = {UP: "model.layers.0.mlp.up_proj.weight", Q: "model.layers.0.self_attn.q_proj.weight"}


def opened(folder: Path) -> Checkpoint:
    return open_base(folder, ReadOptions())


def refused(path: Path) -> DoraConvertError:
    with pytest.raises((InputError, MismatchError)) as caught:
        open_base(path, ReadOptions())
    return caught.value


def test_all_types_are_looked_at() -> None:
    assert {Kind.Q4_K, Kind.Q6_K, Kind.Q2_K, Kind.IQ4_XS, Kind.IQ1_M, Kind.MXFP4} <= set(KINDS)
    assert len(KINDS) >= 24


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_rows_equal_those_of_gguf(kind: Kind, tmp_path: Path) -> None:
    """In odd blocks too, and of a matrix whose rows are reordered."""
    stored = random_blocks(kind, 24, 512)
    write_tensors(tmp_path / "m.gguf", {UP: (stored, kind), Q: (stored, kind)}, "llama")
    write_config(tmp_path)
    base = opened(tmp_path)
    assert base.tensors.keys() == set(NAMES.values())
    plain = gguf.quants.dequantize(stored, kind)
    if kind is not Kind.BF16:
        assert len(np.unique(plain)) > 1
    back = np.argsort(permuted(np.arange(24), 4))
    reader = open_reader()
    for name, want in ((NAMES[UP], plain), (NAMES[Q], plain[back])):
        ref = base.tensors[name]
        assert ref.spec.shape == (24, 512)
        assert ref.spec.dtype is (DType.BF16 if kind is Kind.BF16 else DType.F32)
        for step in (24, 5, 1):
            with reader.rows(ref) as rows:
                got = [rows.read(a, min(a + step, 24), torch.empty(0)) for a in range(0, 24, step)]
            assert torch.equal(torch.cat(got), as_torch(want)), step
        assert torch.equal(reader.load(ref).float(), as_torch(want))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_floats_and_vectors(dtype: type[np.generic], tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((12, 6)).astype(dtype)
    bias = values[:, 0].astype(np.float32)
    kind = Kind.F32 if dtype is np.float32 else Kind.F16
    write_tensors(
        tmp_path / "m.gguf",
        {
            UP: (values, kind),
            "blk.0.attn_q.bias": (permuted(bias, 2), Kind.F32),
            "blk.0.attn_norm.weight": (bias, Kind.F32),
            "rope_freqs.weight": (np.ones(4, np.float32), Kind.F32),
        },
        "llama",
    )
    write_config(tmp_path, num_attention_heads=2)
    base, reader = opened(tmp_path), open_reader()
    got = {name: reader.load(ref) for name, ref in base.tensors.items()}
    assert got.keys() == {
        NAMES[UP],
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
    }
    assert torch.equal(got[NAMES[UP]], as_torch(values))
    assert torch.equal(got["model.layers.0.self_attn.q_proj.bias"], as_torch(bias))
    assert torch.equal(got["model.layers.0.input_layernorm.weight"], as_torch(bias))


def test_experts_are_many_matrices(tmp_path: Path) -> None:
    stored = random_blocks(Kind.Q4_K, 3 * 4, 256)
    gate = np.arange(8, dtype=np.float32)
    write_tensors(
        tmp_path / "m.gguf",
        {
            "blk.0.ffn_down_exps.weight": (stored.reshape(3, 4, -1), Kind.Q4_K),
            "blk.0.ffn_gate_inp_shexp.weight": (gate, Kind.F32),
        },
        "qwen2moe",
    )
    write_config(tmp_path, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe")
    base, reader = opened(tmp_path), open_reader()
    want = as_torch(gguf.quants.dequantize(stored, Kind.Q4_K)).view(3, 4, 256)
    names = [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(3)]
    gate_name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert base.tensors.keys() == {*names, gate_name}
    for i, name in enumerate(names):
        assert torch.equal(reader.load(base.tensors[name]), want[i])
        with reader.rows(base.tensors[name]) as rows:
            assert torch.equal(rows.read(1, 3, torch.empty(0)), want[i, 1:3])
    assert torch.equal(reader.load(base.tensors[gate_name]), as_torch(gate).view(1, 8))


def test_norms_of_gemma(tmp_path: Path) -> None:
    """Stored with the 1 that transformers adds when it computes."""
    stored = np.array([1.5, 0.75, 1.0], np.float32)
    write_tensors(tmp_path / "m.gguf", {"output_norm.weight": (stored, Kind.F32)}, "gemma2")
    write_config(tmp_path, architectures=["Gemma2ForCausalLM"])
    base = opened(tmp_path)
    assert open_reader().load(base.tensors["model.norm.weight"]).tolist() == [0.5, -0.25, 0.0]


def test_the_type_between(tmp_path: Path) -> None:
    """Quantised weights are taken for what the config says that the model was."""
    stored = random_blocks(Kind.Q8_0, 4, 64)
    write_tensors(tmp_path / "m.gguf", {UP: (stored, Kind.Q8_0)}, "llama")
    write_config(tmp_path, dtype="bfloat16")
    (ref,) = opened(tmp_path).tensors.values()
    want = as_torch(gguf.quants.dequantize(stored, Kind.Q8_0))
    assert ref.spec.dtype is DType.BF16
    assert torch.equal(open_reader().load(ref), want.bfloat16())


# -------------------------------------------------------------------------------- which files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    stored = random_blocks(Kind.Q8_0, 4, 64)
    write_tensors(tmp_path / "m.gguf", {UP: (stored, Kind.Q8_0)}, "llama")
    write_config(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_file_or_its_folder(model: Path) -> None:
    by_name, by_folder = opened(model / "m.gguf"), opened(model)
    assert by_name.tensors == by_folder.tensors
    assert by_name.files == by_folder.files == ("config.json", "tokenizer.json")
    assert by_name.schemes == ("gguf",)
    assert "quantization_config" not in by_name.config


def test_of_several_models_one_must_be_named(model: Path) -> None:
    (model / "n.gguf").write_bytes((model / "m.gguf").read_bytes())
    error = refused(model)
    assert "2 GGUF files" in error.what
    assert error.problems == ("m.gguf", "n.gguf")
    assert opened(model / "n.gguf").tensors.keys() == {NAMES[UP]}


def test_in_several_files(model: Path) -> None:
    (model / "m.gguf").rename(model / "m-00001-of-00002.gguf")
    norm = np.ones(64, np.float32)
    write_tensors(
        model / "m-00002-of-00002.gguf", {"output_norm.weight": (norm, Kind.F32)}, "llama"
    )
    for path in (model, model / "m-00002-of-00002.gguf"):
        assert opened(path).tensors.keys() == {NAMES[UP], "model.norm.weight"}
    (model / "m-00002-of-00002.gguf").unlink()
    for path in (model, model / "m-00001-of-00002.gguf"):
        assert "1 of 2 shards are missing" in "".join(refused(path).problems)


def test_without_a_config(model: Path) -> None:
    (model / "config.json").unlink()
    error = refused(model)
    assert "no config.json beside" in error.what
    assert "hf download ORG/NAME" in error.hint


def test_whose_config_it_is(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/org/the-model")
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "hf download org/the-model " in refused(tmp_path).hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM cannot be read"),
        ({"architectures": None}, "none cannot be read"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "'llama', and config.json is that of Qwen3"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ],
)
def test_a_config_that_does_not_fit(model: Path, changes: dict[str, object], words: str) -> None:
    write_config(model, **changes)
    assert words in refused(model).what


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    small = random_blocks(Kind.Q8_0, 6, 32)
    floats = np.ones((2, 2), np.float32)
    write_tensors(
        tmp_path / "m.gguf",
        {
            "blk.0.ssm_a": (floats, Kind.F32),
            "blk.7.ffn_up.weight": (floats, Kind.F32),
            Q: (small, Kind.Q8_0),
            "token_embd.weight": (small, Kind.Q8_0),
            "blk.0.ffn_down.weight": (np.ones((2, 2), np.int32), Kind.I32),
            UP: (np.ones((2, 2, 2), np.float32), Kind.F32),
        },
        "llama",
    )
    write_config(tmp_path, vocab_size=7)
    assert refused(tmp_path).problems == (
        "blk.0.ssm_a: no tensor of this name is known in LLAMA",
        "blk.7.ffn_up.weight: no tensor of this name is known in LLAMA",
        f"{Q}: 6 rows do not divide into 4 heads",
        "token_embd.weight: 6 words, and config.json says 7",
        "blk.0.ffn_down.weight: the installed gguf cannot decode type 26",
        f"{UP}: F32 [2, 2, 2] is not known",
    )


def test_a_config_that_only_claims_it(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    write_config(tmp_path, quantization_config={"quant_method": "gguf"})
    assert "says that the weights are GGUF" in refused(tmp_path).what

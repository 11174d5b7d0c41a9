"""What each command prints and writes when all is well."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert.cli.tables import columns
from dora_convert.formats import formats
from tests.cli.sandbox import MODULES, RANK, Result, Sandbox, digest

SCALING = 8 / RANK


def exact(box: Sandbox, path: str, scaling: float = SCALING) -> Tensor:
    """The formula in float64."""
    adapter = box.load_adapter()
    a, b, m = (
        adapter[f"base_model.model.{path}.{part}"].double()
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    direction = box.load_base()[f"{path}.weight"].double() + scaling * b @ a
    return m[:, None] * direction / direction.norm(dim=1, keepdim=True)


def merged(box: Sandbox) -> dict[str, Tensor]:
    """All tensors of the output, by safetensors' own reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(box.out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


# -------------------------------------------------------------------------------------- inspect


def test_inspect_reads_headers_only(box: Sandbox, run: Callable[..., Result]) -> None:
    size = box.factors.stat().st_size
    with box.factors.open("r+b") as file:  # the data is rubbish: nobody looks
        head = int.from_bytes(file.read(8), "little") + 8
        file.seek(head)
        file.write(b"\xff" * (size - head))
    result = run("inspect", box.adapter)
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[:4] == [
        f"adapter    {box.adapter}",
        "format     peft, DoRA",
        "trained on someone/some-model",
        "modules    4, 4.0 kB",
    ]
    assert [" ".join(line.split()) for line in lines[5:8]] == [
        "group kind axis dtype out x in rank scaling modules size",
        "q_proj DoRA out F32 32x32 4 2 2 2.3 kB",
        "v_proj DoRA out F32 16x32 4 2 2 1.7 kB",
    ]
    assert len(lines) == 8


def test_inspect_with_a_base(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("inspect", box.adapter, "--base", box.base)
    assert result.code == 0
    assert f"base       {box.base} (fits)" in result.out
    table = result.out.split("\n\n")[2].splitlines()
    assert [line.split()[0] for line in table] == ["group", "q_proj", "v_proj", "all"]
    titles = table[0].split()
    # Every column is explained below the table.
    legend = result.out.split("\n\n")[3]
    assert [line.split()[0] for line in legend.splitlines()] == titles[1:]
    assert "bfloat16" in legend
    assert all(len(line) <= 100 and line == line.rstrip() for line in result.out.splitlines())


def test_inspect_figures(box: Sandbox, run: Callable[..., Result]) -> None:
    path = MODULES[1]
    report = run("inspect", box.adapter, "-b", box.base, "--per-module", "--json").json
    assert report["schema"] == "dora-convert/inspect/1"
    assert [group["name"] for group in report["groups"]] == sorted(MODULES)
    group = next(g for g in report["groups"] if g["name"] == path)
    assert group["ranks"] == [RANK]
    assert group["scalings"] == [SCALING]
    assert group["shapes"] == [[16, 32]]
    adapter, key = box.load_adapter(), f"base_model.model.{path}"
    weight = box.load_base()[f"{path}.weight"].double()
    update = SCALING * (
        adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
    )
    magnitude = adapter[f"{key}.lora_magnitude_vector"].double()
    norms = weight.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(weight, weight + update, dim=1)
    after = exact(box, path)
    rounded = after.bfloat16().double()
    ratio = (magnitude / norms).log()
    figures = group["figures"]
    expected = {
        "update": update.norm() / weight.norm(),
        "effect": (after - weight).norm() / weight.norm(),
        "magnitude_shift": (magnitude - norms).abs().mean() / norms.mean(),
        "direction_shift": (1 - cosine).mean(),
        "magnitude_bias": ratio.mean(),
        "magnitude_spread": ratio.std(correction=0),
        "rounding_loss": (rounded - after).norm() / (after - weight).norm(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(float(value), rel=1e-9), name
    assert figures["stored_as"] == "bfloat16"
    assert 0.99 < figures["kept"] < 1.01


def test_inspect_per_module_table(box: Sandbox, run: Callable[..., Result]) -> None:
    lines = run("inspect", box.adapter, "--per-module").out.splitlines()[6:]
    assert [line.split()[0] for line in lines] == sorted(MODULES)  # whole, for it is a pipe


def test_inspect_selection(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("inspect", box.adapter, "--include", "*.q_proj", "--exclude", "*layers.1*")
    assert "modules    1," in result.out
    assert "Note: 3 of 4 modules left out by --include and --exclude" in result.err


def test_inspect_counts_rows_that_merge_will_refuse(
    box: Sandbox, run: Callable[..., Result]
) -> None:
    base = box.load_base()
    base[f"{MODULES[0]}.weight"][0, 0] = torch.nan
    box.save_base(base)
    result = run("inspect", box.adapter, "-b", box.base, "--json")
    assert result.json["total"]["effect"] > 0  # of the rows that have one
    assert any("1 rows of 1 modules" in text for text in result.json["notes"])


def test_columns_fit_a_terminal() -> None:
    rows = [["model.layers.31.self_attn.q_proj", "DoRA", "10.0%"], ["a.b", "LoRA", "9%"]]
    assert list(columns(["group", "kind", "share"], rows, left=2)) == [
        "group                             kind  share",
        "model.layers.31.self_attn.q_proj  DoRA  10.0%",
        "a.b                               LoRA     9%",
    ]
    narrow = list(columns(["group", "kind", "share"], rows, left=2, width=37))
    assert narrow == [
        "group                     kind  share",
        "...s.31.self_attn.q_proj  DoRA  10.0%",
        "a.b                       LoRA     9%",
    ]


# ---------------------------------------------------------------------------------------- merge


def test_merge(box: Sandbox) -> None:
    before = digest(box.base, box.adapter)
    result = box.merge()
    assert result.code == 0
    assert result.out == f"{box.out}\n"
    assert "merged model.safetensors" in result.err
    assert "merged 4 tensors, replaced 0, kept 17: 72.3 kB in 1 shard\n" in result.err
    assert "verified: " in result.err
    assert digest(box.base, box.adapter) == before
    base, found = box.load_base(), merged(box)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        path = name.removesuffix(".weight")
        expected = exact(box, path).float() if path in MODULES else base[name]
        torch.testing.assert_close(tensor, expected, rtol=2e-7, atol=0)


def test_merge_json(box: Sandbox) -> None:
    result = box.merge("--json")
    assert result.code == 0
    assert result.err == ""
    report = result.json
    assert report["schema"] == "dora-convert/merge/1"
    assert report["output"] == str(box.out)
    assert (report["merged"], report["replaced"], report["untouched"]) == (4, 0, 17)
    assert report["files"] == sorted(file.name for file in box.out.iterdir())
    assert report["nbytes"] == sum(t.numel() * t.element_size() for t in merged(box).values())
    assert report["verification"]["differences"] == []


def test_merge_quiet(box: Sandbox) -> None:
    result = box.merge("-q")
    assert (result.code, result.out, result.err) == (0, f"{box.out}\n", "")


@pytest.mark.parametrize("option", ["--dry-run", "-n"])
def test_merge_dry_run(box: Sandbox, option: str) -> None:
    before = sorted(box.root.rglob("*"))
    result = box.merge(option)
    assert result.code == 0
    assert result.out == ""
    assert "would merge 4 tensors" in result.err
    assert "config.json, model.safetensors" in result.err
    assert sorted(box.root.rglob("*")) == before
    report = box.merge(option, "--json").json
    assert report["files"] == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    assert report["verification"] is None
    assert sorted(box.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("FLOAT16", torch.float16), ("float32", torch.float32)],
)
def test_merge_dtype(box: Sandbox, name: str, dtype: torch.dtype) -> None:
    assert box.merge("--dtype", name).code == 0
    found = merged(box)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert torch.equal(found["lm_head.weight"], box.load_base()["lm_head.weight"].to(dtype))
    label = str(dtype).removeprefix("torch.")
    assert json.loads((box.out / "config.json").read_text())["dtype"] == label


@pytest.mark.parametrize("size", ["20kB", "0.02MB", "20000", "20 KB"])
def test_merge_max_shard_size(box: Sandbox, size: str) -> None:
    assert box.merge("--max-shard-size", size).code == 0
    index = json.loads((box.out / "model.safetensors.index.json").read_text())
    files = sorted(box.out.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) == 4
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = set(handle.keys())
            nbytes = sum(handle.get_tensor(n).numel() * 4 for n in names)
        assert names == {n for n, f in index["weight_map"].items() if f == file.name}
        assert nbytes <= 20000
        total += nbytes
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == box.load_base().keys()


def test_merge_keeps_shards(box: Sandbox) -> None:
    first, second = box.split()
    assert "in 2 shards" in box.merge().err
    assert sorted(f.name for f in box.out.glob("*.safetensors")) == [first.name, second.name]


def test_merge_selection(box: Sandbox) -> None:
    base = box.load_base()
    result = box.merge("--include", "*.q_proj", "--exclude", "model.layers.1.*")
    assert "merged 1 tensors" in result.err
    found = merged(box)
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert changed == {f"{MODULES[0]}.weight"}


def test_merge_scale(box: Sandbox) -> None:
    assert box.merge("--scale", "0.25").code == 0
    expected = exact(box, MODULES[0], SCALING * 0.25).float()
    found = merged(box)[f"{MODULES[0]}.weight"]
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


def test_merge_transposed(box: Sandbox) -> None:
    """The same weight stored [in, out] gives the same result, transposed."""
    name = f"{MODULES[1]}.weight"
    expected = exact(box, MODULES[1]).float().T
    base = box.load_base()
    base[name] = base[name].T.contiguous()
    box.save_base(base)
    refused = box.refused(4, "--transposed GLOB")
    assert "adapter [16, 32], base [32, 16]" in refused.err
    assert box.merge("--transposed", MODULES[1]).code == 0
    torch.testing.assert_close(merged(box)[name], expected, rtol=2e-7, atol=0)


def test_merge_workers(box: Sandbox) -> None:
    assert box.merge("--workers", 1).code == 0
    first = digest(box.out)
    assert box.merge("--workers", 7, "--overwrite").code == 0
    assert digest(box.out) == first


def test_merge_overwrite(box: Sandbox) -> None:
    box.out.mkdir()
    (box.out / "old.txt").write_text("old")
    assert box.merge("--overwrite").code == 0
    files = ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    assert sorted(file.name for file in box.out.iterdir()) == files
    assert sorted(file.name for file in box.root.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("check", ["sample", "all", "none"])
def test_merge_verify(box: Sandbox, check: str) -> None:
    result = box.merge("--verify", check)
    assert result.code == 0
    assert ("verified: " in result.err) == (check != "none")
    if check == "all":
        assert "96 rows of 4 modules" in result.err


def test_merge_from_a_base_that_the_adapter_names(
    box: Sandbox, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box.root)
    box.configure(box.adapter, base_model_name_or_path="base")
    result = run("merge", "adapter", "-o", "out")
    assert (result.code, result.out) == (0, "out\n")


CARRIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"a": 1}',
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "generation_config.json": "{}",
    "modeling_custom.py": "raise SystemExit  # never imported",
    "sub/vocab.txt": "a\nb\n",
}


def test_merge_carries_the_rest(box: Sandbox) -> None:
    for name, text in CARRIED.items():
        (box.base / name).parent.mkdir(exist_ok=True)
        (box.base / name).write_text(text)
    assert box.merge("-q").err == ""
    for name, text in CARRIED.items():
        assert (box.out / name).read_text() == text, name


def test_merge_prefers_the_tokenizer_of_the_adapter(box: Sandbox) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (box.base / name).write_text("base")
    (box.base / "tokenizer_config.json").write_text("same")
    (box.adapter / "tokenizer_config.json").write_text("same")
    (box.adapter / "tokenizer.json").write_text("adapter")
    (box.adapter / "chat_template.jinja").write_text("adapter")
    (box.adapter / "README.md").write_text("of the adapter")
    result = box.merge("-q")
    assert result.err == (
        "Note: the adapter's own files are used: chat_template.jinja, tokenizer.json\n"
    )
    assert (box.out / "tokenizer.json").read_text() == "adapter"
    assert (box.out / "chat_template.jinja").read_text() == "adapter"
    assert "of the adapter" not in (box.out / "README.md").read_text()
    assert box.merge("--overwrite", "--json").json["notes"] == [result.err[len("Note: ") : -1]]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_merge_modes_follow_the_umask(box: Sandbox, mask: int) -> None:
    (box.base / "tokenizer.json").write_text("{}")
    (box.base / "tokenizer.json").chmod(0o400)
    before = os.umask(mask)
    try:
        assert box.merge("-q", "--max-shard-size", "20kB").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(box.out.stat().st_mode) == 0o777 & ~mask
    modes = {stat.S_IMODE(file.stat().st_mode) for file in box.out.iterdir()}
    assert modes == {0o666 & ~mask}


# --------------------------------------------------------------------------------------- verify


@pytest.fixture
def verify(box: Sandbox, run: Callable[..., Result]) -> Callable[..., Result]:
    assert box.merge("-q").code == 0

    def verify(*options: object) -> Result:
        return run("verify", box.out, "--adapter", box.adapter, "--base", box.base, *options)

    return verify


def change(box: Sandbox, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """As if it had been written so: no hash tells."""
    (box.out / "SHA256SUMS").unlink()
    tensors = merged(box)
    edit(tensors)
    save_file(tensors, box.out / "model.safetensors", metadata={"format": "pt"})


def test_verify(verify: Callable[..., Result]) -> None:
    result = verify()
    assert result.code == 0
    assert result.err == ""
    hashed, recomputed, _ = result.out.splitlines()
    assert hashed == "ok: 3 files have the sha256 that they were written with"
    assert recomputed.startswith("ok: 21 tensors as planned, 96 rows of 4 modules recomputed")
    report = verify("--all", "--json").json
    assert report["schema"] == "dora-convert/verify/1"
    assert (report["tensors"], report["modules"], report["rows"]) == (21, 4, 96)
    assert report["differences"] == []


def test_verify_finds_every_flipped_file(box: Sandbox) -> None:
    (box.base / "tokenizer.json").write_text("{}")
    assert box.merge().code == 0
    assert box.run("verify", box.out).out == (
        "ok: 4 files have the sha256 that they were written with\n"
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "SHA256SUMS"):
        file = box.out / name
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
        result = box.run("verify", box.out)
        assert result.code == 7
        assert name in result.err
        data[-2] ^= 1
        file.write_bytes(data)
    assert box.run("verify", box.out).code == 0


def test_verify_names_the_file_and_the_tensor(box: Sandbox, verify: Callable[..., Result]) -> None:
    file = box.out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    problems = json.loads(verify("--all", "--json").err)["problems"]
    assert len(problems) == 2
    assert problems[0].startswith("model.safetensors: sha256 ")


def test_verify_without_hashes(box: Sandbox) -> None:
    result = box.run("verify", box.base)
    assert result.code == 3
    assert "base holds no SHA256SUMS" in result.err
    assert "--adapter" in result.err


def test_verify_samples(verify: Callable[..., Result]) -> None:
    assert "6 rows of 3 modules" in verify("--samples", 2).out or (
        "4 rows of 2 modules" in verify("--samples", 2).out
    )


@pytest.mark.parametrize("name", [f"{MODULES[0]}.weight", "model.norm.weight", "lm_head.weight"])
def test_verify_finds_one_changed_value(
    box: Sandbox, verify: Callable[..., Result], name: str
) -> None:
    change(box, lambda tensors: tensors[name].view(-1)[17].mul_(1.001))
    result = verify("--all")
    assert result.code == 7
    assert result.out == ""
    assert "Error: the checkpoint is not what adapter and base give" in result.err
    assert f"output    {box.out}" in result.err
    assert f"{name}: 1 " in result.err
    assert result.err.count("weight:") == 1


def test_verify_finds_a_missing_tensor(box: Sandbox, verify: Callable[..., Result]) -> None:
    change(box, lambda tensors: tensors.pop("model.norm.weight"))
    result = verify()
    assert result.code == 7
    assert "model.norm.weight: missing" in result.err


def test_verify_finds_an_extra_tensor(box: Sandbox, verify: Callable[..., Result]) -> None:
    change(box, lambda tensors: tensors.update(extra=torch.ones(1)))
    result = verify()
    assert result.code == 7
    assert "extra: not expected" in result.err


def test_verify_finds_a_wrong_dtype(box: Sandbox, verify: Callable[..., Result]) -> None:
    name = "lm_head.weight"
    change(box, lambda tensors: tensors.update({name: tensors[name].half()}))
    result = verify("--json")
    assert result.code == 7
    body = json.loads(result.err)
    assert body["problems"] == [f"{name}: F16 [40, 32], expected F32 [40, 32]"]


def test_verify_another_scale(box: Sandbox, verify: Callable[..., Result]) -> None:
    assert verify("--scale", 0.5).code == 7
    assert box.merge("-q", "--overwrite", "--scale", 0.5).code == 0
    assert verify("--scale", 0.5).code == 0


def test_verify_a_result_of_another_dtype(box: Sandbox, verify: Callable[..., Result]) -> None:
    assert box.merge("-q", "--overwrite", "--dtype", "bf16").code == 0
    assert verify("--all").code == 0


# ----------------------------------------------------------------------- formats and completion


def test_formats(run: Callable[..., Result]) -> None:
    result = run("formats")
    assert result.code == 0
    adapters, stacks, schemes = result.out.split("\n\n")
    names = [line.split()[0] for line in adapters.splitlines()[1:]]
    assert names == sorted(names)
    assert "  peft         Hugging Face PEFT\n" in adapters
    assert "  vllm         vLLM" in stacks
    assert "nf4" in schemes
    report = run("formats", "--json").json
    assert report["schema"] == "dora-convert/formats/1"
    assert list(report["adapters"]) == names
    for name in names:
        assert report["adapters"][name] == formats.get(name).title


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Callable[..., Result], shell: str) -> None:
    result = run("completion", shell)
    assert result.code == 0
    assert "dora-convert" in result.out
    assert f"_DORA_CONVERT_COMPLETE={shell}_complete" in result.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [("mer", {"merge"}), ("merge --max-s", {"--max-shard-size"}), ("completion z", {"zsh"})],
)
def test_completions(words: str, expected: set[str]) -> None:
    variables = {
        "_DORA_CONVERT_COMPLETE": "bash_complete",
        "COMP_WORDS": f"dora-convert {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = subprocess.run(
        [sys.executable, "-m", "dora_convert"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["merge"], ["inspect"], ["verify"], ["formats"]])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(run: Callable[..., Result], arguments: list[str], option: str) -> None:
    result = run(*arguments, option)
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith(f"Usage: {' '.join(['dora-convert', *arguments])} ")
    assert "\\b" not in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines())

"""What is wrong is said once, in words that help, and nothing is touched."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.storage import staging
from tests.cli.sandbox import MODULES, Result, Sandbox, digest, make_base

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5000\n"
HTML = "<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
Q0 = MODULES[0]
KEY = f"base_model.model.{Q0}"
MAGNITUDE = f"{KEY}.lora_magnitude_vector"


@contextmanager
def watched_opens() -> Iterator[list[str]]:
    """The paths of all files that are opened meanwhile."""
    seen: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            seen.append(str(arguments[0]))

    sys.addaudithook(watch)  # for ever
    yield seen
    watching = False


# ------------------------------------------------------------------------------- the wrong base


def test_base_of_other_shapes(box: Sandbox) -> None:
    box.save_base(make_base(hidden=64))
    result = box.refused(
        4,
        "the adapter does not fit this base",
        f"adapter   {box.adapter}   (peft, 4 modules)",
        f"base      {box.base}",
        f"{Q0}: adapter [32, 32], base [64, 64]",
        "Hint: The adapter was trained on someone/some-model.",
    )
    assert all(path in result.err for path in MODULES)


def test_many_problems_are_cut_short(box: Sandbox) -> None:
    base = make_base(hidden=64)
    adapter = box.load_adapter()
    for layer in range(2, 8):
        for name in ("q_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{name}"
            base[f"{path}.weight"] = torch.ones(8, 8)
            old = f"base_model.model.model.layers.0.self_attn.{name}"
            new = f"base_model.model.{path}"
            adapter |= {
                key.replace(old, new): value.clone()
                for key, value in adapter.items()
                if key.startswith(old)
            }
    box.save_base(base)
    box.save_adapter(adapter)
    short = box.refused(4, "... 8 more (--verbose shows all)")
    assert short.err.count("adapter [") == 8
    full = box.refused(4, options=["--verbose"])
    assert full.err.count("adapter [") == 16
    assert "more" not in full.err


def test_base_of_right_shapes_but_other_weights(box: Sandbox) -> None:
    """It can be meant, so it is done; but it is said, with numbers."""
    box.save_base(make_base(seed=5))
    before = digest(box.base, box.adapter)
    result = box.merge("--quiet")
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("Note: this may not be the base that was trained on")
    assert "over 96 rows" in line
    assert "% off its row norms" in line
    assert "correlation" in line
    assert digest(box.base, box.adapter) == before


def test_right_base_raises_no_doubt(box: Sandbox) -> None:
    assert box.merge("--quiet").err == ""


def test_names_that_the_base_does_not_have(box: Sandbox) -> None:
    base = {key.replace("self_attn", "attn"): t for key, t in box.load_base().items()}
    box.save_base(base)
    near = Q0.replace("self_attn", "attn")
    box.refused(4, f"{Q0}: the base has no tensor {Q0}.weight; nearest: {near}.weight")


def test_quantized_base(box: Sandbox) -> None:
    box.configure(box.base, quantization_config={"quant_method": "surprise", "bits": 4})
    box.refused(3, "quantised in a way that is not known: surprise", "16-bit original")


def test_quantized_base_of_dense_tensors(box: Sandbox) -> None:
    box.configure(box.base, quantization_config={"quant_method": "gptq", "bits": 4})
    box.refused(3, "says that it is quantised (gptq)", "none of its tensors is", "config.json")


# -------------------------------------------------------------------------------- broken files


def test_missing_shard(box: Sandbox) -> None:
    _, second = box.split()
    second.unlink()
    box.refused(3, second.name, "not there")


def test_truncated_shard(box: Sandbox) -> None:
    os.truncate(box.weights, box.weights.stat().st_size - 100)
    box.refused(3, "model.safetensors is truncated", "100 bytes are missing", "Download it again")


def test_extra_bytes(box: Sandbox) -> None:
    with box.weights.open("ab") as file:
        file.write(b"\0" * 7)
    box.refused(3, "model.safetensors is damaged", "7 bytes too many", "Download it again")


@pytest.mark.parametrize("which", ["weights", "factors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, ("git-lfs pointer", "lfs pull")),
        (HTML, ("web page", "login")),
        ("", ("is empty", "Download it again")),
        ("x" * 1000, ("not a safetensors file",)),
    ],
    ids=["lfs", "html", "empty", "rubbish"],
)
def test_no_such_file_at_all(box: Sandbox, which: str, content: str, words: list[str]) -> None:
    file: Path = getattr(box, which)
    file.write_text(content)
    box.refused(3, file.name, str(file), *words)


def test_all_broken_shards_in_one_message(box: Sandbox) -> None:
    first, second = box.split()
    first.write_text(LFS)
    os.truncate(second, second.stat().st_size - 1)
    box.refused(3, "2 things are wrong", first.name, "git-lfs pointer", second.name, "truncated")


@pytest.mark.parametrize("kind", ["up", "absolute", "inside"])
def test_index_that_leads_out_of_the_folder(box: Sandbox, kind: str) -> None:
    secret = box.root / "secret.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, secret)
    name = {
        "up": "../secret.safetensors",
        "absolute": str(secret),
        "inside": "a/../../secret.safetensors",
    }[kind]
    places = dict.fromkeys(box.load_base(), "model.safetensors")
    box.index(places | {"model.norm.weight": name})
    box.refused(3, json.dumps(name), "not a plain file name", "model.safetensors.index.json")
    with watched_opens() as opened:
        assert box.merge().code == 3
    assert str(box.weights) in opened
    assert not [file for file in opened if "secret" in file]


def test_pickle_without_permission(box: Sandbox) -> None:
    torch.save(box.load_adapter(), box.adapter / "adapter_model.bin")
    box.factors.unlink()
    box.refused(3, "adapter_model.bin", "a pickle", "--allow-pickle")
    assert box.merge("--allow-pickle", "--quiet").code == 0


def test_pickle_that_would_run_code(box: Sandbox) -> None:
    marker = box.root / "ran"
    (box.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(marker)), protocol=2))
    box.factors.unlink()
    result = box.refused(3, "adapter_model.bin", "which is not run", options=["--allow-pickle"])
    assert not marker.exists()
    assert "weights_only" not in result.err  # torch advises to turn it off


class Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


# --------------------------------------------------------------------------------- the configs


def test_all_nonsense_in_the_config_is_reported(box: Sandbox) -> None:
    box.configure(
        box.adapter,
        r=-4,
        lora_alpha="loud",
        use_rslora="perhaps",
        rank_pattern=["q_proj"],
        alpha_pattern={"q_proj": float("inf")},
        init_lora_weights="pissa",
        base_model_name_or_path=7,
    )
    box.refused(
        3,
        "the adapter cannot be used as it is",
        "adapter_config.json",
        "'r' must be a whole number of at least 1, not -4",
        "'lora_alpha' must be a finite number, not 'loud'",
        "'use_rslora' must be true or false",
        "'rank_pattern' must be an object",
        "\"alpha_pattern['q_proj']\" must be a finite number, not inf",
        "'init_lora_weights' is 'pissa'",
        "'base_model_name_or_path' must be a string",
        options=["--verbose"],
    )


@pytest.mark.parametrize("rank", [0, 2.5, True, "4", [4]])
def test_nonsense_rank(box: Sandbox, rank: object) -> None:
    box.configure(box.adapter, r=rank)
    box.refused(3, "adapter_config.json")


@pytest.mark.parametrize("folder", ["base", "adapter"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'r': 4}", ("is not valid JSON", "line 1")),
        ("[1, 2]", ("must hold a JSON object",)),
        ('{"r": 4, "r": 8}', ('the key "r" twice',)),
        ("[" * 100_000, ("nested too deeply",)),
        ("\ud800", ("not UTF-8",)),
    ],
    ids=["syntax", "list", "twice", "deep", "bytes"],
)
def test_config_that_is_none(box: Sandbox, folder: str, text: str, words: list[str]) -> None:
    name = "config.json" if folder == "base" else "adapter_config.json"
    file = getattr(box, folder) / name
    file.write_bytes(text.encode(errors="surrogatepass"))
    box.refused(3, name, str(file), *words)


@pytest.mark.parametrize("folder", ["base", "adapter"])
def test_config_that_is_huge(box: Sandbox, folder: str) -> None:
    name = "config.json" if folder == "base" else "adapter_config.json"
    file = getattr(box, folder) / name
    os.truncate(file, 17 << 20)
    box.refused(3, name, "too large")


def test_pattern_that_never_ends(box: Sandbox) -> None:
    adapter = box.load_adapter()
    path = "a" * 48
    adapter |= {k.replace(Q0, path): v.clone() for k, v in adapter.items() if k.startswith(KEY)}
    box.save_adapter(adapter)
    box.configure(box.adapter, rank_pattern={"(a+)+b": 8})
    begun = time.monotonic()
    box.refused(3, "'(a+)+b'", "too long", "rank_pattern")
    assert time.monotonic() - begun < 30  # unlimited, it would take hours


def test_pattern_that_is_none(box: Sandbox) -> None:
    box.configure(box.adapter, rank_pattern={"q_proj(": 8})
    box.refused(3, "'q_proj('", "not a regular expression")


def test_config_that_steers_the_terminal(box: Sandbox) -> None:
    box.configure(box.adapter, base_model_name_or_path="a\x1b[2J\x07b")
    box.save_base(make_base(hidden=64))
    result = box.refused(4, "a\\x1b[2J\\x07b")
    assert "\x1b" not in result.err


# ---------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_adapter_that_is_not_finite(box: Sandbox, part: str, value: float) -> None:
    adapter = box.load_adapter()
    adapter[f"{KEY}.{part}"].view(-1)[3] = value
    box.save_adapter(adapter)
    size = adapter[f"{KEY}.{part}"].numel()
    box.refused(4, f"{KEY}.{part}", f"1 of {size} values are NaN or Inf")


def test_base_that_is_not_finite(box: Sandbox) -> None:
    base = box.load_base()
    base[f"{Q0}.weight"][5, 7] = torch.nan
    base[f"{Q0}.weight"][6, 0] = torch.inf
    box.save_base(base)
    box.refused(
        4,
        f"{Q0}.weight: 2 rows are NaN or infinite, in the base",
        "Hint: --exclude leaves such modules as they are in the base.",
    )


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_what_is_not_finite_can_be_left_out(box: Sandbox, place: str) -> None:
    """All else is merged, and the excluded module is the base's, NaN and all."""
    base, adapter = box.load_base(), box.load_adapter()
    if place == "base":
        base[f"{Q0}.weight"][5, 7] = torch.nan
        box.save_base(base)
    else:
        adapter[f"{KEY}.lora_A.weight"][0, 0] = torch.inf
        box.save_adapter(adapter)
    assert box.merge("--exclude", Q0, "--verify", "all").code == 0
    merged = load_file(box.out / "model.safetensors")
    weight, expected = merged[f"{Q0}.weight"], base[f"{Q0}.weight"]
    assert torch.equal(weight.view(torch.int32), expected.view(torch.int32))
    others = [name for name in base if not torch.equal(merged[name], base[name])]
    assert {name.removesuffix(".weight") for name in others} >= set(MODULES) - {Q0}


def test_dry_run_refuses_what_a_run_would(box: Sandbox) -> None:
    base = box.load_base()
    base[f"{Q0}.weight"][5, 7] = torch.nan
    box.save_base(base)
    options = ("--dry-run", "--zero-rows", "keep")
    box.refused(4, f"{Q0}: 1 rows are NaN or infinite", options=options)


@pytest.fixture
def zeros(box: Sandbox) -> Sandbox:
    """Three rows of the base are zero, and what is added to them is zero."""
    base, adapter = box.load_base(), box.load_adapter()
    base[f"{Q0}.weight"][2:5] = 0
    adapter[f"{KEY}.lora_B.weight"][2:5] = 0
    box.save_base(base)
    box.save_adapter(adapter)
    return box


def test_zero_rows_with_a_magnitude(zeros: Sandbox) -> None:
    zeros.refused(
        4, f"{Q0}.weight: 3 rows are zero in the base, but have a magnitude", "--zero-rows keep"
    )


def test_zero_rows_kept(zeros: Sandbox) -> None:
    assert zeros.merge("--zero-rows", "keep", "--verify", "all").code == 0
    merged = load_file(zeros.out / "model.safetensors")[f"{Q0}.weight"]
    assert not merged[2:5].any()
    assert bool(merged[[0, 1, 5]].any(dim=1).all())


def test_zero_rows_without_a_magnitude(zeros: Sandbox) -> None:
    adapter = zeros.load_adapter()
    adapter[MAGNITUDE][2:5] = 0
    zeros.save_adapter(adapter)
    assert zeros.merge("--verify", "all").code == 0
    assert not load_file(zeros.out / "model.safetensors")[f"{Q0}.weight"][2:5].any()


def test_overflow(box: Sandbox) -> None:
    adapter = box.load_adapter()
    adapter[MAGNITUDE][0] = 1e7
    box.save_adapter(adapter)
    box.refused(4, f"{Q0}.weight", "too large for float16", options=["--dtype", "float16"])
    assert box.merge("--dtype", "bfloat16").code == 0


# ---------------------------------------------------------------------------------- the output


def test_output_exists(box: Sandbox) -> None:
    box.out.mkdir()
    (box.out / "mine.txt").write_text("precious")
    box.refused(5, str(box.out), "exists already and is not empty", "--overwrite")


def test_output_is_a_file(box: Sandbox) -> None:
    box.out.write_text("precious")
    box.refused(5, "is a file", "--output")


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        ("base", "is the input"),
        ("adapter", "is the input"),
        ("base/new", "lies inside"),
        ("adapter/new", "lies inside"),
        (".", "contains"),
        ("base/../base", "is the input"),
    ],
)
def test_output_and_inputs_overlap(box: Sandbox, place: str, relation: str) -> None:
    box.out = box.root / place
    box.refused(5, relation, "--output")
    box.refused(5, relation, "--output", options=["--overwrite"])


def test_output_is_a_link_to_the_base(box: Sandbox) -> None:
    box.out.symlink_to(box.base)
    box.refused(5, "is the input", options=["--overwrite"])


def test_output_without_parent(box: Sandbox) -> None:
    box.out = box.root / "not" / "there"
    box.refused(5, "does not exist", f"mkdir -p {box.root / 'not'}")


def test_output_is_locked(box: Sandbox) -> None:
    partial = box.root / "out.partial"
    partial.mkdir()
    (partial / ".dora-convert").touch()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = digest(box.root)
    result = box.merge()
    os.close(holder)
    assert result.code == 5
    assert f"another run (process {os.getpid()}) is writing out" in result.err
    assert digest(box.root) == before
    assert box.merge("--quiet").code == 0  # its remains are taken over


def test_disk_with_no_room(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize, f_blocks = 10, 4096, 10**6

    monkeypatch.setattr(staging.os, "statvfs", lambda _: Full)
    box.refused(5, "too little space", "40.96 kB free", "--output")


@pytest.fixture
def mounted(box: Sandbox) -> Iterator[Callable[..., Path]]:
    """Mount a file system in the sandbox."""
    folder = box.root / "mounted"
    folder.mkdir()

    def mount(*arguments: str) -> Path:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_read_only_disk(box: Sandbox, mounted: Callable[..., Path]) -> None:
    box.out = mounted("-t", "tmpfs", "-o", "ro", "tmpfs") / "out"
    box.refused(5, "cannot be written: the file system is read-only", "--output")


def test_disk_that_is_small(box: Sandbox, mounted: Callable[..., Path]) -> None:
    box.out = mounted("-t", "tmpfs", "-o", "size=100k", "tmpfs") / "out"
    box.refused(5, "too little space", "MB needed", "102.4 kB free")
    assert not list(box.out.parent.iterdir())


# ------------------------------------------------------------------------------------- the paths


def test_no_adapter(box: Sandbox) -> None:
    box.adapter = box.root / "nothing"
    result = box.refused(3, f"there is no adapter at {box.adapter}")
    assert "hf download" not in result.err


def test_hub_names(box: Sandbox, offline: None) -> None:
    def merge(adapter: object, base: object) -> Callable[[], Result]:
        return lambda: box.run("merge", adapter, "-b", base, "-o", box.out)

    box.refuses(6, "me/dora is not in the cache", "HF_HUB_OFFLINE", run=merge("me/dora", box.base))
    box.refuses(6, "me/llama is not in the cache", run=merge(box.adapter, "me/llama"))


def test_adapter_and_base_exchanged(box: Sandbox) -> None:
    box.adapter, box.base = box.base, box.adapter
    box.refused(3)


def test_adapter_as_base(box: Sandbox) -> None:
    box.base = box.adapter
    box.refused(3, "there is no base model in adapter", "give the model that it was trained on")


def test_adapter_does_not_name_its_base(box: Sandbox, offline: None) -> None:
    box.configure(box.adapter, base_model_name_or_path=None)

    def merge() -> Result:
        return box.run("merge", box.adapter, "-o", box.out)

    box.refuses(3, "does not name its base", "--base", run=merge)
    box.configure(box.adapter, base_model_name_or_path="someone/some-model")
    box.refuses(6, "someone/some-model is not in the cache", run=merge)
    box.configure(box.adapter, base_model_name_or_path="/home/them/model")
    box.refuses(3, "trained on /home/them/model", "--base", run=merge)
    box.configure(box.adapter, base_model_name_or_path=str(box.base))
    assert merge().code == 0


def test_globs_that_leave_nothing(box: Sandbox) -> None:
    box.refused(3, "leave no module", Q0, options=["--include", "q_proj"])


def test_tensor_that_nobody_knows(box: Sandbox) -> None:
    box.save_adapter(box.load_adapter() | {"base_model.model.extra": torch.ones(3)})
    box.refused(3, "extra [3] is not understood", "--ignore")
    assert box.merge("--quiet", "--ignore", "*.extra").code == 0


# ---------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merg"], ("No such command 'merg'", "Did you mean 'merge'?")),
        (["zzz"], ("No such command 'zzz'",)),
        (["merge", "a", "-o", "b", "--bas", "c"], ("No such option", "--bas")),
        (["merge", "a", "-o", "b", "--max-shard-size", "5XB"], ("'5XB' is no size", "5GB")),
        (["merge", "a", "-o", "b", "--max-shard-size", "0"], ("at least one byte",)),
        (["merge", "a", "-o", "b", "--dtype", "int8"], ("'int8' is not one of", "bf16")),
        (["merge", "a", "-o", "b", "--scale", "nan"], ("'nan' is no finite number",)),
        (["merge", "a", "-o", "b", "--scale", "much"], ("'much' is no finite number",)),
        (["merge", "a", "-o", "b", "--workers", "0"], ("--workers",)),
        (["merge", "a", "-o", "b", "--axis", "rows"], ("'rows' is not one of", "out")),
        (["merge", "a"], ("Missing option", "--output")),
        (["merge", "-o", "b"], ("Missing argument", "ADAPTER")),
        (["verify", "a", "--adapter", "b", "--tolerance", "-1"], ("less than 0",)),
        (["verify", "a", "--adapter", "b", "--tolerance", "inf"], ("no finite number",)),
        (["completion", "powershell"], ("'powershell' is not one of", "fish")),
    ],
    ids=" ".join,
)
def test_usage(run: Callable[..., Result], arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "for help." in result.err
    for word in words:
        assert word in result.err


def test_bug(box: Sandbox, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """What no one foresaw is called a bug, with its place; a traceback only if asked for."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("dora_convert.api.inspect", broken)
    result = run("inspect", box.adapter)
    assert result.code == 1
    assert result.out == ""
    assert "a bug in dora-convert" in result.err
    assert "ZeroDivisionError: seven (test_bad_input.py:" in result.err
    assert "report" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in run("inspect", box.adapter, "--verbose").err


@pytest.mark.parametrize("error", [KeyboardInterrupt, EOFError])
def test_interrupt(
    box: Sandbox,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dora_convert.api.inspect", interrupted)
    result = run("inspect", box.adapter)
    assert result.code == (130 if error is KeyboardInterrupt else 1)
    assert len(result.err.splitlines()) == (1 if error is KeyboardInterrupt else 2)


# ------------------------------------------------------------------------------- errors as JSON


def test_json_error(box: Sandbox) -> None:
    box.save_base(make_base(hidden=64))
    result = box.merge("--json")
    assert result.code == 4
    assert result.out == ""
    body = json.loads(result.err)
    assert body["schema"] == "dora-convert/error/1"
    assert body["exit_code"] == 4
    assert body["error"] == "the adapter does not fit this base"
    assert len(body["problems"]) == 4
    assert body["hint"]
    assert any(str(box.base) in line for line in body["where"])


def test_json_error_of_usage(run: Callable[..., Result]) -> None:
    result = run("merge", "a", "--json")
    assert result.code == 2
    body = json.loads(result.err)
    assert body["exit_code"] == 2
    assert "--output" in body["error"]
    assert body["hint"] == "dora-convert merge --help"


def test_json_error_of_a_bug(
    box: Sandbox, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_convert.api.inspect", lambda *_, **__: 1 / 0)
    body = json.loads(run("inspect", box.adapter, "--json").err)
    assert body["exit_code"] == 1
    assert "ZeroDivisionError" in body["error"]


def test_a_tokenizer_that_is_a_link_is_not_published(box: Sandbox) -> None:
    """A private file of whoever merges would go into the output, and from there to the Hub."""
    secret = box.root / "id_rsa"
    secret.write_text("PRIVATE KEY")
    (box.adapter / "chat_template.jinja").symlink_to(secret)
    (box.adapter / "vocab.txt").write_text("of the adapter")
    (box.base / "merges.txt").symlink_to(secret)
    assert box.merge("--quiet").code == 0
    assert (box.out / "vocab.txt").read_text() == "of the adapter"
    assert not [file for file in box.out.rglob("*") if b"PRIVATE" in file.read_bytes()]

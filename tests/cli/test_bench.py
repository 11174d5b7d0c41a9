"""`bench` measures the stages of a merge and leaves nothing behind; `--device` is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.sandbox import Result, Sandbox


def test_stages_of_a_part_of_the_merge(
    box: Sandbox, run: Callable[..., Result], tmp_path: Path
) -> None:
    whole = json.loads(run("merge", box.adapter, "-b", box.base, "-o", box.out, "--json").out)
    folder = tmp_path / "disk"
    folder.mkdir()
    args = ("-b", box.base, "--folder", folder, "--sample", "1MB", "--workers", 2)
    result = run("bench", box.adapter, *args, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["schema"] == "dora-convert/bench/1"
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == [
        "read",
        "read again",
        "read and merge",
        "copy",
        "copy, on disk",
        "merge",
        "merge, on disk",
    ]
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert stages["copy"]["nbytes"] == stages["merge"]["nbytes"] <= whole["nbytes"]
    assert stages["read and merge"]["nbytes"] <= stages["merge"]["nbytes"]
    assert found["nbytes"] == whole["nbytes"]
    assert found["of_copy"] == pytest.approx(stages["merge"]["seconds"] / stages["copy"]["seconds"])
    assert found["devices"] == ["cpu"]
    assert found["workers"] == 2
    assert list(folder.iterdir()) == []


def test_a_smaller_sample_makes_less(box: Sandbox, run: Callable[..., Result]) -> None:
    def made(sample: str) -> int:
        args = ("-b", box.base, "--folder", box.root, "--sample", sample, "--json")
        report = json.loads(run("bench", box.adapter, *args).out)
        return next(s["nbytes"] for s in report["stages"] if s["name"] == "merge")

    assert 0 < made("1KB") < made("1MB")


def test_a_table_and_a_sentence(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("bench", box.adapter, "-b", box.base, "--folder", box.root)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["stage", "bytes", "took", "rate"]
    assert len(lines) == 8
    assert "times as long as copying, with" in result.err
    assert "the limit is the" in result.err


def test_a_folder_that_is_not_there(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("bench", box.adapter, "-b", box.base, "--folder", box.root / "nowhere")
    assert result.code == 5
    assert "nowhere" in result.err
    assert "Traceback" not in result.err


def test_a_timeline(box: Sandbox, run: Callable[..., Result]) -> None:
    file = box.root / "merge.json"
    args = ("-b", box.base, "--folder", box.root, "--timeline", file)
    result = run("bench", box.adapter, *args)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert ["while", "merging", "took", "of", "the", "time"] in rows
    assert {"read", "compute", "write", "hash", "sync"} <= {row[0] for row in rows if row}
    events = json.loads(file.read_text())["traceEvents"]
    assert {"read", "compute", "write", "hash", "sync"} <= {event["name"] for event in events}
    for event in events:
        assert event["ph"] == "M" or min(event["ts"], event["dur"]) >= 0

    found = json.loads(run("bench", box.adapter, *args, "--json").out)
    shares = {activity["stage"]: activity["busy"] for activity in found["activities"]}
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["sync"] > 0


def test_without_a_timeline_nothing_is_said_of_it(box: Sandbox, run: Callable[..., Result]) -> None:
    args = ("-b", box.base, "--folder", box.root, "--json")
    assert json.loads(run("bench", box.adapter, *args).out)["activities"] == []


def test_a_timeline_where_no_folder_is(box: Sandbox, run: Callable[..., Result]) -> None:
    args = ("-b", box.base, "--folder", box.root, "--timeline", box.root / "nowhere" / "t.json")
    result = run("bench", box.adapter, *args)
    assert result.code == 5
    assert "t.json cannot be written: it does not exist" in result.err


def test_a_device_that_is_not_there(box: Sandbox, run: Callable[..., Result]) -> None:
    args = ("-b", box.base, "-o", box.out, "--device", "cuda:63")
    result = run("merge", box.adapter, *args)
    assert result.code == 3
    assert "there is no device cuda:63" in result.err
    assert not box.out.exists()

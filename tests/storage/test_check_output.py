from __future__ import annotations

import errno
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dora_convert.errors import OutputError
from dora_convert.storage.staging import check_output


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder, with the content of its files."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(out: Path, *inputs: Path, overwrite: bool = True) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check_output(out, inputs=inputs, overwrite=overwrite)
    assert caught.value.hint
    return caught.value


def test_good_outputs(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    file = tmp_path / "lora.safetensors"
    file.write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    inputs = [tmp_path / "base", file]
    check_output(tmp_path / "out", inputs=inputs, overwrite=False)
    check_output(tmp_path / "base2", inputs=inputs, overwrite=False)
    check_output(tmp_path / "empty", inputs=inputs, overwrite=False)
    check_output(tmp_path / "full", inputs=inputs, overwrite=True)
    assert tree(tmp_path) == before


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    error = refused(tmp_path, overwrite=False)
    assert error.what == f"{tmp_path} exists already and is not empty"
    assert "--overwrite" in error.hint
    error = refused(tmp_path / "x")
    assert error.what == f"{tmp_path / 'x'} is a file"


def test_output_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "link").symlink_to("models")
    monkeypatch.chdir(base)
    for out, given, relation in [
        (base, base, "is"),
        (tmp_path / "link" / "base", base, "is"),
        (base, tmp_path / "link" / "base", "is"),
        (Path(), base, "is"),
        (Path("../base"), base, "is"),
        (base / "out", base, "lies inside"),
        (Path("out"), Path(), "lies inside"),
        (tmp_path / "link" / "base" / "a" / "b", base, "lies inside"),
        (base.parent, base, "contains"),
        (tmp_path, base / "model.safetensors", "contains"),
        (base, tmp_path / "models" / "base.partial", "is"),
    ]:
        error = refused(out, tmp_path.parent / "other", given)
        assert error.what == f"the output {out} {relation} the input {given}"


def test_parents(tmp_path: Path) -> None:
    error = refused(tmp_path / "a" / "b" / "out")
    assert error.what == f"the folder of the output, {tmp_path / 'a' / 'b'}, does not exist"
    assert error.hint == f"mkdir -p {tmp_path / 'a' / 'b'}"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a part of its path is not a folder"):
        check_output(tmp_path / "file" / "out", inputs=[], overwrite=False)
    assert refused(Path("/")).what == "/ is a mount point, which cannot be replaced"
    with pytest.raises(OutputError, match="its name is too long"):
        check_output(tmp_path / ("x" * 300), inputs=[], overwrite=False)


def test_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise OSError(errno.EACCES, "x")

    monkeypatch.setattr(tempfile, "mkdtemp", fails)
    with pytest.raises(OutputError, match="cannot be written: permission is denied"):
        check_output(tmp_path / "out", inputs=[], overwrite=False)


def test_read_only_disk(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(OutputError, match="disk cannot be written: the file system is read-only"):
        check_output(mounted / "out", inputs=[], overwrite=False)
    assert tree(mounted) == {}


def test_mount_point(mounted: Path) -> None:
    error = refused(mounted)
    assert "is a mount point" in error.what
    assert error.hint.endswith(str(mounted / "merged"))

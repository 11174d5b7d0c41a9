"""One file, complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_convert.errors import OutputError
from dora_convert.storage.single import check_file, whole_file


def test_it_appears_when_the_block_is_over(tmp_path: Path) -> None:
    target = tmp_path / "picture.svg"
    target.write_text("old")
    with whole_file(target) as file:
        file.write_text("new")
        assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.svg"]
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "picture.svg"
    target.write_text("old")

    def fail() -> None:
        with whole_file(target) as file:
            file.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["picture.svg"]
    assert target.read_text() == "old"


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "picture.svg") as file:
            file.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="no space is left on the disk"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "folder") as file:
            file.write_text("new")

    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="exists already as a folder"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_is_found_out_before(tmp_path: Path) -> None:
    check_file(tmp_path / "new.svg", overwrite=False)
    (tmp_path / "old.svg").touch()
    check_file(tmp_path / "old.svg", overwrite=True)
    with pytest.raises(OutputError, match=r"old\.svg is there already") as caught:
        check_file(tmp_path / "old.svg", overwrite=False)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(OutputError, match="there is no folder"):
        check_file(tmp_path / "none" / "new.svg", overwrite=True)
    with pytest.raises(OutputError, match="too long"):
        check_file(tmp_path / ("n" * 300), overwrite=False)

"""A merge of several shards, run again and again, and what may be left of it at any time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.cli.sandbox import Sandbox, digest
from tests.reliability.faults import Fault
from tests.reliability.nursery import MAIN, Ended, Nursery

__all__ = ["Merges"]

SHARDS = 5


class Merges:
    """`run` merges into `out`; `expected` are the files and hashes of a merge without any fault."""

    def __init__(self, box: Sandbox, nursery: Nursery) -> None:
        self.nursery = nursery
        self.code = MAIN
        self.box = box
        self.root = box.root
        self.place = box.root / "place"
        self.out = self.place / "out"
        self.partial = self.place / "out.partial"
        (box.base / "tokenizer.json").write_text('{"version": "1.0"}')
        self.clear()
        assert self.run().code == 0
        self.expected = self.files(self.out)
        assert len([name for name in self.expected if name.endswith(".safetensors")]) == SHARDS

    def command(self, *options: object) -> list[object]:
        """Of a merge in five shards; what is found out by reading them back has its own tests."""
        box = self.box
        merge = ["merge", box.adapter, "-b", box.base, "-o", self.out, "--max-shard-size", "18000"]
        return [*merge, "--verify", "none", *options]

    def run(self, *options: object, **others: Any) -> Ended:
        """Merge, with a fault if there is one among the `others`."""
        command = self.command("--workers", "1", *options)
        return self.nursery.run(*command, code=self.code, **others)

    def fault(self, nth: int = 1, action: str = "kill", **others: Any) -> Fault:
        """One that hits what concerns the output."""
        return Fault(str(self.place), nth, action, **others)

    def clear(self) -> None:
        """Begin with an empty place."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def files(self, folder: Path) -> dict[str, str]:
        """Hashes of all files below, by name."""
        return {str(Path(n).relative_to(folder)): h for n, h in digest(folder).items()}

    def finished(self) -> dict[str, tuple[int, int]]:
        """Inode and time of every shard that the journal tells of."""
        journal = self.partial / ".dora-convert"
        if not journal.exists():
            return {}
        lines = journal.read_bytes().split(b"\n")[1:-1]
        found = {}
        for line in lines:
            name = json.loads(line)["file"]
            file = self.partial / "files" / name
            if file.exists():
                found[name] = (file.stat().st_ino, file.stat().st_mtime_ns)
        return found

    def check_promise(self) -> None:
        """OUT is not there, or complete, with the same bytes as ever."""
        if self.out.exists():
            assert self.files(self.out) == self.expected

    def resume(self, *options: object) -> int:
        """The same command ends well, and rewrites nothing; how many shards it took over."""
        self.check_promise()
        if self.out.exists() and "--overwrite" not in options:
            again = self.run(*options)
            assert again.code == 5, again
            assert "exists already" in again.err
            assert self.files(self.out) == self.expected
            assert {entry.name for entry in self.partial.rglob("*")} <= {".dora-convert"}
            return 0
        finished = self.finished()
        again = self.run(*options)
        assert again.code == 0, again
        assert self.files(self.out) == self.expected
        assert {entry.name for entry in self.place.iterdir()} == {"out"}
        for name, identity in finished.items():
            stat = (self.out / name).stat()
            assert (stat.st_ino, stat.st_mtime_ns) == identity, name
        return len(finished)

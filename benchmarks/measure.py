"""Run one process; how long it took and how much memory of its own it held."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "run"]

INTERVAL = 0.01
OWN = ("RssAnon:", "RssShmem:")


@dataclass(frozen=True, slots=True)
class Measured:
    """`own_peak` is memory backed by no file: mapped inputs, which the kernel may drop, are out.

    It is 0 where it was not sampled: reading a process's status holds up its page faults, so what
    is timed is not looked at.
    """

    seconds: float
    own_peak: int  # bytes
    stdout: str


def run(command: Sequence[str | Path], *, sampled: bool = False) -> Measured:
    """Run to the end; exits with its stderr if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
        )
        sampler = _Sampler(process.pid)
        if sampled:
            sampler.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        if sampled:
            sampler.join()
        out.seek(0)
        err.seek(0)
        if code:
            sys.exit(f"{' '.join(map(str, command))}\nfailed with {code}:\n{err.read()}")
        return Measured(seconds, sampler.peak, out.read())


class _Sampler(threading.Thread):
    """Reads the process's status until it is gone. A peak shorter than the interval is missed."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(OWN)]
            if not sizes:  # a zombie has no memory left
                return
            self.peak = max(self.peak, sum(sizes))
            time.sleep(INTERVAL)

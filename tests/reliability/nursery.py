"""A process that has imported everything, and runs each command in a child that it forks.

So a run takes hundredths of a second instead of seconds, and can be killed hundreds of times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.reliability.faults import Fault, install

__all__ = ["MAIN", "Ended", "Nursery", "is_stopped"]

MAIN = """
from dora_convert.cli import main
main()
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (minus the signal's number), what it wrote, how long it took."""

    code: int
    out: str
    err: str
    seconds: float = field(compare=False)


class Nursery:
    """One child at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        *args: object,
        fault: Fault | None = None,
        limits: dict[str, int] | None = None,
        stopped: bool = False,
        killed_after: float | None = None,
        environment: Mapping[str, str] | None = None,
        code: str = MAIN,
    ) -> int:
        """Begin a run; its process id.

        `limits` are those of `resource`, without RLIMIT_; that of AS is for what is needed on top.
        One that is `stopped` waits for SIGCONT before it does anything; one that is `killed_after`
        so many seconds has itself killed, since by then its number may be another process's.
        `environment` is all of its own, and `code` runs the program, with the `args`.
        """
        order = {
            "args": [str(arg) for arg in args],
            "fault": dataclasses.asdict(fault) if fault else None,
            "limits": limits or {},
            "stopped": stopped,
            "killed_after": killed_after,
            "environment": None if environment is None else dict(environment),
            "code": code,
            "out": str(self._folder / "stdout"),
            "err": str(self._folder / "stderr"),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._running = int(self._answer())
        while stopped and not is_stopped(self._running):
            time.sleep(0.002)
        return self._running

    def ended(self) -> Ended:
        """Wait for the end of the run; one that takes a minute is killed."""
        with _Alarm(self._running):
            code, seconds = self._answer().split()
        out, err = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        return Ended(int(code), out, err, float(seconds))

    def run(self, *args: object, **others: Any) -> Ended:
        """Begin a run, and wait for its end."""
        self.start(*args, **others)
        return self.ended()

    def killed_once(self, ready: Callable[[], object], *args: object, **others: Any) -> Ended:
        """Begin a run, and kill it when it is `ready`. Raises ProcessLookupError if it ends."""
        process = self.start(*args, **others)
        try:
            while not ready():
                os.kill(process, 0)
                time.sleep(0.005)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            ended = self.ended()
        return ended

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery is gone"
        return line

    def __enter__(self) -> Nursery:
        assert self._answer() == "ready\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def is_stopped(process: int) -> bool:
    """Whether it had a SIGSTOP, and no SIGCONT yet."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class _Alarm:
    def __init__(self, process: int) -> None:
        self._timer = threading.Timer(60, os.kill, (process, signal.SIGKILL))

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _child(order: dict[str, Any]) -> int:
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags), number)
    faulthandler.dump_traceback_later(50)
    if order["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    for name, value in order["limits"].items():
        limit = getattr(resource, f"RLIMIT_{name}")
        more = _memory() if name == "AS" else 0
        resource.setrlimit(limit, (value + more, value + more))
    if order["killed_after"] is not None:
        threading.Timer(order["killed_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    if order["fault"]:
        order["fault"]["calls"] = tuple(order["fault"]["calls"])
        install(Fault(**order["fault"]))
    if order["environment"] is not None:
        os.environ.clear()
        os.environ.update(order["environment"])
    sys.argv[1:] = order["args"]
    try:
        exec(order["code"], {})
    except SystemExit as ended:
        sys.stdout.flush()
        return int(ended.code or 0)
    return 0


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _serve() -> None:
    # ruff: noqa: PLC0415 - a test that talks to it need not import it
    import dora_convert.api.converting
    import dora_convert.api.merging
    import dora_convert.api.projecting
    import dora_convert.cli.commands.merge
    import dora_convert.execution.decoding
    import dora_convert.execution.devices
    import dora_convert.execution.project
    import dora_convert.execution.run
    import dora_convert.execution.verify  # noqa: F401
    from dora_convert.formats import formats

    for name in formats.names():
        formats.get(name)

    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                # Whatever this process was started with: nohup, or in the background.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                code = _child(order)
            finally:
                os._exit(code)
        begun = time.monotonic()
        print(pid, flush=True)  # noqa: T201
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, time.monotonic() - begun, flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()

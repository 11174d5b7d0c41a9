"""Faults at a chosen call of this process to the system, as far as it concerns one output."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CALLS", "Fault", "install"]

# What changes files or folders, or brings them to the disk.
CALLS = (
    "open",
    "pwrite",
    "write",
    "ftruncate",
    "copy_file_range",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "rmdir",
)


@dataclass(frozen=True)
class Fault:
    """What happens at the `nth` of the calls named in `calls`, counted from 1.

    `action`: `kill` before the call or `killed` after it; `short`, a write of half the bytes;
    `lost`, a write that says it was done and was not; a signal, such as `SIGINT`, before the call;
    `touch` or `cut` the file `target`, or leave `target` as it is and fail with an error, by its
    name. Only files below `root` whose path has `about` in it count. With `log` all calls on files
    below `root` are written there, counted or not.
    """

    root: str
    nth: int = 0
    action: str = "kill"
    calls: tuple[str, ...] = CALLS
    about: str = ""
    log: str = ""
    target: str = ""


def install(fault: Fault) -> None:
    """From now on."""
    state = _State(fault)
    for name in CALLS:
        setattr(os, name, _watched(getattr(os, name), name, state))


class _State:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.count = 0
        self.lock = threading.Lock()
        self.log = os.open(fault.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if fault.log else -1
        self.write, self.pwrite = os.write, os.pwrite

    def is_hit(self, name: str, places: tuple[str, ...]) -> bool:
        inside = [place for place in places if place.startswith(self.fault.root)]
        if not inside:
            return False
        with self.lock:
            if self.log >= 0:
                self.write(self.log, "\t".join((name, *places)).encode() + b"\n")
            if name not in self.fault.calls or not any(self.fault.about in p for p in inside):
                return False
            self.count += 1
            return self.count == self.fault.nth


def _watched(real: Callable[..., Any], name: str, state: _State) -> Callable[..., Any]:
    def watched(*args: Any, **others: Any) -> Any:
        if not state.is_hit(name, _places(name, args, others)):
            return real(*args, **others)
        return _strike(state.fault, real, args, others)

    return watched


def _strike(
    fault: Fault, real: Callable[..., Any], args: tuple[Any, ...], others: dict[str, Any]
) -> Any:
    match fault.action:
        case "short":
            fd, data, *offset = args
            return real(fd, data[: max(1, len(data) // 2)], *offset)
        case "lost":
            return len(args[1])
        case "touch":
            os.utime(fault.target, ns=(0, 1))
        case "cut":
            os.truncate(fault.target, 100)
        case "kill":
            _kill()
        case "killed":
            real(*args, **others)
            _kill()
        case "SIGSTOP":
            # To this thread: of one to the process another may hear, and this one goes on a while.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case name if name.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, name))
        case name:
            code = getattr(errno, name)
            raise OSError(code, os.strerror(code))
    return real(*args, **others)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _places(name: str, args: tuple[Any, ...], others: dict[str, Any]) -> tuple[str, ...]:
    """The paths that a call is about; of a call on open files those of the files."""
    if name == "copy_file_range":
        return (_path(args[1]),)
    if name in ("rename", "replace"):
        return tuple(_path(arg) for arg in args[:2])
    if name == "open" and not args[1] & os.O_CREAT:
        return ()
    if name in ("unlink", "rmdir", "open") and others.get("dir_fd") is not None:
        return (str(Path(_path(others["dir_fd"]), os.fsdecode(args[0]))),)
    return (_path(args[0]),)


def _path(value: Any) -> str:
    if isinstance(value, int):
        return str(Path(f"/proc/self/fd/{value}").readlink())
    return os.path.abspath(os.fsdecode(value))  # noqa: PTH100 - as it is, links and all

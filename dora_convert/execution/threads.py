"""A list of work shared out to threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from dora_convert.storage.room import require_room

__all__ = ["in_threads"]

T = TypeVar("T")


def in_threads(work: Sequence[T], do: Callable[[T], None], workers: int) -> None:
    """Call `do` for every item; the first error stops all at their next item and is raised here.

    torch itself runs on one thread meanwhile: blocks are too small to be worth splitting further.
    """
    items = iter(work)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def loop() -> None:
        while not errors:
            with lock:
                item = next(items, None)
            if item is None:
                return
            try:
                do(item)
            except BaseException as error:
                errors.append(error)

    threads = [_Worker(loop, f"worker {i}") for i in range(1, min(workers, len(work)) + 1)]
    with _single_threaded_torch():
        try:
            require_room(len(threads))
            with lock:  # none takes memory for its work before all are there
                for thread in threads:
                    thread.start()
            _join(threads)
        except BaseException as error:  # an interrupt arrives here, in the main thread
            errors.append(error)
            _join(threads)
            raise
    if errors:
        raise errors[0]


class _Worker(threading.Thread):
    """A thread whose end can be waited for again.

    CPython takes one for ended whose `join` was interrupted (before 3.13), and does not wait again.
    """

    def __init__(self, do: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._do = do
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._do()
        finally:
            self.ended.set()


def _join(threads: Sequence[_Worker]) -> None:
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.ended.wait()


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Threads that share a list of tasks and a budget of memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec import Struct, field

PART = 16 << 20  #: bytes; what can be cut is cut into parts of this size, so that workers can share it


def turn(nbytes: int) -> int:
    """Sorts work of so many bytes: what could not be cut comes first, the largest of it before all. At the end, one worker would be busy with it
    and the others with nothing.

    >>> sorted([5, 40 << 20, 1, 90 << 20], key=turn) == [90 << 20, 40 << 20, 5, 1]
    True
    """
    return -max(0, nbytes - PART)


class Task(Protocol):
    """Something that one worker does by itself."""

    @property
    def peak_nbytes(self) -> int:
        """Of tensors, while it runs."""
        ...

    def run(self, worker: Worker) -> None:
        """Does it. What it raises ends the work of all."""
        ...


class Worker(Struct):
    """One thread: what it did, for the report, and where it tells of it."""

    number: int
    tell: Callable[[int], None]
    stop: threading.Event
    copied_nbytes: int = 0
    cloned_nbytes: int = 0  #: of these, shared with the source by the filesystem
    kernel_nbytes: int = 0  #: and copied by the kernel, without passing through a buffer
    computed_nbytes: int = 0
    seconds: float = 0.0
    belongings: dict[str, object] = field(default_factory=dict)  #: what tasks leave for later ones of the same thread

    def to_json(self) -> dict[str, int | float]:
        return {
            "number": self.number, "copied_nbytes": self.copied_nbytes, "cloned_nbytes": self.cloned_nbytes,
            "kernel_nbytes": self.kernel_nbytes, "computed_nbytes": self.computed_nbytes, "seconds": round(self.seconds, 3),
        }  # fmt: skip


class Crew:
    """Runs tasks on ``threads`` workers, in their order, never more at once than fit into ``budget`` bytes."""

    def __init__(self, threads: int, tell: Callable[[int], None] | None, budget: int) -> None:
        self._threads, self._tell, self._free = threads, tell, budget
        self._lock = threading.Condition()
        self._running = 0
        self._waiting: deque[Task] = deque()
        self._errors: list[BaseException] = []
        self.stop = threading.Event()

    def tell(self, nbytes: int) -> None:
        """Progress, from any worker."""
        if self._tell is not None:
            with self._lock:
                self._tell(nbytes)

    def run(self, tasks: Iterable[Task]) -> tuple[Worker, ...]:
        """Does every task, or raises what the first one that failed raised, once all workers have ended."""
        self._waiting.extend(tasks)
        workers = [Worker(number, self.tell, self.stop) for number in range(1, min(self._threads, len(self._waiting)) + 1)]
        threads = [threading.Thread(target=self._work, args=(each,), name=f"ckptconv-{each.number}", daemon=True) for each in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # in short turns, so that Ctrl-C is heard
        finally:
            self.stop.set()
            with self._lock:
                self._lock.notify_all()
            for thread in threads:
                if thread.ident is not None:  # Ctrl-C may come before all of them were started
                    thread.join()
        if self._errors:
            raise self._errors[0]
        return tuple(workers)

    def _work(self, worker: Worker) -> None:
        try:
            while (task := self._next()) is not None:
                started = time.perf_counter()
                try:
                    task.run(worker)
                finally:
                    self._done(task)
                    worker.seconds += time.perf_counter() - started
        except BaseException as error:
            self._errors.append(error)
            self.stop.set()
            with self._lock:
                self._lock.notify_all()

    def _next(self) -> Task | None:
        """The first task that fits beside those that run; any task fits when none does. Waits where there is none yet."""
        with self._lock:
            while self._waiting and not self.stop.is_set():
                for at, task in enumerate(self._waiting):
                    if task.peak_nbytes <= self._free or not self._running:
                        del self._waiting[at]
                        self._running += 1
                        self._free -= task.peak_nbytes
                        return task
                self._lock.wait()
            return None

    def _done(self, task: Task) -> None:
        with self._lock:
            self._running -= 1
            self._free += task.peak_nbytes
            self._lock.notify_all()

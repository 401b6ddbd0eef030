"""Many files, of which only so many are open at once: five hundred shards must not need five hundred descriptors."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FEWEST, _MOST = 8, 256


def open_file_limit() -> int:
    """How many files one set may hold open: an eighth of what the process may, because up to four sets are open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, soft // 8))


class Descriptors:
    """Opens files by their number when they are needed, and closes the one that was idle for longest when there are too many.

    Safe for threads: what is in use is never closed, and where everything is in use one more is opened.

    >>> files = Descriptors(lambda at: os.open(os.devnull, os.O_RDONLY), limit=2)
    >>> for at in range(5):
    ...     with files.use(at) as descriptor:
    ...         assert os.fstat(descriptor)
    >>> len(files)
    2
    >>> files.close(); len(files)
    0
    """

    def __init__(self, opened: Callable[[int], int], limit: int | None = None) -> None:
        self._opened, self._limit = opened, limit or open_file_limit()
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}  # the one that was used longest ago comes first
        self._users: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._descriptors)

    @contextmanager
    def use(self, at: int) -> Iterator[int]:
        """The descriptor of file ``at``, open until the block ends."""
        with self._lock:
            descriptor = self._descriptors.pop(at, None)
            if descriptor is None:
                idle = [key for key in self._descriptors if not self._users.get(key)]
                for key in idle[: max(0, len(self._descriptors) + 1 - self._limit)]:
                    os.close(self._descriptors.pop(key))
                descriptor = self._opened(at)
            self._descriptors[at] = descriptor
            self._users[at] = self._users.get(at, 0) + 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[at] -= 1

    def close(self) -> None:
        """Closes all of them. Nobody may be using one."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

"""What a kernel does to values that is no error, and that a person wants to hear of: it is counted, and whoever runs the kernel collects.

>>> with noticing() as counts:
...     notice("flushed to zero", 3)
>>> dict(counts)
{'flushed to zero': 3}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counts: ContextVar[Counter[str] | None] = ContextVar("counts", default=None)


def notice(what: str, count: int) -> None:
    """Counts values; forgotten where nobody collects."""
    counts = _counts.get()
    if counts is not None and count:
        counts[what] += count


@contextmanager
def noticing() -> Iterator[Counter[str]]:
    """Collects what is noticed inside, in this thread."""
    counts: Counter[str] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)

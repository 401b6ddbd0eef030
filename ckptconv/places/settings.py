"""How remote places are used: whether the network may be, and how much of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace


class Settings(Struct, frozen=True):
    """The options of the command line, under the same names."""

    online: bool = False  #: ``hf://`` may fetch what the cache does not hold
    scratch: Path | None = None  #: where placeholders and outputs on their way lie; None: TMPDIR
    scratch_size: int | None = None  #: bytes of a source that are kept there at most; None: 16 GB, and at most half of what is free


_settings: ContextVar[Settings] = ContextVar("ckptconv_places", default=Settings())  # noqa: B039  (frozen)


def settings() -> Settings:
    """Those in force."""
    return _settings.get()


@contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Other settings, until the block ends.

    >>> with using(online=True):
    ...     settings().online
    True
    """
    token = _settings.set(replace(_settings.get(), **changes))
    try:
        yield _settings.get()
    finally:
        _settings.reset(token)

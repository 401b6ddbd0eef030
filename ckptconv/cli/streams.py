"""Standard output and error that tell a reader who left from a disk that is full.

A reader who left (``| head``) wants to hear no more: the rest goes nowhere, and the exit code stays that of the work. Words that
could not be written (``> report.txt`` on a full disk) are an output error of their own.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

from ckptconv.errors import OutputError, Problem


class WordsLost(OutputError):  # noqa: N818  (a kind of OutputError, which has the suffix)
    """Standard output cannot be written. What was done is done; only nobody can read of it."""


class Words(io.TextIOWrapper):
    """A stream of words for people. ``needed`` says whether words that are lost make an error."""

    needed = True

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        # What is still in the buffer goes the same way, so that the interpreter's last flush does not fail on it again.
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.needed and error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise WordsLost(
                Problem("CK503", f"the report cannot be printed: {error.strerror}", where="standard output",
                        try_="free some space, or --quiet")
            ) from None  # fmt: skip


def guard_streams() -> None:
    """Puts :class:`Words` in the place of ``sys.stdout`` and ``sys.stderr``, and something in the place of streams that are closed.

    A closed standard stream would lend its number to the next file that is opened: the output, say, and a library's warning would be
    written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _words(sys.stdout, 1, needed=True)
    sys.stderr = _words(sys.stderr, 2, needed=False)


def _words(stream: TextIO | None, number: int, *, needed: bool) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, Words):  # someone else's, who runs the command inside of a program
        return stream
    stream.flush()
    words = Words(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding=stream.encoding, errors=stream.errors,
        line_buffering=stream.line_buffering,
    )  # fmt: skip
    words.needed = needed
    return words

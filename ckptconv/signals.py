"""How a process of ours begins: signals become an exception that nobody catches on its way, so that nothing half-written stays behind, and
cycles are looked for seldom."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP, as an exception that nobody catches on its way, so that nothing half-written stays behind."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


#: The numbers of the signals that were raised. A library that calls us back may put an error of its own in the place of what we raise.
received: list[int] = []


def _raise(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a signal handler's signature)
    received.append(number)
    raise Signalled(number)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python swallows what is raised in a destructor or a callback. A signal is not to be lost like that: it comes once more, a moment later."""
    signalled = unraisable.exc_value
    if not isinstance(signalled, Signalled):
        sys.__unraisablehook__(unraisable)
        return
    number = signalled.number
    signal.signal(signal.SIGALRM, lambda _, frame: _raise(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.005)


def begin() -> None:
    """From here on a signal is raised in the main thread as :class:`Signalled`."""
    # Plans are hundreds of thousands of small objects without cycles: looking for cycles among them again and again costs half the time.
    gc.set_threshold(3_000_000, 50, 50)
    sys.unraisablehook = _raise_again
    _handle(_raise)


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for name in _SIGNALS:
        # Who starts us with a signal ignored (nohup) wants it ignored.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)


def let_go() -> None:
    """From here on nothing is left to clean up: a signal may end us at once.

    Nor need the interpreter look through all that is there for cycles, as it does several times when it ends: a tenth of a short run.
    """
    gc.freeze()
    _handle(signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)

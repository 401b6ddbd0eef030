"""``python -m ckptconv`` and the ``ckptconv`` command."""

from __future__ import annotations

import os
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


def _raise(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a signal handler's signature)
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


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for name in _SIGNALS:
        # Who starts us with a signal ignored (nohup) wants it ignored.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)


def _let_go() -> None:
    """From here on nothing is left to clean up: a signal may end us at once."""
    _handle(signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.unraisablehook = _raise_again
    try:
        _handle(_raise)
        code = _run()
        _let_go()
    except Signalled as signalled:
        _let_go()
        sys.stderr.write("interrupted: the output is whole, or as it was before\n")
        code = 128 + signalled.number
    sys.exit(code)


def _run() -> int:
    # `python -m` puts the working folder first on the path: a yaml.py or torch.py lying there must not be taken for the real one.
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # The same goes for an empty entry in PYTHONPATH.
    working = os.getcwd()
    if working != here:
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != working]
    import gc

    # Plans are hundreds of thousands of small objects without cycles: looking for cycles among them again and again costs half the time.
    gc.set_threshold(2_000_000, 50, 50)

    # Looking through all installed packages for plugins of pydantic takes longer than most of our commands.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    import click

    from ckptconv.cli import cli
    from ckptconv.cli.streams import guard_streams
    from ckptconv.errors import CkptconvError

    guard_streams()
    try:
        code = cli(prog_name="ckptconv", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CkptconvError as error:  # the words of --help, say, on a full disk
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()

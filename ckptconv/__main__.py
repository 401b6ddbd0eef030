"""``python -m ckptconv`` and the ``ckptconv`` command."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled like Ctrl-C, so that nothing half-written stays behind."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a signal handler's signature)
    raise Terminated(number)


def main() -> None:
    """Runs the command line and exits with its code."""
    # `python -m` puts the working folder first on the path: a yaml.py or torch.py lying there must not be taken for the real one.
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # The same goes for an empty entry in PYTHONPATH.
    working = os.getcwd()
    if working != here:
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != working]
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    import gc

    import click

    from ckptconv.cli import cli

    # Plans are hundreds of thousands of small objects without cycles: looking for cycles among them again and again costs half the time.
    gc.set_threshold(200_000, 50, 50)

    try:
        code = cli(prog_name="ckptconv", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        signalled = error.__cause__ if isinstance(error, click.Abort) else error
        sys.stderr.write("interrupted: nothing was written under the final name\n")
        code = 128 + signalled.number if isinstance(signalled, Terminated) else 130
    except BrokenPipeError:
        # The reader of our output is gone (`| head`). The work itself is done or undone; only the words have nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

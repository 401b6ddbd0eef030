"""``python -m ckptconv`` and the ``ckptconv`` command."""

from __future__ import annotations

import os
import sys

from ckptconv.signals import Signalled, begin, let_go, received


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        begin()
        code = _run()
        let_go()
    except (Signalled, Exception) as error:
        if not received:
            raise
        let_go()
        sys.stderr.write("interrupted: the output is whole, or as it was before\n")
        code = 128 + (error.number if isinstance(error, Signalled) else received[-1])
    sys.exit(code)


def _run() -> int:
    # `python -m` puts the working folder first on the path: a yaml.py or torch.py lying there must not be taken for the real one.
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # The same goes for an empty entry in PYTHONPATH.
    working = os.getcwd()
    if working != here:
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != working]
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

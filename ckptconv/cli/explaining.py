"""The commands of whoever is stuck: why does it not load, and which rule would make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptconv.cli.options import CONTEXT, HTML, PARITY, PLACES, SELECT, TALK, THREADS, TIMEOUT, examples
from ckptconv.cli.running import Output, guarded

#: An error message of more than this is a log.
MAX_MESSAGE = 16 << 20


@click.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv explain in.pth --target timm:resnet18         why does it not load?",
    "ckptconv explain in.pth                                what is it, and which rules are meant for it?",
    "python train.py 2>&1 | ckptconv explain --error -      what does this message mean?",
    "ckptconv explain in.pth --error message.txt",
    "ckptconv explain CK101",
))  # fmt: skip
@click.argument("source", metavar="[SRC]", required=False, type=click.Path())
@click.option(
    "--target", metavar="T", help="what it should load into: py:module:factory, timm:NAME, hf:FOLDER, a checkpoint or a saved manifest"
)
@click.option(
    "--error",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="the pasted text of an error message; - reads it from stdin",
)
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="a variable of the rules that are tried")
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="the model's config.json; else the one beside SRC"
)
@SELECT
@TIMEOUT
@HTML
@PLACES
@TALK
def explain(
    source: str | None,
    error: str | None,
    set_: tuple[str, ...],
    html: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> int:
    """Say why SRC does not load into T, in words, and what to type. Reads headers only; nothing is written.

    Exit 0 when it loads as it is, 1 when something is to be done, 3 when SRC cannot be read. A code (CK101) in place of SRC is explained too.
    """
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv.explain.codes import explain_code, is_code

        if source is not None and is_code(source) and not Path(source).exists():
            out.code(explain_code(source))
            return 0
        from ckptconv import api

        out.files(None, html, [source, error, options["target"], options["config"]])
        report = api.explain(source, error=_message(error), set=set_, **options)
        out.explanation(report)
        return report.exit_code


def _message(error: str | None) -> str:
    """The text of ``--error FILE`` or ``-``."""
    if error is None:
        return ""
    from ckptconv.errors import Problem, UsageError, printable

    try:
        with click.open_file(error, "rb") as stream:
            raw = stream.read(MAX_MESSAGE)
    except OSError as reason:
        raise UsageError(Problem("CK107", f"the message cannot be read: {reason.strerror}", where=printable(error))) from None
    return bytes(raw).decode("utf-8", "replace")


@click.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv suggest in.pth --target timm:resnet18 -o rules/mine.yaml",
    "ckptconv suggest in.pth --target py:nets:net --pair reduce=conv1",
    "ckptconv suggest in.pth --target timm:resnet18 -o rules/mine.yaml --apply out.pth --parity source=py:old:model",
))  # fmt: skip
@click.argument("source", metavar="SRC", type=click.Path())
@click.option(
    "--target",
    required=True,
    metavar="T",
    help="what it must load into: py:module:factory, timm:NAME, hf:FOLDER, a checkpoint or a saved manifest",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE.yaml",
    help="write the rule there; else, and for -, it is printed",
)
@click.option("--pair", "pairs", multiple=True, metavar="A=B", help="a hint: the part A of the source's names is B in the target's")
@click.option("--apply", type=click.Path(), metavar="DST", help="convert by the rule too, verified; refused while something is ambiguous")
@click.option("--accept-ambiguous", is_flag=True, help="with --apply: convert although something is ambiguous")
@click.option("--force", is_flag=True, help="replace FILE.yaml and DST")
@PARITY
@SELECT
@THREADS
@TIMEOUT
@HTML
@PLACES
@TALK
def suggest(source: str, out: str | None, html: Path | None, as_json: bool, quiet: bool, verbose: int, **options: Any) -> int:
    """Write the rule file that makes SRC load into T, say how sure it is, and try it without writing the output.

    Exit 0 when the rule fits and is unambiguous, 1 with findings (something is ambiguous or stays random), 4 when there is none.
    """
    output = Output(as_json, quiet, verbose)
    with guarded(output):
        from ckptconv import api

        output.files(None, html, [source, out, options["target"], options["apply"]])
        report = api.suggest(source, out=None if out == "-" else out, **options)
        output.suggestion(report)
        return report.exit_code

"""The command for whole folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptconv.cli.options import CONTEXT, CONVERSION, ENGINE, NO_PROGRESS, PARITY, TALK, VERIFY, RulesWord, examples
from ckptconv.cli.running import Output, guarded


@click.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv batch 'zoo/**/*.pth' -r dataparallel -o converted",
    "ckptconv batch zoo -r rules/mine.yaml -o converted --format safetensors --jobs 4",
    "ckptconv batch zoo -r dataparallel -o converted --dry-run",
))  # fmt: skip
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=click.Path())
@click.option("-r", "--rules", required=True, type=RulesWord(), metavar="RULES", help="a rule file, or the name of a built-in rule")
@click.option(
    "-o", "--out", "destination", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="the folder of the outputs, and of their lock",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 64), metavar="N", help="checkpoints at once  [default: one for every core]")
@ENGINE
@CONVERSION
@VERIFY
@PARITY
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="write the report, also of a failure")
@click.option("--dry-run", is_flag=True, help="say what would be converted, and why; nothing is written")
@click.option("--no-sync", is_flag=True, help="do not wait until the disk has everything (as cp)")
@NO_PROGRESS
@TALK
def batch(
    sources: tuple[str, ...], rules: str, destination: Path, set_: tuple[str, ...], format_: str | None, report: Path | None, no_sync: bool,
    no_progress: bool, as_json: bool, quiet: bool, verbose: int, **options: Any,
) -> int:  # fmt: skip
    """Convert many checkpoints by one rule into DIR: only what changed, past those that cannot be converted.

    SRC is a file, a pattern in quotes (** for folders at any depth), or a folder; a folder with an index of shards is one checkpoint. The lock in
    DIR says what was made of what: an output is made again when its source, the rule, an option or the output itself changed. --threads and
    --max-memory are for all jobs together. The exit code is the highest of those that single runs would have had.
    """
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api
        from ckptconv.report.batch import BatchItem, converted_line, print_batch, print_failures

        out.files(report, None, [rules, options["config"]])
        later: list[str] = []
        with out.progress(enabled=not no_progress) as progress:

            def told(item: BatchItem) -> None:
                if progress is not None:  # the bar has the terminal
                    later.append(converted_line(item))
                elif not (quiet or as_json):
                    click.echo(converted_line(item))

            found = api.batch(
                sources, rules, destination, set=set_, format=format_, sync=not no_sync, progress=progress, told=told, **options
            )
        for line in later:
            click.echo(line)
        out.write_report(found.to_json())
        if as_json:
            out.json(found.to_json())
        else:
            print_failures(found, out.errors)
            if not quiet:
                print_batch(found, out.console, verbose)
        return found.exit_code

"""``work``, ``finish`` and ``status``: one conversion by many processes, started by whatever starts processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptconv.cli.options import (
    CONTEXT,
    HTML,
    LEVEL_DEFAULT,
    NO_PROGRESS,
    PARITY,
    TALK,
    TARGET,
    THREADS,
    TIMEOUT,
    Levels,
    examples,
    options,
)
from ckptconv.cli.running import Output, guarded

PLAN = click.argument("plan_file", metavar="plan.json", type=click.Path(dir_okay=False, path_type=Path))
ROOTS = click.option(
    "--root", "roots", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="where source and destination may lie, beside plan.json's folder and the current one",
)  # fmt: skip
LEASE = click.option(
    "--lease", type=click.FloatRange(min=0.5), metavar="SECONDS", help="after how long a silent worker counts as dead  [default: 120]"
)
OWN = options(
    THREADS,
    click.option("--force", is_flag=True, help="replace what is at the destination; without it nothing is ever overwritten"),
    click.option("--no-sync", is_flag=True, help="do not wait until the disk has everything (as cp)"),
)


@click.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv work plan.json                       any number of times, anywhere: each takes what is left",
    "ckptconv work plan.json --index 3 --of 8      a share of its own",
    "sbatch --array=0-7 --wrap 'ckptconv work plan.json'    the share that Slurm, Kubernetes or torchrun says",
))  # fmt: skip
@PLAN
@click.option("--index", type=click.IntRange(0), metavar="I", help="which share is this worker's, from 0; else as the launcher says")
@click.option("--of", type=click.IntRange(1), metavar="N", help="how many shares there are")
@click.option("--claim", is_flag=True, default=None, help="take any task that nobody has; with --index, when the share is done")
@click.option("--no-wait", is_flag=True, help="end when every task is done or claimed by someone, and do not wait for them")
@LEASE
@ROOTS
@OWN
@click.option("--max-memory", metavar="SIZE", help="refuse a task that would need more")
@NO_PROGRESS
@TALK
def work(
    plan_file: Path, index: int | None, of: int | None, claim: bool | None, no_wait: bool, lease: float | None, roots: tuple[Path, ...],
    no_sync: bool, no_progress: bool, as_json: bool, quiet: bool, verbose: int, **own: Any,
) -> None:  # fmt: skip
    """Do tasks of a plan that `plan RULES SRC DST --out plan.json` saved, until none is left.

    Any number of workers may run at once, on any machine that sees source and destination. Whoever is killed leaves nothing half-done:
    another takes over. `finish` puts the result in place.
    """
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        with out.progress(enabled=not no_progress) as progress:
            found = api.work(plan_file, index=index, of=of, claim=claim, roots=roots, lease=lease, wait=not no_wait, progress=progress,
                             sync=not no_sync, **own)  # fmt: skip
        if as_json:
            out.json(found.to_json())
        elif not quiet:
            from ckptconv.report.working import print_worked

            print_worked(found, out.console, verbose)


@click.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv finish plan.json",
    "ckptconv finish plan.json --target timm:resnet50 --report report.json",
))  # fmt: skip
@PLAN
@ROOTS
@TARGET
@click.option(
    "--verify", type=Levels(none=True), default=None, show_default=f"as planned, or {LEVEL_DEFAULT}", metavar="LEVEL",
    help="how far to prove the result: 0 to 6, or none",
)  # fmt: skip
@PARITY
@OWN
@TIMEOUT
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="write the report, also of a failure")
@HTML
@NO_PROGRESS
@TALK
def finish(
    plan_file: Path, report: Path | None, html: Path | None, verify: Any, no_sync: bool, no_progress: bool, as_json: bool, quiet: bool,
    verbose: int, **own: Any,
) -> None:  # fmt: skip
    """Verify what all workers did together, and rename it into place. Exit 4, and nothing published, where a task is missing or damaged."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        out.files(report, html, [plan_file])
        if click.get_current_context().get_parameter_source("verify") is click.core.ParameterSource.COMMANDLINE:
            own["verify"] = verify
        with out.progress(enabled=not no_progress) as progress:
            found = api.finish(plan_file, progress=progress, sync=not no_sync, **own)
        out.run_report(found)


@click.command(context_settings=CONTEXT, epilog=examples("ckptconv status plan.json", "ckptconv status plan.json --json"))
@PLAN
@LEASE
@ROOTS
@TALK
def status(plan_file: Path, lease: float | None, roots: tuple[Path, ...], as_json: bool, quiet: bool, verbose: int) -> None:
    """Say how far the work on a plan is: tasks done, claimed, stale and missing, bytes, rate and remaining time."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        found = api.status(plan_file, roots=roots, lease=lease)
        if as_json:
            out.json(found.to_json())
        elif not quiet:
            from ckptconv.report.working import print_status

            print_status(found, out.console, verbose)

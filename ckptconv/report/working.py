"""Work in tasks as text for people: how far it is, and what a worker did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ckptconv.errors import printable
from ckptconv.report.text import nbytes_text
from ckptconv.tasks import numbers_text

if TYPE_CHECKING:
    from ckptconv.stage.working import Status, Worked


def seconds_text(seconds: float) -> str:
    """A time as people say it.

    >>> seconds_text(8.25), seconds_text(100), seconds_text(9000)
    ('8.2 s', '1 min 40 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def print_worked(found: Worked, console: Console, verbose: int = 0) -> None:
    """What one worker did; every task on a line of its own, where more is asked for."""
    for receipt in found.receipts if verbose else ():
        done = f"{receipt.tensors:,} tensors, {nbytes_text(receipt.read_nbytes)} read, {nbytes_text(receipt.written_nbytes)} written"
        console.print(Text(f"  task {receipt.task}: {done}, {receipt.seconds:.2f} s", "dim"))
    nbytes = sum(receipt.written_nbytes for receipt in found.receipts)
    console.print(
        Text(f"{len(found.receipts):,} tasks done here, {nbytes_text(nbytes)} in {seconds_text(found.seconds)}; {found.done:,} of {found.total:,} done by all")
    )  # fmt: skip


def print_status(found: Status, console: Console, verbose: int = 0) -> None:
    """One screen: counts, bytes, time, and what is not as it should be."""
    tasks = found.tasks
    console.print(
        Text.assemble((printable(found.destination), "bold"), f"  {len(tasks.tasks):,} tasks, {nbytes_text(tasks.written_nbytes)}")
    )
    amplification = f"{nbytes_text(tasks.read_nbytes)} of the source are read {tasks.read_amplification:.2f} times in all"
    console.print(Text(f"  reads    {amplification}", "dim"))
    if not found.begun:
        console.print(Text("  nothing is under way, and something stands at the destination" if found.stands else "  not begun"))
        return
    console.print(Text(f"  work     {printable(found.work)}", "dim"))
    share = found.done_nbytes / tasks.written_nbytes if tasks.written_nbytes else 1.0
    console.print(Text.assemble(("  done     ", "green"), f"{len(found.done):,} tasks, {nbytes_text(found.done_nbytes)} ({share:.0%})"))
    for state, style in (("claimed", "cyan"), ("stale", "yellow")):
        claims = {number: claim for number, claim in found.claims.items() if claim.state == state}
        if claims:
            console.print(Text.assemble((f"  {state:<9}", style), f"{len(claims):,} tasks: {numbers_text(claims)}"))
        for number, claim in list(claims.items())[: None if verbose else 0]:
            console.print(
                Text(f"           task {number}: {printable(claim.owner or 'somebody')}, {seconds_text(max(claim.seconds, 0))} ago", "dim")
            )
    if found.missing:
        console.print(Text(f"  missing  {len(found.missing):,} tasks: {numbers_text(found.missing)}"))
    for number, what in list(found.damaged.items())[:10]:
        console.print(Text(f"  damaged  task {number}: {printable(what)}", "bold red"))
    left = found.seconds_left
    if left is not None and found.nbytes_per_second:
        rest = f", {seconds_text(left)} to go" if left else ""
        console.print(Text(f"  rate     {nbytes_text(found.nbytes_per_second)} a second{rest}"))
    if len(found.done) == len(tasks.tasks):
        console.print(Text("  all done: ckptconv finish puts it in place", "bold green"))

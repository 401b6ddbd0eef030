"""What all commands share: where words go, how errors end, and the progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ckptconv.errors import CkptconvError, Problem
    from ckptconv.explain.codes import CodeHelp
    from ckptconv.report.explaining import Explanation, SuggestReport
    from ckptconv.report.model import Difference, Inspection, LockReport, RuleReport, RunReport
    from ckptconv.report.page import Page
    from ckptconv.ruleset.model import RuleFile

Progress = Callable[[str, int, int], None]
PIPE_WIDTH = 160


class Output:
    """Prints reports for people (rich text, plain when piped) or programs (JSON on stdout). Errors go to stderr."""

    def __init__(self, as_json: bool, quiet: bool, verbose: int) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        self.report_file: Path | None = None
        self.html_file: Path | None = None

    def files(self, report: Path | None, html: Path | None, given: Iterable[object]) -> None:
        """Where the report goes too: never over what the command was ``given``."""
        from ckptconv.execute.small_files import refuse_to_overwrite

        others = [str(word) for word in given if word]
        for path in (report, html):
            if path is not None:
                refuse_to_overwrite(path, others)
        self.report_file, self.html_file = report, html

    @cached_property
    def console(self) -> Console:
        return _console(sys.stdout)

    @cached_property
    def errors(self) -> Console:
        return _console(sys.stderr)

    def json(self, data: Any) -> None:
        click.echo(json.dumps(data, ensure_ascii=False, indent=1))

    def run_report(self, report: RunReport, style: str = "text") -> None:
        if self.report_file is not None:
            self.write_report(report.to_json())
        if self.html_file is not None:
            from ckptconv.report.page import page_of_run

            self.write_page(page_of_run(report))
        if style != "text":
            self.annotations([(str(report.destination["path"]), report.ladder.problems)], style)
        elif self.as_json:
            self.json(report.to_json())
        elif not self.quiet:
            from ckptconv.report.text import print_run

            print_run(report, self.console, self.verbose)

    def inspection(self, report: Inspection, *, flat: bool, match: Sequence[str], tree: bool) -> None:
        if self.as_json:
            self.json(report.to_json())
        elif not self.quiet:
            from ckptconv.report.text import print_inspection

            print_inspection(report, self.console, flat=flat, match=match, tree=tree)

    def explanation(self, report: Explanation) -> None:
        if self.html_file is not None:
            from ckptconv.report.explaining_page import page_of_explanation

            self.write_page(page_of_explanation(report))
        if self.as_json:
            self.json(report.to_json())
        elif not self.quiet:
            from ckptconv.report.explaining_text import print_explanation

            print_explanation(report, self.console, self.verbose)

    def suggestion(self, report: SuggestReport) -> None:
        """The report; a rule that was not written to a file goes to stdout, and the report then to stderr."""
        if self.html_file is not None:
            from ckptconv.report.explaining_page import page_of_suggestion

            self.write_page(page_of_suggestion(report))
        if self.as_json:
            self.json(report.to_json())
            return
        bare = bool(report.text) and not report.rule
        if bare:
            click.echo(report.text, nl=False)
        if not self.quiet:
            from ckptconv.report.explaining_text import print_suggestion

            print_suggestion(report, self.errors if bare else self.console, self.verbose)

    def code(self, help_: CodeHelp) -> None:
        if self.as_json:
            self.json(help_.to_json())
        elif not self.quiet:
            from ckptconv.report.explaining_text import print_code

            print_code(help_, self.console)

    def difference(self, report: Difference) -> None:
        if self.html_file is not None:
            from ckptconv.report.page import page_of_difference

            self.write_page(page_of_difference(report))
        if self.as_json:
            self.json(report.to_json())
        elif not self.quiet:
            from ckptconv.report.text import print_difference

            print_difference(report, self.console)

    def annotations(self, found: Sequence[tuple[str, Sequence[Problem]]], style: str) -> None:
        """Problems for continuous integration, on stdout."""
        from ckptconv.report.annotations import github, sarif

        if style == "sarif":
            self.json(sarif(found))
        elif any(problems for _, problems in found):
            click.echo(github(found))

    def checked(self, found: Sequence[tuple[str, tuple[Problem, ...]]], style: str = "text") -> None:
        if style != "text":
            self.annotations(found, style)
            return
        if self.as_json:
            self.json([{"rules": word, "problems": [problem.to_json() for problem in problems]} for word, problems in found])
            return
        from ckptconv.errors import printable
        from ckptconv.report.text import print_problems

        for word, problems in found:
            print_problems(problems, self.errors)
            if not problems and not self.quiet:
                click.echo(f"{printable(word)}: right")

    def tested(self, found: Sequence[RuleReport], style: str = "text") -> None:
        if style != "text":
            self.annotations([(report.rules, report.problems) for report in found], style)
            return
        if self.as_json:
            self.json([report.to_json() for report in found])
            return
        from ckptconv.errors import printable
        from ckptconv.report.text import print_problems

        for report in found:
            print_problems(report.problems, self.errors)
            word = printable(report.rules)
            for name in report.changed:  # what was written is said also to who wants to hear of errors only
                click.echo(f"{word}: the expectation of {printable(name)!r} was rewritten")
            if self.quiet:
                continue
            for sentence in report.todo:
                click.echo(f"{word}: todo: {printable(sentence, 1000)}")
            if self.verbose or not report.problems:
                verdict = f"{report.failed} fail" if report.problems else "all pass"
                click.echo(f"{word}: {report.tests} tests, {verdict}{f' but {len(report.todo)} todo' if report.todo else ''}")

    def locked(self, report: LockReport) -> None:
        if self.as_json:
            self.json(report.to_json())
            return
        from ckptconv.errors import printable
        from ckptconv.report.text import print_problems

        print_problems(report.problems, self.errors)
        if not report.problems and not self.quiet:
            click.echo(f"{printable(report.path)}: {report.rules} rules {'locked' if report.written else 'as they are locked'}")

    def rules(self, found: Sequence[RuleFile]) -> None:
        if self.as_json:
            self.json([{"name": each.header.name, "revision": each.header.revision, "summary": each.header.summary} for each in found])
            return
        width = max(len(each.label) for each in found)
        for each in found:
            click.echo(f"{each.label:<{width}}  {each.header.summary}")

    def write_report(self, data: Any) -> None:
        """``--report FILE``: replaced as a whole, like everything that is written."""
        if self.report_file is None:
            return
        from ckptconv.execute.small_files import write_text

        # Once: that a report cannot be written is not tried to be reported in it.
        path, self.report_file = self.report_file, None
        write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n", force=True)

    def write_page(self, page: Page) -> None:
        """``--html FILE``: likewise."""
        from ckptconv.execute.small_files import write_text
        from ckptconv.report.html import render

        assert self.html_file is not None, "who makes a page asks first"
        path, self.html_file = self.html_file, None
        write_text(path, render(page), force=True)

    def failure(self, error: CkptconvError) -> None:
        data: dict[str, Any] = {
            "ckptconv_error": 1, "exit_code": error.exit_code, "problems": [problem.to_json() for problem in error.problems],
        }  # fmt: skip
        if error.verification is not None:
            data["verification"] = dict(error.verification)
        if self.as_json:
            self.json(data)
        else:
            from ckptconv.report.text import print_problems

            print_problems(error.problems, self.errors)
        self.write_report(data)
        if self.html_file is not None:
            from ckptconv.report.page import page_of_failure

            self.write_page(page_of_failure(click.get_current_context().info_name or "", error))

    @contextmanager
    def progress(self, *, enabled: bool) -> Iterator[Progress | None]:
        """A bar on the terminal in bytes, with rate and remaining time; nothing where nobody watches."""
        if not enabled or self.quiet or self.as_json or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.errors, transient=True) as bar:
            task = bar.add_task("planning", total=None)

            def tell(stage: str, done: int, total: int) -> None:
                bar.update(task, description=stage, completed=done, total=total)

            yield tell


def _console(stream: Any) -> Console:
    from rich.console import Console

    # A pipe has no width: lines stay whole, so that grep and diff work on them. NO_COLOR (no-color.org) means bold and dim too.
    return Console(
        file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH, soft_wrap=not stream.isatty(),
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )  # fmt: skip


@contextmanager
def guarded(out: Output) -> Iterator[None]:
    """Ends a command with the exit code of what went wrong, every problem printed; a traceback only for a fault of our own."""
    from ckptconv.cli.streams import WordsLost
    from ckptconv.errors import CkptconvError, Refusal, UsageError

    try:
        try:
            yield
        except Refusal as refusal:  # of a word of the command itself: a pattern, say
            raise UsageError(refusal.at("")) from None
    except WordsLost as error:  # there is nowhere left to print JSON to
        from ckptconv.report.text import print_problems

        print_problems(error.problems, out.errors)
        raise click.exceptions.Exit(error.exit_code) from None
    except CkptconvError as error:
        try:
            out.failure(error)
        except CkptconvError as second:  # the report could not be written either: say so, and keep the first reason's code
            from ckptconv.report.text import print_problems

            if second.problems != error.problems:
                print_problems(second.problems, out.errors)
        raise click.exceptions.Exit(error.exit_code) from None

"""The command line: parse, call one function, print, exit code. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ckptconv._version import __version__
from ckptconv.cli.batching import batch
from ckptconv.cli.explaining import explain, suggest
from ckptconv.cli.options import (
    ANNOTATIONS,
    CONTEXT,
    CONVERSION,
    ENGINE,
    HTML,
    LEVEL_DEFAULT,
    NO_PROGRESS,
    OPTIMIZER,
    PARITY,
    PLACES,
    SELECT,
    TALK,
    TARGET,
    THREADS,
    TIMEOUT,
    VERIFY,
    Levels,
    RulesWord,
    examples,
)
from ckptconv.cli.running import Output, guarded
from ckptconv.cli.working import finish, status, work


@click.group(context_settings=CONTEXT, epilog=examples(
    "ckptconv inspect in.pth                                what is in the file?",
    "ckptconv run dataparallel in.pth out.pth               convert, verify, write",
    "ckptconv plan rules/mine.yaml in.pth --target timm:resnet50",
    "ckptconv completion bash >> ~/.bash_completion",
))  # fmt: skip
@click.version_option(__version__, prog_name="ckptconv", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert PyTorch checkpoints by rule files, make them load, and prove it.

    Exit codes: 0 done, 1 findings, 2 usage or rule file, 3 input refused, 4 does not fit or not verified, 5 output or resources.
    """


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv run dataparallel in.pth out.pth",
    "ckptconv run rules/mine.yaml last.ckpt model.safetensors --target timm:resnet50 --select model_ema",
    "ckptconv run timm-vit-to-hf-vit vit/ out/ --set H=12 --shard-size 2GB",
    "ckptconv run --plan plan.json in.pth out.pth",
    "ckptconv run rules/mine.yaml in.pth out.pth --target timm:resnet50 --parity source=py:old:model",
))  # fmt: skip
@click.argument("arguments", nargs=-1, required=True, metavar="RULES SRC DST", type=RulesWord())
@CONVERSION
@click.option(
    "--plan", "plan_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="run a saved plan in place of RULES"
)
@VERIFY
@PARITY
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="write the report, also of a failure")
@HTML
@click.option("--dry-run", is_flag=True, help="as `plan`: nothing is written")
@ENGINE
@click.option("--resume", is_flag=True, help="go on with what an interrupted run with --resume did; begin so, if there is none")
@click.option("--no-sync", is_flag=True, help="do not wait until the disk has everything (as cp)")
@NO_PROGRESS
@PLACES
@TALK
def run(arguments: tuple[str, ...], set_: tuple[str, ...], format_: str | None, plan_file: Path | None, report: Path | None,
        html: Path | None, dry_run: bool, no_sync: bool, no_progress: bool, as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:  # fmt: skip
    """Convert SRC by RULES, verify the result, and write it to DST.

    RULES is a rule file or the name of a built-in rule; SRC a checkpoint file or folder. DST is written completely and verified, or not
    at all.
    """
    wanted = 2 if plan_file is not None else 3
    if len(arguments) != wanted:
        names = "SRC DST" if plan_file is not None else "RULES SRC DST"
        raise click.UsageError(f"want {names}, found {len(arguments)} arguments")
    rules = None if plan_file is not None else arguments[0]
    source, destination = arguments[-2:]
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        given = [rules, source, plan_file, options["config"], *(word.partition("=")[2] for word in options["also"])]
        out.files(report, html, [*given, None if os.path.isdir(destination) else destination])
        settings = {**options, "set": set_, "format": format_}
        if dry_run:
            for word in ("verify", "resume", "engine", "ray_address"):
                del settings[word]
            out.run_report(api.plan(rules, source, destination, plan_file=plan_file, **settings))
        else:
            with out.progress(enabled=not no_progress) as progress:
                found = api.run(rules, source, destination, plan_file=plan_file, progress=progress, sync=not no_sync, **settings)
            out.run_report(found)


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv plan dataparallel in.pth",
    "ckptconv plan rules/mine.yaml in/ out/ --target hf:in --out plan.json",
    "ckptconv plan rules/mine.yaml in/ out/ --out plan.json --task-size 2GB     for `ckptconv work`",
))  # fmt: skip
@click.argument("rules", metavar="RULES", type=RulesWord())
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("destination", metavar="[DST]", required=False, type=click.Path())
@CONVERSION
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="plan.json",
    help="save the plan for `run --plan`; with DST for `work`",
)
@click.option(
    "--verify",
    type=Levels(none=True),
    default="auto",
    show_default=LEVEL_DEFAULT,
    metavar="LEVEL",
    help="how far `finish` proves the result",
)
@click.option(
    "--workers", type=click.IntRange(1, 100_000), metavar="N", help="say what it costs on so many machines: bytes, requests, seconds"
)
@click.option(
    "--store", type=click.Choice(["disk", "nfs", "s3"]), default="disk", show_default=True,
    help="with --workers: where source and destination lie",
)  # fmt: skip
@HTML
@PLACES
@TALK
def plan(rules: str, source: str, destination: str | None, set_: tuple[str, ...], format_: str | None, out: Path | None,
         html: Path | None, as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:  # fmt: skip
    """Say what a run would do: names, shapes, lineage, bytes, peak memory. Reads headers only; nothing is written."""
    output = Output(as_json, quiet, verbose)
    with guarded(output):
        from ckptconv import api

        output.files(None, html, [rules, source, out, options["config"]])
        output.run_report(api.plan(rules, source, destination, out=out, set=set_, format=format_, **options))


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv inspect last.ckpt",
    "ckptconv inspect model/ --match '**.attn.{p}.weight'",
    "ckptconv inspect in.pth --save-manifest in.json",
))  # fmt: skip
@click.argument("source", metavar="SRC", type=click.Path())
@click.option("--match", multiple=True, metavar="PATTERN", help="only names that match, one a line")
@click.option("--flat", is_flag=True, help="every name on a line of its own")
@click.option("--tree", is_flag=True, help="modules as a tree")
@click.option(
    "--save-manifest",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="names, shapes, dtypes and ties, for --target and diff",
)
@click.option("--force", is_flag=True, help="replace FILE.json")
@SELECT
@PLACES
@TALK
def inspect(source: str, match: tuple[str, ...], flat: bool, tree: bool, save_manifest: Path | None, force: bool, select: tuple[str, ...],
            as_json: bool, quiet: bool, verbose: int) -> None:  # fmt: skip
    """Show what a checkpoint holds: every state_dict in it, names, shapes, dtypes, sizes. Reads headers only."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        if save_manifest is not None:
            api.save_manifest(source, save_manifest, select=select, force=force)
        out.inspection(api.inspect(source, select=select), flat=flat, match=match, tree=tree)


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv diff old.pth new.safetensors",
    "ckptconv diff in.pth timm:resnet50",
))  # fmt: skip
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@SELECT
@TIMEOUT
@HTML
@PLACES
@TALK
def diff(
    left: str, right: str, select: tuple[str, ...], timeout: float, html: Path | None, as_json: bool, quiet: bool, verbose: int
) -> int:
    """Compare names, shapes, dtypes and ties of A and B (checkpoint, target or saved manifest). Exit 1 when they differ."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        out.files(None, html, [left, right])
        report = api.diff(left, right, select=select, timeout=timeout)
        out.difference(report)
        return 0 if report.equal else 1


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv verify out.pth --target timm:resnet50",
    "ckptconv verify out.pth --against in.pth",
    "ckptconv verify out.pth --against in.pth --rules rules/mine.yaml",
    "ckptconv verify out.pth --target timm:resnet50 --parity golden=expected.pt",
))  # fmt: skip
@click.argument("destination", metavar="DST", type=click.Path())
@TARGET
@click.option("--against", type=click.Path(), metavar="SRC", help="the checkpoint that DST was made from")
@click.option("--rules", type=RulesWord(), metavar="RULES", help="the rules that it was made by; else those it recorded")
@click.option(
    "--level", type=Levels(none=False), default="auto", show_default=LEVEL_DEFAULT, metavar="LEVEL", help="how far to climb: 0 to 6"
)
@PARITY
@OPTIMIZER
@click.option("--also", multiple=True, metavar="NAME=PATH", help="a further source that DST was made from")
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="a variable of the rule file")
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="the model's config.json; else the one beside SRC"
)
@SELECT
@THREADS
@TIMEOUT
@ANNOTATIONS
@HTML
@NO_PROGRESS
@PLACES
@TALK
def verify(
    destination: str, target: str | None, set_: tuple[str, ...], style: str, html: Path | None, no_progress: bool, as_json: bool, quiet: bool,
    verbose: int, **options: Any,
) -> int:  # fmt: skip
    """Prove a checkpoint that is already there: against a target, and against the source that it was made from."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import api

        out.files(None, html, [destination, options["against"], options["rules"], options["config"]])
        with out.progress(enabled=not no_progress) as progress:
            report = api.verify(destination, target_word=target, set=set_, progress=progress, **options)
        out.run_report(report, style)
        return 4 if report.ladder.failed else 0


@cli.command(
    context_settings=CONTEXT, epilog=examples("ckptconv check rules/mine.yaml", "ckptconv check rules/", "ckptconv check dataparallel")
)
@click.argument("rules", metavar="RULES...", nargs=-1, required=True, type=RulesWord())
@ANNOTATIONS
@TALK
def check(rules: tuple[str, ...], style: str, as_json: bool, quiet: bool, verbose: int) -> int:
    """Validate rule files (or folders of them, or built-in names): all problems with file, line and column. Exit 1 when there are any."""
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import rulefiles

        found = rulefiles.check([*_expanded(rules)])
        out.checked(found, style)
        return 1 if any(problems for _, problems in found) else 0


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv test rules/",
    "ckptconv test dataparallel",
    "ckptconv test rules/mine.yaml --update",
))  # fmt: skip
@click.argument("rules", metavar="[RULES]...", nargs=-1, type=RulesWord())
@click.option("--update", is_flag=True, help="rewrite the expect of failing tests to what the rule makes; comments and all else stay")
@ANNOTATIONS
@TALK
def test(rules: tuple[str, ...], update: bool, style: str, as_json: bool, quiet: bool, verbose: int) -> int:
    """Run the tests of rule files (all built-in rules, where none is named). Names and shapes only: no weights, no torch.

    Tests stand in the rule file under `tests:`, or beside it in NAME.test.yaml. Exit 1 when one fails, or a rule has none.
    """
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import rulefiles

        found = rulefiles.rule_tests([*_expanded(rules)] if rules else None, update=update)
        out.tested(found, style)
        return 1 if any(report.problems for report in found) else 0


def _expanded(words: Iterable[str]) -> Iterable[str]:
    for word in words:
        folder = Path(word)
        files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
        yield from map(str, files) if files else [word]


@cli.command(context_settings=CONTEXT, epilog=examples(
    "ckptconv invert timm-vit-to-hf-vit --like vit.pth -o hf-vit-to-timm-vit.yaml",
    "ckptconv invert rules/mine.yaml --like in.json --lossy",
))  # fmt: skip
@click.argument("rules_word", metavar="RULES", type=RulesWord())
@click.option("--like", required=True, metavar="SRC", help="a checkpoint, manifest or target with the names that RULES start from")
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.yaml", help="write it there; else it is printed"
)
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="a variable of the rule file")
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="the model's config.json; else the one beside SRC"
)
@click.option("--lossy", is_flag=True, help="leave out what cannot come back")
@click.option("--force", is_flag=True, help="replace FILE.yaml")
@SELECT
@PLACES
@TIMEOUT
def invert(rules_word: str, like: str, out: Path | None, set_: tuple[str, ...], **options: Any) -> None:
    """Write the rule file that undoes RULES. It is proved on SRC's names before it is written; what cannot come back is listed by step."""
    with guarded(Output(as_json=False, quiet=False, verbose=0)):
        from ckptconv import api
        from ckptconv.errors import printable

        back = api.invert(rules_word, like, out, set=set_, **options)
        click.echo(
            back.text if out is None else f"{out}: written, {'step by step' if back.way == 'steps' else 'from the plan'}",
            nl=out is not None,
        )
        for step, names, reason in back.lost:
            click.echo(f"does not come back: {printable(names)}: {reason}  ({step})", err=True)


@cli.group(context_settings=CONTEXT)
def rules() -> None:
    """The rules that come with ckptconv."""


@rules.command("list", context_settings=CONTEXT, epilog=examples("ckptconv rules list"))
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def rules_list(as_json: bool) -> None:
    """Name every built-in rule, with what it does."""
    out = Output(as_json, quiet=False, verbose=0)
    with guarded(out):
        from ckptconv.ruleset.builtin import find, names

        out.rules([find(name) for name in names()])


@rules.command("show", context_settings=CONTEXT, epilog=examples("ckptconv rules show dataparallel > rules/mine.yaml"))
@click.argument("name", type=RulesWord())
def rules_show(name: str) -> None:
    """Print a built-in rule file, to read or to start your own from."""
    with guarded(Output(as_json=False, quiet=False, verbose=0)):
        from ckptconv.ruleset.builtin import find, folder

        found = find(name)
        path = folder() / found.file.removeprefix("rules/") if found.builtin else Path(name)
        click.echo(path.read_text(encoding="utf-8"), nl=False)


@rules.command("import", context_settings=CONTEXT, epilog=examples(
    "ckptconv rules import transformers:mixtral -o rules/mixtral.yaml",
    "ckptconv rules import transformers:qwen2_moe --prove",
))  # fmt: skip
@click.argument("word", metavar="transformers:MODEL_TYPE")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.yaml", help="write it there")
@click.option("--prove", is_flag=True, help="run it on the model's own key set, there and back, before it is written")
@click.option("--force", is_flag=True, help="replace FILE.yaml")
def rules_import(word: str, out: Path | None, prove: bool, force: bool) -> None:
    """Turn the installed transformers' mapping from published checkpoints into a rule file."""
    with guarded(Output(as_json=False, quiet=False, verbose=0)):
        from ckptconv import rulefiles

        text = rulefiles.import_rule(word, out, prove=prove, force=force)
        click.echo(text if out is None else f"{out}: written{', proved' if prove else ''}", nl=out is not None)


@rules.command("lock", context_settings=CONTEXT, epilog=examples("ckptconv rules lock", "ckptconv rules lock rules/ --check"))
@click.argument("folder", required=False, type=click.Path(file_okay=False, exists=True))
@click.option("--check", "only_check", is_flag=True, help="write nothing; exit 1 when a rule and the lock do not agree")
@TALK
def rules_lock(folder: str | None, only_check: bool, as_json: bool, quiet: bool, verbose: int) -> int:
    """Record what every revision of every rule means, in LOCK.json beside the rules (the built-in ones, where no FOLDER is named).

    A rule whose meaning changed must have a higher revision: outputs record NAME@REVISION, and that must never mean something else.
    """
    out = Output(as_json, quiet, verbose)
    with guarded(out):
        from ckptconv import rulefiles

        report = rulefiles.lock_rules(folder, check=only_check)
        out.locked(report)
        return 1 if report.problems else 0


@cli.command(context_settings=CONTEXT, epilog=examples("ckptconv schema > rule-v1.schema.json"))
def schema() -> None:
    """Print the JSON Schema of rule files, for completion and checking in editors."""
    from ckptconv.ruleset.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False, sort_keys=True))


@cli.command(
    context_settings=CONTEXT,
    epilog=examples(
        "ckptconv completion bash >> ~/.bash_completion", "ckptconv completion fish > ~/.config/fish/completions/ckptconv.fish"
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes ckptconv's commands, options and rule names."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "the choices are click's own"
    click.echo(kind(cli, {}, "ckptconv", "_CKPTCONV_COMPLETE").source())


cli.add_command(batch)
cli.add_command(explain)
cli.add_command(suggest)
cli.add_command(work)
cli.add_command(finish)
cli.add_command(status)


def main() -> int:
    """The command's exit code."""
    return int(cli(standalone_mode=False) or 0)


if __name__ == "__main__":
    sys.exit(main())

"""What several commands share: options, the types of their values, and the examples at the end of a help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def rule_names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Built-in rules that begin so."""
    from ckptconv.ruleset.builtin import names

    return [name for name in names() if name.startswith(incomplete)]


class RulesWord(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A rule file's path or a built-in name; completes both."""

    name = "rules"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name) for name in rule_names(ctx, param, incomplete)]
        return names or [CompletionItem(incomplete, type="file")]


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(each):
            function = option(function)
        return function

    return decorate


TALK = options(
    click.option("--json", "as_json", is_flag=True, help="print the report as JSON"),
    click.option("-q", "--quiet", is_flag=True, help="print errors only"),
    click.option("-v", "--verbose", count=True, help="say more: every change, every note, where each comes from"),
)
ANNOTATIONS = click.option(
    "--format", "style", type=click.Choice(["text", "github", "sarif"]), default="text", show_default=True,
    help="github: workflow annotations; sarif: a SARIF 2.1.0 log",
)  # fmt: skip
TARGET = click.option(
    "--target",
    metavar="T",
    help="what the result must load into: py:module:factory, timm:NAME, hf:FOLDER, a checkpoint or a saved manifest",
)
SELECT = click.option(
    "--select", multiple=True, metavar="NAME", help="which state_dict of the file (state_dict, model_ema, …); the first that exists"
)
TIMEOUT = click.option(
    "--timeout", type=float, default=300.0, show_default=True, metavar="SECONDS", help="for building the target, and for comparing outputs"
)
THREADS = click.option(
    "--threads", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N", help="workers that copy and compute"
)
OPTIMIZER = options(
    click.option("--optimizer", metavar="follow|drop|PATH", help="the optimizer's state: its moments go through RULES too (follow; PATH: the one there, of "
                 "several), or it is left out (drop); keeps the other extras"),
    click.option("--optimizer-file", type=click.Path(dir_okay=False), metavar="FILE",
                 help="with --optimizer follow: the state is in a file of its own, and becomes optimizer.pt in the folder DST"),
    click.option("--source-model", metavar="T", help="with --optimizer: the model that was trained, as a target; tells which parameters the state means"),
)  # fmt: skip
CONVERSION = options(
    TARGET,
    click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="a variable of the rule file"),
    click.option(
        "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="the model's config.json; else the one beside SRC"
    ),
    SELECT,
    click.option(
        "--format",
        "format_",
        type=click.Choice(["torch", "safetensors", "dcp"]),
        help="of the output (dcp: a torch.distributed.checkpoint folder); else by DST's suffix, else as SRC",
    ),
    click.option("--shard-size", metavar="SIZE", help="largest file of a folder output  [default: 5GB]"),
    click.option(
        "--also", multiple=True, metavar="NAME=PATH", help="a further source; rules call its tensors NAME::tensor (adapter=lora/)"
    ),
    click.option(
        "--keep-extras", is_flag=True, help="keep a training checkpoint's other entries (epoch, optimizer, …); .pth and dcp output only"
    ),
    OPTIMIZER,
    click.option("--untie", is_flag=True, help="write tied weights as separate tensors"),
    click.option("--reverse", is_flag=True, help="run the rules backwards: SRC is what they make, DST what they start from"),
    click.option("--like", metavar="OLD", help="with --reverse: a checkpoint, manifest or target with the names that DST must have"),
    click.option("--lossy", is_flag=True, help="with --reverse: leave out what cannot come back"),
    click.option("--force", is_flag=True, help="replace what is at DST; without it nothing is ever overwritten"),
    THREADS,
    click.option("--task-size", metavar="SIZE", help="of a conversion in tasks (`work`, --resume): bytes of one  [default: 1GB]"),
    click.option("--max-memory", metavar="SIZE", help="refuse a conversion that would need more"),
    click.option("--max-output", metavar="SIZE", help="refuse an output that would be larger"),
    click.option("--forbid-nonfinite", is_flag=True, help="refuse an output with a NaN or an infinity in it"),
    click.option("--allow-code", is_flag=True, help="let the rule file's target be py:module:factory, which runs code of yours"),
    TIMEOUT,
)


def _place(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """What takes an option on remote places: it holds for the whole command, and no function has to pass it on."""

    def take(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        if value is not None and value is not False:
            from ckptconv.places.settings import using

            if name == "scratch_size":
                from ckptconv.errors import UsageError
                from ckptconv.layout import parse_size

                try:
                    value = parse_size(value)
                except UsageError as error:
                    raise click.BadParameter(error.problems[0].what) from None
            context.with_resource(using(**{name: value}))
        return value

    return take


PLACES = options(
    click.option("--online", is_flag=True, expose_value=False, callback=_place("online"),
                 help="hf://OWNER/REPO: fetch from the hub what the cache does not hold"),
    click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), expose_value=False, callback=_place("scratch"), metavar="DIR",
                 help="where bytes from and for URLs are on their way  [default: TMPDIR]"),
    click.option("--scratch-size", expose_value=False, callback=_place("scratch_size"), metavar="SIZE",
                 help="how much of a URL's bytes to hold there  [default: 16 GB, at most half of what is free]"),
)  # fmt: skip
NO_PROGRESS = click.option("--no-progress", is_flag=True, help="no progress bar")
HTML = click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html", help="draw the report as one page, also of a failure"
)
PARITY = click.option(
    "--parity",
    multiple=True,
    metavar="NAME=VALUE",
    help="run the models and compare: source=py:module:factory (what SRC is for) or golden=FILE, inputs=FILE, tolerance=NUMBER",
)
LEVEL_DEFAULT = "3; 5 with --parity"


class Levels(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """How far to verify: 0 to 6 (also L0 to L6), auto, or (where a run may go unverified) none."""

    name = "level"

    def __init__(self, *, none: bool) -> None:
        self.none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | None:
        text = str(value).upper().removeprefix("L")
        if text == "NONE" and self.none:
            return None
        if text == "AUTO":
            return "auto"
        if text not in tuple("0123456"):
            self.fail(f"want 0 to 6{' or none' if self.none else ''}", param, ctx)
        return int(text)


VERIFY = click.option(
    "--verify",
    type=Levels(none=True),
    default="auto",
    show_default=LEVEL_DEFAULT,
    metavar="LEVEL",
    help="how far to prove the result: 0 integrity, 1 accounting, 2 strict load, 3 values, 4 round trip, 5 equal outputs, "
    "6 first module that differs; none",
)
ENGINE = options(
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="what does the work: threads and processes of this machine, or the tasks of a Ray cluster",
    ),
    click.option(
        "--ray-address", metavar="A", help="a cluster that runs (auto: this machine's); else one is begun here for the time of the run"
    ),
)

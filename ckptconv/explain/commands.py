"""What to type: a verdict, a tried rule or a cause as lines that can be copied."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from msgspec.structs import replace

from ckptconv.explain import judging
from ckptconv.explain.contents import is_average
from ckptconv.explain.judging import Verdict
from ckptconv.explain.sides import Cause, Part
from ckptconv.explain.trying import Question, Tried
from ckptconv.ruleset.model import RuleFile


def commands(verdict: Verdict, part: Part, question: Question, source: str, target: str) -> tuple[str, ...]:
    """What does it, or proves it; nothing where nothing can."""
    where = f" --target {shlex.quote(target)}" if target else ""
    select = f" --select {shlex.quote(part.path)}" if len(question.parts) > 1 else ""
    if verdict.word == judging.LOADS:
        return (f"ckptconv verify {shlex.quote(source)}{where}{select}",) if target else ()
    if verdict.rule is not None:
        return tuple(run_of(verdict.rule, source, where, question.paths).split("\n"))
    if verdict.suggested:
        return (
            f"ckptconv suggest {shlex.quote(source)}{where or ' --target T'}{select} -o rules/mine.yaml",
            f"ckptconv run rules/mine.yaml {shlex.quote(source)} {output_of(source)}{where}{select}",
        )  # fmt: skip
    return ()


def run_of(tried: Tried, source: str, where: str, paths: Sequence[str]) -> str:
    """The command, or one for each rule, that does what was tried."""
    lines = []
    at = source
    for count, rule in enumerate(tried.rules):
        last = count == len(tried.rules) - 1
        out = output_of(source) if last else f"step{count + 1}.safetensors"
        select = f" --select {shlex.quote(tried.part.path)}" if not count and _needs_select(rule, tried.part, paths) else ""
        # Variables are those of the first rule: a second one is only tried with none of its own.
        variables = "" if count else "".join(f" --set {shlex.quote(f'{name}={value}')}" for name, value in tried.set.items())
        config = " --config config.json" if tried.waits else ""
        lines.append(f"ckptconv run {rule.header.name} {shlex.quote(at)} {out}{where if last else ''}{select}{variables}{config}")
        at = out
    return "\n".join(lines)


def _needs_select(rule: RuleFile, part: Part, paths: Sequence[str]) -> bool:
    """Whether the rule would choose another state_dict of the file, or none, by itself."""
    select = rule.header.select
    chosen = (
        next((path for path in select if path in paths), "") if select else "." if "." in paths else paths[0] if len(paths) == 1 else ""
    )
    return chosen != part.path


def output_of(source: str) -> str:
    """A name for the result: never the source's own."""
    name = source.rstrip("/").rpartition("/")[2]
    return "out.safetensors" if name.endswith(".safetensors") else "out.pth"


def of_other_copy(tried: Sequence[Tried], part: Part, source: str, target: str, paths: Sequence[str]) -> tuple[str, ...]:
    """The command for the other copy of the weights, where the file has an averaged one that fits too."""
    where = f" --target {shlex.quote(target)}" if target else ""
    other = next(
        (each for each in tried if each.fits and each.part.path != part.path and is_average(each.part.path) != is_average(part.path)), None
    )
    if other is None:
        return ()
    return (
        f"{run_of(other, source, where, paths)}   # {'the averaged weights (EMA)' if is_average(other.part.path) else 'the raw weights'}",
    )


def with_words(causes: Sequence[Cause], source: str) -> list[Cause]:
    """Causes with the user's file in the commands that they propose."""
    mine = {"SRC": shlex.quote(source), "DST": output_of(source)}
    return [replace(cause, try_=re.sub(r"\b(?:SRC|DST)\b", lambda match: mine[match[0]], cause.try_)) for cause in causes]

"""What an output's own metadata tells of how it was made, and the rules that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from ckptconv.errors import CkptconvError, Problem, UsageError, printable
from ckptconv.ruleset.builtin import named
from ckptconv.ruleset.model import RuleFile

OURS = "ckptconv."


def recorded(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that ckptconv wrote (``ckptconv.rules``, ``ckptconv.rules_digest``, …), without the room that was kept for them.

    >>> recorded({"format": "pt", "ckptconv.rules": "ddp@1  "})
    {'ckptconv.rules': 'ddp@1'}
    """
    return {key: value.strip() for key, value in metadata.items() if key.startswith(OURS)}


def rules_of(metadata: Mapping[str, str], written: Path) -> RuleFile:
    """The built-in rule that ``written`` was made by, in the very revision and meaning that it recorded.

    Raises :class:`~ckptconv.errors.UsageError`: CK107 where nothing is recorded, CK105 where the rule is not built in, or means
    something else by now.
    """
    about = recorded(metadata)
    label = about.get(OURS + "rules", "")
    where = printable(written)
    if not label:
        raise UsageError(Problem("CK107", "the file does not say by which rules it was made", where=where, try_="--rules RULES"))
    try:
        rules = named(label)
    except CkptconvError as error:
        raise UsageError([replace(problem, where=where, try_="--rules RULES") for problem in error.problems]) from None
    if about.get(OURS + "rules_digest") != f"sha256:{rules.digest}":
        raise UsageError(
            Problem("CK105", f"it was made by {printable(label)} with another meaning than {rules.label} has here", where=where,
                    try_="--rules RULES, with the file that it was made by")
        )  # fmt: skip
    return rules


def differing_rules(metadata: Mapping[str, str], rules: RuleFile) -> tuple[str, ...]:
    """A sentence where the file recorded other rules than ``rules``; nothing where they are the same, or nothing is recorded."""
    about = recorded(metadata)
    label, digest = about.get(OURS + "rules"), about.get(OURS + "rules_digest")
    if label is None or (label == rules.label and digest == f"sha256:{rules.digest}"):
        return ()
    if label == rules.label:
        return (f"the file was made by {printable(label)} with another meaning than the one it is compared by",)
    return (f"the file was made by {printable(label)}, and is compared by {rules.label}",)

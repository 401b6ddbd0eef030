"""A rule suggested for a file and a target: opened, asked for, tried without writing the output, and settled by values or by running the models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct

from ckptconv import target
from ckptconv.errors import CkptconvError, Problem, UsageError, printable
from ckptconv.execute.digest import digest_tensors
from ckptconv.execute.sources import Sources
from ckptconv.names import collapse, nearest
from ckptconv.ruleset import model as ruleset
from ckptconv.ruleset.model import RuleFile
from ckptconv.spec import Manifest
from ckptconv.stage.opening import Source, open_source
from ckptconv.suggest import Suggestion, suggest
from ckptconv.verify import Ladder
from ckptconv.verify.values import multiset_checksum

#: A larger output is not written only to be verified and thrown away.
MAX_TRIAL = 4 << 30
#: Runs of the models that settle what shapes cannot.
MAX_RUNS = 12
#: Writes the output of a rule to a path and verifies it; raises what is wrong with it.
Trial = Callable[[RuleFile, Path], Ladder]


class Asked(Struct, frozen=True):
    """A source and a target, and how to ask for a rule between them."""

    source: Source
    wanted: Manifest
    name: str  #: of the rule
    pairs: tuple[tuple[str, str], ...] = ()
    values: Mapping[str, Mapping[str, str]] | None = None  #: fingerprints of both sides, where the target is a file with the same weights

    @property
    def here(self) -> Manifest:
        return self.source.container.manifest

    def suggestion(self, *more: tuple[str, str]) -> Suggestion:
        """The suggestion, with further pairs taken as given."""
        return suggest(self.here, self.wanted, name=self.name, hints=(*self.pairs, *more), values=self.values)


def asked(source: Path, target_word: str, out: Path | None, pairs: Sequence[str], select: Sequence[str], timeout: float) -> Asked:
    """Both sides opened and the words checked. Raises as :func:`~ckptconv.stage.opening.open_source` does, and CK107 for a malformed pair."""
    opened = open_source(source, select)
    wish = target.parse(target_word, origin="command line")
    wanted = target.manifest_of(wish, timeout=timeout)
    hints = tuple(_pair(pair, opened.container.manifest, wanted) for pair in pairs)
    same = values_of_both(opened, open_source(wish.path)) if wish.kind == "checkpoint" else None
    return Asked(opened, wanted, _rule_name(out), hints, same)


def _rule_name(out: Path | None) -> str:
    if out is None or str(out) == "-":
        return "suggested"
    stem = out.stem
    try:
        ruleset.Header.validated({"version": 1, "name": stem, "summary": "s"})
    except ValueError:
        better = "-".join("".join(ch if ch.isascii() and ch.isalnum() else " " for ch in stem.lower()).split()) or "mine"
        raise UsageError(
            Problem(
                "CK107",
                "a rule is called as its file, in small letters, digits and hyphens",
                where=printable(out),
                try_=f"-o {better}.yaml",
            )
        ) from None
    return stem


def _pair(text: str, source: Manifest, wanted: Manifest) -> tuple[str, str]:
    """``reduce=conv1``: parts of names, or whole names, of source and target. Both have to occur."""
    one, equals, other = text.partition("=")
    if not equals or not one or not other:
        raise UsageError(Problem("CK107", f"--pair {printable(text)}: want SOURCE=TARGET, parts of names", try_="--pair reduce=conv1"))
    for part, manifest, side in ((one, source, "source"), (other, wanted, "target")):
        if not any(f".{part}." in f".{name}." for name in manifest):
            words = {word for name in manifest for word in name.split(".") if not word.isdigit()}
            close = nearest(part, words)
            raise UsageError(
                Problem("CK107", f"--pair {printable(text)}: no name of the {side} has {printable(part)} in it",
                        found="" if close else ", ".join(printable(each) for each in collapse(list(manifest))[:4]),
                        try_=f"did you mean {printable(close)}?" if close else "ckptconv inspect SRC --tree")
            )  # fmt: skip
    return one, other


def rule_of_text(text: str, name: str) -> RuleFile:
    """The rule file of a suggestion."""
    return ruleset.parse(text.encode(), f"{name}.yaml", stem=name)


def selecting(text: str, source: Source) -> str:
    """The rule with the state_dict that it is for, where the file holds several."""
    if len(source.contents.containers) < 2:
        return text
    head, mark, tail = text.partition("steps:\n")
    return f"{head}select: [{json.dumps(source.container.path)}]\n{mark}{tail}"


def tried(rule: RuleFile, trial: Trial, kind: str, nbytes: int) -> Ladder | None:
    """What a trial in a temporary place gives; None where the output is too large for one."""
    if nbytes > MAX_TRIAL:
        return None
    with TemporaryDirectory(prefix="ckptconv-") as folder:
        return trial(rule, Path(folder) / f"out.{'safetensors' if kind == 'safetensors' else 'pth'}")


def settled_by_running(ask: Asked, first: Suggestion, trial: Trial, kind: str, nbytes: int) -> tuple[Suggestion, Ladder | None, int] | None:
    """The first suggestion whose output the models confirm, what the trial gave, and how many were run; None where none is.

    Alternatives of each ambiguous template are tried one after another, a bounded number of them.
    """
    runs = 0
    for more in [(), *_alternatives(first)]:
        if runs >= MAX_RUNS:
            return None
        found = ask.suggestion(*more) if more else first
        if not found.text or (more and found.text == first.text):
            continue
        runs += 1
        try:
            return found, tried(rule_of_text(found.text, ask.name), trial, kind, nbytes), runs
        except CkptconvError as error:
            if not all(problem.code == "CK412" for problem in error.problems):
                raise
    return None


def _alternatives(found: Suggestion) -> list[tuple[tuple[str, str], ...]]:
    """Pairs to try: each ambiguous target's module with another source's, those of one template at once."""
    groups: dict[tuple[str, int], dict[tuple[str, str], None]] = {}
    open_ = [name for name in found.mapping if found.confidence.get(name) == "ambiguous"]
    for template in collapse(open_):
        for name in template.names:
            for at, other in enumerate(found.alternatives.get(name, ())):
                (theirs, _, leaf), (ours, _, same) = name.rpartition("."), other.rpartition(".")
                groups.setdefault((template.text, at), {})[(ours, theirs) if leaf == same and ours and theirs else (other, name)] = None
    return list(dict.fromkeys(tuple(group) for group in groups.values()))


def values_of_both(source: Source, wanted: Source) -> dict[str, dict[str, str]] | None:
    """Fingerprints by name under ``source`` and ``target``; None where the two files do not hold the same weights, or are very large."""
    if source.container.composites or source.manifest.nbytes + wanted.manifest.nbytes > MAX_TRIAL:
        return None
    here, there = fingerprints(source), fingerprints(wanted)
    same = set(here.values()) & set(there.values())
    # What was trained apart has nothing in common: to call it contradictory would be wrong.
    return {"source": here, "target": there} if there and sum(each in same for each in there.values()) * 2 >= len(there) else None


def fingerprints(source: Source) -> dict[str, str]:
    """Of each tensor whose values say something, a word that is equal for equal values in any order and any float type that holds them."""
    found = {}
    with Sources(source.files) as opened:
        for name, place in source.placed.items():
            if place.spec.numel < 2 or place.spec.dtype.kind not in ("float", "int", "uint"):
                continue
            tensor = opened.read_tensor(place)
            whole = tensor.float() if place.spec.dtype.kind == "float" and place.spec.dtype.nbytes < 4 else tensor
            if not bool((whole == whole.reshape(-1)[0]).all()):  # all ones are all ones everywhere
                found[name] = f"{whole.numel()}:{multiset_checksum(whole):x}"
    return found


def equal_values(written: Source, wanted: Source) -> tuple[int, tuple[str, ...]]:
    """How many tensors of the target's file a written output holds bit by bit, and the names of those that differ."""
    digests: list[Mapping[str, str]] = []
    for source in (written, wanted):
        with Sources(source.files) as opened:
            digests.append(digest_tensors(opened, source.placed))
    here, there = digests
    differ = tuple(name for name, digest in there.items() if here.get(name) != digest)
    return len(there) - len(differ), differ

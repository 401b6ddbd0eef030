"""Two manifests compared: what was found against what is wanted. Pure; every check of ckptconv ends here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.errors import Problem, printable
from ckptconv.names import Template, collapse, nearest
from ckptconv.spec import DType, Manifest, TensorSpec, widens

if TYPE_CHECKING:
    from ckptconv.ruleset.model import Allow as AllowField
    from ckptconv.ruleset.patterns import Pattern

MAX_LINES = 12
MAX_POOL = 200
_SAMPLES = 8
#: Built-in rules that strip a wrapper's prefix.
_PREFIX_RULES = {
    "module.": "dataparallel",
    "_orig_mod.": "torch-compile",
    "_orig_mod.module.": "wrapper-stack",
    "module._orig_mod.": "wrapper-stack",
}
Predicate = Callable[[str], bool]


def _never(_name: str) -> bool:
    return False


class Allow(Struct, frozen=True):
    """Differences that are meant, by name."""

    missing: Predicate = _never
    unexpected: Predicate = _never
    shape: Predicate = _never
    dtype: Predicate = _never


def allowed_by(field_: AllowField) -> Allow:
    """The differences that a rule file's ``allow`` names by patterns."""

    def matches(patterns: Sequence[Pattern] | None) -> Predicate:
        return lambda name: any(pattern.match(name) is not None for pattern in patterns or ())

    return Allow(matches(field_.missing), matches(field_.unexpected), matches(field_.shape), matches(field_.dtype))


class Comparison(Struct, frozen=True, dict=True):
    """Everything in which ``found`` differs from ``wanted``."""

    found: Manifest
    wanted: Manifest
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted
    dtypes: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted; only those that would lose values
    widened: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted; loading copies up
    tied: tuple[tuple[str, str], ...]  #: a wanted name that is not there, and the name that it is tied to and that is
    #: one tensor in the target, and specs in the result that cannot be one: the names, with their dtypes
    broken_ties: tuple[tuple[tuple[str, DType], ...], ...]
    apart: tuple[tuple[str, ...], ...]  #: one tensor in the target, several in the result; their values have to be equal
    allowed_missing: tuple[str, ...]
    allowed_unexpected: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True when nothing differs but what is allowed."""
        return not (self.missing or self.unexpected or self.shapes or self.dtypes or self.broken_ties)

    @cached_property
    def coverage(self) -> float:
        """Elements of the wanted tensors that are filled, as a fraction of all of them; a tie counts once."""
        total = self.wanted.numel
        away = {*self.missing, *self.allowed_missing, *(name for name, _, _ in self.shapes)}
        filled = sum(spec.numel for name, spec in self.wanted.stored.items() if name not in away)
        return filled / total if total else 1.0

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what is no fault, but good to know."""
        notes = [
            f"{_few_names([name for name, _, _ in group])}: {found.dtype} in the file, {wanted.dtype} in the model; loading copies up"
            for (found, wanted), group in _by_dtype(self.widened).items()
        ]
        notes += [f"{printable(name)} is an alias of {printable(first)} in the target, and comes with it" for name, first in self.tied]
        notes += [
            f"{_few_names(group)}: one tensor in the target, several in the file; their values have to be equal" for group in self.apart
        ]
        if self.allowed_unexpected:
            notes.append(f"allowed though unexpected: {_few_names(self.allowed_unexpected)}")
        return tuple(notes) + tuple(printable(note) for note in self.wanted.notes)

    def problems(self) -> list[Problem]:
        """Every difference, names as templates, a bounded number of lines for each kind."""
        problems = self._named("CK401", "the target needs {}, which the result does not have", self.missing, self.unexpected)
        problems += self._named("CK402", "the result has {}, which the target does not know", self.unexpected, self.missing)
        if self._prefix_hint and problems:  # said once: it explains all of them
            problems[0] = replace(problems[0], try_=self._prefix_hint)
        problems += self._shape_problems()
        for (found, wanted), group in list(_by_dtype(self.dtypes).items())[:MAX_LINES]:
            names = _few_names([name for name, _, _ in group])
            problems.append(
                Problem("CK404", f"{names}: {found.dtype} in the checkpoint would lose values in the target's {wanted.dtype}",
                        try_=f"- cast: {{keys: …, dtype: {wanted.dtype}}} in the rule file")
            )  # fmt: skip
        for tied in self.broken_ties[:MAX_LINES]:
            held = ", ".join(f"{printable(name)} {dtype}" for name, dtype in tied)
            problems.append(Problem("CK405", f"one tensor in the target, and two dtypes in the checkpoint: {held}",
                                    try_=f"drop all but {printable(tied[0][0])}: the target ties the others to it"))  # fmt: skip
        if len(self.broken_ties) > MAX_LINES:
            problems.append(Problem("CK405", f"and {len(self.broken_ties) - MAX_LINES:,} more ties are broken"))
        return problems

    def _shape_problems(self) -> list[Problem]:
        groups: dict[tuple[TensorSpec, TensorSpec], list[str]] = {}
        for name, found, wanted in self.shapes:
            groups.setdefault((TensorSpec(found.shape, wanted.dtype), wanted), []).append(name)
        lines = [(template, *specs) for specs, names in groups.items() for template in collapse(names)]
        problems = [
            Problem("CK403", f"size mismatch for {printable(template)}: {list(found.shape)} in the checkpoint, {list(wanted.shape)} in the target",
                    try_=_shape_hint(template.text, found, wanted))
            for template, found, wanted in lines[:MAX_LINES]
        ]  # fmt: skip
        rest = sum(len(template.names) for template, _, _ in lines[MAX_LINES:])
        return problems + ([Problem("CK403", f"and {rest:,} more tensors have other shapes")] if rest else [])

    def _named(self, code: str, sentence: str, names: Sequence[str], others: Sequence[str]) -> list[Problem]:
        templates = collapse(names)
        by_leaf: dict[str, list[str]] = {}
        for other in others:
            by_leaf.setdefault(other.rpartition(".")[2], []).append(other)
        problems = []
        for template in templates[:MAX_LINES]:
            close = None
            if len(template.names) == 1 and not self._prefix_hint:
                # Comparing letters is slow: with names that end alike first, and never with a whole large model.
                pool = by_leaf.get(template.text.rpartition(".")[2]) or others
                close = nearest(template.text, pool[:MAX_POOL])
            try_ = f"is it {printable(close)!r} under another name?" if close else ""
            problems.append(Problem(code, sentence.format(printable(template)), try_=try_))
        if len(templates) > MAX_LINES:
            rest = sum(len(template.names) for template in templates[MAX_LINES:])
            problems.append(Problem(code, f"and {rest:,} more, in {len(templates) - MAX_LINES:,} templates"))
        return problems

    @cached_property
    def _prefix_hint(self) -> str:
        """The one prefix by which most of the missing names are among the unexpected, or the other way round."""
        prefix = shared_prefix(self.unexpected, self.missing)
        if prefix:
            carried, shown = sum(name.startswith(prefix) for name in self.found), printable(prefix)
            if carried < len(self.found):
                step = f"- strip_prefix: {{prefix: {shown}, where: some}}"
                return f"{carried:,} of {len(self.found):,} keys carry the prefix {shown!r}: a rule file with `{step}`"
            rule = _PREFIX_RULES.get(prefix)
            ready = f"ckptconv run {rule} …" if rule else f"a rule file with `- strip_prefix: {shown}`"
            return f"every key carries the prefix {shown!r}: {ready}"
        prefix = shared_prefix(self.missing, self.unexpected)
        return f"the target's keys start with {printable(prefix)!r}: a rule file with `- add_prefix: {printable(prefix)}`" if prefix else ""


def compare(found: Manifest, wanted: Manifest, allow: Allow | None = None) -> Comparison:
    """What differs between a result and what it must load into.

    A wanted name that is missing is no fault where it is tied to one that is there; another dtype is none where it only widens.

    >>> from ckptconv.spec import DType
    >>> a = Manifest({"w": TensorSpec((5, 10), DType.float32)})
    >>> b = Manifest({"w": TensorSpec((6, 10), DType.float32)})
    >>> compare(a, b).problems()[0].what
    'size mismatch for w: [5, 10] in the checkpoint, [6, 10] in the target'
    """
    allow = allow or Allow()
    missing: list[str] = []
    allowed_missing: list[str] = []
    tied: list[tuple[str, str]] = []
    group_of = {name: group for group in wanted.ties for name in group}
    for name in wanted.tensors:
        if name in found:
            continue
        partner = next((other for other in group_of.get(name, ()) if other in found), None)
        if partner is not None:
            tied.append((name, partner))
        elif allow.missing(name):
            allowed_missing.append(name)
        else:
            missing.append(name)
    unexpected: list[str] = []
    allowed_unexpected: list[str] = []
    shapes: list[tuple[str, TensorSpec, TensorSpec]] = []
    dtypes: list[tuple[str, TensorSpec, TensorSpec]] = []
    widened: list[tuple[str, TensorSpec, TensorSpec]] = []
    for name, spec in found.tensors.items():
        if name not in wanted:
            (allowed_unexpected if allow.unexpected(name) else unexpected).append(name)
            continue
        want = wanted[name]
        if spec.shape != want.shape and not allow.shape(name):
            shapes.append((name, spec, want))
        if spec.dtype != want.dtype and not allow.dtype(name):
            (widened if widens(spec.dtype, want.dtype) else dtypes).append((name, spec, want))
    broken, apart = _ties(found, wanted)
    return Comparison(
        found, wanted, tuple(missing), tuple(unexpected), tuple(shapes), tuple(dtypes), tuple(widened), tuple(tied), broken, apart,
        tuple(allowed_missing), tuple(allowed_unexpected),
    )  # fmt: skip


def _ties(found: Manifest, wanted: Manifest) -> tuple[tuple[tuple[tuple[str, DType], ...], ...], tuple[tuple[str, ...], ...]]:
    """Ties of ``wanted`` that ``found`` cannot hold, and those that it holds as several tensors."""
    broken, apart = [], []
    aliases = found.aliases
    for group in wanted.ties:
        there = tuple(name for name in group if name in found)
        dtypes = tuple((name, found[name].dtype) for name in there)
        if len({dtype for _, dtype in dtypes}) > 1:
            broken.append(dtypes)
        elif len({aliases.get(name, name) for name in there}) > 1:
            apart.append(there)
    return tuple(broken), tuple(apart)


def shared_prefix(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """The prefix that turns more than half of ``shorter`` into names of ``longer``; empty text where there is none."""
    there = frozenset(longer)
    tried: set[str] = set()
    for name in shorter[:_SAMPLES]:
        ending = f".{name}"
        for prefix in (other[: -len(name)] for other in longer if other.endswith(ending)):
            if prefix not in tried and len(tried) < _SAMPLES:
                tried.add(prefix)
                if sum(prefix + each in there for each in shorter) * 2 > len(shorter):
                    return prefix
    return ""


def explain_missing_initial(comparison: Comparison, wanted: Manifest) -> str:
    """The sentence on which parameters stay at their initial values; empty text where none do."""
    names = comparison.allowed_missing
    if not names:
        return ""
    stored = wanted.stored
    elements, total = sum(stored[name].numel for name in names if name in stored), wanted.numel
    share = f"{elements / total:.1%} of the model" if total else "all of the model"
    what = "parameter" if len(names) == 1 else "parameters"
    stay = "stays at its initial value" if len(names) == 1 else "stay at their initial values"
    return f"{len(names):,} {what} ({elements:,} elements, {share}) {stay}: {_few_names(names)}"


def _by_dtype(
    items: Sequence[tuple[str, TensorSpec, TensorSpec]],
) -> dict[tuple[TensorSpec, TensorSpec], list[tuple[str, TensorSpec, TensorSpec]]]:
    groups: dict[tuple[TensorSpec, TensorSpec], list[tuple[str, TensorSpec, TensorSpec]]] = {}
    for item in items:
        key = (TensorSpec((), item[1].dtype), TensorSpec((), item[2].dtype))
        groups.setdefault(key, []).append(item)
    return groups


def _few_names(names: Sequence[str]) -> str:
    return _few(collapse(names))


def _few(templates: Sequence[Template], most: int = 4) -> str:
    shown = ", ".join(printable(template) for template in templates[:most])
    return shown + (f" and {len(templates) - most} more templates" if len(templates) > most else "")


def _shape_hint(name: str, found: TensorSpec, wanted: TensorSpec) -> str:
    if found.numel == wanted.numel:
        if sorted(found.shape) == sorted(wanted.shape) and len(found.shape) == 2:
            return "the same sizes in another order: rearrange with 'i o -> o i'"
        return "the same number of elements: reshape, if the order of the elements is the same"
    if found.shape[1:] == wanted.shape[1:] and len(found.shape) in (1, 2):
        return f"another number of classes or rows: drop {printable(name)} and allow it as missing, or slice it"
    return "another width or variant of the model: no renaming can help"

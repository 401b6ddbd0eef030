"""Two manifests compared: what was found against what is wanted. Pure; every check of ckptconv ends here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ckptconv.errors import Problem, printable
from ckptconv.names import Template, collapse, nearest
from ckptconv.spec import Manifest, TensorSpec, widens

MAX_LINES = 12
Predicate = Callable[[str], bool]


def _never(_name: str) -> bool:
    return False


@dataclass(frozen=True)
class Allow:
    """Differences that are meant, by name."""

    missing: Predicate = _never
    unexpected: Predicate = _never
    shape: Predicate = _never
    dtype: Predicate = _never


@dataclass(frozen=True)
class Comparison:
    """Everything in which ``found`` differs from ``wanted``."""

    found: Manifest = field(repr=False)
    wanted: Manifest = field(repr=False)
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted
    dtypes: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted; only those that would lose values
    widened: tuple[tuple[str, TensorSpec, TensorSpec], ...]  #: name, found, wanted; loading copies up
    tied: tuple[tuple[str, str], ...]  #: a wanted name that is not there, and the name that it is tied to and that is
    allowed_missing: tuple[str, ...]
    allowed_unexpected: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True when nothing differs but what is allowed."""
        return not (self.missing or self.unexpected or self.shapes or self.dtypes)

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
            f"{_few(collapse([name for name, _, _ in group]))}: {found.dtype} in the file, {wanted.dtype} in the model; loading copies up"
            for (found, wanted), group in _by_dtype(self.widened).items()
        ]
        notes += [f"{printable(name)} is an alias of {printable(first)} in the target, and comes with it" for name, first in self.tied]
        if self.allowed_unexpected:
            notes.append(f"allowed though unexpected: {_few(collapse(self.allowed_unexpected))}")
        return tuple(notes)

    def problems(self) -> list[Problem]:
        """Every difference, names as templates, a bounded number of lines for each kind."""
        hint = self._prefix_hint()
        problems = self._named("CK401", "the target needs {}, which the result does not have", self.missing, hint)
        problems += self._named("CK402", "the result has {}, which the target does not know", self.unexpected, hint)
        for at, (name, found, wanted) in enumerate(self.shapes):
            if at == MAX_LINES:
                problems.append(Problem("CK403", f"and {len(self.shapes) - MAX_LINES} more tensors have other shapes"))
                break
            problems.append(
                Problem("CK403", f"size mismatch for {printable(name)}: {list(found.shape)} in the checkpoint, {list(wanted.shape)} in the target",
                        try_=_shape_hint(name, found, wanted))
            )  # fmt: skip
        for (found, wanted), group in list(_by_dtype(self.dtypes).items())[:MAX_LINES]:
            names = _few(collapse([name for name, _, _ in group]))
            problems.append(
                Problem("CK404", f"{names}: {found.dtype} in the checkpoint would lose values in the target's {wanted.dtype}",
                        try_=f"- cast: {{keys: …, dtype: {wanted.dtype}}} in the rule file")
            )  # fmt: skip
        return problems

    def _named(self, code: str, sentence: str, names: Sequence[str], hint: str) -> list[Problem]:
        templates = collapse(names)
        problems = []
        for template in templates[:MAX_LINES]:
            try_ = hint
            if not try_ and len(template.names) == 1:
                close = nearest(template.names[0], self.unexpected if code == "CK401" else self.missing)
                try_ = f"is it {printable(close)!r} under another name?" if close else ""
            problems.append(Problem(code, sentence.format(printable(template)), try_=try_))
        if len(templates) > MAX_LINES:
            rest = sum(len(template.names) for template in templates[MAX_LINES:])
            problems.append(Problem(code, f"and {rest} more, in {len(templates) - MAX_LINES} templates"))
        return problems

    def _prefix_hint(self) -> str:
        """The one prefix by which all of the found names, or all of the wanted, differ from the other side."""
        if not self.missing or not self.unexpected:
            return ""
        for longer, shorter, words in (
            (
                self.unexpected,
                self.missing,
                ("every key carries the prefix {!r}: strip_prefix, or one of the built-in wrapper rules (ckptconv rules list)"),
            ),
            (self.missing, self.unexpected, ("the target's keys all start with {!r}: add_prefix")),
        ):
            first = next((name for name in longer if any(name.endswith("." + other) for other in shorter[:1])), None)
            if first is None:
                continue
            prefix = first[: len(first) - len(shorter[0])]
            if sum(prefix + name in set(longer) for name in shorter) * 2 > len(shorter):
                return words.format(printable(prefix))
        return ""


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
    return Comparison(
        found, wanted, tuple(missing), tuple(unexpected), tuple(shapes), tuple(dtypes), tuple(widened), tuple(tied), tuple(allowed_missing),
        tuple(allowed_unexpected),
    )  # fmt: skip


def explain_missing_initial(comparison: Comparison, wanted: Manifest) -> str:
    """The sentence on which parameters stay at their initial values; empty text where none do."""
    names = comparison.allowed_missing
    if not names:
        return ""
    elements, total = sum(wanted[name].numel for name in names), wanted.numel
    share = f"{elements / total:.1%} of the model" if total else "all of the model"
    what = "parameter" if len(names) == 1 else "parameters"
    stay = "stays at its initial value" if len(names) == 1 else "stay at their initial values"
    return f"{len(names):,} {what} ({elements:,} elements, {share}) {stay}: {_few(collapse(names))}"


def _by_dtype(
    items: Sequence[tuple[str, TensorSpec, TensorSpec]],
) -> dict[tuple[TensorSpec, TensorSpec], list[tuple[str, TensorSpec, TensorSpec]]]:
    groups: dict[tuple[TensorSpec, TensorSpec], list[tuple[str, TensorSpec, TensorSpec]]] = {}
    for item in items:
        key = (TensorSpec((), item[1].dtype), TensorSpec((), item[2].dtype))
        groups.setdefault(key, []).append(item)
    return groups


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

"""Names turned round: from what a step made of which names to the patterns and templates that make them back.

Where a rule says how a name is made (:func:`opened`), algebra says how it is unmade; :func:`fit` holds that against the names that were
really seen, solves by observation what algebra leaves open, and narrows every pattern until it claims its own names and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Union

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.errors import Refusal
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Node
from ckptconv.ruleset.patterns import Capture, Index, Pattern, Placeholder, Template

_DIGITS = re.compile(r"([0-9]+)")
_LETTERS = "ijklmnoqrstuvw"
MAX_CHOICES = 24


class Unfit(Exception):  # noqa: N818  (a reason, on its way to a plainer way of saying the same)
    """The names do not fit what was thought of them."""


class Slot(Struct, frozen=True):
    """A placeholder of a pattern that is being written."""

    name: str
    kind: str  #: ``part``, ``int``, ``deep``, ``choice``
    choices: tuple[tuple[str, str], ...] = ()  #: (as matched, as captured)

    @property
    def text(self) -> str:
        """As it stands in a pattern."""
        if self.kind == "choice":
            return f"{{{self.name}:{'|'.join(one if one == other else f'{one}={other}' for one, other in self.choices)}}}"
        return f"{{{self.name}{ {'int': ':int', 'deep': ':**'}.get(self.kind, '') }}}"


class Word(Struct, frozen=True):
    """One of several words at one place: of ``{x:q|k|v}``, one for each name. ``fan`` is what the place is called."""

    text: str
    fan: str


class Want(Struct, frozen=True):
    """A part of a name that is still to be found, by what it was called."""

    name: str


class Formula(Struct, frozen=True):
    """What stands between the braces of a template."""

    text: str


Part = Union[str, Slot, Word, Want, Formula]
Parts = tuple[Part, ...]


class Row(Struct, frozen=True):
    """One observation: these names (one, or the pieces of one) were made of those."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    wants: Mapping[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.keys, self.values))


class Shape(Struct, frozen=True):
    """How the names of many rows look: patterns for the keys, templates with gaps for the values, and what algebra says of the gaps."""

    keys: tuple[Parts, ...]
    values: tuple[Parts, ...]
    hints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.keys, self.values))


class Entry(Struct, frozen=True):
    """Patterns and templates that say all of ``rows`` and nothing else."""

    keys: tuple[Parts, ...]
    values: tuple[Parts, ...]
    rows: tuple[Row, ...]
    captures: tuple[Mapping[str, Capture], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[object, ...]:
        return self.keys, self.values, self.rows


def escaped(text: str) -> str:
    """Literal text inside a pattern or a template."""
    return text.replace("{", "{{").replace("}", "}}")


def text_of(parts: Iterable[Part]) -> str:
    """The pattern or template as a rule file has it.

    >>> text_of(("layers.", Slot("i", "int"), ".", Slot("x", "choice", (("q", "wq"), ("k", "k")))))
    'layers.{i:int}.{x:q=wq|k}'
    """
    out = []
    for part in parts:
        if isinstance(part, str):
            out.append(escaped(part))
        elif isinstance(part, Word):
            out.append(escaped(part.text))
        elif isinstance(part, Formula):
            out.append(f"{{{part.text}}}")
        elif isinstance(part, Slot):
            out.append(part.text)
        else:
            raise Unfit(f"nothing says what {part.name} was")
    return "".join(out)


def texts_of(lists: Sequence[Parts], kind: str = "") -> list[str]:
    """Several patterns or templates, as one where they differ in one word only: ``{x:q|k|v}``, or ``{x:int}`` for ``kind="int"``.

    >>> texts_of([("a.", Word("q", "x")), ("a.", Word("k", "x"))])
    ['a.{x:q|k}']
    """
    first = lists[0]
    places = [at for at, part in enumerate(first) if isinstance(part, Word)]
    if len(lists) > 1 and len(places) == 1 and all(len(parts) == len(first) for parts in lists):
        at = places[0]
        words = [parts[at] for parts in lists]
        same = all((*parts[:at], *parts[at + 1 :]) == (*first[:at], *first[at + 1 :]) for parts in lists)
        if same and len({word.text for word in words if isinstance(word, Word)}) == len(lists):
            taken = {part.name for part in first if isinstance(part, Slot)}
            name = fresh(first[at].fan, taken)  # type: ignore[union-attr]  # a Word, by `places`
            choices = tuple((word.text, word.text) for word in words if isinstance(word, Word))
            slot = Slot(name, kind or "choice", () if kind else choices)
            if kind or not any(set("|=}{:") & set(word) for word, _ in choices):
                return [text_of((*first[:at], slot, *first[at + 1 :]))]
    return [text_of(parts) for parts in lists]


def fresh(name: str, taken: Iterable[str]) -> str:
    """``name``, or with the first number behind it that is free."""
    used = set(taken)
    number = 2
    candidate = name
    while candidate in used:
        candidate, number = f"{name}{number}", number + 1
    return candidate


def parts_of(pattern: str) -> Parts:
    """A pattern's literal text and placeholders; a bare ``**`` gets a name.

    >>> parts_of("**.norm{k:1=a|2=b}.{p}")[2]
    Slot(name='k', kind='choice', choices=(('1', 'a'), ('2', 'b')))
    """
    found: list[Part] = []
    names = set(Pattern.parse(pattern).names)
    for part in Template.parse(pattern).parts:
        if isinstance(part, Placeholder):
            found.append(Slot(part.name, part.kind, part.choices))
            continue
        for at, literal in enumerate(part.split("**")):
            if at:
                name = fresh("rest", names)
                names.add(name)
                found.append(Slot(name, "deep"))
            if literal:
                found.append(literal)
    return tuple(found)


def matched_text(parts: Parts, name: str) -> dict[str, str]:
    """What every placeholder of ``parts`` stood for in ``name``, as written there (the left word of a choice)."""
    plain = tuple(
        replace(part, choices=tuple((left, left) for left, _ in part.choices)) if isinstance(part, Slot) else part for part in parts
    )
    captures = Pattern.parse(text_of(plain)).match(name)
    if captures is None:
        raise Unfit(f"{name} does not match {text_of(plain)}")
    return {key: _text(value) for key, value in captures.items()}


def _text(value: Capture) -> str:
    return value.text if isinstance(value, Index) else str(value)


def affine(node: Node) -> tuple[str, int, int] | None:
    """``(x, a, b)`` where the expression is ``a * x + b``; None where it is not.

    >>> affine(expressions.parse("2 * (i - 1) + 3"))
    ('i', 2, 1)
    """
    found = _linear(node)
    if found is None or len(found[0]) != 1:
        return None
    ((name, factor),) = found[0].items()
    return (name, factor, found[1]) if factor else None


def _linear(node: Node) -> tuple[dict[str, int], int] | None:
    if node.kind == "literal" and type(node.value) is int:
        return {}, node.value
    if node.kind == "name":
        return {node.value: 1}, 0
    sides = [_linear(part) for part in node.parts]
    if node.kind == "minus" and sides[0] is not None:
        return {name: -factor for name, factor in sides[0][0].items()}, -sides[0][1]
    if node.kind != "op" or node.value not in "+-*" or None in sides:
        return None
    (left, one), (right, two) = sides  # type: ignore[misc]  # None is not in sides
    if node.value == "*":
        if left and right:
            return None
        by = two if left else one
        return {name: factor * by for name, factor in (left or right).items()}, one * two
    sign = -1 if node.value == "-" else 1
    return {name: left.get(name, 0) + sign * right.get(name, 0) for name in {**left, **right}}, one + sign * two


def solved(name: str, factor: int, offset: int) -> str:
    """What ``x`` is where ``name`` is ``factor * x + offset``.

    >>> solved("i", 1, -1), solved("i", 2, 1), solved("i", -1, 5)
    ('i + 1', '(i - 1) // 2', '5 - i')
    """
    if factor == -1:
        return f"{offset} - {name}" if offset else f"-{name}"
    shifted = f"{name} - {offset}" if offset > 0 else f"{name} + {-offset}" if offset else name
    return shifted if factor == 1 else f"({shifted}) // {factor}" if offset else f"{name} // {factor}"


def line(name: str, factor: int, offset: int) -> str:
    """``factor * name + offset``, as a person writes it."""
    start = name if factor == 1 else f"-{name}" if factor == -1 else f"{factor}*{name}"
    return start if not offset else f"{start} + {offset}" if offset > 0 else f"{start} - {-offset}"


def opened(template: Template, slots: Mapping[str, Slot], words: Mapping[str, str], observed: Mapping[str, set[str]]) -> Shape:
    """A template as the pattern of what it makes, with what that says of the placeholders it was made from.

    ``words`` are the choices taken of a template that stands for several names; ``observed`` are the words of choices that were seen,
    for those where two of them become one.
    """
    keys: list[Part] = []
    hints: dict[str, list[str]] = {}
    taken: set[str] = set()

    def slot(name: str, kind: str, choices: tuple[tuple[str, str], ...] = ()) -> str:
        made = Slot(fresh(name, taken), kind, choices)
        taken.add(made.name)
        keys.append(made)
        return made.name

    for part in template.parts:
        if isinstance(part, str):
            keys.append(part)
        elif part.expression is not None:
            found = affine(part.expression)
            if found is not None and found[0] in slots and slots[found[0]].kind == "int":
                hints.setdefault(found[0], []).append(solved(slot(found[0], "int"), *found[1:]))
            else:
                slot("n", "int")
        elif part.name in words:
            keys.append(Word(words[part.name], part.name))
        elif part.name in slots and slots[part.name].kind == "choice":
            choices = _turned(slots[part.name], observed.get(part.name, set()))
            hints.setdefault(part.name, []).append(slot(part.name, "choice", choices))
        elif part.name in slots:
            hints.setdefault(part.name, []).append(slot(part.name, slots[part.name].kind))
        else:
            slot(part.name, "part")
    return Shape((tuple(keys),), (), {name: tuple(each) for name, each in hints.items()})


def _turned(slot: Slot, seen: set[str]) -> tuple[tuple[str, str], ...]:
    """``{x:a=b}`` as ``{x:b=a}``. Where two words become one, the one that was seen; where both were, observation must tell."""
    turned: dict[str, str] = {}
    for left, right in sorted(slot.choices, key=lambda choice: choice[0] not in seen):
        turned.setdefault(right, left)
    if len([left for left, right in slot.choices if left in seen]) > len({right for left, right in slot.choices if left in seen}):
        turned = {right: right for right in turned}
    order = [right for _, right in slot.choices]
    return tuple((right, turned[right]) for right in dict.fromkeys(order))


# --- fitting -------------------------------------------------------------------------------------------------------------------------


def fit(rows: Sequence[Row], shape: Shape, universe: Sequence[str], *, literal: bool = False) -> list[Entry]:
    """Entries that say exactly ``rows`` among the names of ``universe``: as few as observation and narrowing allow.

    ``literal``: placeholders that stand for one thing only are written out. Where the shape does not fit, the rows speak for themselves.
    """
    try:
        return _fit(list(rows), shape, _Universe(universe), literal)
    except Unfit:
        return guessed(rows, universe)


class _Universe:
    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def others(self, patterns: Sequence[Pattern], rows: Sequence[Row]) -> dict[str, int]:
        """Names that a pattern claims and must not, with the number of that pattern."""
        mine = [{row.keys[at] for row in rows} for at in range(len(patterns))]
        return {name: at for at, pattern in enumerate(patterns) for name in self.names if name not in mine[at] and pattern.match(name) is not None}  # fmt: skip


def _fit(rows: list[Row], shape: Shape, universe: _Universe, literal: bool) -> list[Entry]:
    captures = _captures(rows, shape)
    slots = _slots(shape.keys)
    single = [name for name in slots if len({_matched(slots[name], each[name]) for each in captures}) == 1]
    if literal and single:
        return _fit(rows, _fixed(shape, {name: _matched(slots[name], captures[0][name]) for name in single}), universe, literal)
    found = {want: _solution(want, rows, captures, slots, shape) for want in _wanted(shape)}
    open_ = [want for want, formula in found.items() if formula is None]
    if open_:
        table = _tabled(open_[0], rows, captures, slots, found)
        if table is not None:
            return _fit(rows, _replaced(shape, table), universe, literal)
        return _split(rows, shape, captures, universe, literal, _unsolved)
    values = tuple(_filled(parts, found) for parts in shape.values)
    used = _mentioned(values)
    idle = [name for name in single if values and name not in used]
    if idle:
        return _fit(rows, _fixed(shape, {name: _matched(slots[name], captures[0][name]) for name in idle}), universe, literal)
    patterns = [Pattern.parse(text_of(parts)) for parts in shape.keys]
    over = universe.others(patterns, rows)
    if over:
        return _narrowed(rows, shape, captures, slots, found, over, universe, literal)
    _proved(rows, values, captures)
    return [Entry(shape.keys, values, tuple(rows), tuple(captures))]


def _captures(rows: Sequence[Row], shape: Shape) -> list[dict[str, Capture]]:
    patterns = [Pattern.parse(text_of(parts)) for parts in shape.keys]
    found: list[dict[str, Capture]] = []
    for row in rows:
        merged: dict[str, Capture] = {}
        for pattern, key in zip(patterns, row.keys, strict=True):
            captures = pattern.match(key)
            if captures is None or any(_text(merged.get(name, value)) != _text(value) for name, value in captures.items()):
                raise Unfit(key)
            merged.update(captures)
        found.append(merged)
    return found


def _slots(keys: Sequence[Parts]) -> dict[str, Slot]:
    return {part.name: part for parts in keys for part in parts if isinstance(part, Slot)}


def _matched(slot: Slot, captured: Capture) -> str:
    """The text in the name that gave this capture."""
    return next((one for one, other in slot.choices if other == captured), _text(captured))


def _wanted(shape: Shape) -> list[str]:
    return list(dict.fromkeys(part.name for parts in shape.values for part in parts if isinstance(part, Want)))


def _mentioned(values: Sequence[Parts]) -> set[str]:
    return {name for parts in values for part in parts if isinstance(part, Formula) for name in expressions.parse(part.text).names()}


def _fixed(shape: Shape, values: Mapping[str, str]) -> Shape:
    def fix(part: Part) -> Part:
        return values[part.name] if isinstance(part, Slot) and part.name in values else part

    return replace(shape, keys=tuple(_without_empty(tuple(map(fix, parts))) for parts in shape.keys))


def _without_empty(parts: Parts) -> Parts:
    """Literal text, an empty ``**`` taken out with its dot."""
    out: list[Part] = []
    for part in parts:
        if part == "":
            if out and isinstance(out[-1], str) and out[-1].endswith("."):
                out[-1] = out[-1][:-1]
            elif not out:
                out.append(part)
        elif out == [""] and isinstance(part, str):
            out = [part.removeprefix(".")]
        else:
            out.append(part)
    return tuple(out)


def _filled(parts: Parts, found: Mapping[str, Part | None]) -> Parts:
    out = []
    for part in parts:
        known = found[part.name] if isinstance(part, Want) else part
        assert known is not None
        out.append(known)
    return tuple(out)


def _value(formula: str, captures: Mapping[str, Capture]) -> str | None:
    try:
        return Template.parse(f"{{{formula}}}").render(captures.__getitem__)
    except (Refusal, KeyError):
        return None


def _solution(want: str, rows: Sequence[Row], captures: Sequence[Mapping[str, Capture]], slots: Mapping[str, Slot], shape: Shape) -> Part | None:  # fmt: skip
    """What gives every row its ``want``: what algebra says, one text for all, a placeholder, or a line through integers."""
    wanted = [row.wants[want] for row in rows]
    for hint in shape.hints.get(want, ()):
        if all(_value(hint, each) == text for each, text in zip(captures, wanted, strict=True)):
            return Formula(hint)
    if len(set(wanted)) == 1:
        return wanted[0]
    for name in slots:
        if all(_text(each[name]) == text for each, text in zip(captures, wanted, strict=True)):
            return Formula(name)
    if not all(text.isdigit() and str(int(text)) == text for text in wanted):
        return None
    columns = {name: [int(each[name]) for each in captures] for name, slot in slots.items() if slot.kind == "int"}
    return _line([int(text) for text in wanted], columns)


def _line(wanted: Sequence[int], columns: Mapping[str, Sequence[int]]) -> Formula | None:
    """A line through one column of integers, or one column more than another's line."""
    for name, column in columns.items():
        found = _through(column, wanted)
        if found is not None:
            return Formula(line(name, *found))
    for name, column in columns.items():
        rest = [value - x for value, x in zip(wanted, column, strict=True)]
        for other, second in columns.items():
            found = _through(second, rest) if other != name else None
            if found is not None and found[0]:
                return Formula(f"{line(other, *found)} + {name}")
    for name, column in columns.items():  # the other way round: every second index
        found = _through(wanted, column)
        if found is not None and found[0] > 1 and len(set(column)) > 2:
            return Formula(solved(name, *found))
    return None


def _through(column: Sequence[int], wanted: Sequence[int]) -> tuple[int, int] | None:
    """``(a, b)`` with ``wanted == a * column + b``, a not 0."""
    x, y = column[0], wanted[0]
    other = next((at for at in range(len(column)) if column[at] != x), None)
    if other is None or (wanted[other] - y) % (column[other] - x):
        return None
    factor = (wanted[other] - y) // (column[other] - x)
    offset = y - factor * x
    return (factor, offset) if factor and all(value == factor * each + offset for each, value in zip(column, wanted, strict=True)) else None


def _tabled(
    want: str, rows: Sequence[Row], captures: Sequence[Mapping[str, Capture]], slots: Mapping[str, Slot], found: Mapping[str, Part | None]
) -> Slot | None:
    """A placeholder as a table ``{s:0=1|1=3}``, where each of its values stands for one ``want`` and nothing else is made of it."""
    used = _mentioned([tuple(part for part in found.values() if part is not None)])
    for name, slot in sorted(slots.items(), key=lambda item: (item[0] != want, item[1].kind != "int")):
        words = [_matched(slot, each[name]) for each in captures]
        table = dict(zip(words, (row.wants[want] for row in rows), strict=True))
        fits = all(table[word] == row.wants[want] for word, row in zip(words, rows, strict=True))
        if fits and name not in used and slot.kind != "deep" and _sayable(table, MAX_CHOICES):
            return Slot(name, "choice", tuple(table.items()))
    return None


def _sayable(table: Mapping[str, str], most: int) -> bool:
    return 0 < len(table) <= most and not any(not word or set("|=}{:") & set(word) for pair in table.items() for word in pair)


def _unsolved(rows: Sequence[Row], shape: Shape) -> tuple[bool, bool]:
    """Whether something stays open, and whether numbers need a table: a line says more."""
    captures, slots = _captures(rows, shape), _slots(shape.keys)
    found = {want: _solution(want, rows, captures, slots, shape) for want in _wanted(shape)}
    tables = [_tabled(want, rows, captures, slots, found) for want, part in found.items() if part is None]
    return None in tables, any(table is not None and slots[table.name].kind == "int" for table in tables)


def _split(
    rows: list[Row], shape: Shape, captures: Sequence[Mapping[str, Capture]], universe: _Universe, literal: bool,
    fault: Callable[[Sequence[Row], Shape], tuple[bool, bool]],
) -> list[Entry]:  # fmt: skip
    """Several entries, one for each value of the placeholder that leaves least open."""
    slots = _slots(shape.keys)
    best: tuple[tuple[int, int, int], list[tuple[list[Row], Shape]]] | None = None
    for name, slot in slots.items():
        groups: dict[str, list[Row]] = {}
        for row, each in zip(rows, captures, strict=True):
            groups.setdefault(_matched(slot, each[name]), []).append(row)
        if slot.kind == "deep" or len(groups) < 2:
            continue
        parts = [(group, _fixed(shape, {name: value})) for value, group in groups.items()]
        faults = [fault(*part) for part in parts]
        cost = (sum(worst for worst, _ in faults), sum(bad for _, bad in faults), len(parts))
        if best is None or cost < best[0]:
            best = (cost, parts)
    if best is None:
        return guessed(rows, universe.names) if any(slot.kind == "deep" for slot in slots.values()) else [_spelled(row) for row in rows]
    return [entry for part in best[1] for entry in _fit(*part, universe, literal)]


def _spelled(row: Row) -> Entry:
    return Entry(tuple((key,) for key in row.keys), tuple((value,) for value in row.values), (row,), ({},))


def _narrowed(
    rows: list[Row], shape: Shape, captures: Sequence[Mapping[str, Capture]], slots: Mapping[str, Slot],
    found: Mapping[str, Part | None], over: Mapping[str, int], universe: _Universe, literal: bool,
) -> list[Entry]:  # fmt: skip
    """The same rows under patterns that leave the names of ``over`` alone."""
    strangers = [Pattern.parse(text_of(shape.keys[at])).match(name) or {} for name, at in over.items()]
    narrower: dict[str, tuple[Slot, set[str]]] = {}
    for name, slot in slots.items():
        mine = dict.fromkeys(_matched(slot, each[name]) for each in captures)
        others = {_matched(slot, each[name]) for each in strangers if name in each} - set(mine)
        if len(mine) == 1 and others:
            return _fit(rows, _fixed(shape, {name: next(iter(mine))}), universe, literal)
        only = _only(slot, rows, captures, found) if others and slot.kind != "deep" else None
        if only is not None:
            narrower[name] = (only, others)
    chosen: list[Slot] = []
    for name, (only, others) in narrower.items():  # each in turn, as long as it keeps a stranger out that is still in
        left = [each for each in strangers if name not in each or _matched(slots[name], each[name]) not in others]
        if len(left) < len(strangers):
            chosen.append(only)
            strangers = left
    if not strangers:
        for only in chosen:
            shape = _replaced(shape, only)
        return _fit(rows, shape, universe, literal)

    def claims(part: Sequence[Row], sub: Shape) -> tuple[bool, bool]:
        return bool(universe.others([Pattern.parse(text_of(parts)) for parts in sub.keys], part)), False

    return _split(rows, shape, captures, universe, literal, claims)


def _only(slot: Slot, rows: Sequence[Row], captures: Sequence[Mapping[str, Capture]], found: Mapping[str, Part | None]) -> Slot | None:
    """A placeholder as the choice of what it was seen to stand for; of an integer, with what is calculated from it."""
    words = [_matched(slot, each[slot.name]) for each in captures]
    users = [want for want, part in found.items() if part is not None and slot.name in _mentioned([(part,)])]
    if slot.kind != "int" or not users:
        table = {word: _text(each[slot.name]) for word, each in zip(words, captures, strict=True)}
    elif len({tuple(row.wants[want] for row in rows) for want in users}) == 1:
        table = dict(zip(words, (row.wants[users[0]] for row in rows), strict=True))
        if any(table[word] != row.wants[users[0]] for word, row in zip(words, rows, strict=True)):
            return None
    else:
        return None
    return Slot(slot.name, "choice", tuple(table.items())) if _sayable(table, MAX_CHOICES) else None


def _replaced(shape: Shape, slot: Slot) -> Shape:
    keys = tuple(tuple(slot if isinstance(part, Slot) and part.name == slot.name else part for part in parts) for parts in shape.keys)
    return replace(shape, keys=keys)


def _proved(rows: Sequence[Row], values: Sequence[Parts], captures: Sequence[Mapping[str, Capture]]) -> None:
    templates = [Template.parse(text_of(parts)) for parts in values]
    for row, each in zip(rows, captures, strict=True):
        for template, value in zip(templates, row.values, strict=True):
            try:
                if template.render(each.__getitem__) != value:
                    raise Unfit(value)
            except (Refusal, KeyError):
                raise Unfit(value) from None


# --- names that speak for themselves --------------------------------------------------------------------------------------------------


def guessed(rows: Sequence[Row], universe: Sequence[str]) -> list[Entry]:
    """Entries from names alone: numbers become ``{i:int}`` where a line leads from one to the other, a common last part ``{p}``."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    shapes: dict[tuple[str, ...], Shape] = {}
    for row in rows:
        shape, wants, form = _numbered(row)
        groups.setdefault(form, []).append(replace(row, wants=wants))
        shapes.setdefault(form, shape)
    found: list[Entry] = []
    for form, group in groups.items():
        try:
            found += _fit(group, shapes[form], _Universe(universe), True)
        except Unfit:
            found += [_spelled(row) for row in group]
    return found


def _numbered(row: Row) -> tuple[Shape, dict[str, str], tuple[str, ...]]:
    """How the names of a row look with their numbers, and their common last part, taken out."""
    names = [*row.keys, *row.values]
    tails = {name.rpartition(".")[2] for name in names}
    tail = next(iter(tails)) if len(tails) == 1 and all("." in name for name in names) else ""
    tail = tail if tail and not _DIGITS.search(tail) else ""
    keys: list[Parts] = []
    first: list[Slot] = []
    told: list[str] = []
    numbers = _DIGITS.findall(row.keys[0].removesuffix(tail))
    for at, key in enumerate(row.keys):
        parts: list[Part] = []
        runs = 0
        for piece in _DIGITS.split(key.removesuffix(tail)):
            if not piece.isdigit():
                parts += [piece] if piece else []
                continue
            if not at:
                first.append(Slot(fresh(_LETTERS[runs % len(_LETTERS)], [slot.name for slot in first]), "int"))
            # A number of a further key is the first key's where the two agree, and a text of its own where they do not.
            shared = not at or (runs < len(first) and numbers[runs] == piece)
            parts.append(first[runs] if shared else piece)
            told.append("" if shared else piece)
            runs += 1
        keys.append((*parts, Slot("p", "part") if len(row.keys) == 1 else tail) if tail else tuple(parts))
    wants: dict[str, str] = {}
    values: list[Parts] = []
    for value in row.values:
        parts = []
        for piece in _DIGITS.split(value.removesuffix(tail)):
            if piece and not piece.isdigit():
                parts.append(piece)
            elif piece:
                wants[f"w{len(wants)}"] = piece
                parts.append(Want(f"w{len(wants) - 1}"))
        if tail:
            wants["tail"] = tail
            parts.append(Want("tail"))
        values.append(tuple(parts))
    form = (*(_DIGITS.sub("#", name.removesuffix(tail)) for name in names), "" if tail and len(row.keys) == 1 else tail, *told)
    return Shape(tuple(keys), tuple(values)), wants, form

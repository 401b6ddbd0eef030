"""Many pairs of names as few anchored patterns and templates.

Outermost first: where everything below a name becomes the same below another, that is one entry. What is left is grouped by its look
without numbers; numbers are solved (:mod:`ckptconv.backnames`), and entries that differ in one word become one with a choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from ckptconv.backnames import Formula, Part, Row, Shape, Slot, Unfit, Want, escaped, fit, text_of
from ckptconv.names import natural_key
from ckptconv.ruleset.patterns import Pattern
from ckptconv.suggest.blocks import skeleton

#: Stands in names for the number over which tensors are stacked or unstacked.
EVERY = "\u2217"
_LETTERS = "ijklno"
_MARKS = set("|=}{:")
_MOST_CHOICES = 24


class Said(Struct, frozen=True):
    """Patterns and templates, and the rows that they say."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    rows: tuple[Row, ...]


def said(rows: Sequence[Row], universe: Iterable[str]) -> list[Said]:
    """Patterns and templates that say exactly ``rows`` among the names of ``universe``.

    >>> rows = [Row((f"h.{i}.{a}.{p}",), (f"layers.{i + 1}.{b}.{p}",)) for i in (0, 1) for a, b in (("ln_1", "norm1"), ("fc", "lin"))
    ...         for p in ("weight", "bias")]
    >>> [(each.keys[0], each.values[0]) for each in said(rows, [])]
    [('h.{i:int}.{x:ln_1=norm1|fc=lin}.{p}', 'layers.{i + 1}.{x}.{p}')]
    """
    names = list(dict.fromkeys([*universe, *(key for row in rows for key in row.keys)]))
    found: list[Said] = []
    left = list(rows)
    if rows and all(len(row.keys) == len(row.values) == 1 for row in rows):
        left, found = _whole_parts(left, names)
    for group in _groups(left, cut=1):
        found += _fitted(group, names)
    return sorted(_with_choices(found, names), key=lambda each: natural_key(each.rows[0].keys[0]) if not each.values else ())


def each_alone(rows: Sequence[Row]) -> list[Said]:
    """Every row spelled out."""
    return [Said(tuple(map(escaped, row.keys)), tuple(map(escaped, row.values)), (row,)) for row in rows]


def swept(names: Sequence[str], universe: Sequence[str]) -> list[str]:
    """Patterns for exactly ``names`` among ``universe``: whole subtrees and leaves of one name first.

    >>> swept(["a.n", "b.n", "dec.0.w", "dec.1.w"], ["a.w", "a.n", "b.n", "dec.0.w", "dec.1.w"])
    ['dec.**', '**.n']
    """
    if any("::" in name for name in names):  # of ranks: `**` does not reach across
        return [each.keys[0] for each in said([Row((name,), ()) for name in names], universe)]
    mine = set(names)
    others = [name for name in universe if name not in mine]
    kept_heads = {".".join(name.split(".")[:cut]) for name in others for cut in range(1, name.count(".") + 1)}
    kept_leaves = {name.rpartition(".")[2] for name in others}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        head = next((".".join(parts[:cut]) for cut in range(1, len(parts)) if ".".join(parts[:cut]) not in kept_heads), None)
        groups.setdefault(f"{escaped(head)}.**" if head is not None and head not in mine and head not in others else "", []).append(name)
    found = [text for text, group in groups.items() if text and len(group) > 1]
    left = [name for text, group in groups.items() if not text or len(group) < 2 for name in group]
    leaves: dict[str, list[str]] = {}
    for name in left:
        head, _, leaf = name.rpartition(".")
        leaves.setdefault(leaf if head and leaf not in kept_leaves and not leaf.isdigit() else "", []).append(name)
    swept_leaves = [
        leaf
        for leaf, group in leaves.items()
        if leaf and len(group) > 1 and not any(leaf == each.rpartition(".")[2] for each in mine - set(group))
    ]
    found += [f"**.{escaped(leaf)}" for leaf in swept_leaves]
    left = [name for leaf, group in leaves.items() if leaf not in swept_leaves for name in group]
    rest = [name for name in universe if name not in mine or name in set(left)]
    return found + [each.keys[0] for each in said([Row((name,), ()) for name in left], rest)]


def _common(row: Row) -> int:
    """How many last segments all names of a row share; at least one stays for the head of a key."""
    split = [name.split(".") for name in (*row.keys, *row.values)]
    most = min([len(parts) - 1 for parts in split[: len(row.keys)]] + [len(parts) for parts in split[len(row.keys) :]])
    count = 0
    while count < most and len({parts[-1 - count] for parts in split}) == 1:
        count += 1
    return count


def _head(name: str, cut: int) -> str:
    return name if not cut else ".".join(name.split(".")[:-cut])


def _whole_parts(rows: list[Row], names: Sequence[str]) -> tuple[list[Row], list[Said]]:
    """Entries `a.{m:**}: b.{m}` where nothing below `a` becomes anything else."""
    held: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        held.update({skeleton(".".join(parts[:cut])) for cut in range(1, len(parts))})
    below: dict[tuple[str, str], list[tuple[Row, int]]] = {}
    for row in rows:
        for cut in range(1, _common(row) + 1):
            key = skeleton(_head(row.keys[0], cut)), skeleton(_head(row.values[0], cut))
            below.setdefault(key, []).append((row, cut))
    done: set[Row] = set()
    found: list[Said] = []
    for (head, _), group in sorted(below.items(), key=lambda item: (item[0][0].count("."), item[0][1].count("."))):
        if held[head] != len(group) or any(row in done for row, _ in group) or len({cut for _, cut in group} | {1}) < 2:
            continue
        if len({skeleton(row.keys[0]) for row, _ in group}) < 2:
            continue
        made = _fitted([(row, cut) for row, cut in group], names, deep=True)
        if len(made) == 1:
            found += made
            done.update(row for row, _ in group)
    return [row for row in rows if row not in done], found


def _groups(rows: Sequence[Row], cut: int) -> list[list[tuple[Row, int]]]:
    """Rows that look alike without numbers and without their common last segment."""
    found: dict[tuple[object, ...], list[tuple[Row, int]]] = {}
    for row in rows:
        own = min(cut, _common(row)) if row.values else 0
        heads = tuple(skeleton(_head(name, own)) for name in (*row.keys, *row.values))
        found.setdefault((own, len(row.keys), heads, *_told(row)), []).append((row, own))
    return list(found.values())


def _told(row: Row) -> list[str]:
    """The numbers of further keys that the first key does not have at the same place: they tell the keys apart."""
    first = _numbers(row.keys[0])
    return [number for key in row.keys[1:] for at, number in enumerate(_numbers(key)) if at >= len(first) or first[at] != number]


def _numbers(name: str) -> list[str]:
    return [piece for piece, is_number in _pieces(name) if is_number]


def _pieces(name: str) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    for letter in name:
        number = letter.isascii() and letter.isdigit()
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0] + letter, number)
        else:
            found.append((letter, number))
    return found


def _fitted(group: Sequence[tuple[Row, int]], names: Sequence[str], *, deep: bool = False) -> list[Said]:
    """Entries for rows that look alike."""
    rows, shape = [], None
    for row, cut in group:
        made, wants = _shaped(row, cut, deep)
        shape = shape or made
        rows.append(Row(row.keys, row.values, wants))
    assert shape is not None
    originals = {row.keys: row for row, _ in group}
    try:
        entries = fit(rows, shape, names, literal=True)
        return [Said(tuple(map(text_of, entry.keys)), tuple(map(text_of, entry.values)),
                     tuple(originals[row.keys] for row in entry.rows)) for entry in entries]  # fmt: skip
    except Unfit:
        return [Said(row.keys, row.values, (row,)) for row, _ in group]


def _shaped(row: Row, cut: int, deep: bool) -> tuple[Shape, dict[str, str]]:
    tail = [Slot("m", "deep") if deep else Slot("p", "part")] if cut else []
    slots: list[Slot] = []
    numbers: list[str] = []
    keys: list[tuple[Part, ...]] = []
    for key in row.keys:
        parts: list[Part] = []
        seen = 0
        for piece, is_number in _pieces(_head(key, cut)):
            if not is_number:
                parts.append(piece)
                continue
            if not keys:
                slots.append(Slot(_LETTERS[seen] if seen < len(_LETTERS) else f"n{seen}", "int"))
                numbers.append(piece)
            parts.append(slots[seen] if seen < len(slots) and numbers[seen] == piece else piece)
            seen += 1
        keys.append((*_dotted(parts, bool(cut)), *tail))
    wants: dict[str, str] = {}
    values: list[tuple[Part, ...]] = []
    for value in row.values:
        parts = []
        for piece, is_number in _pieces(_head(value, cut)):
            if is_number:
                wants[f"w{len(wants)}"] = piece
                parts.append(Want(f"w{len(wants) - 1}"))
            else:
                parts.append(piece)
        values.append((*_dotted(parts, bool(cut)), *(Formula(slot.name) for slot in tail)))
    return Shape(tuple(keys), tuple(values)), wants


def _dotted(parts: list[Part], tailed: bool) -> list[Part]:
    if not tailed or not parts:
        return parts
    last = parts[-1]
    return [*parts[:-1], last + "."] if isinstance(last, str) else [*parts, "."]


# --- entries that differ in one word ---------------------------------------------------------------------------------------------------


def _with_choices(entries: list[Said], names: Sequence[str]) -> list[Said]:
    """Entries merged as long as two or more differ in one segment only."""
    merged = True
    while merged:
        merged = False
        groups: dict[object, list[int]] = {}
        for at, entry in enumerate(entries):
            for key in _views(entry):
                groups.setdefault(key, []).append(at)
        one: dict[int, Said | None] = {}
        for key, places in sorted(((key, places) for key, places in groups.items() if len(places) > 1), key=lambda item: -len(item[1])):
            if len(places) > _MOST_CHOICES or any(at in one for at in places):
                continue
            made = _merge(key, [entries[at] for at in places], names)
            if made is not None:
                one.update(dict.fromkeys(places))
                one[places[0]] = made
                merged = True
        entries = [each for at, entry in enumerate(entries) if (each := one.get(at, entry)) is not None]
    return entries


def _views(entry: Said) -> list[object]:
    """What an entry is without one segment of its keys, and of its templates at most one."""
    if len(entry.keys) != 1 or len(entry.values) > 1:
        return _last_views(entry)
    key = entry.keys[0].split(".")
    value = entry.values[0].split(".") if entry.values else []
    found: list[object] = []
    for at, part in enumerate(key):
        if "{" in part:
            continue
        holes = [-1, *(to for to, word in enumerate(value) if "{" not in word)]
        for to in holes:
            found.append(
                (
                    at,
                    to,
                    tuple(key[:at]),
                    tuple(key[at + 1 :]),
                    tuple(value[:to] if to >= 0 else value),
                    tuple(value[to + 1 :] if to >= 0 else ()),
                )
            )
    return found


def _last_views(entry: Said) -> list[object]:
    """Of entries with several names: what they are without the last segment, if all share it."""
    last = {text.rpartition(".")[2] for text in (*entry.keys, *entry.values)}
    if len(last) > 1 or "{" in next(iter(last)):
        return []
    return [("last", tuple(text.rpartition(".")[0] for text in entry.keys), tuple(text.rpartition(".")[0] for text in entry.values))]


def _merge(key: object, group: Sequence[Said], names: Sequence[str]) -> Said | None:
    assert isinstance(key, tuple)
    rows = tuple(row for each in group for row in each.rows)
    if key[0] == "last":
        words = [each.keys[0].rpartition(".")[2] for each in group]
        if any(set(word) & _MARKS for word in words):
            return None
        slot = f"{{p:{'|'.join(words)}}}"
        return Said(tuple(f"{head}.{slot}" for head in key[1]), tuple(f"{head}.{{p}}" for head in key[2]), rows)
    at, to, before, after, value_before, value_after = key
    words = [each.keys[0].split(".")[at] for each in group]
    others = [each.values[0].split(".")[to] if to >= 0 else "" for each in group]
    if len(set(words)) < len(words) or any(set(word) & _MARKS for word in (*words, *others)) or (to < 0 and group[0].values):
        return None
    head, tail = _affixes(words)
    head2, tail2 = _affixes(others) if to >= 0 else ("", "")
    inner = [word[len(head) : len(word) - len(tail)] for word in words]
    outer = [word[len(head2) : len(word) - len(tail2)] for word in others]
    if not all(inner) or (to >= 0 and not all(outer)):
        head = tail = head2 = tail2 = ""
        inner, outer = words, others
    name = next(letter for letter in ("x", "y", "z", "x2", "y2") if f"{{{letter}:" not in group[0].keys[0])
    choices = [one if one == other or to < 0 else f"{one}={other}" for one, other in zip(inner, outer, strict=True)]
    pattern = ".".join([*before, f"{head}{{{name}:{'|'.join(choices)}}}{tail}", *after])
    values = (".".join([*value_before, f"{head2}{{{name}}}{tail2}", *value_after]),) if to >= 0 else group[0].values
    mine = {row.keys[0] for row in rows}
    if any(Pattern.parse(pattern).match(each) is not None for each in names if each not in mine):
        return None
    return Said((pattern,), values, rows)


def _affixes(words: Sequence[str]) -> tuple[str, str]:
    """What all words begin and end with, cut at `_`."""
    first = min(words, key=len)
    head = 0
    while head < len(first) and all(word[head] == first[head] for word in words):
        head += 1
    head = first[:head].rfind("_") + 1
    tail = 0
    while tail < len(first) - head and all(word[-1 - tail] == first[-1 - tail] for word in words):
        tail += 1
    ending = first[len(first) - tail :] if tail else ""
    cut = ending.find("_")
    return first[:head], ending[cut:] if cut >= 0 else ""


def fanned(texts: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Texts that differ in one segment as one with a choice.

    >>> fanned(["a.q_proj.{p}", "a.k_proj.{p}"])
    ['a.{x:q|k}_proj.{p}']
    """
    split = [text.split(".") for text in texts]
    if len(texts) < 2 or len({len(parts) for parts in split}) > 1:
        return list(texts)
    places = [at for at, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
    if len(places) != 1:
        return list(texts)
    words = [parts[places[0]] for parts in split]
    if len(set(words)) < len(words) or any(set(word) & _MARKS for word in words):
        return list(texts)
    head, tail = _affixes(words)
    inner = [word[len(head) : len(word) - len(tail)] for word in words]
    if not all(inner):
        head, tail, inner = "", "", words
    name = next(letter for letter in ("x", "y", "z", "x2") if letter not in set(taken))
    return [".".join([*split[0][: places[0]], f"{head}{{{name}:{'|'.join(inner)}}}{tail}", *split[0][places[0] + 1 :]])]

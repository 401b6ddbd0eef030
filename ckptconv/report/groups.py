"""A lineage folded for the eye: links that share a source are one figure, figures of one pattern one group, groups of one module a section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from ckptconv.names import collapse, skeleton
from ckptconv.report.links import Lineage, Link
from ckptconv.spec import TensorSpec


class Line(Struct, frozen=True):
    """One line of one side of a group."""

    text: str  #: a template
    count: int
    spec: str  #: the names' one spec, or how many they have
    kind: str = ""  #: of the link that makes it; of the left side none


class Group(Struct, frozen=True):
    """Figures of one pattern: ``blocks.{0-11}.attn.qkv.weight`` split in three, say, twelve times."""

    left: tuple[Line, ...]
    right: tuple[Line, ...]
    kind: str  #: the worst of its links
    figures: tuple[tuple[int, ...], ...]  #: the links of each figure, by their number in the lineage

    @property
    def count(self) -> int:
        return sum(map(len, self.figures))


class Section(Struct, frozen=True):
    """Groups that follow each other in one module of either side. Without names where there is but one group."""

    left: str
    right: str
    groups: tuple[Group, ...]


def sections(lineage: Lineage) -> list[Section]:
    """The whole lineage in the order of its links; every link is in exactly one group.

    >>> from ckptconv.spec import DType
    >>> spec = TensorSpec((2,), DType.float32)
    >>> names = [f"m.layers.{i}.w" for i in range(12)]
    >>> links = tuple(Link("renamed", (name,), name[2:]) for name in names)
    >>> (section,) = sections(Lineage(dict.fromkeys(names, spec), dict.fromkeys((name[2:] for name in names), spec), links))
    >>> group = section.groups[0]
    >>> group.left[0].text, group.right[0].text, group.count
    ('m.layers.{0-11}.w', 'layers.{0-11}.w', 12)
    """
    found: list[Section] = []
    run: list[Group] = []
    left: str | None = None
    right: str | None = None
    for group in _groups(lineage):
        heads = (_module(group.left), _module(group.right))
        if run and all(head is None or known is None or head == known for head, known in zip(heads, (left, right), strict=True)):
            left, right = (known if head is None else head for head, known in zip(heads, (left, right), strict=True))
        else:
            found += [_section(left, right, run)] if run else []
            run = []
            left, right = heads
        run.append(group)
    return found + ([_section(left, right, run)] if run else [])


def _section(left: str | None, right: str | None, run: Sequence[Group]) -> Section:
    return Section(left or "", right or "", tuple(run)) if len(run) > 1 else Section("", "", tuple(run))


def _module(lines: Sequence[Line]) -> str | None:
    """The module that a side's names are in, up to its first number that varies; None for a side without names."""
    if not lines:
        return None
    parts = lines[0].text.split(".")
    numbered = next((at for at, part in enumerate(parts) if "{" in part), None)
    return ".".join(parts[: numbered + 1] if numbered is not None else parts[:1])


def _groups(lineage: Lineage) -> list[Group]:
    patterns: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
    for figure in _figures(lineage.links):
        patterns.setdefault(_pattern(figure, lineage.links), []).append(figure)
    grids = [grid for figures in patterns.values() for grid in _grids(figures, lineage.links)]
    return [_group(figures, lineage) for figures in sorted(grids)]


def _figures(links: Sequence[Link]) -> list[tuple[int, ...]]:
    """Links that share a source, transitively, by their numbers."""
    parent = list(range(len(links)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    owner: dict[str, int] = {}
    for number, link in enumerate(links):
        for name in link.sources:
            other, mine = root(owner.setdefault(name, number)), root(number)
            parent[max(other, mine)] = min(other, mine)
    figures: dict[int, list[int]] = {}
    for number in range(len(links)):
        figures.setdefault(root(number), []).append(number)
    return [tuple(figure) for figure in figures.values()]


def _pattern(figure: tuple[int, ...], links: Sequence[Link]) -> tuple[object, ...]:
    """What figures of one group have in common: what is done, and all of the names but their numbers."""
    mine = [links[number] for number in figure]
    done = dict.fromkeys((link.kind, link.verb, link.how, link.origin, skeleton(link.output)) for link in mine)
    return (*done, *dict.fromkeys(skeleton(name) for link in mine for name in link.sources))


def _grids(figures: list[tuple[int, ...]], links: Sequence[Link]) -> list[list[tuple[int, ...]]]:
    """The figures of one pattern, those apart whose first names do not collapse to one template."""
    if len(figures) == 1:
        return [figures]
    by_name = {_first_name(links[figure[0]]): figure for figure in figures}
    return [[by_name[name] for name in template.names] for template in collapse(list(by_name))]


def _first_name(link: Link) -> str:
    return link.output or link.sources[0]


def _group(figures: list[tuple[int, ...]], lineage: Lineage) -> Group:
    links = [lineage.links[number] for figure in figures for number in figure]
    kinds: dict[str, str] = {}
    for link in links:
        kinds.setdefault(skeleton(link.output), link.kind)
    return Group(
        tuple(_lines((name for link in links for name in link.sources), lineage.left)),
        tuple(_lines((link.output for link in links if link.output), lineage.right, kinds)),
        links[0].kind, tuple(figures),
    )  # fmt: skip


def _lines(names: Iterable[str], specs: Mapping[str, TensorSpec], kinds: Mapping[str, str] | None = None) -> list[Line]:
    found = []
    for template in collapse(list(dict.fromkeys(names))):
        texts = list(dict.fromkeys(str(specs[name]) for name in template.names))
        kind = (kinds or {}).get(skeleton(template.names[0]), "")
        found.append(Line(template.text, len(template.names), texts[0] if len(texts) == 1 else f"{len(texts)} shapes", kind))
    return found

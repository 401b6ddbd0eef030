"""Fan-out and fan-in over placeholders: one name that stands for several, and several that become one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from ckptconv.errors import Refusal, printable
from ckptconv.names import natural_key
from ckptconv.ruleset.patterns import Capture, Index, Pattern, Placeholder, Template
from ckptconv.ruleset.steps.base import Context


def fan_out(templates: Sequence[Template], bound: Sequence[str]) -> Iterator[tuple[Template, Mapping[str, Capture]]]:
    """Every name that ``templates`` stand for, in order, with the choices taken: ``{x:q|k|v}`` gives three where x is not bound."""
    for template in templates:
        fans = template.fan(bound)
        for words in itertools.product(*([right for _, right in fan.choices] for fan in fans)):
            yield template, {fan.name: word for fan, word in zip(fans, words, strict=True)}


class Group(Struct):
    """The members of one fan-in: for each pattern, its names by the values of the placeholders that are gathered over."""

    captures: Mapping[str, Capture]
    members: list[dict[tuple[Capture, ...], str]] = field(default_factory=list)

    def names(self) -> Iterator[str]:
        for member in self.members:
            yield from member.values()


def grouped(
    claims: Iterable[tuple[str, int, Mapping[str, Capture]]], patterns: Sequence[Pattern], over: Sequence[str], context: Context
) -> list[Group]:
    """Claims gathered into groups that agree on every placeholder but ``over``.

    Every pattern must have its members in every group, over the same values, integers running from 0 without a gap; what is missing
    is a problem (CK205) that names the gap, and its group is left out.
    """
    groups: dict[tuple[tuple[str, Capture], ...], Group] = {}
    for name, at, captures in claims:
        key = tuple(sorted((key, value) for key, value in captures.items() if key not in over))
        group = groups.setdefault(key, Group(dict(key), [{} for _ in patterns]))
        group.members[at][tuple(captures[key] for key in over if key in captures)] = name
    whole = []
    for group in groups.values():
        try:
            group.members = _complete(group, patterns, over)
        except Refusal as refusal:
            context.refused(refusal)
        else:
            whole.append(group)
    return whole


def _complete(group: Group, patterns: Sequence[Pattern], over: Sequence[str]) -> list[dict[tuple[Capture, ...], str]]:
    at = ", ".join(f"{key}={value}" for key, value in group.captures.items())
    place = f" at {printable(at)}" if at else ""
    members: list[dict[tuple[Capture, ...], str]] = []
    for pattern, found in zip(patterns, group.members, strict=True):
        if not found:
            have = next(group.names())
            raise Refusal(f"{pattern.text!r} has no tensor{place}", code="CK205", found=f"only {printable(have)} and its like")
        gathered = [placeholder for placeholder in pattern.placeholders if placeholder.name in over]
        wanted = list(
            itertools.product(*(_range(placeholder, column, pattern, place) for placeholder, column in _columns(gathered, found)))
        )
        missing = [key for key in wanted if key not in found]
        if missing:
            gap = ", ".join(f"{placeholder.name}={value}" for placeholder, value in zip(gathered, missing[0], strict=True))
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise Refusal(f"{pattern.text!r} has a gap{place}: {gap}{more}", code="CK205", found=f"{len(found)} of {len(wanted)} members")
        members.append({key: found[key] for key in wanted})
    if over and any([*member] != [*members[0]] for member in members if len(next(iter(member))) == len(next(iter(members[0])))):
        counts = ", ".join(f"{pattern.text!r}: {len(member)}" for pattern, member in zip(patterns, members, strict=True))
        raise Refusal(f"the patterns have different members{place}", code="CK205", found=counts)
    return members


def _columns(placeholders: Sequence[Placeholder], found: Mapping[tuple[Capture, ...], str]) -> Iterator[tuple[Placeholder, list[Capture]]]:
    for position, placeholder in enumerate(placeholders):
        yield placeholder, list(dict.fromkeys(key[position] for key in found))


def _range(placeholder: Placeholder, values: list[Capture], pattern: Pattern, place: str) -> list[Capture]:
    """All values that a gathered placeholder must have, in order: choices as written, integers from 0, other words sorted."""
    if placeholder.kind == "choice":
        return [right for _, right in placeholder.choices]
    if placeholder.kind == "int":
        top = max(int(value) for value in values)
        if top >= 100_000:
            raise Refusal(f"{pattern.text!r} gathers over {placeholder.name}={top}{place}; at most 100,000 members", code="CK211")
        return [Index(str(number)) for number in range(top + 1)]
    return sorted(values, key=lambda value: natural_key(str(value)))

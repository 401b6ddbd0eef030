"""Every recogniser in its order, and the fold: what one explains, the later ones do not see. Adding a cause is a function and a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptconv.compare import shared_prefix
from ckptconv.explain import contents, modules, sizes, variants, wrapping
from ckptconv.explain.sides import Cause, FileFacts, Part, Sides
from ckptconv.spec import Manifest

Recogniser = Callable[[Sides], Cause | None]
#: Names that are right but for something around them; then what is wrong under the right names; then what only one side has.
AROUND: tuple[Recogniser, ...] = (wrapping.wrapper, wrapping.flattened, wrapping.doubled, wrapping.prefix)
INSIDE: tuple[Recogniser, ...] = (*variants.RECOGNISERS, *sizes.RECOGNISERS, *modules.RECOGNISERS, *modules.LEFTOVERS)


def of_file(file: FileFacts, part: Part | None, wanted: Manifest | None) -> list[Cause]:
    """What the file is, and what of that keeps it from loading."""
    return [cause for recognise in contents.RECOGNISERS if (cause := recognise(file, part, wanted)) is not None]


def of_sides(both: Sides, known: Sequence[Cause] = (), *, without: frozenset[str] = frozenset()) -> list[Cause]:
    """Every difference with its cause, those that ``known`` causes explain left out; ``without`` are kinds that are known to be none."""
    found: list[Cause] = []
    left = both.without(name for cause in known for name in cause.names)
    for recognise in AROUND:
        cause = recognise(left)
        if cause is None:
            continue
        found.append(cause)
        if cause.kind == "wrapper":  # what stands under the wrapper is looked at without it
            left = wrapping.without_wrappers(left)
        elif cause.kind == "prefix":
            left = wrapping.without_prefix(
                left, shared_prefix(left.unexpected, left.missing) or shared_prefix(left.missing, left.unexpected)
            )
        else:
            left = left.without(cause.names)
    for recognise in INSIDE:
        cause = recognise(left)
        if cause is not None and cause.kind not in without:
            found.append(cause)
            if cause.fatal:  # it explains everything: what is missing of another model is no cause of its own
                break
            left = left.without(cause.names)
    return found

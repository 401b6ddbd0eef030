"""Forward, then back: does the written output give the source's own bytes back through the derived inverse?"""

from __future__ import annotations

from collections.abc import Mapping

import xxhash
from msgspec import Struct

from ckptconv.errors import Problem, printable
from ckptconv.execute.memory_run import computed
from ckptconv.execute.sources import Sources, bytes_of
from ckptconv.formats.base import Placed
from ckptconv.invert import Lost, invert
from ckptconv.names import collapse
from ckptconv.plan import Plan, Read


class RoundTrip(Struct, frozen=True):
    """How many source tensors came back equal, which did not, and which cannot."""

    equal: int
    problems: tuple[Problem, ...]
    lost: tuple[Lost, ...]

    @property
    def sentence(self) -> str:
        """For the screen: what came back, and what cannot with the reason of the first."""
        text = f"{self.equal:,} source tensors come back byte-equal"
        if not self.lost:
            return text
        shown = ", ".join(str(template) for template in collapse([each.name for each in self.lost])[:3])
        return f"{text}; {len(self.lost):,} cannot ({printable(shown)}: {printable(self.lost[0].reason)})"


def round_trip(
    plan: Plan, written: Mapping[str, Placed], reopened: Sources, written_digests: Mapping[str, str], source_digests: Mapping[str, str]
) -> RoundTrip:
    """Runs the inverse of ``plan`` on the written file, island by island, and compares digests with the source's."""
    inversion = invert(plan)
    equal = 0
    problems: list[Problem] = []

    def judge(name: str, digest: str) -> None:
        nonlocal equal
        if digest == source_digests[name]:
            equal += 1
        elif len(problems) < 20:
            problems.append(Problem("CK409", f"{printable(name)} does not come back as it was"))

    for island in inversion.plan.islands():
        copies = [output for output in island if isinstance(output.expr, Read)]
        for output in copies:
            judge(output.name, written_digests[output.expr.name])  # type: ignore[union-attr]  # a Read, two lines above
        rest = [output for output in island if not isinstance(output.expr, Read)]
        for output, value in computed(rest, lambda node: reopened.read_tensor(written[node.name])):
            judge(output.name, xxhash.xxh3_128_hexdigest(bytes_of(value.resolve_conj().resolve_neg().contiguous())))
    return RoundTrip(equal, tuple(problems), inversion.lost)

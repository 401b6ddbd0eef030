"""Rungs L0 to L6: the output is whole, every key is accounted for, the model loads it strictly, no value was lost or doubled, the source
comes back from it, the model computes what it should, and if not, which of its modules is the first to compute something else.

Strict loading alone proves little (in common models most keys share their shape with another key), so each rung looks at something
else. A rung that cannot be climbed says why; a rung that fails stops the climb.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv import formats
from ckptconv.compare import Allow, compare
from ckptconv.errors import CkptconvError, InputError, Problem, Refusal, printable
from ckptconv.execute.digest import digest_spans, digest_tensors
from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Container, Placed
from ckptconv.names import collapse
from ckptconv.places.presence import bring
from ckptconv.plan import Apply, Fill, Output, Plan, Read, reads
from ckptconv.ranges import as_spans
from ckptconv.spec import Manifest
from ckptconv.verify.rungs import Ladder, Rung

if TYPE_CHECKING:
    from ckptconv.target import Builder, Target
    from ckptconv.verify.parity import ParityReport, ParityRequest


class Evidence(Struct, frozen=True):
    """What there is to verify with. Only ``files`` and ``format`` are always there."""

    files: Sequence[Path]  #: the written files, staged or published
    read: Callable[[], formats.Contents]  #: opens the written output anew
    format: str
    container: str = "."  #: where in the written file the state_dict stands
    plan: Plan | None = None
    source: Mapping[str, Placed] | None = None
    source_files: Sequence[Path] = ()
    source_digests: Mapping[str, str] = field(default_factory=dict)  #: of the source's tensors; empty: not taken
    computed: Mapping[str, str] = field(default_factory=dict)  #: digests of outputs, from when they were computed or copied
    crc32: Mapping[str, int] = field(default_factory=dict)  #: and the CRC-32s of the same bytes
    target: Target | None = None
    wanted: Manifest | None = None
    builder: Builder | None = None  #: of the target, with the model that told what is wanted
    allow: Allow = field(default_factory=Allow)
    parity: ParityRequest | None = None
    timeout: float = 300.0
    threads: int = 2
    progress: Callable[[int], None] | None = None  #: takes the bytes that are read back
    #: where the moments of an optimizer lie in what was written, with all of its files; raises a refusal where they do not
    moments: Callable[[formats.Contents], tuple[Mapping[str, Placed], tuple[Path, ...]]] | None = None


class _Climb:
    """The state of one climb: what a rung finds out is there for the next."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.written: Container | None = None
        self.written_files: tuple[Path, ...] = ()
        self.placed: dict[str, Placed] = {}  #: everything that was written: the state_dict and, where they follow it, the moments
        self.digests: dict[str, str] = {}
        self.compared: set[str] = set()  #: computed outputs whose bytes are known to be the right ones, order included
        self.outputs: ParityReport | None = None

    def integrity(self) -> Rung:
        """L0: the output, opened anew, is the plan's manifest, and its bytes are those that were read or computed."""
        evidence = self.evidence
        try:
            contents = evidence.read()
        except Refusal as refusal:
            return _failed(0, "the output cannot be read back", [refusal.at(str(evidence.files[0]))])
        except OSError as error:
            what, where = f"the written output cannot be read back: {error.strerror}", printable(evidence.files[0])
            return _failed(0, "the output cannot be read back", [Problem("CK407", what, where=where, try_="write elsewhere")])
        if self.evidence.container not in contents.containers:
            return _failed(
                0, "the output holds no state_dict", [Problem("CK407", "the written state_dict is not found", where=str(evidence.files[0]))]
            )
        self.written = contents.containers[self.evidence.container]
        self.written_files, self.placed = contents.files, dict(self.written.tensors)
        try:
            if evidence.moments is not None:
                moments, self.written_files = evidence.moments(contents)
                self.placed.update(moments)
            with Sources(self.written_files) as opened:
                self.digests = digest_tensors(
                    opened, self.placed, threads=evidence.threads, checked=self._known_crc32(), progress=evidence.progress
                )
        except Refusal as refusal:
            return _failed(0, "the written optimizer differs from the plan", [refusal.at(str(evidence.files[0]))])
        except InputError as error:
            return _failed(0, "the output cannot be read back", list(error.problems))
        if evidence.plan is None:
            return Rung(0, "passed", f"{len(self.written.tensors):,} tensors read back, checksums match")
        problems = _manifest_problems(self.written.manifest, evidence.plan.manifest)
        ranges = self._ranges(evidence.plan)
        self.compared = {*evidence.computed, *ranges}
        for output in evidence.plan.stored:
            wanted = ranges.get(output.name) or self._wanted_digest(output)
            if wanted is not None and self.digests.get(output.name) != wanted:
                found = "the bytes in the file are not those of the plan"
                problems.append(Problem("CK407", f"{printable(output.name)}: {found}", where=str(output.origin)))
        if problems:
            return _failed(0, "the written output differs from the plan", problems)
        against = ", bytes equal to the source or to what was computed" if evidence.source_digests else ""
        return Rung(0, "passed", f"{len(self.digests):,} tensors read back, digests match{against}")

    def _known_crc32(self) -> set[tuple[int, int]]:
        """Storages whose recorded CRC-32 is that of the bytes which their digests will be compared with: equal digests prove both."""
        evidence = self.evidence
        if evidence.plan is None:
            return set()
        names = [output.name for output in evidence.plan.stored if output.name in evidence.computed and output.name in self.placed]
        storages = {name: self.placed[name].storage for name in names}
        return {(each.file, each.offset) for name, each in storages.items() if each.crc32 == evidence.crc32.get(name, -1)}

    def _ranges(self, plan: Plan) -> dict[str, str]:
        """Digests, from the source, of outputs that are ranges of its bytes, where they were not taken when these were copied."""
        source, known = self.evidence.source, self.evidence.computed
        if source is None:
            return {}
        made = [output for output in plan.stored if isinstance(output.expr, Apply) and output.name not in known]
        spans = {output.name: found for output in made if (found := as_spans(output.expr, source)) is not None}
        with Sources(self.evidence.source_files) as opened:
            return digest_spans(opened, spans, threads=self.evidence.threads)

    def _wanted_digest(self, output: Output) -> str | None:
        if isinstance(output.expr, Read):
            return self.evidence.source_digests.get(output.expr.name)
        return self.evidence.computed.get(output.name)

    def accounting(self) -> Rung:
        """L1: each source key is used or dropped by a step; each target key is filled, tied, or allowed to be missing."""
        plan, wanted = self.evidence.plan, self.evidence.wanted
        sentences, problems = [], []
        if plan is not None:
            aliases = plan.source.aliases
            used = {name for output in plan.stored for name in reads(output.expr)}
            gone = {aliases.get(name, name) for drop in plan.dropped for name in drop.sources}
            lost = [name for name in plan.source.tensors if aliases.get(name, name) not in used | gone]
            problems += [
                Problem("CK409", f"{template} of the source is neither used nor dropped by a step") for template in collapse(lost)[:10]
            ]
            only_dropped = sum(aliases.get(name, name) not in used for name in plan.source.tensors)
            sentences.append(
                f"{len(plan.source) - only_dropped:,} source keys used" + (f", {only_dropped:,} dropped by a step" if only_dropped else "")
            )
        if wanted is not None:
            found = plan.manifest if plan is not None else self.manifest()
            comparison = compare(found, wanted, self.evidence.allow)
            problems += comparison.problems()
            allowed = len(comparison.allowed_missing)
            sentences.append(f"{len(wanted) - allowed:,} target keys filled" + (f", {allowed:,} allowed to be missing" if allowed else ""))
        if not sentences:
            return Rung(1, "skipped", "neither a plan nor a target to count against")
        return _failed(1, "keys are not accounted for", problems) if problems else Rung(1, "passed", "; ".join(sentences))

    def manifest(self) -> Manifest:
        """What was written, as it was read back."""
        assert self.written is not None, "L0 comes first"
        return self.written.manifest

    def strict(self) -> Rung:
        """L2: the real model, built on the meta device, loads the written file with ``strict=True, assign=True``."""
        from ckptconv.target import Builder

        evidence = self.evidence
        if evidence.target is None:
            return Rung(2, "skipped", "no target; name one with --target")
        if not evidence.target.is_model:
            return Rung(2, "skipped", "the target is a manifest, not a model: names, shapes and dtypes were compared in L1")
        assert evidence.wanted is not None
        comparison = compare(self.manifest(), evidence.wanted, evidence.allow)
        other = [
            name for name, spec in self.manifest().tensors.items() if name in evidence.wanted and evidence.wanted[name].shape != spec.shape
        ]
        if other:
            shown = ", ".join(str(template) for template in collapse(other)[:3])
            return Rung(2, "skipped", f"the rule allows other shapes than the model's, which nothing can load: {printable(shown)}")
        for file in evidence.files:
            bring(file)  # another process reads them
        # What the rule lets through on purpose is told to the loader; everything else must be as strict as torch can be.
        with evidence.builder or Builder(evidence.target) as builder:
            result = builder.strict_load(evidence.files, evidence.format, timeout=evidence.timeout,
                                         allow_missing=comparison.allowed_missing, allow_unexpected=comparison.allowed_unexpected,
                                         container=evidence.container)  # fmt: skip
        if not result.loaded:
            return _failed(
                2, "load_state_dict(strict=True) failed", [Problem("CK408", printable(result.error, 1000), where=evidence.target.text)]
            )
        how = "strict=True, assign=True" if not comparison.allowed_missing else "strict but for the keys that are allowed to be missing"
        said = "".join(f"; {note}" for note in result.notes[:3])
        return Rung(2, "passed", f"{evidence.target.text} loaded the written file ({how}){said}")

    def values(self) -> Rung:
        """L3: nothing lost, nothing doubled, modulo the plan's own transforms."""
        from ckptconv.verify.values import conserved

        evidence = self.evidence
        if evidence.plan is None or evidence.source is None:
            return Rung(3, "skipped", "no source to compare with; name it with --against and --rules")
        assert self.written is not None
        copied = [output for output in evidence.plan.stored if isinstance(output.expr, Read)]
        made = [output for output in evidence.plan.stored if isinstance(output.expr, Fill)]
        with Sources(evidence.source_files) as opened, Sources(self.written_files) as reopened:
            result = conserved(evidence.plan, evidence.source, opened, self.placed, reopened, self.compared)
        problems = [
            Problem("CK407", f"{printable(output.name)}: the bytes differ from the source's", where=str(output.origin))
            for output in copied
            if evidence.source_digests.get(output.expr.name) != self.digests.get(output.name)  # type: ignore[union-attr]
        ]
        problems += result.problems
        if problems:
            return _failed(3, "values were lost or doubled", problems)
        counts = [
            (len(copied), "equal bit by bit"),
            (result.conserved, "hold exactly their sources' elements"),
            (result.recomputed, "equal to a second computation"),
            (len(made), "filled"),
        ]
        return Rung(3, "passed", "; ".join(f"{count:,} tensors {what}" for count, what in counts if count))

    def round_trip(self) -> Rung:
        """L4: the derived inverse, run on the written file, gives the source's own bytes back."""
        from ckptconv.verify.roundtrip import round_trip

        evidence = self.evidence
        if evidence.plan is None or not evidence.source_digests:
            return Rung(4, "skipped", "no source to come back to; name it with --against and --rules")
        assert self.written is not None
        with Sources(self.written_files) as reopened:
            result = round_trip(evidence.plan, self.placed, reopened, self.digests, evidence.source_digests)
        if result.problems:
            return _failed(4, "the source does not come back", result.problems)
        return Rung(4, "passed", result.sentence)

    def parity(self) -> Rung:
        """L5: both models, run on the same inputs, give equal outputs; or the converted one gives the output that is expected of it."""
        request = self.evidence.parity
        if request is None:
            return Rung(5, "skipped", "not climbed: no --parity source=… or golden=…")
        from ckptconv.verify.parity import parity

        self.outputs = report = parity(request, self.evidence.timeout)
        notes = (*report.warnings, *(printable(note) for note in report.notes))
        if not report.equal:
            problem = Problem("CK412", report.sentence, where=printable(request.target.target.text),
                              found=printable("; ".join(report.differences[:5]), 600))  # fmt: skip
            why = "" if report.verdict == "differs" else f": {report.verdict}"
            return replace(_failed(5, f"the outputs differ{why}", [problem]), notes=notes)
        lost = tuple(f"without effect on the output here: {printable(text)}" for text in report.differences[:5])
        return Rung(5, "passed", report.sentence, notes=(*lost, *notes))

    def divergence(self) -> Rung:
        """L6: where the outputs differ, the first pair of modules that gives different outputs."""
        report, request = self.outputs, self.evidence.parity
        if report is None or request is None:
            return Rung(6, "skipped", "not climbed: no models were compared")
        if report.equal:
            return Rung(6, "skipped", "nothing to look for: the outputs are equal")
        if request.source is None:
            return Rung(6, "skipped", "not climbed: a golden output has no modules to compare with; name the model with --parity source=…")
        if report.diverges is None:
            return Rung(6, "skipped", "the outputs differ, but no pair of modules does that could be told to belong together")
        source, target = (printable(name) or "(the model)" for name in (report.diverges.source, report.diverges.target))
        where = f"{printable(request.source.target.text)} / {printable(request.target.target.text)}"
        return _failed(6, f"{source} / {target}", [Problem("CK412", str(report.diverges), where=where)])


def climb(evidence: Evidence, level: int = 3) -> Ladder:
    """Climbs up to ``level``, stopping at the first rung that fails. Raises only for what is no verdict (a source that changed).

    Where the outputs differ the climb goes on to L6 unasked: the run that told so knows the module, and nobody should need a second.
    """
    state = _Climb(evidence)
    rungs: list[Rung] = []
    every = (state.integrity, state.accounting, state.strict, state.values, state.round_trip, state.parity, state.divergence)
    for number, rung in enumerate(every):
        if number > level:
            break
        try:
            rungs.append(rung())
        except CkptconvError as error:
            if error.exit_code != 4:
                raise
            rungs.append(_failed(number, "could not be built or compared", error.problems))
        if rungs[-1].status != "failed":
            continue
        if state.outputs is None or number != 5:
            break
        level = max(level, 6 if state.outputs.diverges is not None else 5)
    return Ladder(tuple(rungs), state.outputs)


def _failed(level: int, sentence: str, problems: Sequence[Problem]) -> Rung:
    return Rung(level, "failed", sentence, tuple(problems))


def _manifest_problems(found: Manifest, wanted: Manifest) -> list[Problem]:
    problems = []
    if set(found.tensors) != set(wanted.tensors):
        different = sorted(set(found.tensors) ^ set(wanted.tensors))
        problems.append(Problem("CK407", "the written file holds other names than the plan", found=printable(", ".join(different[:5]))))
    for name, spec in wanted.tensors.items():
        if name in found and found[name] != spec:
            problems.append(Problem("CK407", f"{printable(name)}: written as {found[name]}, planned as {spec}"))
    if {frozenset(group) for group in found.ties} != {frozenset(group) for group in wanted.ties}:
        problems.append(
            Problem(
                "CK407",
                "the written file ties other names than the plan",
                found=printable(found.ties),
                try_=f"planned: {printable(wanted.ties)}",
            )
        )
    return problems[:20]

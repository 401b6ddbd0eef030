"""From a prepared conversion to a published output: lay out, fill, verify, stamp, rename into place.

The output is verified while it is still staged. Whatever goes wrong, nothing stands under the final name that was not there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckptconv import formats
from ckptconv._version import __version__
from ckptconv.errors import FitError, OutputError, Problem, Refusal, UsageError, printable
from ckptconv.execute.digest import content_digest, digest_tensors
from ckptconv.execute.engine import Receipt, fill, seal_all
from ckptconv.execute.nonfinite import nonfinite_counts
from ckptconv.execute.sources import Sources
from ckptconv.execute.staging import Place, Staging, refuse_overlap
from ckptconv.formats.base import FileLayout, Placed
from ckptconv.layout import (
    FORMAT_OF_SUFFIX,
    Layout,
    carried_tree,
    entries_beside,
    lay_out,
    not_written_here,
    parse_size,
    renamed_versions,
    written_like,
)
from ckptconv.memory import plan_peak
from ckptconv.names import collapse
from ckptconv.places.presence import bring, keeper_of
from ckptconv.places.visiting import recorded_place
from ckptconv.plan import Read, reads
from ckptconv.ranges import phases_of
from ckptconv.stage.preparing import Options, Prepared
from ckptconv.stage.recorded import OURS
from ckptconv.tasks import computed_islands
from ckptconv.verify import Evidence, Ladder, climb

Progress = Callable[[str, int, int], None]
_PROVED_WIDTH = len("L0 L1 L2 L3 L4 L5 L6")
_DIGEST_WIDTH = len("xxh3_128:") + 32
MAX_NAMED = 10


class Shape(Struct, frozen=True):
    """What the output will be: file or folder, and its format."""

    destination: Path
    format: str
    is_folder: bool
    shard_nbytes: int | None


class Produced(Struct, frozen=True):
    """What was written, and how far it is proved."""

    shape: Shape
    layout: Layout
    receipt: Receipt
    ladder: Ladder
    source_digest: str
    left_out: tuple[str, ...]  #: entries of the source that could not be carried along
    notes: tuple[str, ...] = ()


def shape_of(prepared: Prepared, destination: Path, options: Options) -> Shape:
    """File or folder, and its format: from the options, the destination's name, or the source, in this order."""
    suffix_format = FORMAT_OF_SUFFIX.get(destination.suffix)
    # A folder's name may have dots in it (llama-3.1-8b); a file's suffix that says nothing is rather a slip.
    there = os.path.isdir(destination)  # unlike Path.is_dir, it has an answer for a name that is too long
    nameless = suffix_format is None and bool(destination.suffix) and not there and not prepared.source.path.is_dir()
    nameless = nameless and options.format != "dcp"
    if nameless and options.format is None:
        raise UsageError(
            Problem("CK107", f"{printable(destination.suffix)} says no format", where=printable(destination),
                    try_="--format torch or safetensors for a file of this name, or a folder that is there")
        )  # fmt: skip
    is_folder = there or (suffix_format is None and not nameless)
    if options.format is not None and options.format not in formats.WRITERS:
        raise UsageError(Problem("CK107", f"there is no output format {printable(options.format)!r}", try_=", ".join(formats.WRITERS)))
    if options.shard_size is not None and not is_folder:
        raise UsageError(Problem("CK107", "shards need a folder", where=printable(destination), try_="a destination without a suffix"))
    if options.format is not None and suffix_format not in (None, options.format) and not is_folder:
        raise UsageError(
            Problem("CK107", f"--format {options.format}, but the destination's name says {suffix_format}", where=printable(destination))
        )
    format = options.format or (None if is_folder else suffix_format) or written_like(prepared.source.contents)  # noqa: A001
    if format == "dcp" and not is_folder:
        raise UsageError(
            Problem(
                "CK107", "a torch.distributed.checkpoint is a folder", where=printable(destination), try_="a destination without a suffix"
            )
        )
    shards = parse_size(options.shard_size or "5GB") if is_folder else None
    return Shape(destination, format, is_folder, shards)


class Conversion(Struct, frozen=True):
    """A prepared conversion with its destination, laid out: every output has its place, and no byte is written yet."""

    prepared: Prepared
    destination: Path
    options: Options
    shape: Shape
    layout: Layout
    kept: Mapping[str, Placed]  #: tensors of the source that are carried along beside the state_dict, by slot
    left_out: tuple[str, ...]

    @property
    def beside(self) -> tuple[Path, ...]:
        """Files of the source's folder that come along."""
        return self.prepared.source.contents.neighbours if self.shape.is_folder else ()

    @property
    def nbytes(self) -> int:
        """What will be on the disk."""
        return self.layout.nbytes + sum(neighbour.stat().st_size for neighbour in self.beside if neighbour.is_file())

    @property
    def untouched_nbytes(self) -> int:
        """Of the source, what no output takes: it is read for the source's digest alone."""
        return _untouched_nbytes(self.prepared)

    def sources(self) -> Sources:
        """The source's files, to be opened: the same that were planned for, or refused."""
        return Sources(self.prepared.source.files, self.prepared.source.contents.identities)

    def meter(self, progress: Progress | None) -> Meter:
        """One measure over everything that is written, and read back where that is wanted."""
        total = sum(slot.nbytes for file in self.layout.files for slot in file.slots.values())
        if self.options.level is not None:  # what the output does not take of the source is read, too
            total = 2 * total + _untouched_nbytes(self.prepared)
        return Meter(progress or (lambda _stage, _done, _total: None), total)


def estimate(prepared: Prepared, destination: Path | None, options: Options) -> tuple[Conversion | None, int, int]:
    """What producing would write, how many bytes of it are computed, and its peak memory in bytes; pure."""
    islands = computed_islands(prepared.plan.stored, prepared.source.placed)
    computed = sum(output.expr.spec.nbytes for island in islands for output in island)
    made = None if destination is None else _lay(prepared, shape_of(prepared, destination, options), options)
    return made, computed, plan_peak(islands, options.threads)


def begin(prepared: Prepared, destination: Path, options: Options) -> Conversion:
    """The conversion laid out, and everything refused that can be refused before a byte is written."""
    shape = shape_of(prepared, destination, options)
    refuse_overlap(destination, [prepared.source.path, *prepared.source.files])
    if options.force:
        _refuse_more_than_a_checkpoint(destination)
    made = _lay(prepared, shape, options)
    _check_size(made.layout, destination, options)
    return made


def produce(prepared: Prepared, destination: Path, options: Options, progress: Progress | None = None) -> Produced:
    """Writes the output, verifies it, and renames it into place.

    Raises :class:`~ckptconv.errors.OutputError`, :class:`~ckptconv.errors.FitError` (verification) or
    :class:`~ckptconv.errors.InputError` (the source changed or is damaged); in every case the destination is as it was.
    """
    made = begin(prepared, destination, options)
    max_memory = parse_size(options.max_memory) if options.max_memory else None
    meter = made.meter(progress)
    with Staging(destination, is_folder=made.shape.is_folder, force=options.force, nbytes=made.nbytes) as staging, made.sources() as opened:
        receipt = fill(prepared.plan, prepared.source.placed, opened, _named(made.layout, staging), staging.folder, kept=made.kept,
                       threads=options.threads, max_memory=max_memory, digests=options.level is not None, sync=options.sync,
                       progress=meter.counted("writing"))  # fmt: skip
        return conclude(made, staging, opened, receipt, meter)


def conclude(made: Conversion, place: Place, opened: Sources, receipt: Receipt, meter: Meter) -> Produced:
    """What comes after filling, whoever filled: seal, verify, stamp, rename into place. Raises as :func:`produce` does."""
    prepared, options, layout, source = made.prepared, made.options, made.layout, made.prepared.source
    folder, files = place.folder, [place.path_of(file.name) for file in layout.files]
    named, metadata = _named(layout, place), dict(layout.files[0].metadata)
    seal_all(named, receipt, metadata, folder)
    if layout.index is not None:
        place.path_of(layout.index[0]).write_bytes(layout.index[1])
    if options.forbid_nonfinite:
        _check_finite(prepared, folder if made.shape.is_folder else files[0], options)
    ladder, source_digest = Ladder(), ""
    if options.level is not None:
        digests = digest_tensors(opened, _compared(prepared), threads=options.threads, known=receipt.source_digests, checked=receipt.checked,
                                 progress=meter.counted("reading"))  # fmt: skip
        source_digest = content_digest(source.manifest, digests) if len(digests) == len(source.placed) else ""
        ladder = climb(_evidence(prepared, made.shape, folder, files, digests, receipt, options, meter.counted("verifying")), options.level)
    opened.check_unchanged()
    if ladder.failed is not None:
        rung = ladder.failed
        problems = ladder.problems or [Problem("CK407", rung.sentence, where=f"L{rung.level} {rung.name}")]
        raise FitError(problems, ladder.to_json(), prepared)
    metadata[OURS + "source_digest"] = (source_digest or "not taken").ljust(_DIGEST_WIDTH)
    metadata[OURS + "verified"] = ladder.reached.ljust(_PROVED_WIDTH)
    seal_all(named, receipt, metadata, folder)
    _copy_neighbours(made.beside, place)
    place.publish(sync=options.sync)
    return Produced(made.shape, layout, receipt, ladder, source_digest, made.left_out)


def _check_finite(prepared: Prepared, written: Path, options: Options) -> None:
    contents = formats.read(written)
    container = contents.containers[prepared.source.container.path if options.keep_extras else "."]
    with Sources(contents.files) as opened:
        counts = nonfinite_counts(opened, container.tensors)
    if counts:
        origins = {output.name: str(output.origin) for output in prepared.plan.outputs}
        raise FitError([
            Problem("CK414", f"{printable(name)}: {count:,} of {container.tensors[name].spec.numel:,} values are NaN or infinite",
                    where=origins[name], try_="leave --forbid-nonfinite out, if they are meant")
            for name, count in list(counts.items())[:MAX_NAMED]
        ])  # fmt: skip


def noticed(receipt: Receipt) -> list[str]:
    """Sentences on what was done to values, outputs that only differ in their numbers together."""
    by_kind: dict[str, dict[str, int]] = {}
    for name, counts in receipt.noticed.items():
        for what, count in counts.items():
            by_kind.setdefault(what, {})[name] = count
    return [
        f"{printable(template)}: {sum(counts[name] for name in template.names):,} values {what}"
        for what, counts in by_kind.items()
        for template in collapse(list(counts))[:MAX_NAMED]
    ]


def _check_size(layout: Layout, destination: Path, options: Options) -> None:
    nbytes = sum(file.nbytes for file in layout.files)
    if options.max_output is not None and nbytes > parse_size(options.max_output):
        raise UsageError(
            Problem("CK211", f"the output would have {nbytes:,} bytes; --max-output allows {parse_size(options.max_output):,}",
                    where=printable(destination), try_=f"--max-output {nbytes // 10**6 + 1}MB, if that is meant")
        )  # fmt: skip


def _lay(prepared: Prepared, shape: Shape, options: Options) -> Conversion:
    source, plan = prepared.source, prepared.plan
    tree, kept, left_out = None, dict[str, Placed](), list[str]()
    if options.keep_extras:
        if shape.format != "dcp" and (shape.format != "torch" or shape.is_folder):
            what = "--keep-extras needs a single .pth output, or --format dcp: safetensors holds tensors only"
            if options.optimizer is not None:
                what = (
                    "--optimizer keeps a training checkpoint's entries, in a single .pth output or by --format dcp; or, from --optimizer-file, beside "
                    "a folder's weights"
                )
            raise UsageError(Problem("CK107", what))
        if shape.format != "dcp" and source.container.path == "." and entries_beside(source.contents.tree, source.container):
            what = "the state_dict stands at the file's top, among the other entries; only --format dcp keeps them so"
            raise UsageError(
                Problem("CK107", what, where=printable(source.path), try_="--format dcp and a folder, or leave --keep-extras out")
            )
        try:
            contents = prepared.optimizer.put_into(source.contents) if prepared.optimizer is not None else source.contents
            tree, kept, left_out = carried_tree(contents, source.container)
        except Refusal as refusal:
            raise UsageError(refusal.at(printable(source.path))) from None
    renamed = {output.expr.name: output.name for output in plan.outputs if isinstance(output.expr, Read)}
    together: list[list[str]] = []
    if shape.shard_nbytes is not None and plan.manifest.nbytes > shape.shard_nbytes:  # so that no task computes what another does too
        weights = [output for output in plan.stored if output.name in plan.manifest]
        together = [[output.name for output in island] for island in computed_islands(weights, source.placed) if len(island) > 1]
    layout = lay_out(
        plan.manifest, shape.destination, format=shape.format, is_folder=shape.is_folder, shard_nbytes=shape.shard_nbytes,
        metadata=_metadata(prepared), module_versions=renamed_versions(source.container.module_versions, renamed) or None, tree=tree,
        phases=phases_of(plan.stored, source.placed), together=together,
    )  # fmt: skip
    if prepared.optimizer is not None and prepared.optimizer.is_apart:
        if not shape.is_folder:
            what = "the optimizer's state is in a file of its own, and gets one"
            raise UsageError(Problem("CK107", what, where=printable(shape.destination), try_="a folder as DST"))
        beside, kept = prepared.optimizer.file_of_its_own(source.contents, _metadata(prepared))
        layout = replace(layout, files=(*layout.files, beside))
    return Conversion(prepared, shape.destination, options, shape, layout, kept, tuple(left_out))


def _metadata(prepared: Prepared) -> dict[str, str]:
    """The provenance that every output carries; what is not known yet has its final length."""
    aliases = prepared.source.manifest.aliases
    foreign = {
        key: value
        for key, value in prepared.source.contents.metadata.items()
        if not key.startswith(OURS) and key != "format" and key not in aliases
    }
    return {
        **foreign,
        OURS + "version": __version__,
        OURS + "rules": prepared.label,
        OURS + "rules_digest": f"sha256:{prepared.rules_digest}",
        **({OURS + "source": place} if (place := recorded_place(prepared.source.path)) else {}),
        OURS + "source_digest": "pending".ljust(_DIGEST_WIDTH),
        OURS + "verified": "pending".ljust(_PROVED_WIDTH),
        **({OURS + "optimizer": prepared.optimizer.word} if prepared.optimizer is not None else {}),
    }


def _evidence(
    prepared: Prepared, shape: Shape, folder: Path, files: list[Path], digests: Mapping[str, str], receipt: Receipt, options: Options,
    progress: Callable[[int], None],
) -> Evidence:  # fmt: skip
    written, container = folder if shape.is_folder else files[0], prepared.source.container.path if options.keep_extras else "."
    parity = prepared.parity.request(written, container, prepared.plan, prepared.source, prepared.comparison) if prepared.parity else None
    carried = prepared.optimizer
    if carried is not None and carried.is_apart:
        files = files[:-1]
    return Evidence(
        files=files, read=lambda: formats.read(written), format=shape.format, plan=prepared.plan,
        source=prepared.source.placed, source_files=prepared.source.files, source_digests=digests, computed=receipt.digests,
        crc32={name: crc for slots in receipt.crc32.values() for name, crc in slots.items()},
        target=prepared.target, wanted=prepared.wanted, builder=prepared.builder, allow=prepared.allow, container=container,
        timeout=options.timeout, threads=options.threads, parity=parity, progress=progress,
        moments=None if carried is None else lambda contents: carried.read_back(contents, folder),
    )  # fmt: skip


def _refuse_more_than_a_checkpoint(destination: Path) -> None:
    """``--force`` takes a folder's old contents away as a whole. It must not take away what no conversion wrote."""
    if not os.path.isdir(destination) or destination.is_symlink():
        return
    try:
        entries = list(os.scandir(destination))
    except OSError as error:
        what = f"the folder cannot be looked into, and --force would take all of it away: {error.strerror}"
        raise OutputError(Problem("CK503", what, where=printable(destination), try_="a new folder")) from None
    other = not_written_here([each.name for each in entries if each.is_dir()], [each.name for each in entries if not each.is_dir()])
    if other:
        raise OutputError(
            Problem("CK503", "the folder holds more than one converted checkpoint, and --force would take all of it away",
                    where=printable(destination), found=printable(other), try_="a new folder, or move out what is yours")
        )  # fmt: skip


def _copy_neighbours(neighbours: Iterable[Path], place: Place) -> None:
    """config.json, tokenizer and the like come along when a folder becomes a folder."""
    for neighbour in neighbours:
        try:
            shutil.copyfile(bring(neighbour), place.path_of(neighbour.name))
        except OSError as error:
            raise OutputError(
                Problem("CK503", f"{printable(neighbour.name)} cannot be copied along: {error.strerror or error}",
                        where=place.shown, found=printable(neighbour), try_="free some space, or move that file away")
            ) from None  # fmt: skip


class Meter(Struct):
    """One measure over writing, reading and verifying, in bytes."""

    tell: Progress
    total: int
    done: int = 0

    def counted(self, stage: str) -> Callable[[int], None]:
        """What takes the bytes of one stage as they are done."""

        def step(nbytes: int) -> None:
            self.done += nbytes
            self.tell(stage, min(self.done, self.total), self.total)

        return step


def _untouched_nbytes(prepared: Prepared) -> int:
    """Bytes of the source's tensors that no output reads, and that are read for the source's digest alone."""
    used = {name for output in prepared.plan.stored for name in reads(output.expr)}
    return sum(placed.spec.nbytes for name, placed in _compared(prepared).items() if name not in used)


def _compared(prepared: Prepared) -> Mapping[str, Placed]:
    """What of the source is read for its digests: all of it where it is here; from a store only what an output needs."""
    source = prepared.source
    if not any(keeper_of(file) for file in source.files):
        return source.placed
    used = {name for output in (*prepared.plan.outputs, *prepared.plan.stored) for name in reads(output.expr)}
    aliases = source.manifest.aliases
    return {name: placed for name, placed in source.placed.items() if aliases.get(name, name) in used}


def _named(layout: Layout, place: Place) -> list[FileLayout]:
    """The layouts under the names that their files have while they are staged."""
    return [replace(file, name=place.path_of(file.name).name) for file in layout.files]

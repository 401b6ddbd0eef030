"""safetensors: eight bytes of header length, a JSON header, and the tensors' bytes without holes.

The reader is at least as strict as the reference library (https://github.com/huggingface/safetensors): it never accepts what that one
refuses. One name per tensor is all that the format knows; further names of a tied tensor are recorded in ``__metadata__`` as
``safetensors.torch.save_model`` does (alias -> kept name), and come back as ties.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Container, Contents, Converted, FileLayout, Placed, Slot, Storage
from ckptconv.formats.sharded import Folder, lay_out_folder
from ckptconv.formats.strict import allowance, opened, parse_json, read_at
from ckptconv.names import unusable
from ckptconv.spec import MAX_ELEMENTS, MAX_RANK, DType, Manifest, TensorSpec, contiguous_strides

MAX_HEADER = 50_000_000  #: bytes (docs/limits.md), of a file below 1 GiB
_REFERENCE_HEADER = 100_000_000  #: where the reference library stops
METADATA = "__metadata__"
#: Where the data starts is a multiple of this, unless it keeps its source's place in a page: then of what the reference writer keeps to.
ALIGNMENT = 64
LEAST_ALIGNMENT = 8
PAGE = 4096
MAX_DEPTH = 16  #: of what stands in a header field that nobody knows

CODE_DTYPES: Mapping[str, DType] = MappingProxyType({
    "F64": DType.float64, "F32": DType.float32, "F16": DType.float16, "BF16": DType.bfloat16, "F8_E4M3": DType.float8_e4m3fn,
    "F8_E5M2": DType.float8_e5m2, "F8_E4M3FNUZ": DType.float8_e4m3fnuz, "F8_E5M2FNUZ": DType.float8_e5m2fnuz,
    "F8_E8M0": DType.float8_e8m0fnu, "F4": DType.float4_e2m1fn_x2, "C64": DType.complex64, "I64": DType.int64, "I32": DType.int32,
    "I16": DType.int16, "I8": DType.int8, "U64": DType.uint64, "U32": DType.uint32, "U16": DType.uint16, "U8": DType.uint8,
    "BOOL": DType.bool,
})  # fmt: skip
DTYPE_CODES: Mapping[DType, str] = MappingProxyType({dtype: code for code, dtype in CODE_DTYPES.items()})
#: Bits of one element as the header counts them: its F4 is one number, torch's is a pair.
_BITS: Mapping[str, int] = {code: dtype.bits for code, dtype in CODE_DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_SHARES = "DCP_SHARDING_INFO"
SHARE = re.compile(r"shard-([0-9]{5,})-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")  #: one rank's file, as torch calls it
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


def _broken(what: str, *, found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code="CK307", found=found, try_=try_)


# ---------------------------------------------------------------------------------------------------------------- reading


def max_header(nbytes: int) -> int:
    """Bytes that the header of a file of ``nbytes`` may have: what it describes is most of an honest file.

    >>> max_header(1 << 20), max_header(10 << 30)
    (50000000, 100000000)
    """
    return min(_REFERENCE_HEADER, MAX_HEADER * allowance(nbytes))


def read(path: Path) -> Contents:
    """The tensors of a safetensors file, in the header's order, in one container ``.``.

    Raises :class:`~ckptconv.errors.Refusal`: CK302 for a file that is cut off, CK307 for a header that breaks a rule, CK308 for a file
    with one rank's parts of larger tensors; ``OSError`` when the file cannot be opened.
    """
    contents, starts = read_share(path)
    if any(map(any, starts.values())) or (starts and SHARE.fullmatch(path.name)):
        raise Refusal("the file holds one rank's parts of larger tensors", code="CK308", found=printable(path.name),
                      try_="name the folder, with the files of all ranks")  # fmt: skip
    return contents


def read_share(path: Path) -> tuple[Contents, dict[str, tuple[int, ...]]]:
    """As :func:`read`, of a file that may hold parts: with it, where in the whole tensor each begins, if the file says so."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise Refusal("the file is too short for safetensors", code="CK302", found=f"{size} bytes")
        (length,) = struct.unpack("<Q", read_at(descriptor, 8, 0))
        if length > max_header(size):
            raise _broken(f"the header says that it is longer than {max_header(size):,} bytes", found=f"{length:,} bytes")
        if 8 + length > size:
            raise Refusal("the file ends inside its header", code="CK302", found=f"{size:,} bytes, the header needs {8 + length:,}")
        raw = read_at(descriptor, length, 8)
    if not raw.startswith(b"{"):
        raise _broken("the header must be a JSON object", found=printable(repr(raw[:20])))
    header = parse_json(raw, code="CK307", times=allowance(size))
    metadata = _metadata(header.pop(METADATA, {}))
    tensors, unsupported, warnings = _tensors(header, data_start=8 + length, data_nbytes=size - 8 - length)
    aliases = {key: kept for key, kept in metadata.items() if _is_alias(key, kept, tensors) and key not in unsupported}
    tensors |= {alias: tensors[kept] for alias, kept in aliases.items()}
    container = Container(".", tensors, unsupported=unsupported)
    # Where the parts lie is no longer true of what is made from them; torch would believe it.
    own = {key: value for key, value in metadata.items() if key not in aliases and key != _SHARES}
    contents = Contents("safetensors", (path,), {".": container}, tree=dict(tensors), metadata=own, warnings=warnings)
    return contents, _starts(metadata[_SHARES]) if _SHARES in metadata else {}


def _starts(text: str) -> dict[str, tuple[int, ...]]:
    """Tensor -> where its part begins, as torch's HuggingFaceStorageWriter notes it: ``{"w": {"saved_offsets": [4, 0]}}``."""
    entries = parse_json(text.encode("utf-8", "surrogatepass"), code="CK307")
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        start = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(start, list) or any(type(at) is not int or not 0 <= at <= MAX_ELEMENTS for at in start):
            raise _broken(f"{_SHARES} must say of each tensor where its part begins", found=printable(name))
        found[name] = tuple(start)
    return found


def _metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise _broken(f"{METADATA} must map text to text", found=printable(repr(entry)))
    return entry


def _is_alias(key: str, value: str, tensors: Mapping[str, object]) -> bool:
    """True when a metadata entry means "``key`` is another name of the tensor ``value``" and is not a remark about the file."""
    return value in tensors and key not in tensors and unusable(key) is None and key != "format" and not key.startswith("ckptconv.")


def _tensors(header: dict[str, Any], *, data_start: int, data_nbytes: int) -> tuple[dict[str, Placed], dict[str, str], tuple[str, ...]]:
    """The placed tensors, those of types that torch lacks, and warnings. Checks that the byte ranges tile the data."""
    tensors: dict[str, Placed] = {}
    unsupported: dict[str, str] = {}
    ranges: list[tuple[int, int, str]] = []
    unknown: list[str] = []
    alike: dict[tuple[str, tuple[int, ...]], tuple[TensorSpec, tuple[int, ...]]] = {}  # half a million tensors have a few dozen shapes
    for name, entry in header.items():
        reason = unusable(name)
        if reason is not None:
            raise _broken(reason, found=printable(name))
        try:
            code, shape, (begin, end) = _entry(entry)
        except Refusal as refusal:
            raise _broken(f"{printable(name)}: {refusal.what}", found=refusal.found, try_=refusal.try_) from None
        if len(entry) > len(_FIELDS):
            unknown.append(name)
        ranges.append((begin, end, name))
        if code not in CODE_DTYPES:
            unsupported[name] = code
            continue
        known = alike.get((code, shape))
        if known is None:
            stored = (*shape[:-1], shape[-1] // 2) if code == "F4" else shape
            known = alike[code, shape] = TensorSpec(stored, CODE_DTYPES[code]), contiguous_strides(stored)
        tensors[name] = Placed(known[0], Storage(0, data_start + begin, end - begin), 0, known[1])
    _check_tiling(sorted(ranges), data_nbytes)
    return tensors, unsupported, tuple(_unknown_fields(unknown, header))


def _entry(entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Code, shape as the header gives it, and byte range of one tensor, each checked by itself and against the others."""
    if not isinstance(entry, dict):
        raise _broken("must be an object with dtype, shape and data_offsets", found=printable(repr(entry)))
    try:
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError:
        raise _broken(f"has no {' and no '.join(sorted(_FIELDS - entry.keys()))}") from None
    if not isinstance(code, str) or code not in _BITS:
        raise _broken("unknown dtype", found=printable(repr(code)), try_=", ".join(_BITS))
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise _broken(f"shape must be a list of at most {MAX_RANK} sizes", found=printable(repr(shape)))
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken("data_offsets must be [begin, end] with begin <= end", found=printable(repr(offsets)))
    numel = prod(shape)
    # A product that overflows is one even where another axis is empty.
    if numel > MAX_ELEMENTS or (not numel and prod(filter(None, shape)) > MAX_ELEMENTS):
        raise _broken("the shape has more elements than 64 bits can count", found=printable(repr(shape)))
    if code == "F4" and (not shape or shape[-1] % 2):
        raise _broken("F4 numbers come in pairs, so the last axis must be even", found=repr(shape))
    nbits = numel * _BITS[code]
    if nbits != 8 * (offsets[1] - offsets[0]):
        raise _broken("shape and dtype need another number of bytes than data_offsets gives",
                      found=f"{shape} {code} is {nbits / 8:g} bytes, {offsets} is {offsets[1] - offsets[0]:,}")  # fmt: skip
    return code, tuple(shape), (offsets[0], offsets[1])


def _sizes(value: object) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  (three times as fast as all() over a generator, on lists this short)
        if type(item) is not int or item > MAX_ELEMENTS:
            return False
    return True


def _check_tiling(ranges: list[tuple[int, int, str]], data_nbytes: int) -> None:
    at = 0
    for begin, end, name in ranges:
        if begin != at:
            kind = "overlap those before them" if begin < at else "leave a hole before them"
            raise _broken(f"{printable(name)}: its bytes {kind}", found=f"begins at {begin:,}, the bytes before end at {at:,}")
        at = end
    if at > data_nbytes:
        raise Refusal("the file is cut off", code="CK302", found=f"{data_nbytes:,} bytes of tensors, the header says {at:,}")
    if at < data_nbytes:
        raise _broken("bytes that belong to no tensor follow the data", found=f"{data_nbytes - at:,} bytes")


def _unknown_fields(names: list[str], header: dict[str, Any]) -> list[str]:
    """One warning for header fields that this reader does not know; refused only where they are nested beyond sense."""
    fields: dict[str, None] = {}
    for name in names:
        for key, value in header[name].items():
            if key not in _FIELDS:
                fields[key] = None
                _check_depth(value)
    if not fields:
        return []
    shown = ", ".join(printable(field, 40) for field in list(fields)[:3])
    return [f"{len(names):,} header entries have unknown fields ({shown}); they are ignored"]


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = list(chain.from_iterable(inner))
        if not level:
            return
    raise _broken(f"a header field is nested deeper than {MAX_DEPTH}")


# ---------------------------------------------------------------------------------------------------------------- writing


class SafetensorsWriter:
    """Lays safetensors files out: the header in the manifest's order, the data by alignment class so that every tensor is aligned."""

    name = "safetensors"

    def refuse(self, manifest: Manifest) -> list[Refusal]:
        """Names and dtypes that the format cannot hold (CK209, CK504)."""
        refusals = []
        for name, spec in manifest.tensors.items():
            shown, reason = printable(name), unusable(name)
            if reason is not None:
                refusals.append(Refusal(reason, code="CK209", found=shown))
            if spec.dtype not in DTYPE_CODES:
                refusals.append(Refusal(f"{shown}: safetensors has no {spec.dtype}", code="CK504", found=str(spec),
                                        try_="a cast step, or --format torch"))  # fmt: skip
            elif spec.dtype is DType.float4_e2m1fn_x2 and not spec.shape:
                refusals.append(Refusal(f"{shown}: safetensors counts single F4 numbers on the last axis, and this tensor has no axis",
                                        code="CK504", found=str(spec)))  # fmt: skip
        for alias, kept in manifest.aliases.items():
            if alias == "format" or alias.startswith("ckptconv."):
                refusals.append(Refusal(f"{printable(alias)}: the second name of a tie goes into {METADATA}, where this one is taken",
                                        code="CK504", found=f"tied to {printable(kept)}", try_="rename it, or untie it"))  # fmt: skip
        return refusals

    def lay_out(
        self, file_name: str, manifest: Manifest, *, metadata: Mapping[str, str], tree: Any = None,
        module_versions: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: ARG002  (the format has no place for them)
        phases: Mapping[str, int] | None = None,
    ) -> FileLayout:  # fmt: skip
        """Place every tensor. Raises :class:`~ckptconv.errors.Refusal` (CK504) for a ``tree``, and for metadata that reads as a tie."""
        if tree is not None and not isinstance(tree, Converted):
            raise Refusal("safetensors holds tensors only, nothing beside the state_dict", code="CK504", try_="write a .pth file")
        stored, aliases = manifest.stored, manifest.aliases
        for key, value in metadata.items():
            if key in aliases or _is_alias(key, value, stored):
                raise Refusal(f"the metadata entry {printable(key)!r} would be read as a tie", code="CK504",
                              found=f"{printable(key)} = {printable(value)}", try_="drop the entry")  # fmt: skip
        begins: dict[str, int] = {}
        at = 0
        for name in sorted(stored, key=lambda name: -stored[name].dtype.nbytes):
            begins[name] = at
            at += stored[name].nbytes
        entries = {name: _header_entry(spec, begins[name]) for name, spec in stored.items()}
        # Without holes there is one choice, where the data begins; it is made for the first tensor that has a wish.
        wishes = ((phases or {})[name] - begin for name, begin in begins.items() if name in (phases or {}))
        phase = next((wish % PAGE for wish in wishes if wish % LEAST_ALIGNMENT == 0), None)
        header = _header(entries, aliases, metadata, phase)
        start = len(header)
        if start > max_header(at) + 8:
            raise Refusal(f"the header would pass the limit of {max_header(at):,} bytes", code="CK504",
                          found=f"{len(stored):,} tensors, {start:,} bytes", try_="--shard-size")  # fmt: skip
        slots = {name: Slot(start + begins[name], spec.nbytes) for name, spec in stored.items()}
        return FileLayout(
            file_name, self.name, start + at, slots, manifest, dict(metadata), needs_crc=False, detail=(entries, phase if phases else None)
        )

    def lay_out_folder(
        self, manifest: Manifest, shard_nbytes: int | None, together: Iterable[Sequence[str]] = (), **options: Any
    ) -> Folder:
        """``model.safetensors``, or its shards and their index."""
        return lay_out_folder(self, "model", manifest, shard_nbytes, together, options)

    def seal(self, layout: FileLayout, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:  # noqa: ARG002
        """The header. Raises ``ValueError`` when other metadata than the layout's has another length."""
        entries, phase = layout.detail
        header = _header(entries, layout.manifest.aliases, metadata, phase)
        start = layout.nbytes - sum(slot.nbytes for slot in layout.slots.values())
        if len(header) != start:
            raise ValueError(f"the header has {len(header)} bytes, {start} were laid out: metadata must keep its keys and lengths")
        return [(0, header)]


WRITER = SafetensorsWriter()


def _header_entry(spec: TensorSpec, begin: int) -> dict[str, Any]:
    shape = list(spec.shape)
    if spec.dtype is DType.float4_e2m1fn_x2:
        shape[-1] *= 2
    return {"dtype": DTYPE_CODES[spec.dtype], "shape": shape, "data_offsets": [begin, begin + spec.nbytes]}


def _header(entries: Mapping[str, Any], aliases: Mapping[str, str], metadata: Mapping[str, str], phase: int | None) -> bytes:
    """The file's first bytes: length, JSON, and the spaces that bring the data to its alignment, or to its place in a page."""
    text = json.dumps({METADATA: {**metadata, "format": "pt", **aliases}, **entries}, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT if phase is None else (phase - 8 - len(raw)) % PAGE)
    return struct.pack("<Q", len(raw)) + raw

"""Files by hand, byte by byte: pickles from their opcodes, archives from their records, headers from their fields.

Honest writers cannot be made to write what these tests need, and a file written by nobody's library says plainly what is wrong with it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------- pickles


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(number: int) -> bytes:
    """An integer, in the shortest opcode that holds it."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(dotted: str) -> bytes:
    """``module.name``, by the oldest opcode for it."""
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: Sequence[int]) -> bytes:
    return row(*map(whole, values))


def call(function: str, *arguments: bytes) -> bytes:
    return named(function) + row(*arguments) + b"R"


def table(**entries: bytes) -> bytes:
    """A dict with text keys."""
    return pairs(*((text(key), value) for key, value in entries.items()))


def pairs(*entries: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in entries) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


HOOKS = call("collections.OrderedDict")


def storage(count: int = 8, key: str = "0", kind: str = "FloatStorage", place: str = "cpu") -> bytes:
    """The reference to a storage, as torch writes it into the pickle."""
    return row(text("storage"), named(f"torch.{kind}"), text(key), text(place), whole(count)) + b"Q"


def tensor(
    size: Sequence[int] = (8,), stride: Sequence[int] = (1,), offset: int = 0, of: bytes | None = None, hooks: bytes = HOOKS
) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        of if of is not None else storage(),
        whole(offset),
        numbers(size),
        numbers(stride),
        b"\x89",
        hooks,
    )


# ---------------------------------------------------------------------------------------------------------------------- archives


@dataclass(frozen=True)
class Record:
    """One file of an archive. What is not None is said in place of the truth."""

    name: bytes | str
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    local_name: bytes | None = None
    size: int | None = None  #: in the directory, uncompressed
    header: int | None = None  #: in the directory, where the record starts
    disk: int = 0
    extra: bytes = b""
    stored: bool = True  #: False: only the directory speaks of it


def archive(
    records: Sequence[Record], *, disks: int = 0, comment: bytes = b"", count: int | None = None, length_lie: int = 0, start_lie: int = 0
) -> bytes:
    """A zip archive of these records, in this order."""
    out, central = bytearray(), bytearray()
    for record in records:
        raw = record.name if isinstance(record.name, bytes) else record.name.encode()
        packed = record.data
        if record.method == 8:
            squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = squeezed.compress(record.data) + squeezed.flush()
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        at = len(out) if record.header is None else record.header
        size = len(record.data) if record.size is None else record.size
        if record.stored:
            local = raw if record.local_name is None else record.local_name
            sizes = crc, len(packed), len(record.data)
            out += struct.pack("<4s5H3I2H", b"PK\3\4", 20, record.flags, record.method, 0, 0, *sizes, len(local), 0) + local + packed
        entry = 20, 20, record.flags, record.method, 0, 0, crc, len(packed) if record.size is None else size, size
        central += struct.pack("<4s6H3I5H2I", b"PK\1\2", *entry, len(raw), len(record.extra), 0, record.disk, 0, 0, at) + raw + record.extra
    number = len(records) if count is None else count
    end = disks, disks, number, number, len(central) + length_lie, len(out) + start_lie, len(comment)
    return bytes(out + central + struct.pack("<4s4H2IH", b"PK\5\6", *end) + comment)


FLOATS = struct.pack("<8f", *range(8))
ONE = pickled(table(x=tensor()))


def records(pickle: bytes = ONE, data: bytes = FLOATS, **replaced: Record | None) -> list[Record]:
    """The records of a right file with one tensor of eight floats; ``data_pkl=Record(…)`` puts another in a place, None takes it out."""
    usual = {
        "data_pkl": Record("a/data.pkl", pickle), "byteorder": Record("a/byteorder", b"little"), "data_0": Record("a/data/0", data),
        "version": Record("a/version", b"3\n"),
    }  # fmt: skip
    return [record for record in {**usual, **replaced}.values() if record is not None]


def torch_file(pickle: bytes = ONE, data: bytes = FLOATS, **replaced: Record | None) -> bytes:
    return archive(records(pickle, data, **replaced))


# ---------------------------------------------------------------------------------------------------------------------- legacy

MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def old_storage(count: int = 8, key: str = "k", kind: str = "FloatStorage", view: bytes = b"N") -> bytes:
    return row(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), whole(count), view) + b"Q"


def legacy_file(
    body: bytes | None = None, keys: Sequence[str] = ("k",), data: bytes = struct.pack("<q", 8) + FLOATS, *, magic: bytes = MAGIC,
    little: bytes = b"\x88", protocol: int = 1001,
) -> bytes:  # fmt: skip
    """A file of torch before 1.6: magic number, protocol, byte order, object, keys, then the storages."""
    body = table(x=tensor(of=old_storage())) if body is None else body
    system = table(little_endian=little, protocol_version=whole(protocol), type_sizes=table(int=whole(4)))
    listed = b"](" + b"".join(map(text, keys)) + b"e"
    return b"".join(map(pickled, (magic, whole(protocol), system, body, listed))) + data


# ---------------------------------------------------------------------------------------------------------------------- safetensors


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data

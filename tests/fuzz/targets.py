"""What is fuzzed: each target takes any bytes, and nothing but our own refusal may come out of the reader behind it.

Where a reader accepts something, what it says is checked as well: every tensor lies inside its file, and safetensors accepts nothing that
the reference library refuses.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ckptconv.errors import CkptconvError, Refusal, UsageError
from ckptconv.formats import dcp, sharded, torch_legacy, torch_zip_reader
from ckptconv.formats import safetensors as ours
from ckptconv.formats.base import Contents, Placed, Storage
from ckptconv.formats.containers import contents_from_tree
from ckptconv.formats.pickle_machine import run
from ckptconv.formats.rebuilding import StorageRef, storage_dtype
from ckptconv.planner import make_plan
from ckptconv.ruleset import expressions, model
from ckptconv.ruleset.patterns import Pattern, Template

_NOTHING = model.parse(b'{"version": 1, "name": "t", "summary": "t", "steps": [{"drop": {"keys": "nothing", "optional": true}}]}', "t.yaml")
#: In memory: a million small files a minute are no work for a disk.
FOLDER = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"ckptconv-fuzz-{os.getpid()}"
DATA_NBYTES = 4096
NAMES = ("model.layers.0.attn.q.weight", "a", "layers.10.w", "x.é.y", "h.1.2.3", "a" * 40 + "!", "a.b.c.d.e.f.g.h")


def _written(data: bytes, name: str = "in") -> Path:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _inside(contents: Contents) -> None:
    """Every tensor of accepted contents lies inside its file."""
    sizes = [path.stat().st_size for path in contents.files]
    for container in contents.containers.values():
        for name, placed in container.stored.items():
            _fits(name, placed, sizes[placed.storage.file])
        assert container.manifest.nbytes >= 0


def _fits(name: str, placed: Placed, size: int) -> None:
    storage, width = placed.storage, placed.spec.dtype.nbytes
    assert 0 <= storage.offset <= storage.offset + storage.nbytes <= size, name
    if placed.spec.numel:
        last = sum((n - 1) * step for n, step in zip(placed.spec.shape, placed.strides, strict=True))
        assert all(step >= 0 for step in placed.strides), name
        assert 0 <= placed.offset <= placed.offset + (last + 1) * width <= storage.nbytes, name


def fuzz_zip(data: bytes) -> None:
    """A file that says it is a zip archive."""
    try:
        contents = torch_zip_reader.read(_written(data))
    except Refusal:
        return
    _inside(contents)


def _resolve(kind: str, key: str, count: int, view: object) -> StorageRef:
    dtype, width, quantised = storage_dtype(kind)
    if count * width > DATA_NBYTES:
        raise Refusal("too large", code="CK302")
    return StorageRef(dtype, Storage(0, 0, count * width), count * width, quantised, kind if quantised else "")


def fuzz_pickle(data: bytes) -> None:
    """The pickle machine, and the search for state_dicts in what it made."""
    path = FOLDER / "data"
    if not path.exists():
        _written(bytes(DATA_NBYTES), "data")
    try:
        tree, end = run(data, _resolve)
        contents = contents_from_tree("torch", (path,), tree)
    except Refusal:
        return
    assert 0 < end <= len(data)
    _inside(contents)


def zipped(pickle: bytes) -> bytes:
    """A right archive around any pickle, with one storage of 32 bytes."""
    records = {"a/data.pkl": pickle, "a/byteorder": b"little", "a/data/0": bytes(32), "a/version": b"3\n"}
    out, central = bytearray(), bytearray()
    for name, body in records.items():
        raw, crc, at = name.encode(), zlib.crc32(body), len(out)
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, len(body), len(body), len(raw), 0) + raw + body
        central += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, len(body), len(body), len(raw), 0, 0, 0, 0, 0, at) + raw
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(central), len(out), 0)
    return bytes(out + central + end)


def fuzz_zipped_pickle(data: bytes) -> None:
    """The whole way from a file to its state_dicts, with a right archive around any pickle."""
    fuzz_zip(zipped(data))


def fuzz_legacy(data: bytes) -> None:
    """A file of torch before 1.6."""
    try:
        contents = torch_legacy.read(_written(data))
    except Refusal:
        return
    _inside(contents)


def fuzz_safetensors(data: bytes) -> None:
    """A safetensors file: as it is, or (first byte odd) a header whose length and data are made to fit."""
    from safetensors import SafetensorError, deserialize

    if data[:1] and data[0] & 1:
        header = data[1:]
        data = struct.pack("<Q", len(header)) + header + bytes(16)
    else:
        data = data[1:]
    try:
        contents = ours.read(_written(data))
    except Refusal:
        return
    _inside(contents)
    try:
        theirs = {name for name, _ in deserialize(data)}
    except SafetensorError as error:
        raise AssertionError(f"accepted, and the reference refuses it: {error}") from error
    container = contents.containers["."]
    aliases = {name for group in container.manifest.ties for name in group[1:]}
    assert theirs >= {*container.tensors, *container.unsupported} - aliases


def fuzz_rules(data: bytes) -> None:
    """A rule file."""
    try:
        rules = model.parse(data, "fuzz.yaml")
    except UsageError as error:
        problems = error.problems
    else:
        assert rules.steps
        return
    assert all(len(str(problem)) < 4000 for problem in problems)


def fuzz_patterns(data: bytes) -> None:
    """Patterns, templates and expressions, tried on a few names."""
    text = data.decode("utf-8", "surrogateescape")  # an odd byte becomes a lone surrogate: those must be borne, too
    for name in NAMES:
        try:
            captures = Pattern.parse(text).match(name)
        except Refusal:
            break
        if captures:
            assert all(isinstance(value, (str, int)) for value in captures.values())
    try:
        Template.parse(text).render(lambda name: 7 if len(name) > 1 else "part")
    except (Refusal, expressions.Absent):
        pass
    try:
        value = expressions.evaluate(expressions.parse(text), {"n": 12, "t": [3, 1, 2], "c": {"a": 1}, "s": "text"}.__getitem__)
    except (Refusal, expressions.Absent, KeyError):
        return
    assert len(repr(value)) < 10_000_000


_SHARD = struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   ' + bytes(8)


def fuzz_index(data: bytes) -> None:
    """A shard index beside a shard, a link that leads out, and a folder."""
    path = _written(data, "model.safetensors.index.json")
    if not (FOLDER / "s.safetensors").exists():
        _written(_SHARD, "s.safetensors")
        (FOLDER / "link.safetensors").symlink_to("/etc/hostname")
        (FOLDER / "sub").mkdir(exist_ok=True)
    try:
        contents = sharded.read_index(path)
    except Refusal:
        return
    assert all(file.resolve().parent == FOLDER.resolve() for file in contents.files)
    _inside(contents)


#: A tensor of 2 by 4 float32.
ARCHIVE = zipped(
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQK\0K\x02K\x04\x86K\x04K\x01\x86"
    b"\x89ccollections\nOrderedDict\n)RtR."
)


def fuzz_distributed(data: bytes) -> None:
    """The metadata of a torch.distributed.checkpoint, beside a file with two tensors of it."""
    folder = FOLDER / "distributed"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(ARCHIVE * 2)
    (folder / ".metadata").write_bytes(data)
    try:
        contents = dcp.read(folder)
    except Refusal:
        return
    _inside(contents)
    for container in contents.containers.values():
        try:
            make_plan(_NOTHING, container.stored_manifest, composites=container.composites)
        except (Refusal, CkptconvError):
            return


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "zip": fuzz_zip, "pickle": fuzz_pickle, "zipped-pickle": fuzz_zipped_pickle, "legacy": fuzz_legacy, "safetensors": fuzz_safetensors,
    "rules": fuzz_rules, "patterns": fuzz_patterns, "index": fuzz_index, "distributed": fuzz_distributed,
}  # fmt: skip

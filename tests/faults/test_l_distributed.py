"""Catalogue L: folders of torch.distributed.checkpoint, whose metadata is a plain pickle to torch; and GGUF, which is not read."""

import struct
import subprocess
import sys

import pytest
from building import call, named, numbers, pickled, row, storage, table, tensor, text, torch_file, whole
from harness import message

META = "torch.distributed.checkpoint.metadata."
RUN = "run", "pass.yaml", "in", "out.pth"
CHUNK = torch_file(pickled(tensor([2, 4], [4, 1])))

CHUNK_NBYTES = len(CHUNK)


def instance(kind, **fields):
    return named(kind) + b")\x81" + table(**fields) + b"b"


def size(*values):
    return call("torch.Size", numbers(values))


def chunk(offsets, sizes):
    return instance(META + "ChunkStorageMetadata", offsets=size(*offsets), sizes=size(*sizes))


def index(name, offset):
    return instance(META + "MetadataIndex", fqn=text(name), offset=b"N" if offset is None else size(*offset), index=b"N")


def place(offset=0, length=CHUNK_NBYTES, path="__0_0.distcp", **more):
    kind = "torch.distributed.checkpoint.filesystem._StorageInfo"
    return instance(kind, relative_path=text(path), offset=whole(offset), length=whole(length), **more)


def listed(*items):
    return b"](" + b"".join(items) + b"e"


def entries(*items):
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def metadata(shape=(2, 4), chunks=(((0, 0), (2, 4)),), places=None, more=b"", paths=b"N"):
    """The metadata of one tensor ``w`` in these chunks, at these places (key, value)."""
    chunks_ = listed(*(chunk(*each) for each in chunks))
    described = instance(META + "TensorStorageMetadata", properties=b"N", size=size(*shape), chunks=chunks_)
    where = [(index("w", each[0]), place()) for each in chunks] if places is None else places
    return pickled(instance(META + "Metadata", state_dict_metadata=more or entries((text("w"), described)),
                            planner_data=paths, storage_data=entries(*where)))  # fmt: skip


def made(box, files):
    for name, data in {".metadata": metadata(), "__0_0.distcp": CHUNK, **files}.items():
        if isinstance(data, tuple):
            (box.folder / "in").mkdir(exist_ok=True)
            (box.folder / "in" / name).symlink_to(data[0])
        elif data is not None:
            box.write(f"in/{name}", data)


def placed(**changes):
    return {".metadata": metadata(places=[(index("w", (0, 0)), place(**changes))])}


def described():
    return instance(META + "TensorStorageMetadata", properties=b"N", size=size(2, 4), chunks=listed(chunk((0, 0), (2, 4))))


def two_paths(first, second):
    """Two tensors, and where each stood in what was saved."""
    where = [(index(name, (0, 0)), place()) for name in ("w", "v")]
    return {".metadata": metadata(places=where, more=entries((text("w"), described()), (text("v"), described())),
                                  paths=entries((text("w"), first), (text("v"), second)))}  # fmt: skip


TWO = CHUNK * 2
HALF = torch_file(pickled(tensor([2, 4], [4, 1], of=storage(kind="HalfStorage"))), bytes(16))
EVIL = torch_file(pickled(call("posix.system", text("touch marker"))))
HALVES = (((0, 0), (2, 4)), ((2, 0), (2, 4)))
BOTH = [(index("w", (0, 0)), place()), (index("w", (2, 0)), place(len(CHUNK)))]
REFUSED = [
    ("c137-a-command", {".metadata": pickled(call("posix.system", text("touch marker")))}, 3, ("in", "CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c137-a-command-in-the-state", {".metadata": metadata(more=entries((text("w"), call("builtins.eval", text("1")))))}, 3, ("in", "CK303", "the file asks for builtins.eval, which is a built-in function; nothing of it was run", "at byte 86 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c137-a-command-in-a-chunk", {**placed(length=len(EVIL)), "__0_0.distcp": EVIL}, 3, ("in", "CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c137-a-storage-in-the-metadata", {".metadata": pickled(storage())}, 3, ("in", "CK302", ".metadata refers to a storage", "", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c137-not-even-metadata", {".metadata": pickled(table(a=whole(1)))}, 3, ("in", "CK302", ".metadata holds something else than a Metadata", "dict", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c137-cut", {".metadata": metadata()[:-40]}, 3, ("in", "CK304", "the pickle ends early", "at byte 578 of the pickle")),
    ("c137-empty", {".metadata": b""}, 3, ("in", "CK304", "the pickle ends early", "at byte 0 of the pickle")),
    ("c138-only-bytes", {".metadata": metadata(more=entries((text("w"), instance(META + "BytesStorageMetadata"))))}, 3, ("in", "CK309", "no state_dict was found in the file", "", "ckptconv inspect in")),
    ("c139-a-file-above", {**placed(path="../outside.distcp"), "../outside.distcp": CHUNK}, 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", "../outside.distcp", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c139-an-absolute-file", placed(path="/etc/hostname"), 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", "/etc/hostname", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c139-a-folder", placed(path="."), 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", ".", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c139-a-backslash", placed(path="..\\x"), 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", "..\\x", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c139-a-link", {"__0_0.distcp": ("../pass.yaml",)}, 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", "__0_0.distcp", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-hole", {".metadata": metadata((4, 4), HALVES[:1])}, 3, ("in", "CK305", "the chunks of w do not make it up: 2:4 along axis 0 is in no output")),
    ("c140-an-overlap", {".metadata": metadata((3, 4), (HALVES[0], ((1, 0), (2, 4))), [BOTH[0], (index("w", (1, 0)), place(len(CHUNK)))]), "__0_0.distcp": TWO}, 3, ("in", "CK302", "the chunks of w overlap", "2 chunks of [3, 4]", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-chunk-with-more-sizes-than-offsets", {".metadata": metadata((4, 4), (((0, 0), (2, 4, 1)),), BOTH[:1])}, 3, ("in", "CK302", "a chunk of w is missing, or outside of it", "[0, 0] + [2, 4, 1] of [4, 4]", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-chunks-of-two-dtypes", {".metadata": metadata((4, 4), HALVES, [BOTH[0], (index("w", (2, 0)), place(len(CHUNK), len(HALF)))]), "__0_0.distcp": CHUNK + HALF}, 3, ("in", "CK302", "the chunks of w are of different dtypes", "float16, float32", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-beyond-the-tensor", {".metadata": metadata((3, 4), HALVES, BOTH), "__0_0.distcp": TWO}, 3, ("in", "CK302", "a chunk of w is missing, or outside of it", "[2, 0] + [2, 4] of [3, 4]", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-another-rank", {".metadata": metadata((8,), (((0, 0), (2, 4)),))}, 3, ("in", "CK302", "a chunk of w is missing, or outside of it", "[0, 0] + [2, 4] of [8]", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-no-chunks", {".metadata": metadata(chunks=(), places=[])}, 3, ("in", "CK302", "w has no chunks", "", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-chunk-of-another-shape", {"__0_0.distcp": torch_file(pickled(tensor([4, 2], [2, 1])))}, 3, ("in", "CK302", "a chunk of w is not the tensor that .metadata says", "[2, 4] wanted", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-chunk-that-is-nowhere", {".metadata": metadata(places=[(index("v", (0, 0)), place())])}, 3, ("in", "CK302", "a chunk of w is missing, or outside of it", "[0, 0] + [2, 4] of [2, 4]", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-size-that-is-negative", {".metadata": metadata((-2, 4))}, 3, ("in", "CK305", "a tensor whose size is no row of sizes", "(-2, 4)")),
    ("c140-a-product-over-64-bits", {".metadata": metadata((1 << 62, 1 << 62))}, 3, ("in", "CK305", "the chunks of w do not make it up: 4:4611686018427387904 along axis 1 is in no output")),
    ("c140-a-chunk-that-is-in-two-places", {".metadata": metadata(places=[(index("w", (0, 0)), place()), (index("w", (0, 0)), place(len(CHUNK)))]), "__0_0.distcp": TWO}, 3, ("in", "CK302", ".metadata says twice where a chunk of w is", "", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-archives-within-archives", {".metadata": metadata((4, 4), HALVES, [BOTH[0], (index("w", (2, 0)), place(8))]), "__0_0.distcp": TWO}, 3, ("in", "CK302", "archives overlap", "at bytes 0 and 8 of __0_0.distcp", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-path-through-a-tensor", two_paths(row(text("a")), row(text("a"), text("b"))), 3, ("in", "CK302", "the paths in .metadata contradict each other", "v", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-two-tensors-at-one-path", two_paths(row(text("a")), row(text("a"))), 3, ("in", "CK302", "the paths in .metadata contradict each other, or have no end", "v", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c140-a-path-without-end", two_paths(row(text("a")), row(*[text("b")] * 5000)), 3, ("in", "CK302", "the paths in .metadata contradict each other, or have no end", "v", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c141-missing", {"__0_0.distcp": None}, 3, ("in", "CK302", "a data file is missing, or no plain file of the folder", "__0_0.distcp", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c141-short", {"__0_0.distcp": CHUNK[:-1]}, 3, ("in", "CK302", "an archive inside the file reaches past its end", "__0_0.distcp")),
    ("c141-beyond-the-end", placed(offset=1 << 40), 3, ("in", "CK302", "an archive inside the file reaches past its end", "__0_0.distcp")),
    ("c141-negative", placed(offset=-1), 3, ("in", "CK302", "an archive inside the file reaches past its end", "__0_0.distcp")),
    ("c141-length-of-2-to-the-63", placed(length=1 << 63), 3, ("in", "CK302", "an archive inside the file reaches past its end", "__0_0.distcp")),
    ("c141-transformed", placed(transform_descriptors=listed(text("zstd"))), 3, ("in", "CK302", "the chunks were transformed when they were saved (compressed, say)", "['zstd']", "save the checkpoint again with torch.distributed.checkpoint")),
    ("c142-only-a-rank-s-metadata", {".metadata": None, "__0.metadata": metadata()}, 3, ("in", "CK301", "the folder holds no model file and no shard index", "__0.metadata, __0_0.distcp", "name the file itself")),
]  # fmt: skip


@pytest.mark.parametrize(("files", "code", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, files, code, said):
    made(box, files)
    box.refuses(code, message(*said), *RUN)


def test_read(box):
    made(box, {".metadata": metadata((4, 4), HALVES, BOTH), "__0_0.distcp": TWO})
    box.converts(*RUN, torch=True, mb=1024)
    made(box, {})
    assert "unchanged  1  w" in box.run("run", "pass.yaml", "in", "out.pth", "--force").out


def test_c138_a_pickle_among_the_bytes_is_not_looked_at(box):
    """What torch would load without a guard stays where it is; the tensors beside it are read."""
    both = entries((text("w"), instance(META + "TensorStorageMetadata", properties=b"N", size=size(2, 4), chunks=listed(chunk((0, 0), (2, 4))))),
                   (text("extra"), instance(META + "BytesStorageMetadata")))  # fmt: skip
    where = [(index("w", (0, 0)), place()), (index("extra", None), place(len(CHUNK), len(EVIL)))]
    made(box, {".metadata": metadata(places=where, more=both), "__0_0.distcp": CHUNK + EVIL})
    box.converts(*RUN)


GGUF = b"GGUF" + struct.pack("<I", 3)
#: Whatever stands in it: the magic number is enough, nothing behind it is parsed.
GGUFS = [
    ("c144-counts-of-2-to-the-60", GGUF + struct.pack("<2Q", 1 << 60, 1 << 60)),
    ("c144-a-string-of-2-to-the-63", GGUF + struct.pack("<3Q", 0, 1, 1 << 63)),
    ("c144-an-array-of-2-to-the-50", GGUF + struct.pack("<3Q", 0, 1, 1) + b"k" + struct.pack("<2IQ", 9, 4, 1 << 50)),
    ("c145-version-99", b"GGUF" + struct.pack("<I", 99) + bytes(64)),
    ("c145-cut-behind-the-magic-number", b"GGUF"),
    ("c145-alignment-0", GGUF + struct.pack("<3Q", 0, 1, 17) + b"general.alignment" + struct.pack("<2I", 4, 0)),
    ("c146-big-endian", b"GGUF" + struct.pack(">I2Q", 3, 1, 1) + bytes(64)),
    ("c146-two-tensors-on-one-offset", GGUF + struct.pack("<2Q", 2, 0) + (struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + bytes(64)),
]  # fmt: skip


@pytest.mark.parametrize("data", [row[1] for row in GGUFS], ids=[row[0] for row in GGUFS])
def test_gguf(box, data):
    box.write("in.gguf", data)
    said = "CK301", "this is a GGUF file, which is not read", "", "convert from the checkpoint that it was made from"
    box.refuses(3, message("in.gguf", *said), "run", "pass.yaml", "in.gguf", "out.pth")


def test_c143_torch_and_its_errors_have_no_part_in_it(box):
    """torch.distributed.checkpoint raises what escapes ``except Exception``; it is never imported to read its folders."""
    made(box, {})
    code = "import sys; from pathlib import Path; from ckptconv import formats; formats.read(Path('in')); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=box.folder, capture_output=True, text=True, check=True).stdout == "False\n"

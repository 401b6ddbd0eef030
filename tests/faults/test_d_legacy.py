"""Catalogue D: files of torch before 1.6, and files that are no checkpoint whatever they are called."""

import gzip
import io
import os
import pickle
import struct
import tarfile

import pytest
from building import FLOATS, call, entry, legacy_file, old_storage, pickled, row, safetensors_file, table, tensor, text, torch_file, whole
from harness import message


def stored(count, data=FLOATS):
    return struct.pack("<q", count) + data


def view(offset, count):
    return tensor([count], of=old_storage(view=row(text("v"), whole(offset), whole(count))))


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


GOOD = legacy_file()
REFUSED = [
    ("c052-a-storage-that-was-never-stored", legacy_file(keys=(), data=b""), ("CK302", "storage 'k' is declared and not there")),
    ("c052-a-storage-that-nobody-declares", legacy_file(table(n=whole(1)), data=stored(8)), ("CK306", "storage 'k' is there, and no tensor declares it")),
    ("c052-a-storage-listed-twice", legacy_file(keys=("k", "k"), data=stored(8) * 2), ("CK306", "a storage stands twice in the list")),
    ("c053-count-smaller-than-declared", legacy_file(data=stored(7)), ("CK306", "storage 'k' has another size than declared", "8 declared, 7 stored")),
    ("c053-count-larger-than-declared", legacy_file(data=stored(9, bytes(36))), ("CK306", "storage 'k' has another size than declared", "8 declared, 9 stored")),
    ("c053-count-negative", legacy_file(data=stored(-8)), ("CK306", "storage 'k' has another size than declared", "8 declared, -8 stored")),
    ("c053-payload-cut", legacy_file()[:-1], ("CK302", "the file ends inside storage 'k'", "31 of 32 bytes", "fetch the file again")),
    ("c053-payload-missing", legacy_file(data=struct.pack("<q", 8)), ("CK302", "the file ends inside storage 'k'", "0 of 32 bytes", "fetch the file again")),
    ("c053-count-cut", legacy_file(data=b"\x08\0\0"), ("CK302", "the file ends before storage 'k'")),
    ("c053-bytes-behind-the-payload", legacy_file() + b"x", ("CK306", "bytes follow the last storage", "1 bytes")),
    ("c054-256-GB-declared", legacy_file(table(x=tensor(of=old_storage(1 << 36))), data=stored(1 << 36)), ("CK302", "the file ends inside storage 'k'", "32 of 274,877,906,944 bytes", "fetch the file again")),
    ("c054-2-to-the-63-declared", legacy_file(table(x=tensor(of=old_storage(1 << 63)))), ("CK305", "a storage with an impossible size or key", "at byte 206 of the pickle")),
    ("c055-view-past-the-storage", legacy_file(table(x=view(4, 5))), ("CK305", "a storage view reaches past its storage", "9 elements of 8")),
    ("c055-view-of-minus-one", legacy_file(table(x=view(-1, 4))), ("CK306", "a storage view that is none")),
    ("c055-tensor-past-its-view", legacy_file(table(x=tensor([5], of=old_storage(view=row(text("v"), whole(0), whole(4)))))), ("CK305", "a tensor reaches past the end of its storage", "5 elements needed, 4 stored")),
    ("c055-one-key-two-sizes", legacy_file(table(x=tensor(of=old_storage()), y=tensor([4], of=old_storage(4)))), ("CK306", "storage 'k' is declared in two ways")),
    ("c056-big-endian-flag-on-a-little-endian-file", legacy_file(little=b"\x89"), ("CK306", "storage 'k' has another size than declared", "8 declared, 576,460,752,303,423,488 stored")),
    ("c056-no-byte-order", legacy_file(little=whole(1)), ("CK306", "the file does not say its byte order")),
    ("c057-a-command-in-the-object", legacy_file(call("posix.system", text("touch marker"))), ("CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 104 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c057-a-command-in-the-magic-number", legacy_file(magic=call("posix.system", text("touch marker"))), ("CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c057-a-command-among-the-keys", GOOD[: GOOD.rindex(b"\x80\x02](")] + pickled(call("posix.system", text("touch marker"))), ("CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 243 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c057-another-magic-number", legacy_file(magic=whole(7)), ("CK301", "this is a pickle, but not a torch checkpoint", "", "only files of torch.save are read")),
    ("c057-another-protocol", legacy_file(protocol=1002), ("CK301", "the legacy format has another version", "1002")),
    ("c057-a-plain-pickle", pickle.dumps({"w": [1.0, 2.0]}, protocol=4), ("CK301", "this is a pickle, but not a torch checkpoint", "", "only files of torch.save are read")),
    ("c057-a-pickle-of-a-text-protocol", pickle.dumps({"w": [1.0, 2.0]}, protocol=0), ("CK301", "this is a text file, not a checkpoint", "(dp0\\nVw\\np1\\n(lp2\\nF1.0\\naF2.0\\nas.")),
    ("c057-a-tar-of-2016", tarred(), ("CK301", "this is a tar archive, not a checkpoint", "", "unpack it; torch files from before 2017 (tar) are not read")),
    ("c058-empty", b"", ("CK301", "the file is empty", "", "fetch it again")),
    ("c058-one-byte", b"\x80", ("CK301", "this is no torch and no safetensors file", "its first bytes are 80")),
    ("c058-web-page", b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>", ("CK301", "this is a web page, not a checkpoint: a download that went wrong", "", "open it in a browser to see why, and fetch the file again")),
    ("c058-xml-error", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("CK301", "this is a web page, not a checkpoint: a download that went wrong", "", "open it in a browser to see why, and fetch the file again")),
    ("c058-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 497774208\n", ("CK301", "this is a git-lfs pointer (71 bytes), not the file itself", "", "git lfs pull")),
    ("c058-gzip", gzip.compress(GOOD, mtime=0), ("CK301", "this is a gzip archive, not a checkpoint", "", "gunzip it first")),
    ("c058-7z", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24), ("CK301", "this is a 7z archive, not a checkpoint", "", "unpack it first")),
    ("c058-xz", b"\xfd7zXZ\0" + bytes(24), ("CK301", "this is an xz archive, not a checkpoint", "", "unpack it first")),
    ("c058-zstd", b"\x28\xb5\x2f\xfd" + bytes(24), ("CK301", "this is a zstd archive, not a checkpoint", "", "unpack it first")),
    ("c058-rar", b"Rar!\x1a\7\1\0", ("CK301", "this is a rar archive, not a checkpoint", "", "unpack it first")),
    ("c058-hdf5", b"\x89HDF\r\n\x1a\n" + bytes(24), ("CK301", "this is an HDF5 file (Keras?), which is not read")),
    ("c058-numpy", b"\x93NUMPY\1\0", ("CK301", "this is a NumPy array, not a checkpoint")),
    ("c058-config", b'{"hidden_size": 768}', ("CK301", "this is JSON, not a checkpoint", "", "a config or an index? name the folder, or the model's file")),
    ("c058-readme", b"# My model\n", ("CK301", "this is a text file, not a checkpoint", "# My model\\n")),
    ("c058-readme-with-colours", b"\x1b[31mred\x1b[0m\n", ("CK301", "this is a text file, not a checkpoint", "\\x1b[31mred\\x1b[0m\\n")),
    ("c058-noise", bytes(range(200, 256)), ("CK301", "this is no torch and no safetensors file", "its first bytes are c8 c9 ca cb cc cd ce cf")),
    ("c058-zeros", bytes(4096), ("CK301", "this is no torch and no safetensors file", "its first bytes are 00 00 00 00 00 00 00 00")),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, data, said):
    box.write("in.pth", data)
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")


READ = [
    ("c055-views-within-bounds", legacy_file(table(x=view(0, 4), y=view(4, 4)))),
    ("c056-big-endian-throughout", legacy_file(little=b"\x89", data=struct.pack(">q8f", 8, *range(8)))),
    ("c058-a-safetensors-file-called-pth", safetensors_file({"x": entry()}, bytes(8))),
]  # fmt: skip


@pytest.mark.parametrize("data", [row[1] for row in READ], ids=[row[0] for row in READ])
def test_read(box, data):
    box.write("in.pth", data)
    box.converts(torch=True, mb=1024)


def test_c058_a_torch_file_called_safetensors(box):
    box.write("in.safetensors", torch_file())
    box.converts("run", "pass.yaml", "in.safetensors", "out.safetensors")


# ----------------------------------------------------------------------------------------------------------- what is not even a file


def pipe(box):
    os.mkfifo(box.folder / "in.pth")


def device(box):
    (box.folder / "in.pth").symlink_to("/dev/zero")


def dangling(box):
    (box.folder / "in.pth").symlink_to("nowhere")


def circle(box):
    (box.folder / "in.pth").symlink_to("in.pth")


def empty_folder(box):
    (box.folder / "in.pth").mkdir()


def nothing(box):
    pass


PLACES = [
    ("c059-pipe", pipe, ("CK310", "this is a pipe, not a file", "", "name a file, or a folder with an index")),
    ("c059-dev-zero", device, ("CK310", "this is a device, not a file", "", "name a file, or a folder with an index")),
    ("c059-dangling-link", dangling, ("CK310", "this is a link to a file that is not there", "nowhere", "fetch that file, or make the link anew")),
    ("c059-link-to-itself", circle, ("CK310", "the source cannot be opened: Too many levels of symbolic links", "", "a link leads back to itself: name the file that is meant")),
    ("c059-folder", empty_folder, ("CK301", "the folder holds no model file and no shard index", "no file", "name the file itself")),
    ("c059-nothing", nothing, ("CK310", "the source cannot be opened: No such file or directory", "", "look at the spelling of the path: ls shows what is there")),
]  # fmt: skip


@pytest.mark.parametrize(("made", "said"), [row[1:] for row in PLACES], ids=[row[0] for row in PLACES])
def test_no_file(box, made, said):
    made(box)
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_c059_unreadable(box):
    box.write("in.pth", torch_file()).chmod(0)
    said = "CK310", "the source cannot be opened: Permission denied", "", "look at the rights of the file and its folders: ls -l"
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")

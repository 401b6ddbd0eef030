"""Catalogue B: the zip container. Two readers that understand an archive differently are an attack; here there is one reading, or none."""

import struct

import pytest
from building import FLOATS, ONE, Record, archive, pickled, records, storage, table, tensor, torch_file
from harness import message

#: 400 directory entries on the bytes of one record: a file of 90 kB that a naive reader makes 3 GB of.
OVERLAPPING = [Record("a/data/0", FLOATS), *(Record(f"a/data/{at}", FLOATS, header=0, stored=False) for at in range(1, 400))]

#: A whole record (its header, then nine bytes) as the bytes of another.
INNER = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 9, 9, 7, 0) + b"a/inner" + bytes(9)
INNER_AT = len(torch_file(other=Record("a/outer", INNER, stored=True)).partition(INNER)[0])


def lied(raw, marker, field, value, fmt="<I", nth=0):
    """``raw`` with one field, counted from the nth marker, changed."""
    at = -1
    for _ in range(nth + 1):
        at = raw.index(marker, at + 1)
    return raw[: at + field] + struct.pack(fmt, value) + raw[at + field + struct.calcsize(fmt) :]


def flipped(raw, at):
    return raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :]


GOOD = torch_file()

REFUSED = [
    ("c019-a-record-twice", torch_file(again=Record("a/data/0", bytes(32))), ("CK306", "record 'data/0' occurs twice")),
    ("c020-a-pickle-twice", torch_file(again=Record("a/data.pkl", pickled(b"cposix\nsystem\n)R"))), ("CK306", "record 'data.pkl' occurs twice")),
    ("c021-two-folders", torch_file(other=Record("b/data.pkl", ONE)), ("CK306", "the records do not lie in one folder", "b/data.pkl")),
    ("c021-no-folder", torch_file(other=Record("data.pkl", ONE)), ("CK306", "the records do not lie in one folder", "data.pkl")),
    ("c022-absolute", torch_file(other=Record("/a/x")), ("CK306", "the record name '/a/x' is unsafe")),
    ("c022-dotdot", torch_file(other=Record("a/../../marker")), ("CK306", "the record name 'a/../../marker' is unsafe")),
    ("c022-backslash", torch_file(other=Record("a/..\\marker")), ("CK306", "the record name 'a/..\\\\marker' is unsafe")),
    ("c022-drive", torch_file(other=Record("C:/marker")), ("CK306", "the record name 'C:/marker' is unsafe")),
    ("c022-NUL", torch_file(other=Record(b"a/x\0y")), ("CK306", "the record name 'a/x\\\\x00y' is unsafe")),
    ("c022-empty-part", torch_file(other=Record("a//x")), ("CK306", "the record name 'a//x' is unsafe")),
    ("c022-a-folder", torch_file(other=Record("a/x/")), ("CK306", "the record name 'a/x/' is unsafe")),
    ("c022-latin-1", torch_file(other=Record(b"a/\xff")), ("CK306", "a record's name is not UTF-8", "b'a/\\xff'")),
    ("c022-escape-sequence", torch_file(other=Record(b"a/\x1b[31m/../x")), ("CK306", "the record name 'a/\\\\x1b[31m/../x' is unsafe")),
    ("c023-a-deflated-weight", torch_file(data_0=Record("a/data/0", FLOATS, method=8)), ("CK306", "record 'a/data/0' is compressed; torch stores records as they are")),
    ("c023-stored-with-another-size", torch_file(data_0=Record("a/data/0", FLOATS, size=1 << 20)), ("CK302", "record 'data/0' reaches past the end of the data")),
    ("c024-everything-deflated", archive([Record(each.name, each.data, method=8) for each in records()]), ("CK306", "record 'a/data.pkl' is compressed; torch stores records as they are")),
    ("c025-64-MB-of-zeros-in-64-kB", torch_file(data_0=Record("a/data/0", bytes(64 << 20), method=8)), ("CK306", "record 'a/data/0' is compressed; torch stores records as they are")),
    ("c025-64-MB-of-pickle-in-64-kB", torch_file(data_pkl=Record("a/data.pkl", b"\x80\x02" + bytes(64 << 20), method=8)), ("CK306", "record 'a/data.pkl' is compressed; torch stores records as they are")),
    ("c026-400-entries-on-one-record", archive(OVERLAPPING), ("CK306", "record 'data/1' has another name in its own header")),
    ("c026-one-record-inside-another", torch_file(inner=Record("a/inner", bytes(8), header=0, stored=False)), ("CK306", "record 'inner' has another name in its own header")),
    ("c026-a-record-in-the-bytes-of-another", archive([*records(), Record("a/outer", INNER), Record("a/inner", bytes(9), header=INNER_AT, stored=False)]), ("CK306", "records 'outer' and 'inner' overlap")),
    ("c027-directory-longer-than-it-is", archive(records(), length_lie=64), ("CK306", "the archive's directory does not end where its end begins")),
    ("c027-directory-shorter-than-it-is", archive(records(), length_lie=-1), ("CK306", "the archive's directory does not end where its end begins")),
    ("c027-directory-elsewhere", archive(records(), start_lie=-16), ("CK306", "the archive's directory does not end where its end begins")),
    ("c027-directory-beyond-the-end", archive(records(), start_lie=1 << 30), ("CK306", "the archive's directory does not end where its end begins")),
    ("c027-more-entries-than-there-are", archive(records(), count=9), ("CK302", "the archive's directory is cut off")),
    ("c027-fewer-entries-than-there-are", archive(records(), count=3), ("CK306", "the archive's directory has bytes that belong to no record")),
    ("c027-header-beyond-the-end", torch_file(other=Record("a/x", header=1 << 30, stored=False)), ("CK302", "record 'x' starts outside the file")),
    ("c027-header-offset-of-all-ones", torch_file(other=Record("a/x", header=0xFFFFFFFF, stored=False)), ("CK302", "a record's 64-bit sizes are missing")),
    ("c028-another-name-in-the-local-header", torch_file(data_0=Record("a/data/0", FLOATS, local_name=b"a/data/1")), ("CK306", "record 'data/0' has another name in its own header")),
    ("c028-a-longer-name-in-the-local-header", torch_file(data_0=Record("a/data/0", FLOATS, local_name=b"a/data/0x")), ("CK306", "record 'data/0' has another name in its own header")),
    ("c028-no-local-header", torch_file(data_0=Record("a/data/0", FLOATS, header=7)), ("CK302", "record 'data/0' has no header where the directory points")),
    ("c029-encrypted", torch_file(data_0=Record("a/data/0", FLOATS, flags=1)), ("CK306", "record 'a/data/0' is encrypted, or on another disk")),
    ("c029-strongly-encrypted", torch_file(data_0=Record("a/data/0", FLOATS, flags=0x40)), ("CK306", "record 'a/data/0' is encrypted, or on another disk")),
    ("c029-unknown-method", torch_file(data_0=Record("a/data/0", FLOATS, method=99)), ("CK306", "record 'a/data/0' is compressed; torch stores records as they are")),
    ("c029-another-disk", torch_file(data_0=Record("a/data/0", FLOATS, disk=1)), ("CK306", "record 'a/data/0' is encrypted, or on another disk")),
    ("c029-several-disks", archive(records(), disks=2), ("CK306", "the archive spans several disks, or carries a comment")),
    ("c029-a-comment", archive(records(), comment=b"hello"), ("CK306", "bytes follow the end of the archive", "", "the file was appended to, or cut in the wrong place")),
    ("c029-64-bit-size-without-its-field", torch_file(data_0=Record("a/data/0", FLOATS, size=0xFFFFFFFF)), ("CK302", "a record's 64-bit sizes are missing")),
    ("c029-64-bit-field-cut-short", torch_file(data_0=Record("a/data/0", FLOATS, size=0xFFFFFFFF, extra=struct.pack("<HHI", 1, 16, 0))), ("CK302", "a record's 64-bit sizes are missing")),
    ("c029-64-bit-field-of-2-to-the-64", torch_file(data_0=Record("a/data/0", FLOATS, size=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 2**64 - 1, 2**64 - 1))), ("CK302", "record 'data/0' reaches past the end of the data")),
    ("c029-64-bit-end-record-elsewhere", GOOD[:-22] + struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 40, 1) + GOOD[-22:], ("CK302", "the archive's 64-bit end record is damaged")),
    ("c030-bitflip-in-a-weight", flipped(GOOD, GOOD.index(FLOATS) + 15), ("CK312", "x: the checksum that the file records does not match its bytes", "storage at offset 263", "fetch the file again")),
    ("c030-bitflip-in-the-checksum", lied(GOOD, b"PK\1\2", 16, 0x12345678, nth=2), ("CK312", "x: the checksum that the file records does not match its bytes", "storage at offset 263", "fetch the file again")),
    ("c030-bitflip-in-the-pickle", flipped(GOOD, GOOD.index(b"FloatStorage") + 4), ("CK305", "there is no storage class 'Floa4Storage'")),
    ("c031-half", GOOD[: len(GOOD) // 2], ("CK302", "the archive's end is missing: the file is cut off", "290 bytes", "fetch the file again")),
    ("c031-last-byte-missing", GOOD[:-1], ("CK302", "the archive's end is missing: the file is cut off", "579 bytes", "fetch the file again")),
    ("c031-something-before-it", b"junk" + GOOD, ("CK301", "this is no torch and no safetensors file", "its first bytes are 6a 75 6e 6b 50 4b 03 04")),
    ("c031-a-shell-script-before-it", b"#!/bin/sh\ntouch marker\nexit\n" + GOOD, ("CK301", "this is no torch and no safetensors file", "its first bytes are 23 21 2f 62 69 6e 2f 73")),
    ("c031-100-bytes-behind-it", GOOD + bytes(100), ("CK306", "bytes follow the end of the archive", "", "the file was appended to, or cut in the wrong place")),
    ("c031-another-archive-behind-it", GOOD + GOOD, ("CK306", "the archive's directory does not end where its end begins")),
    ("c032-byte-order-middle", torch_file(byteorder=Record("a/byteorder", b"middle")), ("CK306", "the byte order is neither little nor big", "b'middle'")),
    ("c032-byte-order-empty", torch_file(byteorder=Record("a/byteorder", b"")), ("CK306", "the byte order is neither little nor big", "b''")),
    ("c034-version-999", torch_file(version=Record("a/version", b"999\n")), ("CK301", "the archive has a version that no torch writes", "b'999'")),
    ("c034-version-of-a-megabyte", torch_file(version=Record("a/version", b"3" * (1 << 20))), ("CK301", "the archive has a version that no torch writes", "b'3333333333333333333333333333333333333333333333333333333333333333'")),
    ("c034-no-version", torch_file(version=None), ("CK301", "the archive has no version: it was not written by torch.save")),
    ("c034-no-data-pkl", torch_file(data_pkl=None), ("CK301", "the archive has no data.pkl: it was not written by torch.save")),
    ("c034-no-records-at-all", archive([]), ("CK301", "this is an empty zip archive, not a checkpoint")),
    ("c035-key-with-a-path", torch_file(pickled(table(x=tensor(of=storage(key="../data.pkl"))))), ("CK306", "a storage with the impossible key '../data.pkl'")),
    ("c035-key-with-a-backslash", torch_file(pickled(table(x=tensor(of=storage(key="..\\0"))))), ("CK306", "a storage with the impossible key '..\\\\0'")),
    ("c035-key-that-names-the-pickle", torch_file(pickled(table(x=tensor(of=storage(key="data.pkl"))))), ("CK302", "storage 'data.pkl' is declared and not there")),
    ("c035-key-that-is-empty", torch_file(pickled(table(x=tensor(of=storage(key=""))))), ("CK302", "storage '' is declared and not there")),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, data, said):
    box.write("in.pth", data)
    staged = said[0] == "CK312"  # a checksum is known to be wrong only when the bytes have passed
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth", staged=staged)


SWAPPED = struct.pack(">8f", *range(8))
READ = [
    ("c032-byte-order-big", torch_file(data=SWAPPED, byteorder=Record("a/byteorder", b"big"))),
    ("c032-no-byte-order", torch_file(byteorder=None)),
    ("c034-a-record-that-nobody-needs", torch_file(other=Record("a/data/77", b"x"))),
    ("c034-60000-records", torch_file(**{f"r{at}": Record(f"a/data/{at + 1}") for at in range(60_000)})),
]  # fmt: skip


@pytest.mark.parametrize("data", [row[1] for row in READ], ids=[row[0] for row in READ])
def test_read_as_it_is_meant(box, data):
    box.write("in.pth", data)
    box.converts("run", "pass.yaml", "in.pth", "out.safetensors", torch=True, mb=1024)
    assert (box.folder / "out.safetensors").read_bytes()[-32:] == FLOATS


def test_c034_records_that_nobody_needs_are_said(box):
    box.write("in.pth", torch_file(other=Record("a/data/77", b"x"), evil=Record("a/run\N{RIGHT-TO-LEFT OVERRIDE}me", b"x")))
    assert "2 records belong to no tensor (data/77, run\\u202eme); they are left behind" in box.converts().out


def test_c033_the_code_of_a_torchscript_archive_is_never_looked_at(box):
    """Its tensors are read by design (real conversions need them); its code may be anything, and stays where it is."""
    pickle = pickled(b"c__torch__\nNet\n)\x81}" + b"X\x01\0\0\0x" + tensor() + b"sb")
    code = Record("a/code/__torch__.py", b"import os; os.system('touch marker')" * 1000, method=8)
    box.write("in.pth", torch_file(pickle, constants=Record("a/constants.pkl", pickled(b"cposix\nsystem\n)R")), code=code))
    outcome = box.converts()
    assert "a TorchScript archive: its tensors are read, its code is neither run nor carried along" in outcome.out
    assert b"os.system" not in (box.folder / "out.pth").read_bytes()


def test_c033_a_torchscript_archive_that_is_cut_or_lies_is_refused_like_any_other(box):
    pickle = pickled(b"c__torch__\nNet\n)\x81}" + b"X\x01\0\0\0x" + tensor(size=[9]) + b"sb")
    box.write("in.pth", torch_file(pickle, constants=Record("a/constants.pkl", pickled(b")"))))
    said = "CK305", "a tensor reaches past the end of its storage", "9 elements needed, 8 stored"
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")

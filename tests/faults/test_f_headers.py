"""Catalogue F: safetensors headers. Never accepts what the reference library refuses, and says which rule was broken.

The rules one by one are in ``tests/formats/test_safetensors.py``, with the differential test against the reference library; here the same
bytes go through the command line, with its limits.
"""

import json

import pytest
import safetensors
from building import archive, entry, records, safetensors_file
from harness import message

from ckptconv.formats.safetensors import MAX_HEADER
from ckptconv.formats.strict import MAX_VALUES

A = {"a": entry()}


def raw(text, data=b""):
    return safetensors_file(text.encode(), data)


REFUSED = [
    ("c068-header-of-length-0", safetensors_file(b"") + bytes(8), ("CK301", "this is no torch and no safetensors file", "its first bytes are 00 00 00 00 00 00 00 00")),
    ("c068-header-longer-than-the-file", safetensors_file(A, length=1000), ("CK302", "the file ends inside its header", "69 bytes, the header needs 1,008")),
    ("c068-header-of-2-to-the-64", safetensors_file(A, length=2**64 - 1), ("CK301", "this is no torch and no safetensors file", "its first bytes are ff ff ff ff ff ff ff ff")),
    ("c068-header-over-the-limit", safetensors_file(A, length=MAX_HEADER + 1), ("CK307", "the header says that it is longer than 50,000,000 bytes", "50,000,001 bytes")),
    ("c068-seven-bytes", bytes(7), ("CK301", "this is no torch and no safetensors file", "its first bytes are 00 00 00 00 00 00 00")),
    ("c069-not-JSON", raw("{x}"), ("CK307", "not valid JSON", "Expecting property name enclosed in double quotes at character 1")),
    ("c069-a-list", raw("[]"), ("CK301", "this is no torch and no safetensors file", "its first bytes are 02 00 00 00 00 00 00 00")),
    ("c069-text-behind-it", raw("{} x"), ("CK307", "not valid JSON", "Extra data at character 3")),
    ("c069-NaN", raw('{"x": NaN}'), ("CK307", "NaN is not JSON")),
    ("c069-100000-deep", raw('{"x":' + "[" * 100_000 + "]" * 100_000 + "}"), ("CK307", "the JSON is nested too deep")),
    ("c069-not-utf-8", safetensors_file(b'{"\xff": 1}'), ("CK307", "not UTF-8 text", "byte 0xff at 2")),
    ("c069-lone-surrogate", raw('{"\\ud800": 1}'), ("CK307", "a text holds a lone surrogate")),
    ("c070-a-name-twice-on-one-range", raw('{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), ("CK307", "the key 'x' occurs twice")),
    ("c070-a-field-twice", raw('{"x":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), ("CK307", "the key 'dtype' occurs twice")),
    ("c071-a-metadata-key-twice", raw('{"__metadata__":{"a":"1","a":"2"}}'), ("CK307", "the key 'a' occurs twice")),
    ("c071-metadata-twice", raw('{"__metadata__":{},"__metadata__":{}}'), ("CK307", "the key '__metadata__' occurs twice")),
    ("c071-metadata-that-is-no-text", raw('{"__metadata__":{"a":[1]}}'), ("CK307", "__metadata__ must map text to text", "{'a': [1]}")),
    ("c072-overlap", safetensors_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), ("CK307", "b: its bytes overlap those before them", "begins at 4, the bytes before end at 8")),
    ("c072-two-names-on-one-range", safetensors_file({"a": entry(), "b": entry()}, bytes(8)), ("CK307", "b: its bytes overlap those before them", "begins at 0, the bytes before end at 8")),
    ("c072-hole", safetensors_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), ("CK307", "b: its bytes leave a hole before them", "begins at 12, the bytes before end at 8")),
    ("c072-hole-before-the-first", safetensors_file({"a": entry(offsets=[4, 12])}, bytes(12)), ("CK307", "a: its bytes leave a hole before them", "begins at 4, the bytes before end at 0")),
    ("c072-bytes-behind-the-last", safetensors_file(A, bytes(9)), ("CK307", "bytes that belong to no tensor follow the data", "1 bytes")),
    ("c072-cut", safetensors_file(A, bytes(7)), ("CK302", "the file is cut off", "7 bytes of tensors, the header says 8")),
    ("c072-end-before-begin", safetensors_file({"a": entry(offsets=[8, 0])}, bytes(8)), ("CK307", "a: data_offsets must be [begin, end] with begin <= end", "[8, 0]")),
    ("c073-negative-offset", safetensors_file({"a": entry(offsets=[-8, 0])}), ("CK307", "a: data_offsets must be [begin, end] with begin <= end", "[-8.0, 0]")),
    ("c073-float-offset", safetensors_file({"a": entry(offsets=[0.0, 8])}, bytes(8)), ("CK307", "a: data_offsets must be [begin, end] with begin <= end", "[0.0, 8]")),
    ("c073-offset-over-64-bits", safetensors_file({"a": entry(offsets=[0, 2**64])}, bytes(8)), ("CK307", "a: data_offsets must be [begin, end] with begin <= end", "[0, 18446744073709551616]")),
    ("c073-another-number-of-elements", safetensors_file({"a": entry([3])}, bytes(8)), ("CK307", "a: shape and dtype need another number of bytes than data_offsets gives", "[3] F32 is 12 bytes, [0, 8] is 8")),
    ("c073-shape-that-overflows", safetensors_file({"a": entry([2**62, 2**62])}, bytes(8)), ("CK307", "a: the shape has more elements than 64 bits can count", "[4611686018427387904, 4611686018427387904]")),
    ("c073-shape-that-wraps-to-16-bytes", safetensors_file({"a": entry([2**62 + 1, 4], [0, 16])}, bytes(16)), ("CK307", "a: the shape has more elements than 64 bits can count", "[4611686018427387905, 4]")),
    ("c074-shape-0-by-2-to-the-63", safetensors_file({"a": entry([0, 2**63], [0, 0])}), ("CK307", "a: shape must be a list of at most 64 sizes", "[0, 9223372036854775808]")),
    ("c074-shape-0-by-2-to-the-80", safetensors_file({"a": entry([0, 2**40, 2**40], [0, 0])}), ("CK307", "a: the shape has more elements than 64 bits can count", "[0, 1099511627776, 1099511627776]")),
    ("c074-rank-100000", safetensors_file({"a": entry([1] * 100_000, [0, 4])}, bytes(4)), ("CK307", "a: shape must be a list of at most 64 sizes", "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1…")),
    ("c075-unknown-dtype", safetensors_file({"a": entry(dtype="F31")}, bytes(8)), ("CK307", "a: unknown dtype", "'F31'", "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, F4, C64, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, F6_E2M3, F6_E3M2")),
    ("c075-lower-case-dtype", safetensors_file({"a": entry(dtype="f32")}, bytes(8)), ("CK307", "a: unknown dtype", "'f32'", "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, F4, C64, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, F6_E2M3, F6_E3M2")),
    ("c075-numeric-dtype", safetensors_file({"a": entry(dtype=10)}, bytes(8)), ("CK307", "a: unknown dtype", "10", "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, F4, C64, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, F6_E2M3, F6_E3M2")),
    ("c075-odd-F4", safetensors_file({"a": entry([3], [0, 2], "F4")}, bytes(2)), ("CK307", "a: F4 numbers come in pairs, so the last axis must be even", "[3]")),
    ("c075-null-entry", safetensors_file({"a": None}), ("CK307", "a: must be an object with dtype, shape and data_offsets", "None")),
    ("c075-missing-field", safetensors_file({"a": {"dtype": "F32", "shape": [0]}}), ("CK307", "a: has no data_offsets")),
    ("c075-unknown-field-nested-beyond-sense", raw('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"y":' + "[" * 100 + "]" * 100 + "}}"), ("CK307", "a header field is nested deeper than 16")),
    ("c076-more-values-than-the-limit", raw('{"a":[' + "0," * MAX_VALUES + "0]}"), ("CK307", "the JSON has more than 2,000,000 values", "2,000,002 commas and brackets")),
    ("c076-millions-of-empty-lists", raw('{"a":[' + "[]," * (MAX_VALUES // 2) + "0]}"), ("CK307", "the JSON has more than 2,000,000 values", "2,000,002 commas and brackets")),
    ("c077-an-archive-behind-it", safetensors_file({}, archive(records())), ("CK307", "bytes that belong to no tensor follow the data", "580 bytes")),
    ("c077-an-archive-in-its-metadata", raw(json.dumps({"__metadata__": {"x": "PK\3\4"}})) + archive(records()), ("CK307", "bytes that belong to no tensor follow the data", "580 bytes")),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, data, said):
    box.write("in.pth", data)
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.safetensors")


@pytest.mark.parametrize("data", [row[1] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_the_reference_says(data):
    """Where the reference accepts what is refused here, the row stands in this list: stricter, and on purpose."""
    try:
        safetensors.deserialize(data)
    except (safetensors.SafetensorError, TypeError):
        return
    assert next(row[0] for row in REFUSED if row[1] is data) in STRICTER


STRICTER = [
    "c070-a-name-twice-on-one-range", "c071-a-metadata-key-twice", "c074-shape-0-by-2-to-the-80", "c075-unknown-field-nested-beyond-sense",
    "c074-rank-100000", "c074-shape-0-by-2-to-the-63",
]  # fmt: skip

READ = [
    ("c075-unknown-field", safetensors_file({"a": entry(scale=[1, {"y": 0.5}])}, bytes(8))),
    ("c076-200000-empty-tensors", safetensors_file({f"layers.{at}.w": entry([0], [0, 0]) for at in range(200_000)})),
    ("c076-header-of-blanks", safetensors_file(b"{}" + b" " * (MAX_HEADER - 2))),
    ("c076-20-MB-of-metadata", raw(json.dumps({"__metadata__": {"a": "x" * 20_000_000}}))),
    ("c076-metadata-beyond-the-basic-plane", raw(json.dumps({"__metadata__": {"a": "\N{GRINNING FACE}" * 5_000_000}}, ensure_ascii=False))),
]  # fmt: skip


@pytest.mark.parametrize("data", [row[1] for row in READ], ids=[row[0] for row in READ])
def test_read_within_the_limits(box, data):
    box.write("in.safetensors", data)
    assert box.run("inspect", "in.safetensors").code == 0

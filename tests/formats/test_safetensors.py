from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written import bytes_of, manifest_of, spec_of, write

from ckptconv.errors import Refusal
from ckptconv.formats.base import Contents, Converted, Kept
from ckptconv.formats.safetensors import MAX_HEADER, SafetensorsWriter, read
from ckptconv.spec import DType, Manifest, TensorSpec

WRITER = SafetensorsWriter()


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_bytes(tmp_path: Path, data: bytes) -> Contents:
    path = tmp_path / "in.safetensors"
    path.write_bytes(data)
    return read(path)


# ------------------------------------------------------------------------------------------------- what honest writers wrote


def test_the_reference_writers_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7), "e": torch.zeros(0, 2)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "by": "hand"})
    contents = read(path)
    assert (contents.format, contents.files, contents.metadata, contents.warnings) == (
        "safetensors",
        (path,),
        {"format": "pt", "by": "hand"},
        (),
    )
    container = contents.containers["."]
    data = path.read_bytes()
    assert {name: placed.spec for name, placed in container.tensors.items()} == {name: spec_of(tensor) for name, tensor in tensors.items()}
    for name, placed in container.tensors.items():
        assert data[placed.storage.offset :][: placed.spec.nbytes] == bytes_of(tensors[name])
        assert placed.contiguous


def test_aliases_of_save_model_come_back_as_ties(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    safetensors.torch.save_model(model, str(tmp_path / "in.safetensors"), metadata={"format": "pt"})
    contents = read(tmp_path / "in.safetensors")
    manifest = contents.containers["."].manifest
    assert set(manifest) == {"embed.weight", "head.weight", "head.bias"}
    assert [set(group) for group in manifest.ties] == [{"embed.weight", "head.weight"}]
    assert contents.metadata == {"format": "pt"}


def test_remarks_are_not_taken_for_aliases(tmp_path: Path) -> None:
    metadata = {"format": "pt", "ckptconv.rules": "pt", "a\nb": "pt", "other": "absent"}
    contents = read_bytes(tmp_path, file_of({"__metadata__": metadata, "pt": entry()}, bytes(8)))
    assert list(contents.containers["."].tensors) == ["pt"]
    assert contents.metadata == metadata


def test_f4_counts_pairs_as_torch_does(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "in.safetensors")
    assert read(tmp_path / "in.safetensors").containers["."].manifest["x"] == TensorSpec((3, 4), DType.float4_e2m1fn_x2)


def test_types_without_a_torch_type_are_named_and_left_out(tmp_path: Path) -> None:
    contents = read_bytes(tmp_path, file_of({"six": entry([4], [0, 3], "F6_E2M3"), "x": entry([1], [3, 7])}, bytes(7)))
    assert contents.containers["."].unsupported == {"six": "F6_E2M3"}
    assert list(contents.containers["."].tensors) == ["x"]


def test_unknown_fields_are_a_warning(tmp_path: Path) -> None:
    contents = read_bytes(tmp_path, file_of({"x": {**entry(), "scale": [1, {"y": 0.5}], "\x1b[31m": None}}, bytes(8)))
    assert contents.warnings == ("1 header entries have unknown fields (scale, \\x1b[31m); they are ignored",)


# ----------------------------------------------------------------------------------------------------------- hostile headers

HUGE = "9" * 5000
HOSTILE: Mapping[str, tuple[bytes, str, str]] = {
    "seven bytes": (bytes(7), "CK302", "the file is too short for safetensors"),
    "no file at all": (b"", "CK302", "the file is too short for safetensors"),
    "header of length 0": (file_of(b""), "CK307", "the header must be a JSON object"),
    "header longer than the file": (file_of({}, length=3), "CK302", "the file ends inside its header"),
    "header length of 2^64-1": (file_of({}, length=2**64 - 1), "CK307", "the header says that it is longer than 50,000,000 bytes"),
    "header above the cap": (file_of({}, length=MAX_HEADER + 1), "CK307", "the header says that it is longer than 50,000,000 bytes"),
    "not JSON": (file_of(b"{x}"), "CK307", "not valid JSON"),
    "a list": (file_of(b"[]"), "CK307", "the header must be a JSON object"),
    "leading blank": (file_of(b" {}"), "CK307", "the header must be a JSON object"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "CK307", "the header must be a JSON object"),
    "trailing text": (file_of(b"{} x"), "CK307", "not valid JSON"),
    "NaN": (file_of(b'{"x": NaN}'), "CK307", "NaN is not JSON"),
    "Infinity": (file_of(b'{"x": -Infinity}'), "CK307", "-Infinity is not JSON"),
    "100,000 deep": (file_of(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "CK307", "the JSON is nested too deep"),
    "100 deep in an unknown field": (
        file_of(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"y":' + b"[" * 100 + b"]" * 100 + b"}}"),
        "CK307", "a header field is nested deeper than 16"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "CK307", "not UTF-8 text"),
    "lone surrogate": (file_of(b'{"\\ud800": 1}'), "CK307", "a text holds a lone surrogate"),
    "lone surrogate in a field": (file_of({"x": {**entry(), "y": "\udfff"}}, bytes(8)), "CK307", "a text holds a lone surrogate"),
    "a name twice": (file_of(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
                     "CK307", "the key 'x' occurs twice"),
    "a metadata key twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "CK307", "the key 'a' occurs twice"),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "CK307", "the key '__metadata__' occurs twice"),
    "a field twice": (file_of(b'{"x":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "CK307", "the key 'dtype' occurs twice"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "CK307", "__metadata__ must map text to text"),
    "metadata null": (file_of({"__metadata__": None}), "CK307", "__metadata__ must map text to text"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "CK307", "b: its bytes overlap those before them"),
    "two names for one range": (file_of({"a": entry(), "b": entry()}, bytes(8)), "CK307", "b: its bytes overlap those before them"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "CK307", "b: its bytes leave a hole before them"),
    "leading hole": (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "CK307", "a: its bytes leave a hole before them"),
    "empty tensor inside another": (file_of({"a": entry(), "b": entry([0], [4, 4])}, bytes(8)), "CK307", "b: its bytes overlap those before them"),
    "trailing bytes": (file_of({"a": entry()}, bytes(9)), "CK307", "bytes that belong to no tensor follow the data"),
    "a zip behind it": (file_of({}, b"PK\5\6" + bytes(18)), "CK307", "bytes that belong to no tensor follow the data"),
    "cut off": (file_of({"a": entry()}, bytes(7)), "CK302", "the file is cut off"),
    "end before begin": (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "CK307", "a: data_offsets must be [begin, end] with begin <= end"),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}), "CK307", "a: data_offsets must be [begin, end] with begin <= end"),
    "float offset": (file_of({"a": entry(offsets=[0.0, 8])}, bytes(8)), "CK307", "a: data_offsets must be [begin, end] with begin <= end"),
    "boolean size": (file_of({"a": entry([True], [0, 4])}, bytes(4)), "CK307", "a: shape must be a list of at most 64 sizes"),
    "offset beyond 64 bits": (file_of({"a": entry(offsets=[0, 2**64])}, bytes(8)), "CK307", "a: data_offsets must be [begin, end] with begin <= end"),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "CK307", "a: data_offsets must be [begin, end] with begin <= end"),
    "minus zero": (file_of(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "CK307", "a: shape must be a list of at most 64 sizes"),
    "a number of 5,000 digits": (file_of(f'{{"a":{{"dtype":"F32","shape":[{HUGE}],"data_offsets":[0,0]}}}}'.encode()), "CK307", "a number is out of range"),
    "shape and range differ": (file_of({"a": entry([3])}, bytes(8)), "CK307", "a: shape and dtype need another number of bytes than data_offsets gives"),
    "shape that overflows": (file_of({"a": entry([2**62, 2**62])}, bytes(8)), "CK307", "a: the shape has more elements than 64 bits can count"),
    "shape that wraps to 16 bytes": (file_of({"a": entry([2**62 + 1, 4], [0, 16])}, bytes(16)), "CK307", "a: the shape has more elements than 64 bits can count"),
    "shape [0, 2^63]": (file_of({"a": entry([0, 2**63], [0, 0])}), "CK307", "a: shape must be a list of at most 64 sizes"),
    "shape [0, 2^40, 2^40]": (file_of({"a": entry([0, 2**40, 2**40], [0, 0])}), "CK307", "a: the shape has more elements than 64 bits can count"),
    "rank 100,000": (file_of({"a": entry([1] * 100_000, [0, 4])}, bytes(4)), "CK307", "a: shape must be a list of at most 64 sizes"),
    "unknown dtype": (file_of({"a": entry(dtype="F31")}, bytes(8)), "CK307", "a: unknown dtype"),
    "lower-case dtype": (file_of({"a": entry(dtype="f32")}, bytes(8)), "CK307", "a: unknown dtype"),
    "numeric dtype": (file_of({"a": entry(dtype=10)}, bytes(8)), "CK307", "a: unknown dtype"),
    "a list as dtype": (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "CK307", "a: unknown dtype"),
    "half a byte of F4": (file_of({"a": entry([3], [0, 2], "F4")}, bytes(2)), "CK307", "a: F4 numbers come in pairs, so the last axis must be even"),
    "F4 whose last axis is odd": (file_of({"a": entry([2, 3], [0, 3], "F4")}, bytes(3)), "CK307", "a: F4 numbers come in pairs, so the last axis must be even"),
    "F4 without an axis": (file_of({"a": entry([], [0, 0], "F4")}), "CK307", "a: F4 numbers come in pairs, so the last axis must be even"),
    "a fraction of a byte": (file_of({"a": entry([1], [0, 1], "F6_E2M3")}, bytes(1)), "CK307", "a: shape and dtype need another number of bytes than data_offsets gives"),
    "null entry": (file_of({"a": None}), "CK307", "a: must be an object with dtype, shape and data_offsets"),
    "entry as a list": (file_of({"a": ["F32", [0], [0, 0]]}), "CK307", "a: must be an object with dtype, shape and data_offsets"),
    "missing fields": (file_of({"a": {"dtype": "F32"}}), "CK307", "a: has no data_offsets and no shape"),
    "name with a control character": (file_of({"a\x1b[31m": entry()}, bytes(8)), "CK307", "the name holds control characters or lone surrogates"),
    "name of a megabyte": (file_of({"a" * 2**20: entry()}, bytes(8)), "CK307", "the name has 1,048,576 characters; at most 1,024 are allowed"),
    "empty name": (file_of({"": entry()}, bytes(8)), "CK307", "the name is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "code", "what"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_header_that_breaks_a_rule_is_refused(tmp_path: Path, data: bytes, code: str, what: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_bytes(tmp_path, data)
    assert (caught.value.code, caught.value.what) == (code, what)
    assert len(caught.value.found) < 400
    assert (caught.value.what + caught.value.found).isprintable()


@pytest.mark.parametrize("length", range(0, 120, 7))
def test_every_truncation_is_refused(tmp_path: Path, length: int) -> None:
    whole = safetensors.torch.save({"a": torch.ones(4), "b": torch.zeros(2, 2)})
    assert len(whole) > 120
    with pytest.raises(Refusal):
        read_bytes(tmp_path, whole[:length])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refusal, match="not a regular file"):
        read(tmp_path / "pipe")


def test_huge_but_honest_headers_are_read(tmp_path: Path) -> None:
    started = time.process_time()
    many = {f"model.layers.{at}": entry([0], [0, 0]) for at in range(100_000)}
    assert len(read_bytes(tmp_path, file_of(many)).containers["."].tensors) == 100_000
    assert read_bytes(tmp_path, file_of({"__metadata__": {"a": "x" * 20_000_000}})).metadata["a"][:3] == "xxx"
    assert read_bytes(tmp_path, file_of(b"{}" + b" " * (MAX_HEADER - 2))).containers["."].tensors == {}
    assert time.process_time() - started < 20  # seconds; measured 1.5


# -------------------------------------------------------------------------------- never accepts what the reference refuses

_numbers = st.one_of(
    st.sampled_from([0, 1, 2, 4, 8, 12, 16, -1, 2**31, 2**40, 2**63, 2**64, 0.0, -0.0, 1e9, True, None]), st.integers(0, 20)
)
_entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F4", "F6_E3M2", "BOOL", "BF16", "F8_E8M0", "C64", "U64", "f32", "", 3, None]), "shape": st.lists(_numbers, max_size=3),
     "data_offsets": st.lists(_numbers, min_size=2, max_size=2)},
    optional={"extra": st.recursive(st.one_of(_numbers, st.text(max_size=3)), lambda inner: st.lists(inner, max_size=2), max_leaves=4)},
)  # fmt: skip
_headers = st.dictionaries(st.one_of(st.sampled_from(["a", "b", "c", "__metadata__"]), st.text(max_size=3)), _entries, max_size=3)


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Any]:
    """Headers that are right, so that the property is not about refusals alone."""
    header, at = {}, 0
    for name in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype, bits = draw(st.sampled_from([("F32", 32), ("BF16", 16), ("U8", 8), ("F4", 4), ("F6_E2M3", 6)]))
        nbytes = -(-bits * int(torch.tensor(shape).prod()) // 8)
        header[name] = entry(shape, [at, at + nbytes], dtype)
        at += nbytes
    return header


_mutations = st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=2)), max_size=2)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(_headers, tilings()), mutations=_mutations, nbytes=st.one_of(st.none(), st.integers(0, 32)))
def test_nothing_is_accepted_that_the_reference_refuses(
    tmp_path: Path, header: dict[str, Any], mutations: list[tuple[int, bytes]], nbytes: int | None
) -> None:
    ends = [value["data_offsets"][1] for value in header.values() if isinstance(value["data_offsets"][1], int)]
    data = bytearray(
        file_of(header, bytes(nbytes if nbytes is not None else min(max(ends, default=0), 10_000) if max(ends, default=0) > 0 else 0))
    )
    for at, new in mutations:
        data[at : at + len(new)] = new
    try:
        contents = read_bytes(tmp_path, bytes(data))
    except Refusal:
        return
    accepted = dict(safetensors.deserialize(bytes(data)))
    container = contents.containers["."]
    assert accepted.keys() == container.tensors.keys() | container.unsupported.keys()
    for name, placed in container.tensors.items():
        assert bytes(data)[placed.storage.offset :][: placed.storage.nbytes] == bytes(accepted[name]["data"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=tilings())
def test_a_tiling_is_accepted_where_the_reference_accepts_it(tmp_path: Path, header: dict[str, Any]) -> None:
    data = file_of(header, bytes(max((value["data_offsets"][1] for value in header.values()), default=0)))
    if any(value["dtype"] == "F4" and (not value["shape"] or value["shape"][-1] % 2) for value in header.values()):
        return
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        with pytest.raises(Refusal):
            read_bytes(tmp_path, data)
    else:
        assert (
            read_bytes(tmp_path, data).containers["."].tensors.keys() | read_bytes(tmp_path, data).containers["."].unsupported.keys()
            == header.keys()
        )


# -------------------------------------------------------------------------------------------------------------------- writing


def test_the_header_keeps_the_manifests_order_and_the_data_is_by_alignment(tmp_path: Path) -> None:
    tensors = {"z": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "a": torch.ones(2, dtype=torch.int64), "c": torch.ones(2)}
    layout = write(tmp_path / "out.safetensors", WRITER, tensors)
    assert sorted(layout.slots, key=lambda name: layout.slots[name].offset) == ["a", "b", "c", "z"]
    assert list(layout.slots) == list(tensors)
    assert list(read(tmp_path / "out.safetensors").containers["."].tensors) == list(tensors)
    assert layout.slots["a"].offset % 64 == 0


def test_metadata_says_format_pt_and_names_the_aliases(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    layout = write(
        tmp_path / "out.safetensors", WRITER, {"a": weight, "b": weight}, ties=(("a", "b"),), metadata={"format": "tf", "by": "us"}
    )
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "us", "b": "a"}
        assert list(opened.keys()) == ["a"]
    assert list(layout.slots) == ["a"]


def test_what_the_format_cannot_hold_is_refused_all_at_once() -> None:
    spec = TensorSpec((2,), DType.float32)
    manifest = Manifest(
        {"c": TensorSpec((2,), DType.complex32), "d": TensorSpec((), DType.complex128), "f": TensorSpec((), DType.float4_e2m1fn_x2),
         "kept": spec, "format": spec, "ckptconv.x": spec, "__metadata__": spec}, ties=(("kept", "format", "ckptconv.x"),),
    )  # fmt: skip
    assert [(refusal.code, refusal.what) for refusal in WRITER.refuse(manifest)] == [
        ("CK504", "c: safetensors has no complex32"),
        ("CK504", "d: safetensors has no complex128"),
        ("CK504", "f: safetensors counts single F4 numbers on the last axis, and this tensor has no axis"),
        ("CK209", "the name __metadata__ is reserved by safetensors"),
        ("CK504", "format: the second name of a tie goes into __metadata__, where this one is taken"),
        ("CK504", "ckptconv.x: the second name of a tie goes into __metadata__, where this one is taken"),
    ]


@pytest.mark.parametrize("metadata", [{"b": "note"}, {"note": "a"}])
def test_metadata_that_would_read_as_a_tie_is_refused(metadata: dict[str, str]) -> None:
    weight = torch.ones(1)
    with pytest.raises(Refusal) as caught:
        WRITER.lay_out("out.safetensors", manifest_of({"a": weight, "b": weight}, (("a", "b"),)), metadata=metadata)
    ((key, _),) = metadata.items()
    assert (caught.value.code, caught.value.what) == ("CK504", f"the metadata entry '{key}' would be read as a tie")


@pytest.mark.parametrize("tree", [{"state_dict": Converted()}, Kept("x", TensorSpec((), DType.int8))])
def test_there_is_no_room_beside_the_tensors(tree: object) -> None:
    with pytest.raises(Refusal, match="safetensors holds tensors only"):
        WRITER.lay_out("out.safetensors", manifest_of({"a": torch.ones(1)}), metadata={}, tree=tree)


def test_a_header_that_no_reader_would_take_is_refused() -> None:
    with pytest.raises(Refusal, match="the header would pass the limit"):
        WRITER.lay_out("out.safetensors", manifest_of({"a": torch.ones(1)}), metadata={"a long story": "x" * MAX_HEADER})

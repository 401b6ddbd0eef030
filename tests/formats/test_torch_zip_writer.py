from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from written import manifest_of, seal, write

from ckptconv import formats
from ckptconv.formats.base import Converted, Kept
from ckptconv.formats.pickle_writer import emit
from ckptconv.formats.torch_zip_writer import TorchZipWriter
from ckptconv.spec import DType, Manifest, TensorSpec

WRITER = TorchZipWriter()
SERIALIZATION_ID = "archive/.data/serialization_id"


def torch_bytes(saved: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def without_id(data: bytes) -> tuple[bytes, list[tuple[Any, ...]], int]:
    """An archive up to its serialization id, its directory without the id's checksum, and its size."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    (at,) = (info.header_offset for info in archive.infolist() if info.filename == SERIALIZATION_ID)
    entries = [
        (info.filename, info.header_offset, info.file_size, info.flag_bits, info.extra, info.create_version, info.extract_version,
         info.CRC if info.filename != SERIALIZATION_ID else None)
        for info in archive.infolist()
    ]  # fmt: skip
    return data[:at], entries, len(data)


def state_dict() -> OrderedDict[str, torch.Tensor]:
    layers = {"fc": torch.nn.Linear(3, 5), "bn": torch.nn.BatchNorm1d(5), "head": torch.nn.Linear(5, 300)}
    model = torch.nn.Sequential(OrderedDict(layers))
    state = model.state_dict()
    for dtype in (torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.bfloat16, torch.bool, torch.int64):
        state[f"extra.{dtype}"] = torch.arange(3).to(dtype)
    state["empty"] = torch.zeros(0, 3)
    return state


def test_the_file_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    state = state_dict()
    write(tmp_path / "out.pth", WRITER, state, module_versions=state._metadata)  # type: ignore[attr-defined]
    assert without_id((tmp_path / "out.pth").read_bytes()) == without_id(torch_bytes(state))


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 2500])
def test_many_tensors_are_batched_as_torch_does(tmp_path: Path, count: int) -> None:
    state = OrderedDict((f"layers.{at}.weight", torch.tensor([at])) for at in range(count))
    write(tmp_path / "out.pth", WRITER, state)
    assert without_id((tmp_path / "out.pth").read_bytes()) == without_id(torch_bytes(state))


TREES = {
    "scalars": {"epoch": 3, "best": -0.5, "flag": True, "other": False, "none": None, "name": "été\n", "raw": b"\x00\xff", "no bytes": b""},
    "integers": [
        0,
        255,
        256,
        65535,
        65536,
        -1,
        2**31 - 1,
        2**31,
        -(2**31),
        -(2**31) - 1,
        2**63,
        -(2**63),
        2**64,
        -(2**64),
        127,
        128,
        -128,
        -129,
    ],
    "containers": {
        "empty": [{}, [], (), OrderedDict()],
        "nested": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        7: {"deep": OrderedDict(a=1, b=2)},
    },
    "long": {"list": list(range(2001)), "dict": {f"k{at}": at for at in range(1500)}, "one": [1]},
    "a text that looks like a global": ["ccollections\nOrderedDict\n", OrderedDict()],
    "same text twice": ["x", "x", {"x": "x"}],
}


@pytest.mark.parametrize("beside", TREES.values(), ids=TREES.keys())
def test_the_tree_around_the_state_dict_comes_back(tmp_path: Path, beside: object) -> None:
    path = tmp_path / "out.pth"
    moment = torch.arange(4, dtype=torch.float64)
    tree = {
        "before": beside,
        "state_dict": Converted(),
        "optimizer": {"state": {0: {"exp_avg": Kept("::optimizer.exp_avg", TensorSpec((4,), DType.float64))}}},
    }
    write(path, WRITER, {"w": torch.ones(2)}, tree=tree, kept={"::optimizer.exp_avg": moment})
    loaded = torch.load(path, weights_only=True)
    assert loaded["before"] == beside
    assert repr(loaded["before"]) == repr(beside)  # == does not tell True from 1, nor a tuple's kind
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))
    read = formats.read(path)
    assert read.tree["before"] == beside
    assert list(read.containers["state_dict"].tensors) == ["w"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], moment)
    assert loaded["optimizer"]["state"][0]["exp_avg"].dtype == torch.float64


def test_integers_of_any_size_are_written() -> None:
    numbers = [0, -(2**5000), 2**2039 - 1, 2**2039, -(2**2039), 10**700]
    pickled, storages = emit([Converted(), *numbers], Manifest({}))
    assert pickle.loads(pickled) == [{}, *numbers]
    assert storages == {}


@pytest.mark.parametrize(("tree", "message"), [
    ({"a": Converted(), "b": Converted()}, "the tree holds 2 places for the state_dict, not one"),
    ({"a": 1}, "the tree holds 0 places for the state_dict, not one"),
    ({"a": Converted(), "b": {1, 2}}, "set is not plain data"),
    ({"a": Converted(), "b": Kept("w", TensorSpec((), DType.int8))}, "the slot name 'w' is taken"),
    ([Kept("k", TensorSpec((), DType.int8)), Kept("k", TensorSpec((), DType.int8)), Converted()], "the slot name 'k' is taken"),
])  # fmt: skip
def test_a_tree_that_cannot_be_written_is_the_callers_fault(tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emit(tree, manifest_of({"w": torch.ones(2)}))


def test_ties_share_one_record_and_load_as_one_storage(tmp_path: Path) -> None:
    path = tmp_path / "out.pth"
    weight = torch.arange(6.0).reshape(2, 3)
    layout = write(path, WRITER, {"a": weight, "b": torch.ones(2), "c": weight}, ties=(("a", "c"),))
    assert list(layout.slots) == ["a", "b"]
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["a", "b", "c"]
    assert loaded["a"].untyped_storage().data_ptr() == loaded["c"].untyped_storage().data_ptr()
    assert torch.equal(loaded["c"], weight)


def test_module_versions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.pth"
    write(path, WRITER, {"bn.num_batches_tracked": torch.tensor(3)}, module_versions={"": {"version": 1}, "bn": {"version": 2}})
    assert torch.load(path, weights_only=True)._metadata == {"": {"version": 1}, "bn": {"version": 2}}


def test_metadata_is_a_record_and_is_patched_by_a_second_seal(tmp_path: Path) -> None:
    path = tmp_path / "out.pth"
    layout = write(path, WRITER, {"w": torch.ones(2)}, metadata={"ckptconv.verified": "pending", "note": "é"})
    first = path.read_bytes()
    checksums = {"w": zipfile.ZipFile(path).getinfo("archive/data/0").CRC}
    seal(path, layout, WRITER, checksums, {"ckptconv.verified": "L5 good", "note": "ü"})
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("archive/ckptconv.json")) == {"ckptconv.verified": "L5 good", "note": "ü"}
        assert archive.testzip() is None
    assert len(first) == path.stat().st_size
    assert first != path.read_bytes()
    with pytest.raises(ValueError, match="it must keep its keys and lengths"):
        WRITER.seal(layout, checksums, {"ckptconv.verified": "longer than before", "note": "ü"})


def test_without_metadata_there_is_no_record_of_it(tmp_path: Path) -> None:
    write(tmp_path / "out.pth", WRITER, {"w": torch.ones(2)})
    assert zipfile.ZipFile(tmp_path / "out.pth").namelist()[-1] == SERIALIZATION_ID


def test_the_serialization_id_tells_contents_apart(tmp_path: Path) -> None:
    ids = []
    for value in (1.0, 2.0, 1.0):
        write(tmp_path / "out.pth", WRITER, {"w": torch.full((2,), value)})
        ids.append(zipfile.ZipFile(tmp_path / "out.pth").read(SERIALIZATION_ID))
    assert ids[0] == ids[2] != ids[1]
    assert all(len(digits) == 40 and digits.isdigit() for digits in ids)


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_accepts_the_file(tmp_path: Path) -> None:
    write(tmp_path / "out.pth", WRITER, state_dict(), metadata={"a": "b"})
    told = subprocess.run(["unzip", "-t", tmp_path / "out.pth"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "No errors detected" in told.stdout


def test_offsets_beyond_4_gib_and_their_directory(tmp_path: Path) -> None:
    # Sparse: nothing is written into the large slot.
    big = 2**32 + 8
    manifest = Manifest(
        {"big": TensorSpec((big,), DType.uint8), "after": TensorSpec((3,), DType.float32), "none": TensorSpec((0,), DType.int8)}
    )
    layout = WRITER.lay_out("out.pth", manifest, metadata={"a": "b"})
    path = tmp_path / "out.pth"
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), layout.nbytes)
    after = b"\x01" * 12
    with path.open("r+b") as file:
        file.seek(layout.slots["after"].offset)
        file.write(after)
    seal(path, layout, WRITER, {"big": 123, "after": 0x4DEEBF66, "none": 0}, {"a": "b"})
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: (info.file_size, info.header_offset) for info in archive.infolist()}
        assert sizes["archive/data/0"] == (big, layout.slots["big"].offset - 106)
        assert sizes["archive/data/1"] == (12, layout.slots["big"].offset + big + 24)
        assert archive.getinfo("archive/data/0").CRC == 123
        assert archive.read("archive/ckptconv.json") == b'{"a":"b"}'
        with archive.open("archive/data/1") as record:
            record._expected_crc = None  # type: ignore[attr-defined]  # not the point here: the place is
            assert record.read() == after
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_offset("data/0") == layout.slots["big"].offset
    assert reader.get_record_offset("data/1") == layout.slots["after"].offset
    assert layout.slots["after"].offset % 64 == 0


def test_the_zip64_fields_are_those_of_torch() -> None:
    # Recorded from torch.save({"a": torch.empty(2**32 + 8, dtype=torch.uint8), "b": torch.ones(3)}).
    big = 2**32 + 8
    manifest = Manifest({"a": TensorSpec((big,), DType.uint8), "b": TensorSpec((3,), DType.float32)})
    layout = WRITER.lay_out("out.pth", manifest, metadata={})
    first, after = layout.slots["a"].offset, layout.slots["a"].offset + big
    pieces = dict(WRITER.seal(layout, {"a": 0xE60914AE, "b": 0xDC7C4E94}, {}))
    name = pieces[0].index(b"archive/data/0")
    assert pieces[0][name + 14 : name + 34] == b"\x01\x00\x10\x00\x08\x00\x00\x00\x01\x00\x00\x00" + bytes(8)
    assert pieces[0][name + 34 : name + 36] == b"FB"
    assert pieces[after][:24] == b"PK\x07\x08\xae\x14\t\xe6\x08\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00\x01\x00\x00\x00"
    assert pieces[after][24 + 30 + 14 :][:12] == b"\x01\x00\x08\x00" + (after + 24).to_bytes(8, "little")
    last = pieces[layout.slots["b"].offset + 12]
    assert last[:24] == b"PK\x07\x08\x94N|\xdc\x0c\x00\x00\x00\x00\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00"
    entry = last.index(b"PK\x01\x02", last.index(b"archive/byteorder", last.index(b"PK\x01\x02")))
    assert last[entry : entry + 80] == (
        b"PK\x01\x02\x00\x00\x00\x00\x08\x08\x00\x00\x00\x00\x00\x00\xae\x14\t\xe6\xff\xff\xff\xff\xff\xff\xff\xff\x0e\x00\x14\x00"
        + bytes(10) + (first - 106).to_bytes(4, "little") + b"archive/data/0"
        + b"\x01\x00\x10\x00\x08\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00\x01\x00\x00\x00"
    )  # fmt: skip
    assert last[-98:-42] == (
        b"PK\x06\x06,\x00\x00\x00\x00\x00\x00\x00\x1e\x03-\x00" + bytes(8) + (8).to_bytes(8, "little") * 2
        + last[-58:-42]
    )  # fmt: skip
    assert last[-42:-38] == b"PK\x06\x07"
    assert last[-22:] == b"PK\x05\x06\x00\x00\x00\x00\x08\x00\x08\x00" + last[-58:-54] + b"\xff\xff\xff\xff\x00\x00"


def test_more_than_65535_records_are_counted_in_the_zip64_end_record(tmp_path: Path) -> None:
    count = 65_600
    manifest = Manifest({f"w{at}": TensorSpec((0,), DType.int8) for at in range(count)})
    layout = WRITER.lay_out("out.pth", manifest, metadata={})
    path = tmp_path / "out.pth"
    path.write_bytes(bytes(layout.nbytes))
    seal(path, layout, WRITER, {}, {})
    assert len(zipfile.ZipFile(path).namelist()) == count + 6


def test_laying_out_20000_tensors_is_quick() -> None:
    manifest = Manifest({f"model.layers.{at}.self_attn.q_proj.weight": TensorSpec((64, 64), DType.bfloat16) for at in range(20_000)})
    started = time.process_time()
    layout = WRITER.lay_out("out.pth", manifest, metadata={})
    spent = time.process_time() - started
    assert len(layout.slots) == 20_000
    assert spent < 3  # seconds; measured 0.3 on one slow core

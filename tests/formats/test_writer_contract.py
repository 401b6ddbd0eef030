"""What every writer owes: all dtypes that it does not refuse, odd shapes and names, ties, any order of filling, equal bytes each time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from written import bytes_of, fill, manifest_of, seal, spec_of, write

from ckptconv import formats
from ckptconv.formats.base import Writer
from ckptconv.formats.safetensors import DTYPE_CODES
from ckptconv.spec import DType, Manifest, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

WRITERS = pytest.mark.parametrize("writer", formats.WRITERS.values(), ids=formats.WRITERS.keys())
SUFFIX = {"torch": ".pth", "safetensors": ".safetensors", "dcp": ".distcp"}
FORMAT = {"dcp": "torch-distributed"}


def load(path: Path) -> dict[str, torch.Tensor]:
    """By the library that owns the format, in every way that it can."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".distcp":
        dcp_to_torch_save(path.parent, path.parent / "whole.pth")
        return torch.load(path.parent / "whole.pth", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, weights_only=True, mmap=True)
    plain = torch.load(path, weights_only=True)
    assert {name: bytes_of(tensor) for name, tensor in mapped.items()} == {name: bytes_of(tensor) for name, tensor in plain.items()}
    return plain


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert spec_of(found[name]) == spec_of(tensor), name
        assert bytes_of(found[name]) == bytes_of(tensor), name
        assert found[name].is_contiguous()


def noise(shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
    """Any bytes that the type allows."""
    nbytes = TensorSpec(shape, dtype).nbytes
    raw = torch.randint(
        0, 2 if dtype is DType.bool else 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape))
    )
    return raw.view(getattr(torch, dtype.value)).reshape(shape)


def samples(writer: Writer) -> dict[str, torch.Tensor]:
    dtypes = [dtype for dtype in DType if not writer.refuse(Manifest({"x": TensorSpec((2, 4), dtype)}))]
    tensors = {f"types.{dtype}": noise((3, 2, 5), dtype) for dtype in dtypes}
    tensors |= {f"flat.{dtype}": noise((7,), dtype) for dtype in reversed(dtypes)}
    tensors |= {f"empty.{dtype}": noise((0, 4), dtype) for dtype in dtypes}
    tensors |= {f"number.{dtype}": noise((), dtype) for dtype in dtypes if not writer.refuse(Manifest({"x": TensorSpec((), dtype)}))}
    return tensors | {
        "n" * 1024: noise((3,), DType.float32),
        "schön/層.\u202e1 'q\" \\": noise((1, 1), DType.int16),
        "data.pkl": noise((2,), DType.int8),
    }


@WRITERS
@pytest.mark.parametrize("threads", [1, 2])
def test_every_tensor_comes_back_bit_for_bit(writer: Writer, tmp_path: Path, threads: int) -> None:
    path, tensors = tmp_path / f"out{SUFFIX[writer.name]}", samples(writer)
    write(path, writer, tensors, threads=threads)
    assert_same(load(path), tensors)


@WRITERS
def test_our_own_reader_agrees(writer: Writer, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"out{SUFFIX[writer.name]}", samples(writer)
    tensors["alias"] = tensors["types.float32"]
    ties = (("types.float32", "alias"),)
    layout = write(path, writer, tensors, ties=ties, metadata={"ckptconv.version": "1", "note": "n"})
    contents = formats.read(path.parent if writer.name == "dcp" else path)
    (container,) = contents.containers.values()
    assert contents.format == FORMAT.get(writer.name, writer.name)
    assert {"ckptconv.version": "1", "note": "n"}.items() <= contents.metadata.items()
    assert dict(container.manifest.tensors) == dict(layout.manifest.tensors)
    assert list(container.tensors) == list(tensors)
    assert container.manifest.ties == ties
    assert contents.warnings == ()
    data = path.read_bytes()
    for name, placed in container.tensors.items():
        at = placed.storage.offset + placed.offset
        assert placed.contiguous
        assert data[at : at + placed.spec.nbytes] == bytes_of(tensors[name]), name


@WRITERS
def test_only_the_known_dtypes_are_refused(writer: Writer) -> None:
    refused = {dtype for dtype in DType if writer.refuse(Manifest({"x": TensorSpec((2, 4), dtype)}))}
    assert refused == ({DType.complex32, DType.complex128} if writer.name == "safetensors" else set())


@WRITERS
def test_slots_and_sealed_pieces_cover_the_file_once(writer: Writer) -> None:
    layout = writer.lay_out("out", manifest_of(samples(writer)), metadata={"a": "b"})
    ranges = [(slot.offset, slot.nbytes) for slot in layout.slots.values() if slot.nbytes]
    ranges += [(offset, len(piece)) for offset, piece in writer.seal(layout, dict.fromkeys(layout.slots, 0), {"a": "c"})]
    at = 0
    for offset, nbytes in sorted(ranges):
        assert offset == at
        at += nbytes
    assert at == layout.nbytes


@WRITERS
def test_tensors_are_aligned_to_their_elements(writer: Writer) -> None:
    layout = writer.lay_out("out", manifest_of(samples(writer)), metadata={})
    assert [name for name, slot in layout.slots.items() if slot.offset % layout.manifest[name].dtype.nbytes] == []


@WRITERS
def test_two_runs_give_equal_layouts_and_equal_bytes(writer: Writer, tmp_path: Path) -> None:
    tensors, metadata = samples(writer), {"b": "1", "a": "2"}
    first = write(tmp_path / "first", writer, tensors, metadata=metadata)
    second = write(tmp_path / "second", writer, tensors, metadata=metadata, threads=2)
    assert first.slots == second.slots
    assert writer.lay_out("first", manifest_of(tensors), metadata=metadata) == first
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@WRITERS
def test_sealing_again_changes_the_metadata_and_nothing_else(writer: Writer, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"out{SUFFIX[writer.name]}", {"w": torch.ones(3), "v": torch.zeros(2)}
    layout = writer.lay_out(path.name, manifest_of(tensors), metadata={"digest": "pending.", "other": "x"})
    assert layout.metadata == {"digest": "pending.", "other": "x"}
    checksums = fill(path, layout, {name: bytes_of(tensor) for name, tensor in tensors.items()})
    seal(path, layout, writer, checksums, layout.metadata)
    size = path.stat().st_size
    seal(path, layout, writer, checksums, {**layout.metadata, "digest": "12345678"})
    assert path.stat().st_size == size == layout.nbytes
    assert_same(load(path), tensors)
    assert b"12345678" in path.read_bytes()
    assert b"pending." not in path.read_bytes()
    with pytest.raises(ValueError, match="keep its keys and lengths"):
        writer.seal(layout, checksums, {**layout.metadata, "digest": "1" * 500})


@WRITERS
def test_an_empty_state_dict_is_a_file(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / f"out{SUFFIX[writer.name]}"
    write(path, writer, {})
    assert load(path) == {}


@WRITERS
@pytest.mark.parametrize(("name", "reason"), [
    ("", "the name is empty"),
    ("x" * 1025, "the name has 1,025 characters; at most 1,024 are allowed"),
    ("a\nb", "the name holds control characters or lone surrogates"),
    ("a\ud800", "the name holds control characters or lone surrogates"),
])  # fmt: skip
def test_names_that_nobody_should_meet_are_refused(writer: Writer, name: str, reason: str) -> None:
    (refusal,) = writer.refuse(Manifest({"fine": TensorSpec((), DType.int8), name: TensorSpec((), DType.int8)}))
    assert (refusal.code, refusal.what) == ("CK209", reason)


def test_the_dtype_table_of_safetensors_is_that_of_its_library() -> None:
    for dtype in DTYPE_CODES:
        saved = safetensors.torch.save({"x": noise((2, 4), dtype)})
        assert f'"dtype":"{DTYPE_CODES[dtype]}"'.encode() in saved

"""Catalogue C: what a tensor says about the storage that it views. Every number is checked against the record, in integers without end."""

import struct

import pytest
import torch
from building import (
    FLOATS,
    HOOKS,
    Record,
    archive,
    call,
    named,
    numbers,
    pickled,
    records,
    row,
    storage,
    table,
    tensor,
    text,
    whole,
)
from harness import message
from safetensors.torch import load_file

from ckptconv.formats.fsdp import WAY_OUT

F = storage()


def one(body, data=FLOATS, **more):
    """A right file around one tensor ``x``; two more storages of 8 bytes lie in it as ``1`` and ``2``."""
    extra = {"data_1": Record("a/data/1", struct.pack("<2f", 5, 6)), "data_2": Record("a/data/2", struct.pack("<q", 1 << 40)), **more}
    return archive(records(pickled(body), data, **extra))


AFFINE = row(named("torch.per_tensor_affine"), b"G" + struct.pack(">d", 0.5), whole(3))


def quantised(size=(8,), stride=(1,), offset=0, scheme=AFFINE):
    return call(
        "torch._utils._rebuild_qtensor",
        storage(32, kind="QInt8Storage"),
        whole(offset),
        numbers(size),
        numbers(stride),
        scheme,
        b"\x89",
        HOOKS,
    )


def sparse(indices, values, size):
    layout = call("torch.serialization._get_layout", text("torch.sparse_coo"))
    return call("torch._utils._rebuild_sparse_tensor", layout, row(indices, values, numbers(size), b"\x89"))


INDEX_OF_2_TO_THE_40 = tensor([1, 1], [1, 1], of=storage(1, "2", "LongStorage"))
PAIR = tensor([1], [1], of=storage(2, "1"))
CHANNELS = row(named("torch.per_channel_affine"), tensor([2], [1], of=storage(2, "1")), tensor([2], [1], of=storage(2, "1")), whole(0))

#: The tensor's body, and what is said. All of them are refused while the pickle is read, before a byte of a weight.
REFUSED = [
    ("c036-quantised-with-a-giant-stride", table(x=quantised([2], [1 << 20])), ("CK305", "a tensor reaches past the end of its storage", "1,048,577 elements needed, 32 stored")),
    ("c036-quantised-out-of-bounds", table(x=quantised([33])), ("CK305", "a tensor reaches past the end of its storage", "33 elements needed, 32 stored")),
    ("c036-quantised-with-an-offset", table(x=quantised([8], offset=25)), ("CK305", "a tensor reaches past the end of its storage", "33 elements needed, 32 stored")),
    ("c036-quantised-with-too-few-scales", table(x=quantised([4, 2], [2, 1], scheme=CHANNELS)), ("CK305", "a quantised tensor whose scales do not fit", "[2] float32 for [4, 2] float32")),
    ("c036-quantised-by-an-unknown-scheme", table(x=quantised(scheme=row(named("torch.other"), whole(1), whole(0)))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (quantized)")),
    ("c036-quantised-storage-without-a-quantiser", table(x=tensor(of=storage(32, kind="QInt8Storage"))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (quantized)")),
    ("c037-sparse-of-a-size-that-cannot-be", table(x=sparse(INDEX_OF_2_TO_THE_40, PAIR, [1 << 41])), ("CK305", "a sparse tensor that is too large to be written out", "[2199023255552]")),
    ("c037-sparse-without-its-values", table(x=sparse(INDEX_OF_2_TO_THE_40, b"N", [4])), ("CK305", "1 tensors are of a kind that cannot be converted", "x (sparse)")),
    ("c037-sparse-of-negative-size", table(x=sparse(INDEX_OF_2_TO_THE_40, PAIR, [-4])), ("CK305", "a tensor whose size is no row of sizes", "(-4,)")),
    ("c037-sparse-csr-in-the-old-form", table(x=call("torch._utils._rebuild_sparse_csr_tensor", row())), ("CK305", "1 tensors are of a kind that cannot be converted", "x (sparse)")),
    ("c038-nested", table(x=call("torch._utils._rebuild_nested_tensor", tensor(), tensor(), tensor(), tensor())), ("CK305", "1 tensors are of a kind that cannot be converted", "x (nested)")),
    ("c038-meta", table(x=call("torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), numbers([3]), numbers([1]), b"\x89")), ("CK305", "1 tensors are of a kind that cannot be converted", "x (meta)")),
    ("c038-wrapper-subclass", table(x=call("torch._utils._rebuild_wrapper_subclass", named("some.Tensor"))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (tensor subclass)")),
    ("c038-subclass", table(x=call("torch._tensor._rebuild_from_type_v2", named("torch._utils._rebuild_tensor_v2"), named("some.Tensor"),
     row(F, whole(0), numbers([8]), numbers([1]), b"\x89", HOOKS), b"N")), ("CK305", "1 tensors are of a kind that cannot be converted", "x (some.Tensor)")),
    ("c038-DTensor", table(x=call("torch.distributed.tensor._api.DTensor", tensor())), ("CK305", "1 tensors are of a kind that cannot be converted", "x (DTensor)", WAY_OUT)),
    ("c039-negative-stride", table(x=tensor([4], [-1], 4)), ("CK305", "a tensor whose strides is no row of sizes", "(-1,)")),
    ("c039-negative-size", table(x=tensor([-4])), ("CK305", "a tensor whose shape is no row of sizes", "(-4,)")),
    ("c039-negative-offset", table(x=tensor(offset=-1)), ("CK305", "a tensor without a storage or with an impossible offset")),
    ("c040-size-that-overflows", table(x=tensor([1 << 62, 1 << 62], [0, 0])), ("CK305", "a tensor repeats its elements beyond measure", "[4611686018427387904, 4611686018427387904] float32, 8 elements stored")),
    ("c040-sizes-whose-product-wraps-to-16", table(x=tensor([(1 << 62) + 4, 4], [0, 0])), ("CK305", "a tensor repeats its elements beyond measure", "[4611686018427387908, 4] float32, 8 elements stored")),
    ("c040-size-of-2-to-the-63", table(x=tensor([1 << 63], [0])), ("CK305", "a tensor whose shape is no row of sizes", "(9223372036854775808,)")),
    ("c040-offset-that-overflows", table(x=tensor(offset=(1 << 63) - 1)), ("CK305", "a tensor reaches past the end of its storage", "9,223,372,036,854,775,815 elements needed, 8 stored")),
    ("c040-stride-that-overflows", table(x=tensor([2, 2], [(1 << 63) - 1, 1])), ("CK305", "a tensor reaches past the end of its storage", "9,223,372,036,854,775,809 elements needed, 8 stored")),
    ("c040-strides-whose-sum-wraps-to-0", table(x=tensor([3, 3], [1 << 62, 1 << 62])), ("CK305", "a tensor reaches past the end of its storage", "18,446,744,073,709,551,617 elements needed, 8 stored")),
    ("c041-one-element-too-many", table(x=tensor([9])), ("CK305", "a tensor reaches past the end of its storage", "9 elements needed, 8 stored")),
    ("c041-one-row-too-far", table(x=tensor([2, 4], [5, 1])), ("CK305", "a tensor reaches past the end of its storage", "9 elements needed, 8 stored")),
    ("c041-offset-one-too-far", table(x=tensor([8], offset=1)), ("CK305", "a tensor reaches past the end of its storage", "9 elements needed, 8 stored")),
    ("c041-empty-tensor-far-away", table(x=tensor([0], offset=9)), ("CK305", "a tensor reaches past the end of its storage", "9 elements needed, 8 stored")),
    ("c041-more-strides-than-sizes", table(x=tensor([2], [1, 1])), ("CK305", "a tensor with more sizes than strides, or fewer", "[2] and [1, 1]")),
    ("c042-eight-floats-expanded-to-4-TB", table(x=tensor([1 << 40], [0])), ("CK305", "a tensor repeats its elements beyond measure", "[1099511627776] float32, 8 elements stored")),
    ("c042-one-row-expanded-to-a-gibibyte-and-a-bit", table(x=tensor([(1 << 25) + 1, 8], [0, 1])), ("CK305", "a tensor repeats its elements beyond measure", "[33554433, 8] float32, 8 elements stored")),
    ("c043-fewer-declared-than-stored", table(x=tensor([7], of=storage(7))), ("CK306", "storage '0' has another size than declared", "28 bytes declared, 32 stored")),
    ("c043-more-declared-than-stored", table(x=tensor([8], of=storage(9))), ("CK306", "storage '0' has another size than declared", "36 bytes declared, 32 stored")),
    ("c043-2-to-the-62-declared", table(x=tensor([8], of=storage(1 << 62))), ("CK306", "storage '0' has another size than declared", "18,446,744,073,709,551,616 bytes declared, 32 stored")),
    ("c043-minus-one-declared", table(x=tensor([8], of=storage(-1))), ("CK305", "a storage with an impossible size or key", "at byte 97 of the pickle")),
    ("c043-a-count-that-is-text", table(x=tensor(of=row(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), text("8")) + b"Q")), ("CK305", "a storage with an impossible size or key", "at byte 98 of the pickle")),
    ("c044-declared-8-stored-2-and-a-neighbour-behind", table(x=tensor([8], of=storage(8, "1"))), ("CK306", "storage '1' has another size than declared", "32 bytes declared, 8 stored")),
    ("c045-one-key-two-dtypes", table(x=tensor([2], of=storage(2, "1")), y=tensor([2], of=storage(2, "1", "IntStorage"))), ("CK306", "storage '1' is declared in two ways", "2 FloatStorage and 2 IntStorage")),
    ("c045-one-key-two-sizes", table(x=tensor([2], of=storage(2, "1")), y=tensor([2], of=storage(3, "1"))), ("CK306", "storage '1' is declared in two ways", "2 FloatStorage and 3 FloatStorage")),
    ("c046-a-storage-that-is-not-there", table(x=tensor(of=storage(key="3"))), ("CK302", "storage '3' is declared and not there")),
    ("c049-rank-65", table(x=tensor([1] * 65, [1] * 65)), ("CK305", "a tensor of rank 65; at most 64 are read")),
    ("c051-quint4x2", table(x=tensor(of=storage(32, kind="QUInt4x2Storage"))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (quantized)")),
    ("c051-a-dtype-that-nobody-knows", table(x=call("torch._utils._rebuild_tensor_v3", storage(32, kind="UntypedStorage"), whole(0), numbers([8]),
     numbers([1]), b"\x89", HOOKS, named("torch.int4"))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (dtype torch.int4)")),
    ("c051-a-dtype-that-is-none", table(x=call("torch._utils._rebuild_tensor_v3", storage(32, kind="UntypedStorage"), whole(0), numbers([8]),
     numbers([1]), b"\x89", HOOKS, text("float32"))), ("CK305", "1 tensors are of a kind that cannot be converted", "x (unknown dtype)")),
    ("c051-a-storage-that-nobody-knows", table(x=tensor(of=storage(kind="HalfHeartedStorage"))), ("CK305", "there is no storage class 'HalfHeartedStorage'")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, body, said):
    box.write("in.pth", one(body))
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")


def test_c037_a_sparse_index_outside_of_the_tensor(box):
    """Its place is right and its bytes are not: seen when it is written out, before an element goes anywhere."""
    box.write("in.pth", one(table(x=sparse(INDEX_OF_2_TO_THE_40, tensor([1], [1], of=storage(2, "1")), [4]))))
    said = message("passed through", "CK305", "x: a sparse tensor has values outside its shape", "[4]")
    box.refuses(4, said, "run", "pass.yaml", "in.pth", "out.pth", torch=True, mb=1024, staged=True)


def test_c047_a_truth_value_that_is_none(box):
    box.write("in.pth", one(table(x=tensor([8], of=storage(8, kind="BoolStorage"))), data=bytes([0, 1, 2, 255, 1, 0, 0, 1])))
    said = message("in.pth", "CK306", "x: a truth value is neither 0 nor 1", "the byte 0x02 at offset 264")
    box.refuses(3, said, "run", "pass.yaml", "in.pth", "out.pth", staged=True)


READ = [
    ("c042-a-harmless-expand", table(x=tensor([3, 4], [0, 1])), torch.arange(4.0).expand(3, 4)),
    ("c048-cuda", table(x=tensor(of=storage(place="cuda:7"))), torch.arange(8.0)),
    ("c048-evil-place", table(x=tensor(of=storage(place="evil:0; touch marker"))), torch.arange(8.0)),
    ("c048-meta-place", table(x=tensor(of=storage(place="meta"))), torch.arange(8.0)),
    ("c048-xla", table(x=tensor(of=storage(place="xla:0"))), torch.arange(8.0)),
    ("c049-empty", table(x=tensor([0, 3], [3, 1])), torch.empty(0, 3)),
    ("c049-empty-by-2-to-the-40", table(x=tensor([0, 1 << 40], [1 << 40, 1])), torch.empty(0, 1 << 40)),
    ("c049-scalar", table(x=tensor([], [], 5)), torch.tensor(5.0)),
    ("c049-rank-64", table(x=tensor([1] * 64, [1] * 64, 3)), torch.full([1] * 64, 3.0)),
    ("c050-transposed", table(x=tensor([2, 4], [1, 2])), torch.arange(8.0).view(4, 2).T),
    ("c050-sliced", table(x=tensor([3], [2], 1)), torch.tensor([1.0, 3, 5])),
    ("c050-overlapping", table(x=tensor([3, 3], [1, 1])), torch.arange(8.0).as_strided((3, 3), (1, 1))),
]  # fmt: skip


@pytest.mark.parametrize(("body", "wanted"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_read_as_torch_reads_it(box, body, wanted):
    box.write("in.pth", one(body))
    box.converts("run", "pass.yaml", "in.pth", "out.safetensors", torch=True, mb=1024)
    found = load_file(box.folder / "out.safetensors")["x"]
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted)
    assert (box.folder / "out.safetensors").stat().st_size <= 1000 + wanted.nbytes, "no larger than needed"


@pytest.mark.parametrize(("dtype", "width"), [("complex32", 4), ("complex128", 16)])
def test_c051_a_dtype_that_the_output_lacks_is_said_before_any_work(box, dtype, width):
    arguments = storage(2 * width, kind="UntypedStorage"), whole(0), numbers([2]), numbers([1]), b"\x89", HOOKS, named(f"torch.{dtype}")
    box.write("in.pth", one(table(x=call("torch._utils._rebuild_tensor_v3", *arguments)), data=bytes(2 * width)))
    said = message("out.safetensors", "CK504", f"x: safetensors has no {dtype}", f"[2] {dtype}", "a cast step, or --format torch")
    box.refuses(3, said, "run", "pass.yaml", "in.pth", "out.safetensors")

import pytest
import torch

from ckptconv.spec import DType, Manifest, TensorSpec, contiguous_strides, is_contiguous, widens


@pytest.mark.parametrize("dtype", list(DType))
def test_every_dtype_is_torchs_own(dtype):
    theirs = getattr(torch, dtype.value)
    assert theirs.itemsize * 8 == dtype.bits
    assert (dtype.kind in ("float",)) == theirs.is_floating_point
    assert (dtype.kind == "complex") == theirs.is_complex


def test_widening_is_what_torch_can_do_without_loss():
    """For every pair that is said to widen, every extreme value of the narrow type survives the way there and back."""
    plain = [
        DType.float64,
        DType.float32,
        DType.float16,
        DType.bfloat16,
        DType.int64,
        DType.int32,
        DType.int16,
        DType.int8,
        DType.uint8,
        DType.bool,
    ]
    small = [DType.float8_e4m3fn, DType.float8_e5m2]
    for source in plain + small:
        for to in plain:
            if not widens(source, to):
                continue
            theirs = getattr(torch, source.value)
            if source is DType.bool:
                values = torch.tensor([False, True])
            elif theirs.is_floating_point:
                info = torch.finfo(theirs)
                values = torch.tensor(
                    [info.max, info.min, info.tiny, info.eps, 1 + info.eps, info.smallest_normal * info.eps], dtype=torch.float64
                ).to(theirs)
            else:
                info = torch.iinfo(theirs)
                values = torch.tensor([info.max, info.min, info.max - 1], dtype=theirs)
            back = values.to(getattr(torch, to.value)).to(theirs)
            assert torch.equal(back.view(torch.uint8), values.view(torch.uint8)), (source, to)


@pytest.mark.parametrize(
    ("source", "to"),
    [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16"), ("int64", "float32"), ("int32", "float32"), ("uint8", "int8"),
     ("int8", "uint8"), ("complex64", "float32"), ("float64", "float32"), ("int64", "float64"), ("float8_e5m2", "float8_e4m3fn")],
)  # fmt: skip
def test_narrowing_is_not_widening(source, to):
    assert not widens(DType(source), DType(to))


def test_strides_are_torchs_own():
    for shape in [(), (3,), (2, 3, 4), (0, 3), (1, 1), (2, 0, 4)]:
        tensor = torch.empty(shape)
        assert contiguous_strides(shape) == tensor.stride()
        assert is_contiguous(shape, tensor.stride())
    moved = torch.empty(2, 3).T
    assert not is_contiguous(tuple(moved.shape), moved.stride())
    assert is_contiguous((1, 3), (77, 1))


def test_a_manifest_counts_a_tie_once_and_survives_json():
    spec = TensorSpec((2, 3), DType.bfloat16)
    manifest = Manifest({"a": spec, "b": spec, "c": TensorSpec((), DType.int64)}, (("a", "b"),), frozenset({"c"}))
    assert (manifest.nbytes, manifest.numel, len(manifest)) == (20, 7, 3)
    assert manifest.aliases == {"b": "a"}
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert Manifest({"b": spec, "a": spec}).fingerprint != Manifest({"a": spec, "b": spec}).fingerprint


@pytest.mark.parametrize(
    "broken",
    [
        {}, [], {"ckptconv_manifest": 1}, {"ckptconv_manifest": 1, "tensors": {"a": ["float32", 2]}, "order": []},
        {"ckptconv_manifest": 1, "tensors": {"a": ["float33", 2]}, "order": ["a"]},
        {"ckptconv_manifest": 1, "tensors": {"a": ["float32", -2]}, "order": ["a"]},
        {"ckptconv_manifest": 1, "tensors": {"a": ["float32", 2]}, "order": ["a"], "ties": [["a", "b"]]},
    ],
)  # fmt: skip
def test_what_is_not_a_manifest_is_refused(broken):
    with pytest.raises(ValueError, match=r"saved manifest|want \[dtype|unknown dtype|tie names"):
        Manifest.from_json(broken)

import pytest

from ckptconv.compare import Allow, compare, explain_missing_initial
from ckptconv.spec import DType, Manifest, TensorSpec


def manifest(ties=(), **tensors):
    made = {}
    for name, given in tensors.items():
        shape, dtype = given if isinstance(given, tuple) else (given, "float32")
        made[name.replace("__", ".")] = TensorSpec(tuple(shape), DType(dtype))
    return Manifest(made, ties)


@pytest.mark.parametrize(
    ("found", "wanted", "problems"),
    [
        (manifest(a=[1]), manifest(a=[1]), []),
        (manifest(a=[5, 10]), manifest(a=[6, 10]),
         ["[CK403]\n  size mismatch for a: [5, 10] in the checkpoint, [6, 10] in the target\n"
          "  try: another number of classes or rows: drop a and allow it as missing, or slice it"]),
        (manifest(a=[2, 3]), manifest(a=[3, 2]),
         ["[CK403]\n  size mismatch for a: [2, 3] in the checkpoint, [3, 2] in the target\n"
          "  try: the same sizes in another order: rearrange with 'i o -> o i'"]),
        (manifest(a=[4, 1, 1]), manifest(a=[4]),
         ["[CK403]\n  size mismatch for a: [4, 1, 1] in the checkpoint, [4] in the target\n"
          "  try: the same number of elements: reshape, if the order of the elements is the same"]),
        (manifest(a=[4, 9, 9]), manifest(a=[8, 8, 8]),
         ["[CK403]\n  size mismatch for a: [4, 9, 9] in the checkpoint, [8, 8, 8] in the target\n"
          "  try: another width or variant of the model: no renaming can help"]),
        (manifest(a=[1]), manifest(a=[1], b=[2]), ["[CK401]\n  the target needs b, which the result does not have"]),
        (manifest(a=[1], b=[2]), manifest(a=[1]), ["[CK402]\n  the result has b, which the target does not know"]),
        (manifest(module__a=[1], module__b=[1]), manifest(a=[1], b=[1]),
         ["[CK401]\n  the target needs a, which the result does not have\n"
          "  try: every key carries the prefix 'module.': strip_prefix, or one of the built-in wrapper rules (ckptconv rules list)",
          "[CK401]\n  the target needs b, which the result does not have\n"
          "  try: every key carries the prefix 'module.': strip_prefix, or one of the built-in wrapper rules (ckptconv rules list)",
          "[CK402]\n  the result has module.a, which the target does not know\n"
          "  try: every key carries the prefix 'module.': strip_prefix, or one of the built-in wrapper rules (ckptconv rules list)",
          "[CK402]\n  the result has module.b, which the target does not know\n"
          "  try: every key carries the prefix 'module.': strip_prefix, or one of the built-in wrapper rules (ckptconv rules list)"]),
        (manifest(a=([2], "float64")), manifest(a=[2]),
         ["[CK404]\n  a: float64 in the checkpoint would lose values in the target's float32\n"
          "  try: - cast: {keys: …, dtype: float32} in the rule file"]),
        (manifest(a=([2], "complex64")), manifest(a=[2]),
         ["[CK404]\n  a: complex64 in the checkpoint would lose values in the target's float32\n"
          "  try: - cast: {keys: …, dtype: float32} in the rule file"]),
    ],
)  # fmt: skip
def test_every_difference_has_its_sentence(found, wanted, problems):
    comparison = compare(found, wanted)
    assert [str(problem) for problem in comparison.problems()] == problems
    assert comparison.fits == (not problems)


def test_a_widening_dtype_is_a_note_and_no_fault():
    comparison = compare(manifest(a=([2], "float16")), manifest(a=[2]))
    assert comparison.fits
    assert comparison.notes == ("a: float16 in the file, float32 in the model; loading copies up",)


def test_a_missing_alias_of_a_present_name_is_no_fault():
    wanted = manifest(ties=(("embed", "head"),), embed=[4, 2], head=[4, 2])
    comparison = compare(manifest(embed=[4, 2]), wanted)
    assert comparison.fits
    assert comparison.notes == ("head is an alias of embed in the target, and comes with it",)
    assert compare(manifest(other=[1]), wanted).missing == ("embed", "head")


def test_what_is_allowed_by_name_is_said_with_its_size():
    wanted = manifest(body=[90], head__w=[9], head__b=[1])
    comparison = compare(
        manifest(body=[90], extra=[1]), wanted, Allow(missing=lambda name: name.startswith("head"), unexpected=lambda name: name == "extra")
    )
    assert comparison.fits
    assert comparison.coverage == 0.9
    assert (
        explain_missing_initial(comparison, wanted)
        == "2 parameters (10 elements, 10.0% of the model) stay at their initial values: head.w, head.b"
    )
    assert comparison.notes == ("allowed though unexpected: extra",)


def test_never_a_wall_of_keys():
    wanted = Manifest({f"m{at}.x{at}y{at}.w": TensorSpec((1,), DType.float32) for at in range(5000)})
    many = Manifest({f"{chr(97 + at % 26)}{chr(97 + at // 26)}.w": TensorSpec((1,), DType.float32) for at in range(600)})
    comparison = compare(many, wanted)
    assert len(comparison.problems()) <= 30
    assert "and " in comparison.problems()[-1].what


def test_half_a_million_names_are_compared_at_once():
    spec = TensorSpec((1,), DType.float32)
    big = Manifest({f"layers.{at}.w": spec for at in range(100_000)})
    assert compare(big, big).fits

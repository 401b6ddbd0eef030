import time

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
          "  try: every key carries the prefix 'module.': ckptconv run dataparallel …",
          "[CK401]\n  the target needs b, which the result does not have",
          "[CK402]\n  the result has module.a, which the target does not know",
          "[CK402]\n  the result has module.b, which the target does not know"]),
        (manifest(net__a=[1]), manifest(a=[1]),
         ["[CK401]\n  the target needs a, which the result does not have\n"
          "  try: every key carries the prefix 'net.': a rule file with `- strip_prefix: net.`",
          "[CK402]\n  the result has net.a, which the target does not know"]),
        (manifest(module__a=[1], step=[1]), manifest(a=[1]),
         ["[CK401]\n  the target needs a, which the result does not have\n"
          "  try: 1 of 2 keys carry the prefix 'module.': a rule file with `- strip_prefix: {prefix: module., where: some}`",
          "[CK402]\n  the result has module.a, which the target does not know",
          "[CK402]\n  the result has step, which the target does not know"]),
        (manifest(a=[1]), manifest(vit__a=[1]),
         ["[CK401]\n  the target needs vit.a, which the result does not have\n"
          "  try: the target's keys start with 'vit.': a rule file with `- add_prefix: vit.`",
          "[CK402]\n  the result has a, which the target does not know"]),
        (manifest(enc__weigth=[1]), manifest(enc__weight=[1]),
         ["[CK401]\n  the target needs enc.weight, which the result does not have\n  try: is it 'enc.weigth' under another name?",
          "[CK402]\n  the result has enc.weigth, which the target does not know\n  try: is it 'enc.weight' under another name?"]),
        (manifest(l__0__w=[3, 2], l__1__w=[3, 2], l__2__w=[3, 2]), manifest(l__0__w=[4, 2], l__1__w=[4, 2], l__2__w=[4, 2]),
         ["[CK403]\n  size mismatch for l.{0-2}.w ×3: [3, 2] in the checkpoint, [4, 2] in the target\n"
          "  try: another number of classes or rows: drop l.{0-2}.w and allow it as missing, or slice it"]),
        (manifest(a=([2], "float16"), b=([2], "float32")), manifest(ties=(("a", "b"),), a=[2], b=[2]),
         ["[CK405]\n  one tensor in the target, and two dtypes in the checkpoint: a float16, b float32\n"
          "  try: drop all but a: the target ties the others to it"]),
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


def test_shapes_and_ties_have_their_bounds_too():
    names = [f"{chr(97 + at)}{chr(98 + at)}" for at in range(24)]
    several = compare(manifest(**{name: [at + 2] for at, name in enumerate(names)}), manifest(**{name: [1] for name in names}))
    assert len(several.problems()) == 13
    assert several.problems()[-1].what == "and 12 more tensors have other shapes"
    pairs = tuple((name, f"{name}_tied") for name in names)
    wanted = manifest(ties=pairs, **{name: [1] for pair in pairs for name in pair})
    found = manifest(**{name: ([1], dtype) for pair in pairs for name, dtype in zip(pair, ("float16", "float32"), strict=True)})
    assert len(compare(found, wanted).problems()) == 13
    assert compare(found, wanted).problems()[-1].what == "and 12 more ties are broken"


def test_a_tie_whose_names_stand_apart_is_a_note():
    wanted = manifest(ties=(("embed", "head"),), embed=[4, 2], head=[4, 2])
    apart = compare(manifest(embed=[4, 2], head=[4, 2]), wanted)
    assert apart.fits
    assert apart.notes == ("embed, head: one tensor in the target, several in the file; their values have to be equal",)
    assert compare(wanted, wanted).notes == ()


def test_an_allowed_tie_is_counted_once():
    wanted = manifest(ties=(("embed", "head"),), body=[12], embed=[4, 2], head=[4, 2])
    comparison = compare(manifest(body=[12]), wanted, Allow(missing=lambda name: name != "body"))
    assert comparison.coverage == 0.6
    assert (
        explain_missing_initial(comparison, wanted)
        == "2 parameters (8 elements, 40.0% of the model) stay at their initial values: embed, head"
    )


def test_notes_of_the_target_are_passed_on_and_cannot_steer_the_terminal():
    wanted = Manifest({}, notes=("x.\x1b[31m_extra_state is no tensor",))
    assert compare(Manifest({}), wanted).notes == ("x.\\x1b[31m_extra_state is no tensor",)


SPEC = TensorSpec((1,), DType.float32)
INNER = [f"layers.{layer}.experts.{expert}.w.weight" for layer in range(500) for expert in range(1000)]
WORDS = [f"{at:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for at in range(100_000)]


@pytest.mark.parametrize(
    ("found", "wanted", "first"),
    [
        pytest.param(INNER, INNER, None, id="equal"),
        pytest.param([f"module.{name}" for name in INNER], INNER,
                     "[CK401]\n  the target needs layers.{0-499}.experts.{0-999}.w.weight ×500000, which the result does not have\n"
                     "  try: every key carries the prefix 'module.': ckptconv run dataparallel …", id="prefix"),
        pytest.param([f"dec.{word}.weight" for word in WORDS], [f"enc.{word}.weight" for word in WORDS],
                     "[CK401]\n  the target needs enc.g.weight, which the result does not have\n"
                     "  try: is it 'dec.g.weight' under another name?", id="all different, no template"),
    ],
)  # fmt: skip
def test_half_a_million_names_take_seconds(found, wanted, first):
    found, wanted = (Manifest(dict.fromkeys(names, SPEC)) for names in (found, wanted))
    started = time.process_time()
    problems = compare(found, wanted).problems()
    assert time.process_time() - started < 20
    assert (str(problems[0]) if problems else None) == first
    assert len(problems) <= 26

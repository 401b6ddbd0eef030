"""Catalogue I: targets. The user's code runs when the user says so, in a process that is watched; and strict loading is not trusted."""

import json

import pytest
from building import pickled, storage, table, tensor, torch_file
from harness import message

MODELS = """
import os, time
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
def two(): return Two()
def tied():
    model = Two()
    model.b.weight = model.a.weight
    return model
def swallowing():
    model = Two()
    model.b.extra = nn.Parameter(torch.zeros(3))
    def swallow(state, prefix, meta, strict, missing, unexpected, errors):
        for key in [key for key in state if key.endswith("junk")]: del state[key]
    model._register_load_state_dict_pre_hook(swallow)
    return model
class Stateful(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("scratch", torch.zeros(7), persistent=False)
    def get_extra_state(self): return {"seen": 1}
    def set_extra_state(self, state): pass
def raises(): raise ValueError("no weights for you\\x1b[31m")
def hangs(): time.sleep(1000)
def forks():
    if os.fork() == 0: time.sleep(1000)
    os._exit(3)
def prints():
    for _ in range(1000): os.write(1, b"x" * (1 << 20))
    raise RuntimeError("after a gigabyte")
"""
SQUARE = torch_file(pickled(table(**{"a.weight": tensor([2, 2], [2, 1]), "b.weight": tensor([2, 2], [2, 1], 4)})))
ONE_TIED = torch_file(pickled(table(**{"a.weight": tensor([2, 2], [2, 1])})))
LONG = {"seconds": 60, "mb": 0}  # seconds of torch being imported, twice
RUN = "run", "pass.yaml", "in.pth", "out.pth"


@pytest.fixture
def room(box):
    box.write("models.py", MODELS)
    box.write("in.pth", SQUARE)
    # py: targets leave no bytecode beside the user's code in these tests
    box.env = {"PYTHONDONTWRITEBYTECODE": "1"}
    return box


UNBUILDABLE = [
    ("c102-raises", "raises", "building the model failed: ValueError: no weights for you\\x1b[31m"),
    ("c102-forks", "forks", "building the target ended with exit code 3, without an answer"),
    ("c102-prints-a-gigabyte", "prints", "building the model failed: RuntimeError: after a gigabyte"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what"), [row[1:] for row in UNBUILDABLE], ids=[row[0] for row in UNBUILDABLE])
def test_unbuildable(room, name, what):
    room.refuses(4, message(f"py:models:{name}", "CK406", what), *RUN, "--target", f"py:models:{name}", child=True, **LONG)


def test_c102_takes_too_long(room):
    said = "CK406", "building the target took longer than 2 s", "", "--timeout SECONDS"
    room.refuses(4, message("py:models:hangs", *said), *RUN, "--target", "py:models:hangs", "--timeout", "2", child=True, **LONG)


CODE = "version: 1\nname: code\nsummary: s\ntarget: {model: 'py:%s'}\nsteps: [drop: {keys: nothing, optional: true}]\n"


@pytest.mark.parametrize("name", ["os:system", "models:two", "subprocess:Popen"])
def test_c101_a_rule_file_names_code(room, name):
    """Nothing is imported: the child that would do it is not even started (the audit hook would have seen it)."""
    room.write("code.yaml", CODE % name)
    said = "CK106", "a rule file cannot name code as its target", "", f"--target py:{name}, or --allow-code if you trust the file"
    room.refuses(2, message(f"py:{name}", *said), "run", "code.yaml", "in.pth", "out.pth")


def test_c101_unless_the_user_allows_it(room):
    room.write("code.yaml", CODE % "models:two")
    outcome = room.converts("run", "code.yaml", "in.pth", "out.pth", "--allow-code", **LONG)
    assert "L2 ok     strict load: py:models:two loaded the written file (strict=True, assign=True)" in outcome.out


def test_c103_files_of_the_working_folder_are_not_taken_for_libraries(room, process):
    for name in ("yaml", "torch", "safetensors", "click", "json", "re2", "rich"):
        room.write(f"{name}.py", "import pathlib; pathlib.Path('marker').touch(); raise SystemExit(3)")
    for _ in range(2):
        result = process("run", "pass.yaml", "in.pth", "out.pth", "--force", cwd=room.folder, env={"PYTHONPATH": ":."})
        assert (result.code, result.err) == (0, "")
    assert not (room.folder / "marker").exists()


# ------------------------------------------------------------------------------------------ what strict loading does not see


def manifest(ties=(), **tensors):
    entries = {name: [dtype, *shape] for name, (shape, dtype) in tensors.items()}
    return json.dumps({"ckptconv_manifest": 1, "tensors": entries, "order": list(entries), "ties": ties, "buffers": []})


def one(kind, shape=(4,), stride=(1,)):
    return torch_file(
        pickled(table(w=tensor(shape, stride, of=storage(4, kind=kind)))), data=bytes({"ComplexFloatStorage": 32}.get(kind, 32))
    )


FOUR = [4], "float32"
MISFITS = [
    ("c104-another-shape", torch_file(pickled(table(w=tensor([8])))), {"w": FOUR}, (), ("wanted.json", "CK403", "size mismatch for w: [8] in the checkpoint, [4] in the target", "", "another number of classes or rows: drop w and allow it as missing, or slice it")),
    ("c104-another-dtype", one("DoubleStorage"), {"w": ([4], "float16")}, (), ("wanted.json", "CK404", "w: float64 in the checkpoint would lose values in the target's float16", "", "- cast: {keys: …, dtype: float16} in the rule file")),
    ("c104-missing", torch_file(pickled(table(w=tensor([4])))), {"w": FOUR, "v": FOUR}, (), ("wanted.json", "CK401", "the target needs v, which the result does not have")),
    ("c104-unexpected", torch_file(pickled(table(w=tensor([4]), v=tensor([4], offset=4)))), {"w": FOUR}, (), ("wanted.json", "CK402", "the result has v, which the target does not know")),
    ("c108-float64-into-float32", one("DoubleStorage"), {"w": FOUR}, (), ("wanted.json", "CK404", "w: float64 in the checkpoint would lose values in the target's float32", "", "- cast: {keys: …, dtype: float32} in the rule file")),
    ("c108-int64-into-float32", one("LongStorage"), {"w": FOUR}, (), ("wanted.json", "CK404", "w: int64 in the checkpoint would lose values in the target's float32", "", "- cast: {keys: …, dtype: float32} in the rule file")),
    ("c108-complex-into-float32", one("ComplexFloatStorage"), {"w": FOUR}, (), ("wanted.json", "CK404", "w: complex64 in the checkpoint would lose values in the target's float32", "", "- cast: {keys: …, dtype: float32} in the rule file")),
    ("c109-as-many-elements-in-another-shape", torch_file(pickled(table(w=tensor([2, 4], [4, 1])))), {"w": ([4, 2], "float32")}, (), ("wanted.json", "CK403", "size mismatch for w: [2, 4] in the checkpoint, [4, 2] in the target", "", "the same sizes in another order: rearrange with 'i o -> o i'")),
]  # fmt: skip


@pytest.mark.parametrize(("source", "wanted", "ties", "said"), [row[1:] for row in MISFITS], ids=[row[0] for row in MISFITS])
def test_misfit(box, source, wanted, ties, said):
    box.write("in.pth", source)
    box.write("wanted.json", manifest(ties, **wanted))
    box.refuses(4, message(*said), *RUN, "--target", "wanted.json")


def test_c105_a_tied_target_and_two_different_values(room):
    said = "py:models:tied", "CK408", "one tensor in the model, two different values in the file: b.weight and a.weight"
    room.refuses(4, message(*said), *RUN, "--target", "py:models:tied", child=True, staged=True, **LONG)


def test_c106_a_tied_target_and_one_of_the_pair(box):
    box.write("in.pth", ONE_TIED)
    box.write("tied.json", manifest([["a.weight", "b.weight"]], **{"a.weight": ([2, 2], "float32"), "b.weight": ([2, 2], "float32")}))
    outcome = box.converts(*RUN, "--target", "tied.json")
    assert "b.weight is an alias of a.weight in the target, and comes with it" in outcome.out


def test_c107_a_hook_that_swallows_keys_cannot_hide_them(room):
    """torch's strict loading passes here: the hook takes the odd keys away before they are compared. The manifests do not."""
    both = {"a.weight": tensor([2, 2], [2, 1]), "b.weight": tensor([2, 2], [2, 1], 4), "b.junk": tensor([3])}
    room.write("in.pth", torch_file(pickled(table(**both))))
    said = message("py:models:swallowing", "CK401", "the target needs b.extra, which the result does not have")
    said += message("py:models:swallowing", "CK402", "the result has b.junk, which the target does not know")
    room.refuses(4, said, *RUN, "--target", "py:models:swallowing", child=True, **LONG)


def test_c107_scratch_buffers_and_extra_state(room):
    outcome = room.converts(*RUN, "--target", "py:models:Stateful", **LONG)
    assert "_extra_state is no tensor and is not compared" in outcome.out
    assert "L2 ok" in outcome.out


def test_c109_a_transposed_square_matrix_is_beyond_names_and_shapes(box):
    """Nothing but running the model can tell, and the report claims nothing else."""
    box.write("in.pth", SQUARE)
    box.write("two.json", manifest(**{"a.weight": ([2, 2], "float32"), "b.weight": ([2, 2], "float32")}))
    box.write("rules.yaml", 'version: 1\nname: rules\nsummary: s\nsteps: [rearrange: {keys: a.weight, pattern: "a b -> b a"}]\n')
    outcome = box.converts("run", "rules.yaml", "in.pth", "out.pth", "--target", "two.json", torch=True, **LONG)
    assert "the target is a manifest, not a model: names, shapes and dtypes were compared in L1" in outcome.out
    assert "L5" not in outcome.out


BROKEN_MANIFESTS = [
    ("c104-not-JSON", "{"), ("c104-a-list", "[]"), ("c104-names-that-are-lists", '{"ckptconv_manifest": 1, "tensors": {}, "order": [[]]}'),
    ("c104-ties-that-are-none", '{"ckptconv_manifest": 1, "tensors": {}, "order": [], "ties": 3}'), ("c104-100000-deep", "[" * 100_000),
    ("c104-a-dtype-that-is-a-list", '{"ckptconv_manifest": 1, "tensors": {"a": [[], 1]}, "order": ["a"]}'),
]  # fmt: skip


@pytest.mark.parametrize("text", [row[1] for row in BROKEN_MANIFESTS], ids=[row[0] for row in BROKEN_MANIFESTS])
def test_a_manifest_that_is_none(box, text):
    box.write("in.pth", SQUARE)
    box.write("wanted.json", text)
    outcome = box.run(*RUN, "--target", "wanted.json")
    assert outcome.code == 2
    assert outcome.err.startswith("error: wanted.json  [CK107]\n  ")

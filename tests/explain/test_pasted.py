"""Error messages as people paste them: whole, wrapped, cut off, coloured, from torch, transformers and Lightning."""

import textwrap

import pytest
import torch
from torch import nn

import ckptconv
from ckptconv.errors import UsageError
from ckptconv.explain.pasted import parse


class Net(nn.Module):
    def __init__(self, classes=6):
        super().__init__()
        self.body = nn.Linear(4, 10)
        self.head = nn.Linear(10, classes)


def torch_says(model, state):
    """What torch itself raises."""
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state)
    return f'Traceback (most recent call last):\n  File "t.py", line 1, in <module>\nRuntimeError: {raised.value}'


def wrapped_by_a_terminal(text):
    return "\n".join(
        line for each in text.split("\n") for line in (textwrap.wrap(each, 60, break_long_words=True, drop_whitespace=False) or [""])
    )


def logged(text):
    return "\n".join(f"[rank0]: \x1b[31m{line}\x1b[0m" for line in text.split("\n"))


@pytest.mark.parametrize("mangled", [str, wrapped_by_a_terminal, logged], ids=["whole", "wrapped", "logged"])
def test_torch_is_read_back_whole(mangled):
    state = {f"module.{name}": value for name, value in Net().state_dict().items()} | {"head.weight": torch.ones(5, 10)}
    found = parse(mangled(torch_says(Net(), state)))
    assert found.model == "Net"
    assert found.missing == ("body.weight", "body.bias", "head.bias")
    assert found.unexpected == ("module.body.weight", "module.body.bias", "module.head.weight", "module.head.bias")
    assert found.sizes == (("head.weight", (5, 10), (6, 10)),)
    assert not found.cut


def test_a_value_that_is_no_tensor_is_named():
    found = parse(torch_says(Net(), {**Net().state_dict(), "body.weight": 3}))
    assert found.known[0].sentence == "body.weight is <class 'int'> in the file, not a tensor: another part of the file is the state_dict"


@pytest.mark.parametrize(
    ("text", "missing", "unexpected", "sizes", "cut"),
    [
        pytest.param('Missing key(s) in state_dict: "a.weight", "a.bias", ...', ("a.weight", "a.bias"), (), (), True, id="cut-by-hand"),
        pytest.param('Missing key(s) in state_dict: "a.weight", "a.bi', ("a.weight",), (), (), True, id="cut-in-a-name"),
        pytest.param("<_IncompatibleKeys(missing_keys=['a.w'], unexpected_keys=['b.w', 'c.w'])>", ("a.w",), ("b.w", "c.w"), (), False, id="strict-false"),
        pytest.param(
            "Some weights of ViTForImageClassification were not initialized from the model checkpoint at x and are newly initialized: "
            "['classifier.bias', 'classifier.weight']\nYou should probably TRAIN this model",
            ("classifier.bias", "classifier.weight"), (), (), False, id="transformers-4-missing",
        ),
        pytest.param(
            "Some weights of the model checkpoint at x were not used when initializing BertModel: ['cls.predictions.bias', 'cls.decoder.weight']\n- This IS expected",
            (), ("cls.predictions.bias", "cls.decoder.weight"), (), False, id="transformers-4-unused",
        ),
        pytest.param(
            "- classifier.weight: found shape torch.Size([5, 8]) in the checkpoint and torch.Size([6, 8]) in the model instantiated",
            (), (), (("classifier.weight", (5, 8), (6, 8)),), False, id="transformers-4-shapes",
        ),
        pytest.param(
            "\tsize mismatch for pos_embed: copying a param with shape torch.Size([1, 578, 384]) from checkpoint, the shape in current model is torch.Size([1, 258, 384]).",
            (), (), (("pos_embed", (1, 578, 384), (1, 258, 384)),), False, id="size-alone",
        ),
        pytest.param(
            'While copying the parameter named "a.w", whose dimensions in the model are torch.Size([3]) and whose dimensions in the checkpoint are torch.Size([2]), '
            "an exception occurred : ('x',).",
            (), (), (("a.w", (2,), (3,)),), False, id="while-copying",
        ),
    ],
)  # fmt: skip
def test_other_spellings(text, missing, unexpected, sizes, cut):
    found = parse(text)
    assert (found.missing, found.unexpected, found.sizes, found.cut) == (missing, unexpected, sizes, cut)


def test_the_table_of_transformers_5_is_read_back():
    """Made by the installed library itself."""
    from ckptconv.target.torchvision_ops import import_with_torchvision

    report = import_with_torchvision("transformers.utils.loading_report")
    info = report.LoadStateDictInfo(
        {f"layers.{i}.norm.weight" for i in range(12)} | {"head.bias"}, {"old.bias", "layers.0.x", "layers.1.x"}, {("head.weight", (5, 8), (6, 8))}, [], {}, set()
    )  # fmt: skip
    found = parse(info.create_loading_report())
    assert set(found.missing) == info.missing_keys
    assert set(found.unexpected) == info.unexpected_keys
    assert not found.sizes or found.sizes == (("head.weight", (5, 8), (6, 8)),)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        pytest.param("_pickle.UnpicklingError: Weights only load failed. … WeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace was not an allowed global",
                     "weights-only", "torch.load(weights_only=True) met an object that it may not build (argparse.Namespace); the tensors beside it are fine", id="weights-only"),
        pytest.param("ModuleNotFoundError: No module named 'models'", "module", "the whole model was pickled, and unpickling wants the author's code (models)", id="module"),
        pytest.param("RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory", "truncated",
                     "the file is cut off, or no torch file: the zip archive's end is missing", id="central-directory"),
        pytest.param("_pickle.UnpicklingError: invalid load key, 'v'.", "not-a-checkpoint",
                     "the file is no pickle: its first byte is 'v'; a 'v' is a git-lfs pointer, a '<' a web page", id="lfs"),
        pytest.param("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", "truncated", "the safetensors file is cut off, or none", id="header"),
        pytest.param("RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk", "tied", "tied weights: safetensors wants each tensor once", id="shared"),
        pytest.param("ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's group", "optimizer",
                     "the optimizer's state was saved for another set of parameters: layers were added, frozen or dropped since", id="optimizer"),
        pytest.param("AttributeError: 'NoneType' object has no attribute 'get' at metadata.get('format')", "metadata",
                     'the safetensors file does not say {"format": "pt"}, which transformers asks for', id="metadata"),
        pytest.param("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 48 GiB", "memory",
                     "loading or converting the whole checkpoint at once needs more memory than there is", id="memory"),
        pytest.param("TypeError: Expected state_dict to be dict-like, got <class 'nets.Net'>.", "module",
                     "not a state_dict was given, but nets.Net: the file holds a whole model", id="not-a-dict"),
    ],
)  # fmt: skip
def test_messages_without_keys_have_an_answer(text, kind, says):
    report = ckptconv.explain(error=text)
    assert [(cause.kind, cause.sentence) for cause in report.causes] == [(kind, says)]
    assert report.causes[0].try_
    assert report.exit_code == 1


@pytest.mark.parametrize(
    "text",
    [
        'Missing key(s) in state_dict: "a"' + " " * 200_000,
        "x" * 200_000 + "|",
        " " * 200_000,
        "Missing key(s) in state_dict: " + '"' * 100_001,
        "size mismatch for " * 9_000,
    ],
    ids=["spaces after a name", "a long row", "spaces", "quotes", "sizes without an end"],
)
def test_text_that_is_made_to_be_slow_is_not(text):
    parse(text)


def test_what_is_no_message_is_refused():
    with pytest.raises(UsageError) as raised:
        ckptconv.explain(error="hello\n")
    assert (
        str(raised.value)
        == "[CK107]\n  there is no message in the text that is known\n  found: hello\n  try: ckptconv explain SRC --target T"
    )


def test_a_message_alone_is_explained():
    state = {f"module.{name}": value for name, value in Net().state_dict().items()}
    report = ckptconv.explain(error=torch_says(Net(), state))
    assert report.verdict == "convertible"
    assert (
        report.causes[0].sentence
        == "every key in the checkpoint carries what a wrapper adds: module. (nn.DataParallel or DistributedDataParallel)"
    )
    assert report.commands == ("ckptconv run dataparallel SRC out.pth",)


def test_a_size_mismatch_alone_is_explained():
    report = ckptconv.explain(error=torch_says(Net(), Net(classes=5).state_dict()))
    assert report.verdict == "convertible with loss"
    assert report.causes[0].kind == "head"


def test_a_message_with_the_file_stands_for_the_model(tmp_path):
    """Of missing keys only the names are known, and rules are tried all the same."""
    state = {f"module.{name}": value for name, value in Net().state_dict().items()}
    torch.save(state, tmp_path / "in.pth")
    report = ckptconv.explain(tmp_path / "in.pth", error=torch_says(Net(), state))
    assert (report.verdict, report.commands) == ("convertible", (f"ckptconv run dataparallel {tmp_path}/in.pth out.pth",))


def test_a_message_with_the_model_stands_for_the_file(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "model.pth")
    state = {name.replace("body", "stem"): value for name, value in Net().state_dict().items()}
    report = ckptconv.explain(target=str(tmp_path / "model.pth"), error=torch_says(Net(), state))
    assert "stem.weight" in " ".join(cause.sentence for cause in report.causes)

"""Catalogue E: names that are no names, names that meet, and objects that are no state_dict."""

import pytest
from building import call, pairs, pickled, row, table, tensor, text, torch_file, whole
from harness import message

RUN = "run", "pass.yaml", "in.pth", "out.pth"
TWO = text("a"), tensor([4])
NESTED = pairs((text("a.b"), tensor([4])), (text("a"), table(b=tensor([4], offset=4))))

REFUSED = [
    ("c060-a-key-twice", b"}(" + TWO[0] + TWO[1] + TWO[0] + TWO[1] + b"u", ("CK306", "the key 'a' stands twice", "at byte 268 of the pickle")),
    ("c060-a-key-twice-one-after-the-other", b"}" + TWO[0] + TWO[1] + b"s" + TWO[0] + TWO[1] + b"s", ("CK306", "the key 'a' stands twice", "at byte 268 of the pickle")),
    ("c060-a-key-twice-in-pairs", call("collections.OrderedDict", b"](" + row(*TWO) + row(*TWO) + b"e"), ("CK304", "an ordered dict of something that is no pairs")),
    ("c061-a-dotted-key-and-the-same-way-down", NESTED, ("CK306", "two entries are called 'a.b'", "in .")),
    ("c062-3-and-text-3", pairs((whole(3), tensor([4])), (text("3"), tensor([4], offset=4))), ("CK306", "two entries are called '3'", "in .")),
    ("c062-tuple-keys", pairs((row(text("a"), whole(1)), tensor())), ("CK306", "a state_dict's keys must be text", "<tuple 0>")),
    ("c062-bytes-keys", pairs((b"C\x01a", tensor())), ("CK306", "a state_dict's keys must be text", "b'a'")),
    ("c062-huge-integer-keys", pairs((whole(1 << 70), tensor())), ("CK306", "a key that is an integer of more than 64 bits", "at byte 141 of the pickle")),
    ("c063-NUL", pairs((text("a\0b"), tensor())), ("CK306", "the name holds control characters or lone surrogates: 'a\\\\x00b'", "in .")),
    ("c063-line-end", pairs((text("a\nok: all fine"), tensor())), ("CK306", "the name holds control characters or lone surrogates: 'a\\\\nok: all fine'", "in .")),
    ("c063-escape-sequence", pairs((text("a\x1b]0;owned\x07\x1b[2J"), tensor())), ("CK306", "the name holds control characters or lone surrogates: 'a\\\\x1b]0;owned\\\\x07\\\\x1b[2J'", "in .")),
    ("c063-half-a-character", pairs((b"X\x03\0\0\0\xed\xa0\x80", tensor())), ("CK306", "the name holds control characters or lone surrogates: '\\\\ud800'", "in .")),
    ("c063-empty", pairs((text(""), tensor())), ("CK306", "the name is empty: ''", "in .")),
    ("c063-a-megabyte", pairs((text("a" * (1 << 20)), tensor())), ("CK306", "the name has 1,048,576 characters; at most 1,024 are allowed: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…'", "in .")),
    ("c063-1025-characters", pairs((text("a" * 1025), tensor())), ("CK306", "the name has 1,025 characters; at most 1,024 are allowed: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…'", "in .")),
    ("c065-reserved-name-in-the-source", table(__metadata__=tensor()), ("CK306", "the name __metadata__ is reserved by safetensors: '__metadata__'", "in .")),
    ("c066-a-bare-tensor", tensor(), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c066-a-list-of-tensors", b"](" + tensor() + b"e", ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c066-numbers", table(lr=whole(1)), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c066-an-object", call("argparse.Namespace", text("x")), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c066-two-wrapped-models", table(model=table(w=tensor([4])), ema=table(w=tensor([4], offset=4))), ("CK309", "the file holds several state_dicts, and none was selected", "model (1 tensors), ema (1 tensors)", "--select model, or `select:` in the rule file")),
    ("c066-optimizer-only", table(optimizer=table(state=table(), param_groups=b"]")), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, body, said):
    box.write("in.pth", torch_file(pickled(body)))
    box.refuses(3, message("in.pth", *said), *RUN)


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_c066_a_wrapped_model_is_found(box, key):
    box.write("in.pth", torch_file(pickled(table(**{key: table(w=tensor()), "epoch": whole(3), "args": call("argparse.Namespace")}))))
    assert "unchanged  1  w" in box.converts().out


def test_c063_1024_characters_are_a_name(box):
    box.write("in.pth", torch_file(pickled(pairs((text("a" * 1024), tensor())))))
    box.converts("run", "pass.yaml", "in.pth", "out.safetensors")


def test_c064_names_that_only_look_alike_are_kept_apart_and_said(box):
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    box.write("in.pth", torch_file(pickled(pairs((text(composed), tensor([4])), (text(decomposed), tensor([4], offset=4))))))
    outcome = box.converts()
    assert f"'{composed}' and '{decomposed}' look alike and are two names" in outcome.out
    assert "unchanged  2" in outcome.out


RULES = "version: 1\nname: rules\nsummary: s\nsteps:\n"
STEPS = [
    ("c065-renamed-to-the-reserved-name", '- rename: {a: __metadata__}', 2, ("rules.yaml:5:3  rename (step 1)", "CK209", "the name __metadata__ is reserved by safetensors: '__metadata__'", "made from a")),
    ("c067-two-sources-one-name", '- rename: {a: x, b: x}', 2, ("rules.yaml:5:3  rename (step 1)", "CK202", "two results under one name: x", "rules.yaml:5  rename (step 1) and rules.yaml:5  rename (step 1)", "drop or rename one of them first")),
    ("c067-onto-a-name-that-stays", '- rename: {a: b}', 2, ("rules.yaml:5:3  rename (step 1)", "CK202", "two results under one name: b", "rules.yaml:5  rename (step 1) and passed through", "drop or rename one of them first")),
    ("c067-nothing-matched", '- rename: {nothing: x}', 2, ("rules.yaml:5:3  rename (step 1)", "CK201", "the step matched nothing: nothing", "a, b", "ckptconv inspect in.pth --match '**', or add optional: true")),
    ("c067-claimed-twice", '- rename: {a: x, "{p}": "y.{p}"}', 2, ("rules.yaml:5:3  rename (step 1)", "CK203", "two entries claim a", "'a' and '{p}'", "make one of them narrower")),
    ("c067-untouched-where-all-are-expected", '- rename: {a: x}\nexpect_all: true', 4, ("rules.yaml", "CK210", "no step touches b", "", "rename or drop it, or leave expect_all out")),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "code", "said"), [row[1:] for row in STEPS], ids=[row[0] for row in STEPS])
def test_steps(box, steps, code, said):
    box.write("in.pth", torch_file(pickled(table(a=tensor([4]), b=tensor([4], offset=4)))))
    box.write("rules.yaml", RULES + steps + "\n")
    box.refuses(code, message(*said), "run", "rules.yaml", "in.pth", "out.pth")


def test_c067_optional_and_drop_are_how_it_is_said(box):
    box.write("in.pth", torch_file(pickled(table(a=tensor([4]), b=tensor([4], offset=4)))))
    box.write("rules.yaml", RULES + "- rename: {nothing: x}\n  optional: true\n- drop: b\n- rename: {a: x}\nexpect_all: true\n")
    box.converts("run", "rules.yaml", "in.pth", "out.pth")

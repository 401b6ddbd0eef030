"""docs/limits.md is true, every limit holds at its edge, and what lies below the limits stays within the means that are promised."""

import importlib
import itertools
import re
import struct
from pathlib import Path

import pytest
from building import Record, call, named, numbers, pickled, row, storage, table, tensor, text, torch_file, whole
from harness import MB

from ckptconv.errors import CkptconvError, Refusal, printable
from ckptconv.formats import pickle_machine, torch_zip_reader
from ckptconv.formats.containers import MAX_DEPTH, MAX_NODES, check_tree
from ckptconv.formats.pickle_machine import MAX_MEMO, run
from ckptconv.formats.strict import MAX_VALUES, allowance, parse_json
from ckptconv.ruleset import expressions, patterns, yamlfile
from ckptconv.ruleset.expressions import evaluate, parse

PAGE = (Path(__file__).parent.parent.parent / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .* \| `([a-z_.]+)\.([A-Z_]+)` \| ([0-9,]+) \|$", PAGE, re.MULTILINE)


def test_the_page_names_many_limits():
    assert len(ROWS) == PAGE.count("\n| ") - 2


@pytest.mark.parametrize(("module", "constant", "value"), ROWS, ids=[f"{module}.{constant}" for module, constant, _ in ROWS])
def test_the_page_says_what_the_code_does(module, constant, value):
    assert getattr(importlib.import_module(f"ckptconv.{module}"), constant) == int(value.replace(",", ""))


def ran(body, **options):
    return run(b"\x80\x02" + body + b".", lambda *_: None, **options)


#: A pickle that just fits a limit, and what is said of one more. The large limits are lowered here: their edge is what counts.
EDGES = [
    ("MAX_STEPS", 1000, lambda n: b"](" + b"N" * (n - 5) + b"e", "the pickle has more than 1,000 steps"),
    ("MAX_OBJECTS", 1000, lambda n: b"](" + b"]" * (n - 1) + b"e", "the pickle makes more than 1,000 objects"),
    ("MAX_OBJECTS", 1000, lambda n: named("builtins.list") + b"](" + b"N" * n + b"e\x85R", "the pickle copies more than 1,000 objects"),
    ("MAX_MEMO", 1000, lambda n: b"N" + b"".join(b"r" + struct.pack("<I", at) for at in range(n)), "the pickle remembers more than 1,000 things"),
    ("MAX_GLOBALS", 1000, lambda n: b"](" + b"".join(b"ca\n%d\n" % at for at in range(n)) + b"e", "the pickle asks for more than 1,000 different names"),
    ("MAX_TEXT", 16 << 20, lambda n: b"X" + struct.pack("<I", n) + b"a" * n, "a text of 16,777,217 bytes; at most 16,777,216 are read"),
    ("MAX_MARKS", 256, lambda n: b"(" * n + b"t" * n, "the pickle nests deeper than 256"),
    ("MAX_INTEGER_BYTES", 32, lambda n: b"\x8a" + bytes([n]) + b"\1" * n, "an integer of 33 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("constant", "limit", "body", "what"), EDGES, ids=[row[3] for row in EDGES])
def test_the_edge_of_the_pickle_machine(monkeypatch, constant, limit, body, what):
    monkeypatch.setattr(pickle_machine, constant, limit)
    ran(body(limit))
    with pytest.raises(Refusal) as refusal:
        ran(body(limit + 1))
    assert refusal.value.what == what


def test_the_limits_grow_with_the_checkpoint(monkeypatch):
    assert [allowance(nbytes) for nbytes in (0, (1 << 30) - 1, 1 << 30, 5 << 30)] == [1, 1, 2, 6]
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    ran(b"](" + b"N" * 1990 + b"e", times=2)


def nested(depth):
    tree = {"a": 1}
    for _ in range(depth - 1):
        tree = [tree]
    return tree


def test_the_edge_of_nesting():
    check_tree(nested(MAX_DEPTH))
    with pytest.raises(Refusal, match="nests deeper than 64"):
        check_tree(nested(MAX_DEPTH + 1))


def test_nesting_is_seen_from_wherever_a_container_is_reached():
    """A chain of a thousand, each link of which the root holds too: no link is deep in the root, and the chain is deep all the same."""
    links = [{"a": 1}]
    for _ in range(1000):
        links.append({"next": links[-1]})
    for root in (links, links[::-1], {str(at): link for at, link in enumerate(links)}):
        with pytest.raises(Refusal, match="nests deeper than 64"):
            check_tree(root)


def test_the_edge_of_sharing():
    inner = dict.fromkeys(range(998))
    check_tree([inner] * (MAX_NODES // 999 - 1))
    with pytest.raises(Refusal, match="reached again and again"):
        check_tree([inner] * (MAX_NODES // 999 + 1))


def test_what_has_no_end_is_quoted_from_its_start():
    doubled = ["x"]
    for _ in range(200):
        doubled = [doubled, doubled]
    assert len(printable(doubled)) == 201
    assert printable([1, "a", (2,), (), {"k": [None, b"b"]}]) == repr([1, "a", (2,), (), {"k": [None, b"b"]}])
    itself = {}
    itself["me"] = itself
    assert printable(itself).startswith("{'me': {'me': ")


def test_the_edge_of_json():
    assert len(parse_json(b"[" + b"0," * (MAX_VALUES - 1) + b"0]", code="CK307")) == MAX_VALUES
    with pytest.raises(Refusal, match="more than 2,000,000 values"):
        parse_json(b"[" + b"0," * MAX_VALUES + b"0]", code="CK307")
    assert len(parse_json(b"[" + b"0," * MAX_VALUES + b"0]", code="CK307", times=2)) == MAX_VALUES + 1


def test_the_edge_of_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip_reader, "MAX_RECORDS", 5)
    for count, fits in ((1, True), (2, False)):
        path = tmp_path / str(count)
        path.write_bytes(torch_file(**{f"more{at}": Record(f"a/{at}") for at in range(count)}))
        if fits:
            torch_zip_reader.read(path)
        else:
            with pytest.raises(Refusal, match="the archive has 6 records; at most 5 are read"):
                torch_zip_reader.read(path)
    monkeypatch.setattr(torch_zip_reader, "MAX_RECORDS", 9)
    monkeypatch.setattr(torch_zip_reader, "MAX_DIRECTORY", 50)
    with pytest.raises(Refusal, match=r"the archive's directory has [0-9]+ bytes; at most 50 are read"):
        torch_zip_reader.read(path)


def test_the_edge_of_rule_files():
    yamlfile.load(b"a: 1" + b" " * (yamlfile.MAX_BYTES - 4), "r.yaml")
    yamlfile.load(b"[" + b"1," * (yamlfile.MAX_VALUES - 1) + b"]", "r.yaml")
    for raw, what in (
        (b"a: 1" + b" " * (yamlfile.MAX_BYTES - 3), "at most 1,048,576 bytes"),
        (b"[" + b"1," * yamlfile.MAX_VALUES + b"]", "at most 100,000 values"),
    ):
        with pytest.raises(CkptconvError, match=what):
            yamlfile.load(raw, "r.yaml")


def test_the_edge_of_patterns_and_expressions():
    patterns.Pattern.parse("a" * patterns.MAX_PATTERN)
    with pytest.raises(Refusal, match="at most 1,024 characters"):
        patterns.Pattern.parse("a" * (patterns.MAX_PATTERN + 1))
    ten = "{%s:" + "|".join("0123456789") + "}"
    thousand = "".join(ten % name for name in "xyz")
    assert len(patterns.Template.parse(thousand).fan(())) == 3
    with pytest.raises(Refusal, match="a template stands for 2,000 names; at most 1,000 are allowed"):
        patterns.Template.parse(thousand + "{w:a|b}").fan(())
    parse("(" * 31 + "1" + ")" * 31)
    with pytest.raises(Refusal, match="nests at most 32 deep"):
        parse("(" * 32 + "1" + ")" * 32)
    full = [0] * (expressions.MAX_LENGTH - 1)
    evaluate(parse("[x]"), {"x": full}.__getitem__)
    with pytest.raises(Refusal, match="at most 100,000 values"):
        evaluate(parse("[x, 1]"), {"x": full}.__getitem__)


# ----------------------------------------------------------------------------------------- just below the limits, in a measured process

M = 32 << 20


def modules(inner):
    return (
        named("a.M")
        + b")\x81}("
        + text("_parameters")
        + b"}"
        + text("p")
        + tensor()
        + b"s"
        + text("_buffers")
        + b"}"
        + text("_modules")
        + b"}("
        + inner
        + b"uub"
    )


def doubling(depth):
    """A dict of two names for one dict of two names for one dict of … a tensor."""
    layers = b"".join(
        b"}(" + text("a") + b"h" + bytes([at]) + text("b") + b"h" + bytes([at]) + b"uq" + bytes([at + 1]) for at in range(depth)
    )
    return b"(}q\x00" + text("w") + tensor() + b"s" + layers + b"t0h" + bytes([depth])


#: A million empty values, to be copied again and again.
MANY_IN_A_TUPLE = b"(" + b"N" * 1_000_000 + b"t"
LAUGHS = b"(]q\x00" + b"".join(b"](" + (b"h" + bytes([at])) * 10 + b"eq" + bytes([at + 1]) for at in range(25)) + b"t0h\x19"
HASH_BOMB = b"X\x01\0\0\0aq\x00" + b"".join(b"h" + bytes([at]) + b"h" + bytes([at]) + b"\x86q" + bytes([at + 1]) for at in range(60))
LAYOUT = b"(" + HASH_BOMB + b"t0" + named("torch.serialization._get_layout") + b"h\x3c\x85R"


def again(value, made, count=100_000):
    """``value`` is made once, as memory 1, and then ``made`` of it, ``count`` times."""
    return b"(" + value + b"q\x01t0](" + made * count + b"e"


def versions():
    shared = b"}" + text("_metadata") + b"}(" + b"".join(b"J" + struct.pack("<i", at) + b"}" for at in range(300_000)) + b"us"
    return (
        b"("
        + shared
        + b"q\x01t0("
        + text("w")
        + tensor()
        + b"q\x02t0}("
        + b"".join(text(f"s.{at}") + named("collections.OrderedDict") + b")R" + text("w") + b"h\x02s" + b"h\x01b" for at in range(9000))
        + b"u"
    )


COSTS = [
    ("c009-as-many-memories-as-there-may-be", b"N" + b"".join(b"r" + struct.pack("<I", at) for at in range(MAX_MEMO))),
    ("c011-dicts-shared-eighteen-times-over", doubling(18)),
    ("c011-dicts-shared-sixty-times-over", doubling(60)),
    ("c011-modules-shared-sixty-times-over", b"(" + modules(b"") + b"q\x00" + b"".join(modules(text("a") + b"h" + bytes([at]) + text("b") + b"h" + bytes([at])) + b"q" + bytes([at + 1]) for at in range(60)) + b"t0h\x3c"),
    ("c014-empty-dicts-without-end", b"](" + b"}" * M + b"e"),
    ("c014-lists-copied-without-end", b"]q\x00(" + b"N" * 1_000_000 + b"e](" + (named("builtins.list") + b"h\x00\x85R") * 100_000 + b"e"),
    ("c014-texts-encoded-without-end", b"X" + struct.pack("<I", 16_000_000) + b"a" * 16_000_000 + b"q\x000](" + (named("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R") * 10_000 + b"e"),
    ("c014-text-beyond-the-basic-plane", b"](" + (b"X" + struct.pack("<I", 15 << 20) + "\N{GRINNING FACE}".encode() + b"a" * ((15 << 20) - 4)) * 4 + b"e"),
    ("c014-integers-without-end", b"](" + b"J\xff\xff\xff\x7f" * (M // 5) + b"e"),
    ("c014-dicts-in-a-dict", b"}(" + b"".join(b"J" + struct.pack("<i", at) + b"}" for at in range(740_000)) + b"u"),
    ("c010-a-layout-that-takes-for-ever-to-hash", table(x=call("torch._utils._rebuild_sparse_tensor", LAYOUT, row(tensor(), tensor(), numbers([4]))))),
    ("c011-laughing-lists-as-a-shape", b"](" + LAUGHS + named("torch.Size") + b"h\x19\x85Re"),
    ("c011-laughing-lists-as-a-reference", LAUGHS + b"Q"),
    ("c011-versions-of-nine-thousand-state-dicts", versions()),
    ("c014-arguments-copied-without-end", again(MANY_IN_A_TUPLE, named("copyreg._reconstructor") + b"h\x01R")),
    ("c014-dicts-copied-by-their-last-argument", again(b"}(" + b"".join(b"J" + struct.pack("<i", at) + b"N" for at in range(300_000)) + b"u", named("collections.OrderedDict") + b"Nh\x01\x86R")),
    ("c014-schemes-copied-without-end", again(MANY_IN_A_TUPLE, named("torch._utils._rebuild_qtensor") + b"(" + storage(32, kind="QInt8Storage") + b"NNNh\x01tR", 1)),
    ("c014-states-compared-without-end", again(b"}(" + b"".join(b"J" + struct.pack("<i", at) + b"N" for at in range(300_000)) + b"u", named("collections.OrderedDict") + b")Rh\x01b")),
    ("c015-keys-that-hash-alike", b"}(" + b"".join(whole((2**61 - 1) * at << 8) + b"N" for at in range(1, 20_000)) + b"u"),
    ("c049-shapes-of-a-million-axes", b"]q\x00(" + b"K\x01" * 1_000_000 + b"e](" + (named("torch.Size") + b"h\x00\x85R") * 1000 + b"e"),
]  # fmt: skip


@pytest.mark.parametrize("body", [row[1] for row in COSTS], ids=[row[0] for row in COSTS])
def test_the_worst_below_the_limits(box, body):
    """The limit of this process is its death; that it ends with a sentence is the test."""
    box.write("in.pth", torch_file(pickled(body)))
    outcome = box.run("run", "pass.yaml", "in.pth", "out.pth", mb=MB)
    assert outcome.code == 3
    assert outcome.err.startswith("error: in.pth  [CK3")


def test_strides_that_hash_alike(box):
    """Nobody steps along an axis of size 1, so its stride may be anything: here 0 and 2**61 - 1, whose tuples all have one hash."""
    strides = itertools.product((0, 2**61 - 1), repeat=16)
    tensors = {f"t{at}": tensor([1] * 16, stride) for at, stride in zip(range(40_000), strides, strict=False)}
    box.write("in.pth", torch_file(pickled(table(**tensors))))
    outcome = box.run("inspect", "in.pth", mb=MB)
    assert outcome.code == 0
    assert "40,000 tensors, 1 parameters" in outcome.out

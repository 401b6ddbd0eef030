"""Torch files read without torch: every honest file as torch itself reads it, every hostile one refused by name."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from ckptconv import formats
from ckptconv.errors import Refusal
from ckptconv.execute.sources import Sources
from ckptconv.spec import DType

# ------------------------------------------------------------------------------------------------------------------- honest files


def tensors_of(path, container="."):
    contents = formats.read(path)
    with Sources(contents.files) as opened:
        return {name: opened.read_tensor(placed) for name, placed in contents.containers[container].tensors.items()}


def same(left, right):
    left, right = left.detach().contiguous(), right.detach().contiguous()
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def sample(dtype):
    if dtype is DType.float4_e2m1fn_x2:
        return torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).view(2, 3)
    theirs = getattr(torch, dtype.value)
    return torch.arange(6).view(2, 3).to(torch.float32 if theirs.itemsize == 1 and theirs.is_floating_point else theirs).to(theirs)


def saved_in_the_old_format(state, path):
    try:
        save(state, path, new=False)
    except (NotImplementedError, AttributeError, TypeError, RuntimeError, KeyError):
        return False
    return True


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def new(request):
    return request.param


def save(value, path, new, **options):
    torch.save(value, path, _use_new_zipfile_serialization=new, **options)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", list(DType))
def test_every_dtype(tmp_path, dtype, new):
    value = sample(dtype)
    state = {"x": value, "empty": value[:0], "one": value[0, 0]}
    if new:
        save(state, tmp_path / "a.pth", new)
    elif not saved_in_the_old_format(state, tmp_path / "a.pth"):
        return  # torch has no way to write it either
    found = tensors_of(tmp_path / "a.pth")
    assert same(found["x"], value)
    assert found["empty"].shape == (0, 3)
    assert found["one"].shape == ()
    assert same(found["one"], value[0, 0].clone())


def test_views_share_and_oversize_storages(tmp_path, new):
    big = torch.arange(1000.0)
    state = {
        "row": big[10:14].view(2, 2),
        "strided": big[0:20:3],
        "moved": big[:6].view(2, 3).T,
        "expanded": big[:3].expand(4, 3),
        "last": big[-1],
    }
    save(state, tmp_path / "a.pth", new)
    found = tensors_of(tmp_path / "a.pth")
    assert all(same(found[name], value) for name, value in state.items())


def test_ties_are_seen(tmp_path, new):
    weight = torch.randn(4, 2)
    save({"embed": weight, "head": weight, "part": weight[:2], "x": torch.ones(1)}, tmp_path / "a.pth", new)
    assert formats.read(tmp_path / "a.pth").containers["."].manifest.ties == (("embed", "head"),)


def test_parameters_and_module_versions(tmp_path, new):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save(model.state_dict(), tmp_path / "a.pth", new)
    container = formats.read(tmp_path / "a.pth").containers["."]
    assert container.module_versions["1"] == {"version": 2}
    save({"p": nn.Parameter(torch.ones(2))}, tmp_path / "b.pth", new)
    assert same(tensors_of(tmp_path / "b.pth")["p"], torch.ones(2))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    state = {f"layers.{at}.weight": torch.full((2, 3), float(at)) for at in range(300)}
    torch.save(
        {"state_dict": state, "note": "x" * 300, "data": b"bytes", "n": 2**40, "f": 1.5, "l": [1, (2, 3)]},
        tmp_path / "a.pth",
        pickle_protocol=protocol,
    )
    found = tensors_of(tmp_path / "a.pth", "state_dict")
    assert list(found) == list(state)
    assert all(same(found[name], value) for name, value in state.items())


def test_a_training_checkpoint_lists_every_candidate_and_every_stranger(tmp_path, new):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(), "ema": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3, "history": collections.defaultdict(list),
        "count": collections.Counter("ab"), "loss": torch.tensor(0.5),
    }  # fmt: skip
    save(saved, tmp_path / "a.ckpt", new)
    contents = formats.read(tmp_path / "a.ckpt")
    assert list(contents.containers) == ["model", "ema"]
    assert list(contents.containers["ema"].tensors) == ["module.weight", "module.bias"]
    assert contents.skipped["args"] == "argparse.Namespace"


WHOLE = """
import sys, types, torch
from torch import nn

module = types.ModuleType("somebodys_models")
class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("transient", torch.arange(4), persistent=False)
        self.parent = None
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Inner(), Inner()])
        self.head = nn.Linear(3, 2)
        self.head.weight.data.fill_(7)
        self.activation = torch.nn.functional.relu
        self.settings = {"a": (1, 2)}
        self.body[0].parent = [self]
for kind in (Inner, Net):
    kind.__module__ = "somebodys_models"
    setattr(module, kind.__name__, kind)
sys.modules["somebodys_models"] = module
net = Net()
what = sys.argv[2]
new = sys.argv[3] == "True"
torch.save(net if what == "bare" else {"model": net, "epoch": 1}, sys.argv[1], _use_new_zipfile_serialization=new)
torch.save(net.state_dict(), sys.argv[1] + ".state")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["bare", "nested"])
def test_a_whole_module_whose_class_is_not_installed_gives_up_its_tensors(tmp_path, what, new):
    path = tmp_path / "net.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", WHOLE, str(path), what, str(new)], check=True, cwd=tmp_path)
    found = tensors_of(path, "." if what == "bare" else "model")
    wanted = torch.load(f"{path}.state")
    assert list(found) == list(wanted)
    assert all(same(found[name], value) for name, value in wanted.items())


def test_a_tree_of_parameters_is_one_state_dict_with_joined_names(tmp_path):
    torch.save({"encoder": {"w": torch.ones(2), "inner": {"b": torch.ones(1)}}, "decoder": {"w": torch.zeros(2)}}, tmp_path / "a.pth")
    assert list(formats.read(tmp_path / "a.pth").containers["."].tensors) == ["encoder.w", "encoder.inner.b", "decoder.w"]


def test_what_is_beside_the_tensors_of_a_state_dict_is_skipped_and_said(tmp_path):
    meta = torch.ones(3, device="meta")
    torch.save({"a.w": torch.ones(2), "b.w": torch.ones(2), "a._extra_state": None, "epoch": 3, "s": meta}, tmp_path / "a.pth")
    container = formats.read(tmp_path / "a.pth").containers["."]
    assert list(container.tensors) == ["a.w", "b.w"]
    assert container.skipped == {"a._extra_state": "NoneType", "epoch": "int"}
    assert container.unsupported == {"s": "meta"}


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"lr": 0.1}], ids=["tensor", "list", "numbers"])
def test_a_file_without_a_state_dict_has_no_candidate(tmp_path, value):
    torch.save(value, tmp_path / "a.pth")
    assert formats.read(tmp_path / "a.pth").containers == {}


def test_big_endian_files_are_swapped(tmp_path):
    values = torch.tensor([1.0, -2.5, 3e7])
    torch.save({"x": values}, tmp_path / "a.pth")
    swapped = rebuilt(
        tmp_path / "a.pth", {"byteorder": b"big", "data/0": values.view(torch.uint8).view(-1, 4).flip(1).contiguous().numpy().tobytes()}
    )
    assert same(tensors_of(swapped)["x"], values)


def test_reading_needs_neither_torch_nor_numpy(tmp_path, new):
    save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pth", new)
    code = f"import sys; from pathlib import Path; from ckptconv import formats; formats.read(Path({str(tmp_path / 'a.pth')!r})); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------------------- hostile files


def refused(path):
    with pytest.raises(Refusal) as refusal:
        formats.read(path)
    return refusal.value.code, refusal.value.what


def rebuilt(path, records=None, extra=(), compress=False, top="a"):
    """The same archive with other records; None takes one out."""
    with zipfile.ZipFile(path) as archive:
        old = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    new = {**old, **(records or {})}
    out = path.with_name("rebuilt.pth")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in new.items():
            if data is not None:
                archive.writestr(f"{top}/{name}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return out


@pytest.fixture
def good(tmp_path):
    torch.save({"x": torch.arange(8.0), "y": torch.ones(2)}, tmp_path / "good.pth")
    return tmp_path / "good.pth"


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stolen(name):
    """A callable that pickles under any dotted name, without there being one."""
    return f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode()


GADGETS = [
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.open",
    "builtins.__import__",
    "__builtin__.eval",
    "runpy.run_path",
    "runpy._run_code",
    "pty.spawn",
    "code.InteractiveInterpreter",
    "codeop.compile_command",
    "cProfile.run",
    "profile.run",
    "timeit.timeit",
    "timeit.main",
    "pdb.run",
    "bdb.Bdb.run",
    "trace.Trace.run",
    "doctest.debug_script",
    "socket.create_connection",
    "urllib.request.urlopen",
    "urllib.request.urlretrieve",
    "http.client.HTTPConnection",
    "ftplib.FTP",
    "smtplib.SMTP",
    "webbrowser.open",
    "shutil.rmtree",
    "pickle.loads",
    "_pickle.loads",
    "marshal.loads",
    "types.CodeType",
    "types.FunctionType",
    "importlib.import_module",
    "imp.load_source",
    "ctypes.CDLL",
    "multiprocessing.util.spawnv_passfds",
    "asyncio.unix_events._UnixSubprocessTransport._start",
    "pip._internal.main",
    "pip.main",
    "ensurepip._run_pip",
    "logging.FileHandler",
    "logging.config.fileConfig",
    "uuid._get_command_stdout",
    "operator.attrgetter",
    "operator.methodcaller",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.serialization.os.system",
    "torch._dynamo.optimize",
    "torch.utils.cpp_extension.load",
    "numpy.load",
    "numpy.f2py.compile",
    "numpy.testing._private.utils.runstring",
    "io.open",
    "_io.FileIO",
    "tempfile.mkstemp",
    "zipfile.ZipFile",
    "tarfile.open",
    "sqlite3.connect",
    "pydoc.pipepager",
    "idlelib.pyshell.ModifiedInterpreter.runcommand",
    "lib2to3.pgen2.grammar.Grammar.loads",
    "dill.loads",
    "cloudpickle.loads",
    "joblib.load",
    "pandas.read_pickle",
    "functools.reduce",
    "site.main",
    "signal.signal",
    "atexit.register",
    "inspect.getsource",
    "argparse.os.system",
]


@pytest.mark.parametrize("name", GADGETS)
def test_a_global_that_runs_something_is_refused_by_name(tmp_path, good, name):
    marker = tmp_path / "marker"
    argument = f"touch {marker}".encode()
    body = b"\x80\x02" + stolen(name) + b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R."
    code, what = refused(rebuilt(good, {"data.pkl": body}))
    assert code == "CK303"
    assert what.startswith(f"the file asks for {name}, which ")
    assert what.endswith("; nothing of it was run")
    assert not marker.exists()


def test_a_real_exploit_does_not_run_and_no_fallback_loads_it(tmp_path, good, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    body = pickle.dumps({"x": Evil(os.system, f"touch {marker}")}, protocol=2)
    assert refused(rebuilt(good, {"data.pkl": body}))[0] == "CK303"
    torch.save({"x": Evil(os.system, f"touch {marker}")}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert refused(tmp_path / "legacy.pth")[0] == "CK303"
    assert not marker.exists()


def test_an_allowed_function_cannot_be_fed_a_forbidden_one(good):
    body = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nctorch\nTensor\n)}tR."
    assert refused(rebuilt(good, {"data.pkl": body}))[0] == "CK303"


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQ"
END = b"\x89ccollections\nOrderedDict\n)RtR"


def one_tensor(view):
    """A pickle with the one tensor ``x`` on an eight-element storage, viewed in the given way."""
    return b"\x80\x02}X\x01\0\0\0x" + TENSOR + view + END + b"s."


@pytest.mark.parametrize(
    ("body", "code", "what"),
    [
        (b"\x80\x02(i", "CK304", "opcode 0x69 is none that an honest checkpoint needs"),
        (b"\x80\x02\x82\x01.", "CK304", "opcode 0x82 is none that an honest checkpoint needs"),
        (b"\x80\x05\x96" + b"\xff" * 8, "CK304", "opcode 0x96 is none that an honest checkpoint needs"),
        (b"\x80\x09.", "CK304", "pickle protocol 9"),
        (b"\x80\x02}", "CK304", "the pickle ends early"),
        (b"\x80\x02t.", "CK304", "a mark is missing"),
        (b"\x80\x02.", "CK304", "the pickle ends with something left over"),
        (b"\x80\x02NN.", "CK304", "the pickle ends with something left over"),
        (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "CK304", "an integer of 255 bytes"),
        (b"\x80\x02X\xff\xff\xff\xff", "CK304", "a text of 4,294,967,295 bytes; at most 16,777,216 are read"),
        (b"\x80\x02" + b"(" * 300, "CK304", "the pickle nests deeper than 256"),
        (b"\x80\x02}q\x00X\x01\0\0\0xh\x00s.", "CK304", "a container holds itself"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "CK304", "the file nests deeper than 64"),
        (b"\x80\x02(]q\x00" + b"".join(b"](" + (b"h" + bytes([n])) * 10 + b"eq" + bytes([n + 1]) for n in range(25)) + b"t0h\x19.",
         "CK304", "the same containers are reached again and again: written out, the file would have no end"),
        (b"\x80\x02}(X\x01\0\0\0xNX\x01\0\0\0xNu.", "CK306", "the key 'x' stands twice"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\0\0\0__class__Nsb.", "CK304", "the file sets attributes on a dict"),
        (one_tensor(b"K\x00K\x09\x85K\x01\x85"), "CK305", "a tensor reaches past the end of its storage"),
        (one_tensor(b"K\x05K\x04\x85K\x01\x85"), "CK305", "a tensor reaches past the end of its storage"),
        (one_tensor(b"K\x00K\x04\x85K\x03\x85"), "CK305", "a tensor reaches past the end of its storage"),
        (one_tensor(b"K\x00J\xff\xff\xff\xff\x85K\x01\x85"), "CK305", "a tensor whose shape is no row of sizes"),
        (one_tensor(b"K\x00K\x04\x85J\xff\xff\xff\xff\x85"), "CK305", "a tensor whose strides is no row of sizes"),
        (one_tensor(b"J\xff\xff\xff\xffK\x04\x85K\x01\x85"), "CK305", "a tensor without a storage or with an impossible offset"),
        (one_tensor(b"K\x00\x8a\x09" + (2**70).to_bytes(9, "little") + b"\x85K\x01\x85"), "CK305", "a tensor whose shape is no row of sizes"),
        (one_tensor(b"K\x00\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85K\x00\x85"), "CK305", "a tensor repeats its elements beyond measure"),
        (one_tensor(b"K\x00K\x02K\x02\x86K\x01\x85"), "CK305", "a tensor with more sizes than strides, or fewer"),
        (one_tensor(b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t"), "CK305", "a tensor of rank 65; at most 64 are read"),
    ],
)  # fmt: skip
def test_a_malformed_pickle_is_refused(good, body, code, what):
    assert refused(rebuilt(good, {"data.pkl": body})) == (code, what)


def test_a_huge_memo_index_costs_nothing(good):
    body = b"\x80\x02]r" + struct.pack("<I", 2**31) + b"."
    assert formats.read(rebuilt(good, {"data.pkl": body})).containers == {}


def test_hashing_cannot_take_for_ever(good):
    nested = b")"
    body = b"\x80\x02}" + nested + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(40)) + b"Ns."
    assert formats.read(rebuilt(good, {"data.pkl": body})).containers == {}


@pytest.mark.parametrize(
    ("records", "extra", "code", "what"),
    [
        ({"data/0": None}, (), "CK302", "storage '0' is declared and not there"),
        ({"data/0": b"1234"}, (), "CK306", "storage '0' has another size than declared"),
        ({"data/0": bytes(64)}, (), "CK306", "storage '0' has another size than declared"),
        ({"data.pkl": None}, (), "CK301", "the archive has no data.pkl: it was not written by torch.save"),
        ({"version": None}, (), "CK301", "the archive has no version: it was not written by torch.save"),
        ({"version": b"999"}, (), "CK301", "the archive has a version that no torch writes"),
        ({"byteorder": b"middle"}, (), "CK306", "the byte order is neither little nor big"),
        ({}, [("b/x", b"")], "CK306", "the records do not lie in one folder"),
        ({}, [("a/../x", b"")], "CK306", "the record name 'a/../x' is unsafe"),
        ({}, [("/a/x", b"")], "CK306", "the record name '/a/x' is unsafe"),
        ({}, [("C:/x", b"")], "CK306", "the record name 'C:/x' is unsafe"),
    ],
)
def test_a_malformed_archive_is_refused(good, records, extra, code, what):
    assert refused(rebuilt(good, records, extra)) == (code, what)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["data/0", "data.pkl"])
def test_a_record_that_stands_twice_is_refused(good, name):
    assert refused(rebuilt(good, {}, [(f"a/{name}", bytes(32))])) == ("CK306", f"record '{name}' occurs twice")


def test_a_compressed_archive_is_refused_before_anything_is_inflated(good):
    assert refused(rebuilt(good, {}, compress=True))[1].endswith("is compressed; torch stores records as they are")


def test_records_that_nobody_needs_are_a_warning(good):
    assert formats.read(rebuilt(good, {"data/77": b"x"})).warnings == ("1 records belong to no tensor (data/77); they are left behind",)


def edited(path, change):
    raw = bytearray(path.read_bytes())
    raw = change(raw) or raw
    path.with_name("edited.pth").write_bytes(raw)
    return path.with_name("edited.pth")


def central(raw, field, value, size, nth=0):
    """Changes a field of the nth entry of the central directory."""
    at = -1
    for _ in range(nth + 1):
        at = raw.index(b"PK\1\2", at + 1)
    raw[at + field : at + field + size] = value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw[: len(raw) // 2], "CK302"),
        (lambda raw: raw[:-1], "CK302"),
        (lambda raw: raw + bytes(100), "CK306"),
        (lambda raw: b"junk" + raw, "CK301"),
        (lambda raw: central(raw, 8, 1, 2), "CK306"),  # encrypted
        (lambda raw: central(raw, 10, 8, 2), "CK306"),  # deflated
        (lambda raw: central(raw, 42, 0, 4, nth=2), "CK306"),  # two entries on one header
        (lambda raw: central(raw, 42, 2**31, 4), "CK302"),  # outside
        (lambda raw: central(raw, 24, 2**30, 4), "CK306"),  # sizes disagree
        (lambda raw: raw.__setitem__(slice(30, 31), b"z"), "CK306"),  # another name in the record's own header
        (lambda raw: raw.__setitem__(slice(len(raw) - 6, len(raw) - 2), b"\1\0\0\0"), "CK306"),  # the directory's offset lies
    ],
)
def test_a_damaged_archive_is_refused(good, change, code):
    assert refused(edited(good, change))[0] == code


def test_every_truncation_is_refused(good):
    raw = good.read_bytes()
    cut = good.with_name("cut.pth")
    for size in range(0, len(raw), 37):
        cut.write_bytes(raw[:size])
        assert refused(cut)[0] in ("CK301", "CK302", "CK306")


def outcome(path):
    try:
        formats.read(path)
    except Refusal as refusal:
        return refusal.code
    return "read"


def test_random_damage_never_raises_anything_else(good, new):
    import random

    rng = random.Random(0)
    path = good.with_name("seed.pth")
    save({"x": torch.arange(8.0), "n": {"a": [1, 2], "b": torch.ones(2)}}, path, new)
    raw = path.read_bytes()
    mutant = good.with_name("mutant.pth")
    for _ in range(1500):
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        mutant.write_bytes(changed)
        assert outcome(mutant)[:3] in ("CK3", "rea")


# ------------------------------------------------------------------------------------------------------------------- legacy


def legacy(tmp_path, change):
    torch.save({"x": torch.arange(8.0)}, tmp_path / "l.pth", _use_new_zipfile_serialization=False)
    raw = bytearray((tmp_path / "l.pth").read_bytes())
    (tmp_path / "l.pth").write_bytes(change(raw) or raw)
    return tmp_path / "l.pth"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw[:-4], "CK302"),
        (lambda raw: raw + b"x", "CK306"),
        (lambda raw: raw.__setitem__(slice(len(raw) - 40, len(raw) - 32), (9).to_bytes(8, "little")), "CK306"),
        (lambda raw: raw.__setitem__(slice(len(raw) - 40, len(raw) - 32), (-1).to_bytes(8, "little", signed=True)), "CK306"),
        (lambda raw: raw.__setitem__(slice(4, 6), b"\0\0"), "CK301"),
        (lambda raw: raw[:60], "CK304"),
    ],
)
def test_a_damaged_legacy_file_is_refused(tmp_path, change, code):
    assert refused(legacy(tmp_path, change))[0] == code


def test_a_storage_that_was_never_stored_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(8.0)}, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    keys = pickle.dumps([], protocol=2)
    at = raw.rindex(b"\x80\x02]q")
    (tmp_path / "l.pth").write_bytes(raw[:at] + keys)
    code, what = refused(tmp_path / "l.pth")
    assert (code, what.startswith("storage ")) == ("CK302", True)


# ------------------------------------------------------------------------------------------------------------------- not a checkpoint


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "this is a git-lfs pointer (64 bytes), not the file itself",
        ),
        (b"<!DOCTYPE html><html><body>404</body></html>", "this is a web page, not a checkpoint: a download that went wrong"),
        (b"\x1f\x8b\x08" + bytes(20), "this is a gzip archive, not a checkpoint"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "this is a 7z archive, not a checkpoint"),
        (b'{"hidden_size": 768}', "this is JSON, not a checkpoint"),
        (b"GGUF" + bytes(20), "this is a GGUF file, which is not read"),
        (b"hello, world\n", "this is a text file, not a checkpoint"),
        (bytes(257) + b"ustar" + bytes(300), "this is a tar archive, not a checkpoint"),
        (bytes(range(1, 200)), "this is no torch and no safetensors file"),
        (pickle.dumps({"a": 1}, protocol=2), "this is a pickle, but not a torch checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, data, what):
    (tmp_path / "model.pth").write_bytes(data)
    assert refused(tmp_path / "model.pth") == ("CK301", what)


def test_the_kind_is_told_from_bytes_and_not_from_the_suffix(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "really.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "really.safetensors")
    assert formats.read(tmp_path / "really.pth").format == "safetensors"
    assert formats.read(tmp_path / "really.safetensors").format == "torch"


def test_pipes_links_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "nothing")
    assert refused(tmp_path / "pipe.pth") == ("CK310", "this is a pipe, not a file")
    assert refused(tmp_path / "link.pth") == ("CK310", "this is a link to a file that is not there")
    assert refused(tmp_path / "nothing.pth")[0] == "CK310"


def test_a_name_with_a_colon_is_no_drive(tmp_path):
    """torch.save names the archive's folder after the file."""
    torch.save({"x": torch.ones(2)}, tmp_path / "a:b.pth")
    assert list(formats.read(tmp_path / "a:b.pth").containers["."].tensors) == ["x"]

"""Catalogue A: pickles that want to run something, or to cost something. Each is a right torch file around one wrong pickle."""

import struct

import pytest
from building import HOOKS, call, named, numbers, pairs, pickled, row, storage, table, tensor, text, torch_file, whole
from harness import message

MARK = text("touch marker")
REDUCE_X = pickled(table(x=call("posix.system", MARK)))
DEEP = b"]" * 100_000 + b"a" * 99_999
#: Pairs of pairs of pairs: to hash the outermost is to hash the innermost a million million times.
BOMB_KEY = b")" + b"".join(b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(40))
LAUGHS = b"(]q\x00" + b"".join(b"](" + (b"h" + bytes([at])) * 10 + b"eq" + bytes([at + 1]) for at in range(25)) + b"t0h\x19"


def parameter(function, *rest):
    """``_rebuild_from_type_v2(function, torch.nn.parameter.Parameter, …)``."""
    return call("torch._tensor._rebuild_from_type_v2", named(function), named("torch.nn.parameter.Parameter"), *rest)


REFUSED = [
    ("c001-reduce-posix-system", REDUCE_X, ("CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 10 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c001-reduce-os-system", pickled(call("os.system", MARK)), ("CK303", "the file asks for os.system, which runs commands or code; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c001-subprocess-run", pickled(call("subprocess.run", b"](" + MARK + b"e")), ("CK303", "the file asks for subprocess.run, which runs commands or code; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c002-eval", pickled(call("builtins.eval", text("open('marker','w')"))), ("CK303", "the file asks for builtins.eval, which is a built-in function; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c002-exec-of-python-2", pickled(call("__builtin__.execfile", text("marker"))), ("CK303", "the file asks for __builtin__.execfile, which is a built-in function; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c002-getattr", pickled(call("builtins.getattr", named("torch.Tensor"), text("__init__"))), ("CK303", "the file asks for builtins.getattr, which is a built-in function; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c002-import", pickled(call("builtins.__import__", text("os"))), ("CK303", "the file asks for builtins.__import__, which is a built-in function; nothing of it was run", "at byte 2 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c003-dotted-through-torch", b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + MARK + b"\x85R.", ("CK303", "the file asks for torch.serialization.os.system, which runs commands or code; nothing of it was run", "at byte 40 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c003-dotted-through-an-honest-module", b"\x80\x04" + text("argparse") + text("_sys.modules") + b"\x93" + MARK + b"\x85R.", ("CK303", "the file asks for argparse._sys.modules, which runs commands or code; nothing of it was run", "at byte 32 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c003-dotted-dunder", b"\x80\x04" + text("torch") + text("Tensor.__class__.__base__") + b"\x93)R.", ("CK303", "the file asks for torch.Tensor.__class__.__base__, which runs commands or code; nothing of it was run", "at byte 42 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c004-allowed-function-fed-a-command", pickled(parameter("posix.system", row(MARK), b"N")), ("CK303", "the file asks for posix.system, which runs commands or code; nothing of it was run", "at byte 40 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c004-allowed-function-fed-a-stranger", pickled(parameter("some.function", row(MARK), b"N")), ("CK303", "a tensor subclass is to be rebuilt by some.function", "", "ask the author for plain tensors")),
    ("c004-subclass-of-a-command", pickled(call("torch._tensor._rebuild_from_type_v2", named("torch._utils._rebuild_tensor_v2"), named("os.system"),
     row(storage(), whole(0), numbers([8]), numbers([1]), b"\x89", HOOKS), b"N")), ("CK303", "the file asks for os.system, which runs commands or code; nothing of it was run", "at byte 73 of the pickle", "do not load this file anywhere; ask its author for safetensors")),
    ("c006-attributes-of-a-class", pickled(named("torch.nn.modules.linear.Linear") + b"}" + text("forward") + named("argparse.Namespace") + b"sb"), ("CK304", "the file sets attributes on a class", "at byte 68 of the pickle")),
    ("c006-attributes-of-a-tensor", pickled(tensor() + b"}" + text("data") + whole(1) + b"sb"), ("CK304", "the file sets attributes on a tensor", "at byte 141 of the pickle")),
    ("c006-attributes-of-a-dict", pickled(HOOKS + b"}" + text("__class__") + b"Nsb"), ("CK304", "the file sets attributes on a dict", "at byte 47 of the pickle")),
    ("c008-INST", b"\x80\x02(ios\nsystem\n.", ("CK304", "opcode 0x69 is none that an honest checkpoint needs", "at byte 3 of the pickle")),
    ("c008-OBJ", b"\x80\x02(" + named("argparse.Namespace") + b"o.", ("CK304", "opcode 0x6f is none that an honest checkpoint needs", "at byte 23 of the pickle")),
    ("c008-EXT1", b"\x80\x02\x82\x01.", ("CK304", "opcode 0x82 is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c008-EXT4", b"\x80\x02\x84\x01\0\0\0.", ("CK304", "opcode 0x84 is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c008-STACK_GLOBAL-of-a-list", b"\x80\x04]" + text("system") + b"\x93.", ("CK304", "a global without a proper name", "at byte 14 of the pickle")),
    ("c008-BYTEARRAY8", b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x.", ("CK304", "opcode 0x96 is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c008-NEXT_BUFFER", b"\x80\x05\x97.", ("CK304", "opcode 0x97 is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c008-DUP", b"\x80\x02]2.", ("CK304", "opcode 0x32 is none that an honest checkpoint needs", "at byte 3 of the pickle")),
    ("c008-POP_MARK", b"\x80\x02](N1.", ("CK304", "opcode 0x31 is none that an honest checkpoint needs", "at byte 5 of the pickle")),
    ("c008-PERSID", b"\x80\x02Px\n.", ("CK304", "opcode 0x50 is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c008-PUT-as-text", b"\x80\x02]p0\n.", ("CK304", "opcode 0x70 is none that an honest checkpoint needs", "at byte 3 of the pickle")),
    ("c008-LONG4", b"\x80\x02\x8b\xff\xff\xff\x7f.", ("CK304", "opcode 0x8b is none that an honest checkpoint needs", "at byte 2 of the pickle")),
    ("c010-tuples-in-tuples-as-a-key", pickled(b"}" + BOMB_KEY + b"Ns"), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c010-tuples-in-tuples-as-a-tensors-name", pickled(b"}" + BOMB_KEY + tensor() + b"s"), ("CK306", "a state_dict's keys must be text", "<tuple 0>")),
    ("c011-laughing-lists", pickled(table(x=tensor(), y=LAUGHS)), ("CK304", "the same containers are reached again and again: written out, the file would have no end")),
    ("c012-lists-100000-deep", pickled(DEEP), ("CK304", "the file nests deeper than 64")),
    ("c012-tuples-100000-deep", pickled(b")" + b"\x85" * 100_000), ("CK304", "the file nests deeper than 64")),
    ("c012-marks-in-marks", pickled(b"(" * 1000), ("CK304", "the pickle nests deeper than 256", "at byte 259 of the pickle")),
    ("c012-dicts-70-deep", pickled((b"}" + text("a")) * 70 + b"N" + b"s" * 70), ("CK304", "the file nests deeper than 64")),
    ("c013-a-dict-in-itself", pickled(b"}q\x00" + text("x") + b"h\x00s"), ("CK304", "a container holds itself")),
    ("c013-a-list-in-itself", pickled(table(x=tensor(), y=b"]q\x00h\x00a")), ("CK304", "a container holds itself")),
    ("c013-an-object-in-its-own-state", pickled(table(a=named("argparse.Namespace") + b")\x81q\x00}" + text("me") + b"h\x00sb")), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c014-bytearray-of-64-GB", pickled(call("builtins.bytearray", whole(1 << 36))), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c014-bytes-of-64-GB", pickled(table(x=call("builtins.bytes", whole(1 << 36)))), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c014-tensor-of-a-terabyte", pickled(table(x=call("torch.Tensor", whole(1 << 38)))), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c014-range-of-everything", pickled(table(x=call("builtins.list", call("builtins.range", whole(1 << 60))))), ("CK309", "no state_dict was found in the file", "", "ckptconv inspect in.pth")),
    ("c015-integer-of-255-bytes", pickled(b"\x8a\xff" + b"\x01" * 255), ("CK304", "an integer of 255 bytes", "at byte 3 of the pickle")),
    ("c015-size-of-2-to-the-70", pickled(table(x=tensor(size=[1 << 70]))), ("CK305", "a tensor whose shape is no row of sizes", "(1180591620717411303424,)")),
    ("c015-text-of-4-GB", pickled(b"X\xff\xff\xff\xff"), ("CK304", "a text of 4,294,967,295 bytes; at most 16,777,216 are read", "at byte 7 of the pickle")),
    ("c015-text-of-2-to-the-63", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b".", ("CK304", "a text of 9,223,372,036,854,775,808 bytes; at most 16,777,216 are read", "at byte 11 of the pickle")),
    ("c015-bytes-of-2-to-the-63", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b".", ("CK304", "a text of 9,223,372,036,854,775,808 bytes; at most 16,777,216 are read", "at byte 11 of the pickle")),
    ("c016-protocol-9", b"\x80\x09}.", ("CK304", "pickle protocol 9", "at byte 1 of the pickle")),
    ("c016-nothing-at-all", b"", ("CK304", "the pickle ends early", "at byte 0 of the pickle")),
    ("c016-only-a-header", b"\x80\x02", ("CK304", "the pickle ends early", "at byte 2 of the pickle")),
    ("c016-cut-inside-a-text", b"\x80\x02" + text("abcdef")[:-2], ("CK304", "the pickle ends early", "at byte 7 of the pickle")),
    ("c016-missing-mark", b"\x80\x02t.", ("CK304", "a mark is missing", "at byte 2 of the pickle")),
    ("c016-stop-on-an-empty-stack", b"\x80\x02.", ("CK304", "the pickle ends with something left over", "at byte 2 of the pickle")),
    ("c016-two-objects-left", b"\x80\x02NN.", ("CK304", "the pickle ends with something left over", "at byte 4 of the pickle")),
    ("c016-a-mark-left", b"\x80\x02N(.", ("CK304", "the pickle ends with something left over", "at byte 4 of the pickle")),
    ("c016-nothing-to-pop", b"\x80\x02R.", ("CK304", "the pickle is malformed (IndexError)", "at byte 2 of the pickle")),
    ("c016-memory-of-nothing", b"\x80\x02h\x07.", ("CK304", "the pickle is malformed (KeyError)", "at byte 2 of the pickle")),
    ("c016-setitem-on-nothing", b"\x80\x02NNs.", ("CK304", "the pickle is malformed (IndexError)", "at byte 4 of the pickle")),
    ("c016-append-to-a-dict", b"\x80\x02}Na.", ("CK304", "items are appended to a dict", "at byte 4 of the pickle")),
    ("c016-setitems-on-a-list", b"\x80\x02](NNu.", ("CK304", "entries are set on a list", "at byte 6 of the pickle")),
    ("c016-a-key-without-a-value", b"\x80\x02}(Nu.", ("CK304", "a key without a value", "at byte 5 of the pickle")),
    ("c016-text-that-is-no-utf8", b"\x80\x02X\x02\0\0\0\xff\xfe.", ("CK304", "the pickle is malformed (UnicodeDecodeError)", "at byte 2 of the pickle")),
    ("c016-a-call-of-text", pickled(text("x") + b")R"), ("CK304", "a call of a str", "at byte 9 of the pickle")),
    ("c016-a-call-without-arguments", pickled(named("argparse.Namespace") + b"NR"), ("CK304", "a call without arguments", "at byte 23 of the pickle")),
    ("c016-a-reference-that-is-none", pickled(text("storage") + b"Q"), ("CK304", "a reference that is no storage", "at byte 14 of the pickle")),
    ("c016-global-without-a-line-end", b"\x80\x02c" + b"x" * 5000, ("CK304", "the pickle is malformed (ValueError)", "at byte 2 of the pickle")),
    ("c016-global-without-a-name", b"\x80\x02c\n\n.", ("CK304", "a global without a proper name", "at byte 2 of the pickle")),
]  # fmt: skip


@pytest.mark.parametrize(("pickle", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, pickle, said):
    box.write("in.pth", torch_file(pickle))
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")


def test_c005_no_fallback_whatever_the_environment_says(box):
    box.write("in.pth", torch_file(REDUCE_X))
    box.env = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}
    box.refuses(3, message("in.pth", *REFUSED[0][2]), "run", "pass.yaml", "in.pth", "out.pth")


HONEST = [
    # Hooks are read as what they are, a table nobody looks at: never attached, never called.
    ("c007-backward-hooks", table(x=tensor(hooks=table(hook=named("argparse.Namespace"))))),
    ("c007-parameter-with-hooks", table(x=call("torch._utils._rebuild_parameter", tensor(), b"\x88", pairs((whole(0), named("some.hook")))))),
    ("c009-memo-index-of-2-to-the-31", table(x=tensor() + b"r\x00\x00\x00\x80")),
    ("c009-memo-index-of-2-to-the-32", table(x=tensor() + b"r\xff\xff\xff\xff")),
    ("c016-protocol-5-as-honest-files-have-it", b"\x95" + struct.pack("<Q", 1) + table(x=tensor())),
]  # fmt: skip


@pytest.mark.parametrize("body", [row[1] for row in HONEST], ids=[row[0] for row in HONEST])
def test_read_without_touching_what_is_asked_for(box, body):
    box.write("in.pth", torch_file(pickled(body)))
    outcome = box.converts()
    assert "unchanged  1  x" in outcome.out
    assert outcome.peak_nbytes < 50 << 20
    # What publishing an output does: its staging, its size, the C library's call to exchange two names.
    assert not [event for event in outcome.events if not any(word in event for word in ("partial", "truncate", "ctypes.dlopen None"))]


# ------------------------------------------------------------------------------------------------------- the corpora of the scanners

RUNS, OPENS, BUILT_IN = "runs commands or code", "opens files or connections", "is a built-in function"
#: What published malicious pickles and the tests of pickle scanners use, by technique.
GADGETS = {
    "os.popen": RUNS, "posix.popen": RUNS, "nt.system": RUNS, "subprocess.Popen": RUNS, "subprocess.check_output": RUNS, "commands.getoutput": RUNS,
    "builtins.compile": BUILT_IN, "builtins.open": BUILT_IN, "builtins.breakpoint": BUILT_IN, "builtins.vars": BUILT_IN, "builtins.map": BUILT_IN, "builtins.setattr": BUILT_IN,
    "__builtin__.apply": BUILT_IN, "pip.main": RUNS, "pip._internal.cli.main.main": RUNS, "ensurepip._run_pip": RUNS, "setuptools.sandbox.run_setup": RUNS,
    "runpy._run_code": RUNS, "runpy.run_path": RUNS, "pty.spawn": RUNS, "code.InteractiveInterpreter.runcode": RUNS, "codeop.compile_command": RUNS,
    "cProfile.run": RUNS, "profile.Profile.runctx": RUNS, "timeit.timeit": RUNS, "trace.Trace.run": RUNS, "pdb.run": RUNS, "bdb.Bdb.run": RUNS,
    "doctest.debug_script": RUNS, "ast.literal_eval": RUNS, "importlib.import_module": RUNS, "imp.load_source": RUNS, "pkgutil.resolve_name": RUNS, "zipimport.zipimporter": RUNS,
    "ctypes.CDLL": RUNS, "marshal.loads": RUNS, "types.FunctionType": RUNS, "types.CodeType": RUNS, "operator.methodcaller": RUNS, "_operator.attrgetter": RUNS,
    "functools.reduce": RUNS, "pickle.loads": RUNS, "_pickle.Unpickler": RUNS, "dill._dill._load_type": RUNS, "joblib.load": RUNS, "shelve.open": RUNS,
    "numpy.f2py.crackfortran.getlincoef": RUNS, "numpy.testing._private.utils.runstring": RUNS, "numpy.load": RUNS, "pandas.read_pickle": RUNS,
    "torch.load": RUNS, "torch.hub.load": RUNS, "torch.jit.unsupported_tensor_ops.execWrapper": RUNS, "torch._dynamo.guards.GuardBuilder.get": RUNS,
    "torch.utils.bottleneck.__main__.run_cprofile": RUNS, "torch.utils.collect_env.run": RUNS, "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression": RUNS,
    "torch.serialization.load": RUNS, "idlelib.autocomplete.AutoComplete.get_entity": RUNS, "lib2to3.pgen2.grammar.Grammar.loads": RUNS, "uuid._get_command_stdout": RUNS,
    "logging.FileHandler": RUNS, "logging.config.listen": RUNS, "_aix_support._read_cmd_output": RUNS, "_osx_support._read_output": RUNS, "_pyrepl.pager.pipe_pager": RUNS, "pydoc.pipepager": RUNS,
    "multiprocessing.util.spawnv_passfds": RUNS, "asyncio.unix_events._UnixSubprocessTransport._start": RUNS, "concurrent.futures.process._process_worker": RUNS,
    "urllib.request.urlopen": OPENS, "urllib.request.urlretrieve": OPENS, "http.client.HTTPSConnection": OPENS, "socket.create_connection": OPENS, "requests.get": OPENS, "aiohttp.request": OPENS,
    "ftplib.FTP": OPENS, "smtplib.SMTP": OPENS, "ssl.get_server_certificate": OPENS, "webbrowser.open": RUNS, "shutil.rmtree": OPENS, "io.FileIO": OPENS, "_io.open": OPENS, "tempfile.mkstemp": OPENS,
    "linecache.getlines": OPENS, "sqlite3.connect": OPENS, "tarfile.open": OPENS, "zipfile.ZipFile": OPENS, "fileinput.input": OPENS, "glob.glob": OPENS, "distutils.file_util.write_file": RUNS,
    "sys.modules": RUNS, "site.execsitecustomize": RUNS, "atexit.register": RUNS, "signal.signal": RUNS, "threading.Timer": RUNS, "gc.get_objects": RUNS, "inspect.currentframe": RUNS,
}  # fmt: skip


@pytest.mark.parametrize("name", GADGETS)
def test_c018_gadget(box, name):
    box.write("in.pth", torch_file(pickled(table(x=tensor(), y=call(name, MARK)))))
    found = f"at byte {len(pickled(table(x=tensor(), y=b''))) - 2:,} of the pickle"
    said = (
        "CK303",
        f"the file asks for {name}, which {GADGETS[name]}; nothing of it was run",
        found,
        "do not load this file anywhere; ask its author for safetensors",
    )
    box.refuses(3, message("in.pth", *said), "run", "pass.yaml", "in.pth", "out.pth")


def test_c018_there_are_more_than_sixty():
    assert len(GADGETS) >= 60

"""Names in pickles that no checkpoint has a reason to mention: they run commands or code, or open files or connections.

Nothing is ever imported or called, whatever stands here; the list decides only between "an object of an unknown class, left out" and
"this file was made to attack whoever loads it".
"""

from __future__ import annotations

_RUNS = "runs commands or code"
_OPENS = "opens files or connections"

#: Top-level modules of which nothing is honest in a checkpoint.
_MODULES = {
    **dict.fromkeys(
        ("os", "posix", "nt", "subprocess", "sys", "runpy", "pty", "code", "codeop", "commands", "popen2", "importlib", "imp", "zipimport", "pkgutil", "marshal",
         "types", "ctypes", "_ctypes", "cffi", "_cffi_backend", "multiprocessing", "concurrent", "threading", "_thread", "asyncio", "pip", "setuptools",
         "distutils", "pkg_resources", "ensurepip", "venv", "cProfile", "profile", "timeit", "pdb", "bdb", "trace", "doctest", "unittest", "pydoc", "ast",
         "compileall", "py_compile", "_aix_support", "_osx_support", "_pyrepl", "dis", "inspect", "gc", "atexit", "signal", "sched", "site", "sitecustomize", "usercustomize", "sysconfig",
         "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "operator", "_operator", "idlelib", "lib2to3", "test", "turtle", "tkinter",
         "antigravity", "webbrowser", "platform", "bench", "IPython", "jupyter", "nose", "pexpect", "fabric", "invoke", "sh", "plumbum", "numba", "cython"),
        _RUNS,
    ),
    **dict.fromkeys(
        ("socket", "_socket", "socketserver", "ssl", "_ssl", "select", "selectors", "urllib", "urllib2", "urllib3", "http", "httplib", "requests", "httpx", "aiohttp",
         "ftplib", "smtplib", "poplib", "imaplib", "nntplib", "telnetlib", "xmlrpc", "xmlrpclib", "wsgiref", "paramiko", "shutil", "tempfile", "io", "_io", "_pyio",
         "fileinput", "glob", "linecache", "tarfile", "zipfile", "gzip", "bz2", "lzma", "mmap", "fcntl", "pwd", "grp", "netrc", "sqlite3", "_sqlite3",
         "dbm", "mailbox", "mailcap", "nturl2path", "winreg", "_winreg", "msilib", "boto3", "fsspec", "s3fs", "gcsfs"),
        _OPENS,
    ),
}  # fmt: skip

#: Modules below an honest package.
_SUBMODULES = {
    **dict.fromkeys(
        ("torch.hub", "torch.jit", "torch.serialization", "torch.package", "torch._dynamo", "torch._inductor", "torch.compiler", "torch.ops", "torch._ops",
         "torch.classes", "torch._classes", "torch.utils.cpp_extension", "torch.utils.bottleneck", "torch.utils.collect_env", "torch.utils.model_zoo", "torch.distributed.rpc",
         "torch.distributed.run", "torch.distributed.launcher", "torch.distributed.elastic", "torch.multiprocessing", "torch.testing", "torch.fx.graph", "torch.fx.experimental",
         "numpy.f2py", "numpy.testing", "numpy.distutils", "numpy.lib.npyio", "numpy.ctypeslib", "logging.config", "logging.handlers", "joblib.numpy_pickle",
         "joblib.externals", "pandas.io", "sklearn.externals", "encodings", "xml.sax", "transformers.dynamic_module_utils", "huggingface_hub"),
        _RUNS,
    ),
}  # fmt: skip

#: Single names of modules that are honest otherwise.
_NAMES = {
    **dict.fromkeys(
        ("torch.load", "torch.save", "torch.compile", "torch._utils._import_dotted_name", "torch.storage._load_from_bytes", "torch._C._import_ir_module",
         "torch.nn.modules.module.register_module_forward_hook", "numpy.load", "numpy.save", "numpy.fromfile", "numpy.memmap", "numpy.loadtxt",
         "numpy.genfromtxt", "numpy.core.multiarray.fromfile", "logging.FileHandler", "logging.basicConfig", "codecs.open", "codecs.getreader",
         "uuid._get_command_stdout", "uuid._popen", "functools.reduce", "functools.partialmethod", "pathlib._local", "itertools.starmap",
         "copyreg.add_extension", "copyreg.pickle", "copy_reg.add_extension", "_codecs.lookup", "_codecs.register", "pandas.read_pickle", "joblib.load"),
        _RUNS,
    ),
}  # fmt: skip

#: Modules that honest packages import, and so can be reached through them: `argparse.os`.
_EVERYWHERE = frozenset(
    {"os", "sys", "posix", "nt", "subprocess", "shutil", "builtins", "__builtin__", "ctypes", "importlib", "pickle", "socket"}
)

#: Of refused modules, what torch itself writes for honest tensors, and where Python 3.13 says that paths come from.
_HONEST = frozenset({
    "torch.serialization._get_layout",
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
})  # fmt: skip

#: Of the built-in names, only plain types are honest.
_BUILTIN_TYPES = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "slice", "str", "tuple", "type",
    "long", "unicode", "Ellipsis", "NotImplemented", "NoneType", "Exception", "ValueError", "RuntimeError", "KeyError", "TypeError", "print",
}) - {"print"}  # fmt: skip


def refused_reason(module: str, name: str) -> str:
    """Why ``module.name`` is refused, as the end of a sentence; empty text where it only stays unknown.

    >>> refused_reason("posix", "system"), refused_reason("argparse", "Namespace")
    ('runs commands or code', '')
    """
    if f"{module}.{name}" in _HONEST:
        return ""
    parts = module.split(".")
    qualified = name.split(".")
    if module in ("builtins", "__builtin__", "__builtins__"):
        return "" if name in _BUILTIN_TYPES else "is a built-in function"
    for at in range(len(parts), 0, -1):
        found = _SUBMODULES.get(".".join(parts[:at]))
        if found:
            return found
    if parts[0] in _MODULES:
        return _MODULES[parts[0]]
    if any(part in _EVERYWHERE for part in parts[1:]):
        return _RUNS
    whole = [*parts, *qualified]
    for at in range(len(whole), 1, -1):
        found = _NAMES.get(".".join(whole[:at]))
        if found:
            return found
    # A dotted name may walk from an honest module to anything that it has imported.
    for part in qualified[:-1] if len(qualified) > 1 else []:
        known = _MODULES.get(part) or _MODULES.get(part.lstrip("_"))  # `import os as _os`
        if known or part.startswith("__"):
            return known or _RUNS
    if len(qualified) > 1 and (qualified[-1].startswith("__") or qualified[-1] in ("system", "popen", "eval", "exec")):
        return _RUNS
    return ""

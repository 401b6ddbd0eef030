"""The process in which targets are built: the user's code runs here, and only here.

For every byte that comes through one pipe it reads a request (JSON) from the beginning of a file and writes one line of JSON into another
pipe. A model is built at the first request and kept for the next. What user code prints goes to stdout and stderr, and cannot be taken for
an answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class Unbuildable(Exception):  # noqa: N818  (an answer, not a fault)
    """Why there is no model, and what to try."""

    def __init__(self, what: str, try_: str = "", code: str = "CK406") -> None:
        super().__init__(what)
        self.what, self.try_, self.code = what, try_, code


def main() -> None:
    """Answers requests until nobody can ask any more."""
    request_fd, asked_fd, answer_fd = map(int, sys.argv[1:4])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model's structure needs nothing from the network
    models: list[tuple[nn.Module, list[str]]] = []
    while os.read(asked_fd, 1):
        request = json.loads(os.pread(request_fd, os.fstat(request_fd).st_size, 0))
        if request["kind"] == "py" and request["working_folder"] not in sys.path:
            # The user's own model file lies here. Last on the path: what lies there never shadows an installed library.
            sys.path.append(request["working_folder"])
        try:
            answer = _answer(request, models)
        except Unbuildable as reason:
            answer = {"failed": reason.what, "try": reason.try_, "code": reason.code}
        except BaseException as error:
            what = f"it ended the process (exit code {error.code})" if isinstance(error, SystemExit) else _said(error)
            answer = {"failed": f"building the model failed: {what}", "try": "", "code": "CK406"}
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(answer_fd, data) :]
    os._exit(0)  # threads or exit handlers of user code must not keep us


def _answer(request: Mapping[str, Any], models: list[tuple[nn.Module, list[str]]]) -> dict[str, Any]:
    if not models:
        models.append(_built(request))
    model, notes = models[0]
    if request["what"] == "manifest":
        said = list(notes)
        return {"manifest": _manifest(model, said), "notes": said}  # in this order: the manifest adds notes of its own
    from ckptconv.target.loading import load_into

    models.clear()  # once something is loaded into it, it is no longer the model that was built
    try:
        state = _written(request)
    except Unbuildable:
        raise
    except Exception as error:
        raise Unbuildable(f"the written files cannot be read: {_said(error)}", code="CK408") from None
    result = load_into(model, state, allow_missing=request["allow_missing"], allow_unexpected=request["allow_unexpected"], assign=True)
    return {
        "loaded": result.loaded, "error": result.error, "missing": list(result.missing), "unexpected": list(result.unexpected),
        "notes": [*notes, *result.notes],
    }  # fmt: skip


def _built(request: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    import torch

    from ckptconv.target.loading import tie, to_meta
    from ckptconv.target.torchvision_ops import with_torchvision

    factory = {"py": _py_factory, "timm": _timm_factory, "hf": _hf_factory}[request["kind"]](request)
    notes: list[str] = []
    try:
        with torch.device("meta"):
            model = with_torchvision(factory)
    except Exception:
        # Some constructors compute with their own weights, which meta tensors cannot do: built for real, then moved. Where that fails too,
        # its reason is the true one.
        model = factory()
        notes.append("the model cannot be built on the meta device; it was built on the CPU")
    if not isinstance(model, torch.nn.Module):
        raise Unbuildable(f"the factory gives a {type(model).__name__}, not an nn.Module")
    tie(model)
    if notes:
        to_meta(model)
    return model, notes


def _py_factory(request: Mapping[str, Any]) -> Any:
    import inspect

    from ckptconv.target.torchvision_ops import import_with_torchvision

    module_name, _, attribute = request["name"].partition(":")
    try:
        found: Any = import_with_torchvision(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise Unbuildable(f"there is no module {module_name!r}", "the working folder and PYTHONPATH are searched") from None
        # A name with a dot is a hole in a package that is there: installing will not fill it.
        try_ = f"pip install {error.name}" if error.name and "." not in error.name else ""
        raise Unbuildable(f"importing {module_name} failed: {error}", try_) from None
    except Exception as error:
        raise Unbuildable(f"importing {module_name} failed: {_said(error)}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = ", ".join(name for name in dir(found) if not name.startswith("_"))
            raise Unbuildable(f"{module_name} has no {attribute!r}", f"it has {there[:200]}")
        found = getattr(found, part)
    if not callable(found):
        raise Unbuildable(
            f"{module_name}:{attribute} cannot be called: it is of type {type(found).__name__}",
            "name a function or a class that gives the model",
        )
    arguments = dict(request["arguments"])

    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in callables have none: calling them will tell
        return lambda: found(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise Unbuildable(
            f"{attribute}{signature} cannot be called like this: {error}",
            f"py:{request['name']}?name=value, or a function without arguments",
        ) from None
    return lambda: found(**arguments)


def _timm_factory(request: Mapping[str, Any]) -> Any:
    from ckptconv.target.torchvision_ops import import_with_torchvision

    try:
        timm = import_with_torchvision("timm")
    except ModuleNotFoundError as error:
        raise Unbuildable(f"timm: targets need the package {error.name}", "pip install 'ckptconv[timm]'", "CK505") from None
    name = request["name"]
    if not timm.is_model(name):
        from ckptconv.names import nearest

        close = nearest(name, timm.list_models())
        raise Unbuildable(f"timm has no model {name!r}", f"did you mean {close}?" if close else "")
    return lambda: timm.create_model(name, pretrained=False, **dict(request["arguments"]))


def _hf_factory(request: Mapping[str, Any]) -> Any:
    folder, class_name = request["path"], dict(request["arguments"]).get("class", "")
    if not (Path(folder) / "config.json").is_file():
        raise Unbuildable(f"there is no config.json in {folder}", "hf:FOLDER wants the folder of a model")
    from ckptconv.target.torchvision_ops import import_with_torchvision

    try:
        transformers = import_with_torchvision("transformers")
    except ModuleNotFoundError as error:
        raise Unbuildable(f"hf: targets need the package {error.name}", "pip install 'ckptconv[hf]'", "CK505") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise Unbuildable(f"transformers {transformers.__version__} cannot read this config: {_said(error)}") from None
    wanted = class_name or next(iter(getattr(config, "architectures", None) or []), "")
    if not wanted:
        return lambda: transformers.AutoModel.from_config(config)
    # The name comes from a stranger's file: it may mean a model, and nothing else that transformers holds.
    kind = getattr(transformers, str(wanted), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise Unbuildable(f"transformers {transformers.__version__} has no model class {wanted!r}", "hf:FOLDER#ClassName names another")
    return lambda: kind(config)


def _said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _manifest(model: nn.Module, notes: list[str]) -> dict[str, Any]:
    import torch

    from ckptconv.spec import DType, Manifest, TensorSpec

    tensors: dict[str, TensorSpec] = {}
    names: dict[int, list[str]] = {}
    parameters = {id(parameter) for parameter in model.parameters()}
    buffers = []
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            notes.append(f"{name} is no tensor and is not compared")
            continue
        try:
            tensors[name] = TensorSpec(tuple(value.shape), DType(str(value.dtype).removeprefix("torch.")))
        except ValueError:
            raise Unbuildable(f"{name} is a tensor of {value.dtype}, which ckptconv does not know") from None
        names.setdefault(id(value), []).append(name)
        if id(value) not in parameters:
            buffers.append(name)
    ties = tuple(tuple(group) for group in names.values() if len(group) > 1)
    return Manifest(tensors, ties, frozenset(buffers)).to_json()


def _written(request: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The written files, mapped, by the plain libraries that everyone else reads them with."""
    import torch

    if request["format"] == "dcp":
        from ckptconv.target.distributed import mapped_state

        return mapped_state(Path(request["files"][0]).parent, ".".join(request["container"]) or ".")
    state: OrderedDict[str, Tensor] = OrderedDict()
    versions: dict[str, Any] = {}
    for file in request["files"]:
        if request["format"] == "torch":
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for key in request["container"]:
                loaded = loaded[key]
            state.update(loaded)
            versions.update(getattr(loaded, "_metadata", {}))
            continue
        from ckptconv.formats.safetensors import read

        contents = read(Path(file))
        aliases = contents.containers["."].manifest.aliases
        try:
            from safetensors import safe_open
        except ModuleNotFoundError:
            raise Unbuildable("loading safetensors needs the package safetensors", "pip install safetensors", "CK505") from None
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
        state.update({name: tensors[aliases.get(name, name)] for name in contents.containers["."].tensors})
    if versions:
        state._metadata = versions  # type: ignore[attr-defined]
    return state


if __name__ == "__main__":
    main()

"""The word that names a target, parsed once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from msgspec import Struct

from ckptconv.errors import Problem, UsageError, named, printable
from ckptconv.places.presence import bring
from ckptconv.places.visiting import is_remote, near

_PY = re.compile(r"([A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
_CLASS = re.compile(r"[A-Za-z_]\w*")
_MODELS = ("py", "timm", "hf")
#: Arguments by which timm would read or fetch weights: a target is structure only, and a rule file must not open other files.
_TIMM_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


class Target(Struct, frozen=True):
    """A parsed target. ``text`` is what the user wrote."""

    kind: Literal["py", "timm", "hf", "manifest", "checkpoint"]
    text: str
    name: str  #: module:factory, model name, or a path
    arguments: tuple[tuple[str, Any], ...] = ()  #: of the factory; for ``hf`` the model ``class``, where one is named
    base: Path | None = None  #: where a relative folder starts

    @property
    def is_model(self) -> bool:
        """True when there is a model to load into, and not only names and shapes."""
        return self.kind in _MODELS

    @property
    def path(self) -> Path:
        """The file or folder of an ``hf``, manifest or checkpoint target."""
        path = Path(self.name)
        return self.base / path if self.base is not None and not path.is_absolute() else path


def parse(text: str, *, origin: Literal["command line", "rule file"], base: Path | None = None, allow_code: bool = False) -> Target:
    """The target that ``text`` means. From a rule file it may not leave its folder, and name code only where the user allows it.

    >>> parse("timm:resnet18?num_classes=10", origin="command line").arguments
    (('num_classes', 10),)
    >>> parse("hf:vit#ViTModel", origin="rule file", base=Path("models")).path.as_posix()
    'models/vit'

    Raises :class:`~ckptconv.errors.UsageError`: CK107 for what is no target, CK106 for what only the command line may say.
    """
    if origin == "command line" and is_remote(text):
        return _elsewhere(text)
    kind, colon, rest = text.partition(":")
    if colon and kind in _MODELS:
        name, _, query = (rest, "", "") if kind == "hf" else rest.partition("?")
        arguments = tuple((key, _literal(value)) for key, value in parse_qsl(query, keep_blank_values=True))
        if kind == "py":
            if origin == "rule file" and not allow_code:
                what, try_ = (
                    "a rule file cannot name code as its target",
                    f"--target {printable(text)}, or --allow-code if you trust the file",
                )
                raise UsageError(Problem("CK106", what, where=printable(text), try_=try_))
            if not _PY.fullmatch(name):
                raise UsageError(Problem("CK107", "want py:package.module:factory", where=printable(text)))
            return Target("py", text, name, arguments)
        if not name:
            raise UsageError(Problem("CK107", f"want {kind}:{'NAME' if kind == 'timm' else 'FOLDER'}", where=printable(text)))
        if kind == "timm":
            for key, _ in arguments:
                if key in _TIMM_WEIGHTS:
                    what = f"timm: builds the model without weights, and takes no {key}"
                    raise UsageError(Problem("CK107", what, where=printable(text)))
            return Target("timm", text, name, arguments)
        folder, mark, model_class = name.rpartition("#")
        if mark and folder and _CLASS.fullmatch(model_class):
            name, arguments = folder, (("class", model_class),)
        _confined(name, text, origin)
        return Target("hf", text, name, arguments, base)
    _confined(text, text, origin)
    path = base / text if base is not None else Path(text)
    if not path.exists():
        raise UsageError(
            Problem("CK107", "there is no such target", where=printable(text),
                    try_="py:module:factory, timm:NAME, hf:FOLDER, a checkpoint, or a manifest saved by `ckptconv inspect --save-manifest`")
        )  # fmt: skip
    return Target("manifest" if path.suffix == ".json" and not path.name.endswith(".index.json") else "checkpoint", text, text, (), base)


def _elsewhere(text: str) -> Target:
    """A snapshot of the hub is the model that its config describes; every other URL is a checkpoint, or a saved manifest."""
    path = near(text)
    if text.lower().startswith("hf:") and path.is_dir():
        return Target("hf", named(text), str(path))
    saved = path.suffix == ".json" and not path.name.endswith(".index.json")
    return Target("manifest" if saved else "checkpoint", named(text), str(bring(path) if saved else path))


def _confined(name: str, text: str, origin: str) -> None:
    if origin == "rule file" and (Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~")):
        raise UsageError(
            Problem("CK106", "a rule file's target must not leave its folder", where=printable(text), try_="--target on the command line")
        )


def _literal(value: str) -> Any:
    try:
        found = json.loads(value.lower() if value in ("True", "False", "None") else value)
    except ValueError:
        return value
    return found if isinstance(found, (bool, int, float)) or found is None else value

"""How the words of a command become the things they mean: a source with its state_dict chosen, a config, variables, a manifest."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv import formats, target
from ckptconv.errors import CkptconvError, InputError, Problem, Refusal, UsageError, printable
from ckptconv.formats.base import INDEX_SUFFIX, Composite, Container, Contents, Placed
from ckptconv.formats.strict import cannot_open, identities_below
from ckptconv.names import nearest
from ckptconv.places.presence import bring
from ckptconv.places.visiting import is_remote, look_beside, near
from ckptconv.spec import Manifest

if TYPE_CHECKING:
    from ckptconv.ruleset.model import RuleFile

#: bytes (docs/limits.md)
MAX_CONFIG, MAX_PLAN = 16 << 20, 64 << 20
MAX_LOOK_ALIKES = 5
_CONFIGS = ("config.json", "adapter_config.json", "params.json")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


class Source(Struct, frozen=True):
    """An opened checkpoint and the state_dict in it that is meant; with it others, whose names start with ``NAME::``."""

    path: Path
    contents: Contents
    container: Container
    manifest: Manifest  #: of everything that has bytes: what a plan reads
    placed: Mapping[str, Placed]
    also: Mapping[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> Sequence[Path]:
        return self.contents.files

    @property
    def composites(self) -> Mapping[str, Composite]:
        """What is stored in parts (sparse, quantised, chunks): the plan puts it together."""
        return self.container.composites


def rule_file(rules: str | Path | RuleFile) -> RuleFile:
    """A rule file from its path, its built-in name, or itself."""
    if not isinstance(rules, (str, Path)):
        return rules
    from ckptconv.ruleset.builtin import find

    return find(str(rules))


def contents_of(path: Path, format: str | None = None) -> Contents:  # noqa: A002
    """What the checkpoint at ``path`` holds. Raises :class:`~ckptconv.errors.InputError` with the file in front of the reason."""
    before = identities_below(path)
    try:
        found = formats.read(path, format)
        return replace(found, identities={file: before[file] for file in found.files if file in before})
    except Refusal as refusal:
        raise InputError(refusal.at(printable(path))) from None
    except CkptconvError:
        raise
    except OSError as error:
        raise InputError(cannot_open(error).at(printable(path))) from None


def open_source(
    path: Path,
    select: Sequence[str] = (),
    format: str | None = None,  # noqa: A002  (the field's own word)
    also: Mapping[str, Path] | None = None,
) -> Source:
    """The checkpoint at ``path`` with one state_dict chosen: the first of ``select`` that it has, or the only one.

    ``also`` are further checkpoints by name; their tensors are called ``NAME::tensor``.
    """
    contents = contents_of(path, format)
    container = _supported(choose(contents, select, path), path)
    for name, other in (also or {}).items():
        from ckptconv.formats.joining import shifted, together

        more = contents_of(other)
        chosen = _supported(choose(more, [each for each in select if each in more.containers], other), other)
        container = together(container.path, [container, shifted(chosen, len(contents.files), f"{name}::")])
        contents = replace(
            contents, files=(*contents.files, *more.files), identities={**contents.identities, **more.identities},
            warnings=(*contents.warnings, *more.warnings),
        )  # fmt: skip
    contents = replace(contents, warnings=(*contents.warnings, *_look_alikes(container)))
    return Source(path, contents, container, container.stored_manifest, container.stored, also or {})


def _look_alikes(container: Container) -> list[str]:
    """Names that are written with other characters and read the same (an é of one character, and of two): they stay two names."""
    seen: dict[str, str] = {}
    found: list[str] = []
    for name in (*container.tensors, *container.composites):
        if not name.isascii():
            other = seen.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name and len(found) < MAX_LOOK_ALIKES:
                found.append(f"'{printable(other)}' and '{printable(name)}' look alike and are two names")
    return found


def _supported(container: Container, path: Path) -> Container:
    from ckptconv.formats import fsdp

    try:
        fsdp.refuse_flat(container)
    except Refusal as refusal:
        raise InputError(refusal.at(printable(path))) from None
    if container.unsupported:
        shown = ", ".join(f"{printable(name)} ({kind})" for name, kind in list(container.unsupported.items())[:5])
        what = f"{len(container.unsupported)} tensors are of a kind that cannot be converted"
        raise InputError(Problem("CK305", what, where=printable(path), found=shown, try_=fsdp.way_out(container)))
    return container


def named_paths(items: Iterable[str] | Mapping[str, Any]) -> dict[str, Path]:
    """``--also adapter=PATH``: names to paths."""
    pairs = items.items() if isinstance(items, Mapping) else [item.partition("=")[::2] for item in items]
    found: dict[str, Path] = {}
    for name, path in pairs:
        if not _VARIABLE.fullmatch(name) or not str(path) or name in found or name == "config":
            raise UsageError(
                Problem("CK107", f"--also {printable(name)}={printable(path)}: want NAME=PATH, each name once", try_="--also adapter=lora/")
            )
        found[name] = near(path)
    return found


def choose(contents: Contents, select: Sequence[str], path: Path) -> Container:
    """The state_dict that is meant. Several and none selected is an error that lists them: `model` and `ema` are not the same weights."""
    found = contents.containers
    if not found:
        raise InputError(
            Problem("CK309", "no state_dict was found in the file", where=printable(path), try_=f"ckptconv inspect {printable(path)}")
        )
    for wanted in select:
        if wanted in found:
            return found[wanted]
    listed = ", ".join(f"{printable(name)} ({len(container.tensors):,} tensors)" for name, container in list(found.items())[:8])
    if select:
        close = nearest(select[0], found)
        raise InputError(
            Problem("CK309", f"the file has no {printable(' or '.join(select))}", where=printable(path), found=listed,
                    try_=f"--select {close or next(iter(found))}")
        )  # fmt: skip
    if "." in found:
        return found["."]
    if len(found) > 1:
        raise InputError(
            Problem("CK309", "the file holds several state_dicts, and none was selected", where=printable(path), found=listed,
                    try_=f"--select {next(iter(found))}, or `select:` in the rule file")
        )  # fmt: skip
    return next(iter(found.values()))


def read_json(path: Path, what: str, limit: int) -> Any:
    """Plain JSON from a file of at most ``limit`` bytes; :class:`~ckptconv.errors.UsageError` for anything else."""
    try:
        with bring(path).open("rb") as stream:
            raw = stream.read(limit + 1)
        if len(raw) > limit:
            raise ValueError(f"the file is over {limit >> 20} MiB")
        return json.loads(raw)
    except OSError as error:
        raise UsageError(
            Problem("CK107", f"{what} cannot be read: {error.strerror}", where=printable(path), try_=cannot_open(error).try_)
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else printable(error)
        raise UsageError(Problem("CK107", f"{what} is not JSON: {reason}", where=printable(path))) from None


def config_beside(path: Path) -> Path | None:
    """The config that lies in a checkpoint's folder, or beside its file: ``config.json``, PEFT's ``adapter_config.json``, Meta's ``params.json``."""
    folder = path if path.is_dir() else path.parent
    look_beside(path, _CONFIGS)
    return next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)


def config_for(path: Path, given: Path | None) -> Mapping[str, Any] | None:
    """``--config FILE``, else the config beside the source."""
    found = given or config_beside(path)
    if found is None:
        return None
    config = read_json(found, "the config", MAX_CONFIG)
    if not isinstance(config, dict):
        raise UsageError(Problem("CK107", "the config must be a JSON object", where=printable(found)))
    return config


def variables(items: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """``--set H=32``: integers, numbers, true/false and JSON lists or tables are read as such, the rest is text."""
    if isinstance(items, Mapping):
        return dict(items)
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise UsageError(Problem("CK107", f"--set {printable(item)}: want NAME=VALUE", try_="--set H=32"))
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def parse_target(text: str, rules: RuleFile | None, source: Path | None, *, allow_code: bool = False) -> target.Target:
    """The target named on the command line, or by the rule file (relative to the source's folder; code only where it is allowed)."""
    if rules is None:
        return target.parse(text, origin="command line", base=None)
    base = None if source is None else source if source.is_dir() else source.parent
    if base is not None and not text.endswith(".json"):
        bring(base / "config.json")  # another process builds the model from it
    if text.endswith(".json"):
        base = rules.folder
    return target.parse(text, origin="rule file", base=base, allow_code=allow_code)


def manifest_of_word(word: str, select: Sequence[str] = (), timeout: float = 300.0) -> Manifest:
    """The manifest that a word of ``diff`` means: a checkpoint, a saved manifest, or a target."""
    path = near(word)
    if path.exists() and (path.suffix != ".json" or (is_remote(word) and path.name.endswith(INDEX_SUFFIX))):
        return open_source(path, select).container.manifest
    return target.manifest_of(target.parse(word, origin="command line", base=None), timeout=timeout)

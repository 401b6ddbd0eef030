"""The rule files that come with ckptconv, and how a word on the command line becomes a rule file."""

from __future__ import annotations

from pathlib import Path

from ckptconv.errors import Problem, UsageError, printable
from ckptconv.names import nearest
from ckptconv.ruleset.model import RuleFile, load


def folder() -> Path:
    """Where the built-in rules are: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "rules"
    return installed if installed.is_dir() else package.parent / "rules"


def is_installed(path: Path) -> bool:
    """Whether a file is one of an installed package, rather than of somebody's folder or a checkout."""
    return path.resolve().is_relative_to((Path(__file__).parent.parent / "rules").resolve())


def names() -> list[str]:
    """The names of all built-in rules, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml") if not path.name.endswith(".test.yaml"))


def find(word: str) -> RuleFile:
    """The rule file that ``word`` means: a path, or the name of a built-in rule, or ``NAME@REVISION``.

    Raises :class:`~ckptconv.errors.UsageError` CK105 with the nearest name where there is none, or what is wrong with the file.
    """
    path = Path(word)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.exists():
            close = nearest(path.stem, names())
            hint = f"the built-in rule {close!r}" if close else "ckptconv rules list"
            raise UsageError(Problem("CK105", "there is no such rule file", where=printable(word), try_=hint))
        return load(path, shown=word)
    return named(word)


def named(word: str) -> RuleFile:
    """The built-in rule ``NAME`` or ``NAME@REVISION``, whatever files there are. Raises CK105 where there is none."""
    found = path_of(word)
    return load(found, shown=f"rules/{found.relative_to(folder())}", builtin=True)


def path_of(word: str) -> Path:
    """The file of the built-in rule ``NAME`` or ``NAME@REVISION``. Raises CK105 with the nearest name where there is none."""
    name, at, revision = word.partition("@")
    found = next((path for path in sorted(folder().glob("*.yaml")) if path.stem == name), None)
    if found is None:
        close = nearest(name, names())
        hint = f"did you mean {close!r}?" if close else "ckptconv rules list, or the path of a rule file"
        raise UsageError(Problem("CK105", f"there is no built-in rule {printable(name)!r}", try_=hint))
    if at:
        have = load(found, builtin=True).header.revision
        if revision != str(have):
            raise UsageError(Problem("CK105", f"the built-in rule {name!r} has revision {have}, not {printable(revision)}"))
    return found

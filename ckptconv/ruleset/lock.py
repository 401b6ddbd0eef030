"""The lock of a folder of rules: what every revision of every rule meant, so that NAME@REVISION never comes to mean something else.

Outputs record NAME@REVISION. The lock, which is committed beside the rules, holds the digest of each; a rule that changed its meaning
and kept its revision is found by comparing the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ckptconv.errors import Problem, UsageError, printable
from ckptconv.ruleset.model import RuleFile, load
from ckptconv.ruleset.testfile import is_test_file

NAME = "LOCK.json"
_MAX_BYTES = 16 << 20
_RUN = "run ckptconv rules lock"


class Locked(BaseModel):
    """A rule as it is locked. ``history``: the digest of every revision, this one's too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    revision: int = Field(ge=1)
    digest: str = Field(pattern="^sha256:[0-9a-f]{64}$")
    history: dict[str, str]


Lock = Mapping[str, Locked]


def read(folder: Path) -> Lock:
    """The lock of a folder; an empty one where there is none yet."""
    path = folder / NAME
    try:
        with path.open("rb") as stream:
            data = json.loads(stream.read(_MAX_BYTES))
        return {str(name): Locked.model_validate(entry) for name, entry in data.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(Problem("CK105", f"the lock cannot be read: {error.strerror}", where=printable(path))) from None
    except (ValueError, AttributeError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UsageError(
            Problem(
                "CK109", f"this is no lock of rules: {printable(reason)}", where=printable(path), try_="restore it from version control"
            )
        ) from None


def rules_in(folder: Path) -> dict[str, RuleFile]:
    """Every rule of a folder by its name. Raises what is wrong with any of them."""
    files = sorted(path for path in folder.glob("*.yaml") if not is_test_file(path))
    if not files:
        raise UsageError(Problem("CK105", "there are no rule files in this folder", where=printable(folder)))
    return {path.stem: load(path) for path in files}


def reused(lock: Lock, rules: Mapping[str, RuleFile]) -> list[Problem]:
    """Rules whose meaning changed under a revision that had one already: what no lock may be written over."""
    found = []
    for name, rule in rules.items():
        locked, revision, digest = lock.get(name), rule.header.revision, _digest(rule)
        if locked is None:
            continue
        old = locked.history.get(str(revision), locked.digest if revision == locked.revision else digest)
        if old != digest:
            what = f"the meaning of rule {name!r} changed, but its revision is still {revision}: {_short(old)} became {_short(digest)}"
            if revision < locked.revision:
                what = f"rule {name!r} went back to revision {revision}, which meant {_short(old)}, and now means {_short(digest)}"
            found.append(Problem("CK109", what, where=printable(rule.file), try_=f"raise revision to {locked.revision + 1}, then {_RUN}"))
        elif revision < locked.revision:
            what = f"rule {name!r} went back from revision {locked.revision} ({_short(locked.digest)}) to {revision} ({_short(digest)})"
            found.append(Problem("CK109", what, where=printable(rule.file), try_=f"revision {locked.revision + 1}, then {_RUN}"))
    return found


def stale(lock: Lock, rules: Mapping[str, RuleFile]) -> list[Problem]:
    """Rules that are right, but newer than the lock."""
    found = []
    for name, rule in rules.items():
        locked, revision, digest = lock.get(name), rule.header.revision, _digest(rule)
        if locked is None:
            found.append(Problem("CK109", f"rule {name!r} is not in the lock", where=printable(rule.file), try_=_RUN))
        elif revision > locked.revision:
            what = f"rule {name!r} has revision {revision} ({_short(digest)}), the lock {locked.revision} ({_short(locked.digest)})"
            found.append(Problem("CK109", what, where=printable(rule.file), try_=_RUN))
    return found


def renewed(lock: Lock, rules: Mapping[str, RuleFile]) -> str:
    """The lock's new text. What it knows stays, also of rules that are gone: their names are taken."""
    entries: dict[str, Any] = {name: locked.model_dump() for name, locked in lock.items()}
    for name, rule in rules.items():
        history = {**(lock[name].history if name in lock else {}), str(rule.header.revision): _digest(rule)}
        ordered = dict(sorted(history.items(), key=lambda item: int(item[0])))
        entries[name] = {"revision": rule.header.revision, "digest": _digest(rule), "history": ordered}
    return json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False) + "\n"


def _digest(rule: RuleFile) -> str:
    return f"sha256:{rule.digest}"


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12] + "…"

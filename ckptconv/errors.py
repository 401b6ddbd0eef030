"""Errors that a person can act on.

Crafts (transforms, formats) raise a short :class:`Refusal`; the floor that knows the place turns it into a :class:`Problem` once.
Checks return lists of problems, and only the stage raises them, all at once, as one of the :class:`CkptconvError` kinds, each with
the exit code that the command line gives back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from msgspec import Struct
from msgspec.structs import replace

DONE, FINDINGS, USAGE, INPUT, FIT, OUTPUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
MAX_QUOTE = 200
_MAX_SHOWN_DEPTH = 8


def printable(text: object, limit: int = MAX_QUOTE) -> str:
    """``text`` with control, bidirectional and other invisible characters escaped, cut to ``limit`` characters.

    Names come from strangers' files; nothing of theirs may steer a terminal or a log.

    >>> printable("layer\\x1b[31m")
    'layer\\\\x1b[31m'
    """
    shown = named(_written(text, limit) if isinstance(text, (list, tuple, dict)) else str(text))
    cut = len(shown) > limit
    shown = shown[:limit]
    if not shown.isprintable():
        shown = "".join(ch if ch.isprintable() else ch.encode("unicode_escape", "surrogatepass").decode("ascii") for ch in shown)
    return shown + "…" if cut else shown


#: Paths of ours that stand for another place (the mirror of a remote checkpoint) -> the place. What people read names the place.
PLACES: dict[str, str] = {}
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?<!hf://)[^/\s@'\"]*@")
_VALUE = re.compile(r"(?<=[?&])([^=&\s'\"]*=)[^&\s'\"#]+")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*")


def named(path: object) -> str:
    """A path or URL as text for people and reports: the place that it stands for, and nothing by which somebody could log in.

    >>> named("s3://key:secret@bucket/in.pth"), named("https://host/in.pth?X-Amz-Signature=0123&part=1")
    ('s3://***@bucket/in.pth', 'https://host/in.pth?X-Amz-Signature=***&part=***')
    """
    text = str(path)
    for ours, place in PLACES.items():
        if ours in text:
            text = text.replace(ours, place)
    if "://" not in text:
        return text
    return _IN_TEXT.sub(lambda match: _VALUE.sub(r"\1***", _USER.sub(r"\1***@", match[0])), text)


def _written(value: object, limit: int) -> str:
    """The start of ``repr(value)``, and no more work than that: lists of lists of the same list have no end when they are written out."""
    shown = ""
    for piece in _pieces(value, limit):
        shown += piece
        if len(shown) > limit:
            break
    return shown


def _pieces(value: object, limit: int, depth: int = 0) -> Iterator[str]:
    if not isinstance(value, (list, tuple, dict)):
        yield repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    elif depth == _MAX_SHOWN_DEPTH:
        yield "…"
    else:
        opening, closing = "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
        yield opening
        for at, item in enumerate(value):
            yield ", " if at else ""
            if isinstance(value, dict):
                yield from _pieces(item, limit, depth + 1)
                yield ": "
                item = value[item]  # noqa: PLW2901
            yield from _pieces(item, limit, depth + 1)
        yield ",)" if closing == ")" and len(value) == 1 else closing


class Refusal(ValueError):  # noqa: N818  (a reason on its way up, not yet an error)
    """A craft's short reason: what rule was broken, what was found, what to try. It knows no file and no line."""

    def __init__(self, what: str, *, code: str, found: str = "", try_: str = "") -> None:
        super().__init__(what)
        self.what, self.code, self.found, self.try_ = what, code, found, try_

    def at(self, where: str) -> Problem:
        return Problem(self.code, self.what, where=where, found=self.found, try_=self.try_)


class Problem(Struct, frozen=True):
    """One thing that is wrong: where, what, found, try.

    >>> print(Problem("CK201", "step matched nothing", where="r.yaml:3:5  drop (step 1)", found="12 names", try_="ckptconv inspect x"))
    r.yaml:3:5  drop (step 1)  [CK201]
      step matched nothing
      found: 12 names
      try: ckptconv inspect x
    """

    code: str
    what: str
    where: str = ""
    found: str = ""
    try_: str = ""

    def __str__(self) -> str:
        head = f"{self.where}  [{self.code}]" if self.where else f"[{self.code}]"
        lines = [head, f"  {self.what}"]
        if self.found:
            lines.append(f"  found: {self.found}")
        if self.try_:
            lines.append(f"  try: {self.try_}")
        return "\n".join(lines)

    def at(self, where: str) -> Problem:
        """The same problem with the place that a floor above knows."""
        return replace(self, where=where)

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "what": self.what, "where": self.where, "found": self.found, "try": self.try_}


class CkptconvError(Exception):
    """Base of everything that ckptconv raises on purpose; holds every problem that was found, not only the first.

    ``verification`` is what the ladder found, as JSON, where a rung of it failed: a program wants more than the sentences. ``about`` is
    what was known by then, for views that show it: whatever the floor that raises has, a report where it reaches the command line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problems: Problem | Iterable[Problem], verification: Mapping[str, Any] | None = None, about: object = None) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.verification, self.about = verification, about
        super().__init__("\n".join(map(str, self.problems)))


class UsageError(CkptconvError):
    """The command's words or the rule file are wrong (exit 2)."""

    exit_code = USAGE


class InputError(CkptconvError):
    """A source cannot be read, or is refused (exit 3)."""

    exit_code = INPUT


class FitError(CkptconvError):
    """The result does not fit the target, or a verification failed (exit 4)."""

    exit_code = FIT


class OutputError(CkptconvError):
    """The result cannot be written, or resources ran out (exit 5)."""

    exit_code = OUTPUT


#: Every code, with one sentence that explains it. Codes are stable: they are never given a second meaning.
CODES: Mapping[str, str] = {
    # 1xx: rule files and command words
    "CK101": "The rule file is not the YAML that ckptconv reads: strict core YAML, no anchors, no duplicate keys, at most 1 MiB.",
    "CK102": "A field of the rule file is unknown, missing or has the wrong type.",
    "CK103": "A name pattern or template is malformed.",
    "CK104": "An expression is malformed, uses something that is not allowed, or a variable has no value.",
    "CK105": "No rule file or built-in rule has this name.",
    "CK106": "The rule file asks for something that only the command line may give (a py: target, a path outside its folder).",
    "CK107": "The command's words do not fit together.",
    "CK108": "A rule file's own test failed, or it has none.",
    "CK109": "A rule and the lock of its folder do not agree: its meaning changed under the same revision, or the lock is old.",
    "CK110": "A mapping of another library cannot be said as rules.",
    "CK111": "The lock of a batch is not one that a batch wrote.",
    # 2xx: planning
    "CK201": "A step matched nothing and is not optional.",
    "CK202": "Two results would have one name.",
    "CK203": "Two entries of one step claim the same name.",
    "CK204": "Not all names carry the prefix that a step strips.",
    "CK205": "A fan-in has a gap, or its groups have different members.",
    "CK206": "A transform does not fit the shapes or dtypes that it meets.",
    "CK207": "A check step found something else than it asks for.",
    "CK208": "The rule file's `when` says that it is not for this checkpoint.",
    "CK209": "A name cannot be written: empty, over 1,024 characters, with control characters, or reserved by the format.",
    "CK210": "A name was touched by no step, and the rule file says expect_all.",
    "CK211": "The work that a step asks for passes a stated limit.",
    "CK212": "The rules cannot be undone: something of the source is not in the output any more.",
    # 3xx: sources
    "CK301": "The file is not a checkpoint.",
    "CK302": "The file is damaged or cut off.",
    "CK303": "The pickle asks for code to run; nothing of it was run.",
    "CK304": "The pickle is malformed or passes a limit.",
    "CK305": "A tensor reaches outside its storage, or is of a kind that is not supported.",
    "CK306": "The container's records contradict each other.",
    "CK307": "The safetensors header breaks a rule of the format.",
    "CK308": "The shard index and the shards do not agree, or point outside the folder.",
    "CK309": "No state_dict was found in the file, or more than one and none was selected.",
    "CK310": "The source cannot be opened.",
    "CK311": "The source changed while it was read, or is not the one that the plan was made for.",
    "CK312": "A checksum of the source does not match its bytes.",
    "CK313": "A remote store did not answer, or not as it should.",
    "CK314": "An optimizer's state cannot be read, or it is open which parameter each part of it belongs to.",
    # 4xx: targets and verification
    "CK401": "Keys that the target needs are missing.",
    "CK402": "Keys that the target does not know are there.",
    "CK403": "A tensor has another shape than the target's.",
    "CK404": "A tensor's dtype cannot go into the target's without loss, and no step casts it.",
    "CK405": "A tie of the target is broken.",
    "CK406": "The target cannot be built.",
    "CK407": "The written output differs from the plan.",
    "CK408": "Strict loading failed.",
    "CK409": "Values were lost or doubled.",
    "CK410": "A cast overflowed.",
    "CK411": "The models could not be run and compared.",
    "CK412": "The models give different outputs.",
    "CK413": "Quantised numbers cannot be decoded: a scale is missing, zero or not finite.",
    "CK414": "The output holds values that are not finite, and --forbid-nonfinite was given.",
    "CK415": "A suggested rule leaves open which tensor is which, and nothing settled it.",
    "CK416": "A task of the work is not done, or its receipt or its bytes are damaged or another's.",
    "CK417": "An optimizer's state cannot follow the weights.",
    # 5xx: output
    "CK501": "The output exists, and --force was not given.",
    "CK502": "The output is, or lies inside, the source.",
    "CK503": "The output cannot be written.",
    "CK504": "A format cannot hold what the plan gives it.",
    "CK505": "A needed package is not installed.",
    "CK506": "Another run is writing the same output.",
    "CK507": "The work that is under way was begun with another plan, source, options or version.",
    "CK510": "The process that did the work ended before it was done.",
    "CK511": "The cluster cannot be reached, or none of its machines is large enough.",
}

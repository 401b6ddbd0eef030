"""A page as one self-contained file: no network, no framework; names are text everywhere, and a strict policy holds the browser to that."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ckptconv._version import __version__
from ckptconv.errors import CODES, Problem, printable
from ckptconv.plan import Origin
from ckptconv.report.groups import Line, Section, sections
from ckptconv.report.links import KINDS, Lineage
from ckptconv.report.page import Page
from ckptconv.report.text import nbytes_text
from ckptconv.spec import TensorSpec

if TYPE_CHECKING:
    from jinja2 import Environment

_ASSETS = Path(__file__).parent / "assets"
_STATIC_ROWS = 1500  #: of the table that is printed, and read where no script runs
_LONG = 100_000  #: characters of one text; names of a checkpoint have at most 1,024
_EXCERPT_LINES = 40
_T = TypeVar("_T", bound=Hashable)


def render(page: Page) -> str:
    """The page as HTML.

    >>> from ckptconv.report.page import Verdict
    >>> "&lt;script&gt;" in render(Page("run", Verdict("good", "<script>")))
    True
    """
    style, script = _asset("page.css"), _asset("lineage.js") + _asset("page.js")
    folded = sections(page.lineage) if page.lineage is not None else []
    return _environment().get_template("page.html.jinja").render(
        page=page, problems=_by_code(page.problems), codes=CODES, kinds=KINDS, version=__version__, style=style, script=script, policy=_policy(style, script),
        data=script_json(_data(page, page.lineage, folded)) if page.lineage is not None else "",
        groups=[(section, group) for section in folded for group in section.groups][:_STATIC_ROWS],
        more=sum(len(section.groups) for section in folded) - _STATIC_ROWS,
    )  # fmt: skip


def script_json(data: Any) -> str:
    """JSON that can stand inside a script element, whatever is in it.

    >>> print(script_json("</script><!-- \\u2028 &"))
    "\\u003c/script\\u003e\\u003c!-- \\u2028 \\u0026"
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def excerpt(text: str, line: int) -> str:
    """The lines of the step that begins at ``line``, as they stand in the rule file.

    >>> excerpt("steps:\\n  - drop:\\n      - a\\n  - keep: b\\n", 2)
    '  - drop:\\n      - a'
    """
    lines = text.splitlines()
    if not 1 <= line <= len(lines):
        return ""
    first, *rest = lines[line - 1 : line - 1 + _EXCERPT_LINES]
    depth = len(first) - len(first.lstrip())
    shown = [first]
    for each in rest:
        if each.strip() and len(each) - len(each.lstrip()) <= depth:
            break
        shown.append(each)
    while not shown[-1].strip() or shown[-1].lstrip().startswith("#"):
        shown.pop()
        if not shown:
            return ""
    return "\n".join(shown)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may be fetched, and only the style and the script that stand in the page may run."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ).format(*hashes)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = lambda text, limit=2000: printable(text, limit)
    return environment


def _by_code(problems: Iterable[Problem]) -> list[tuple[str, str, list[Problem]]]:
    """Problems of one code at one place together, in the order in which they were found."""
    found: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        found.setdefault((problem.code, problem.where), []).append(problem)
    return [(*key, members) for key, members in found.items()]


class _Numbers(Generic[_T]):
    """Things by number, each kept once."""

    def __init__(self) -> None:
        self.at: dict[_T, int] = {}

    def __call__(self, thing: _T) -> int:
        return self.at.setdefault(thing, len(self.at))


def _data(page: Page, lineage: Lineage, folded: Iterable[Section]) -> dict[str, Any]:
    """What lineage.js reads. Columns and numbers, so that 50,000 tensors stay a few megabytes."""
    specs, texts, origins = _Numbers[TensorSpec](), _Numbers[str](), _Numbers[Origin]()
    kinds = {kind: at for at, kind in enumerate(KINDS)}
    left, right = ({name: at for at, name in enumerate(side)} for side in (lineage.left, lineage.right))
    texts("")
    links = lineage.links
    return {
        "kinds": [{"word": kind.word, "glyph": kind.glyph, "tone": kind.tone, "sentence": kind.sentence} for kind in KINDS.values()],
        "left": _side(lineage.left, specs),
        "right": _side(lineage.right, specs),
        "links": {
            "kind": [kinds[link.kind] for link in links],
            "sources": [[left[name] for name in link.sources] for link in links],
            "output": [right[link.output] if link.output else -1 for link in links],
            "verb": [kinds[link.verb] if link.verb else -1 for link in links],
            "how": [texts(printable(link.how, _LONG)) for link in links],
            "note": [texts(printable(link.note, _LONG)) for link in links],
            "origin": [origins(link.origin) for link in links],
        },
        "sections": [
            [
                printable(section.left, _LONG), printable(section.right, _LONG),
                [[_lines(group.left, kinds), _lines(group.right, kinds), kinds[group.kind], group.figures] for group in section.groups],
            ]
            for section in folded
        ],
        "specs": [[str(spec), nbytes_text(spec.nbytes)] for spec in specs.at],
        "texts": list(texts.at),
        "origins": [_origin(origin, page.rule_texts) for origin in origins.at],
    }  # fmt: skip


def _side(side: Mapping[str, TensorSpec], specs: _Numbers[TensorSpec]) -> dict[str, Any]:
    """Each name as what it has in common with the one before it, and the rest: a third of the size."""
    names = [printable(name, _LONG) for name in side]
    shared = [_shared(before, name) for before, name in zip(["", *names], names, strict=False)]
    return {
        "shared": [len(name[:at].encode("utf-16-le")) // 2 for name, at in zip(names, shared, strict=True)],  # as JavaScript counts
        "rests": [name[at:] for name, at in zip(names, shared, strict=True)],
        "specs": [specs(spec) for spec in side.values()],
    }


def _shared(before: str, name: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(before, name, strict=False)) if a != b), min(len(before), len(name)))


def _lines(lines: Iterable[Line], kinds: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {"text": printable(line.text, _LONG), "count": line.count, "spec": line.spec, "kind": kinds.get(line.kind, -1)} for line in lines
    ]


def _origin(origin: Origin, texts: Mapping[str, str]) -> list[Any]:
    if not origin.step:
        return ["", 0, ""]
    lines = [printable(line, _LONG) for line in excerpt(texts.get(origin.file, ""), origin.line).split("\n")]
    return [printable(origin), origin.line, "\n".join(lines)]

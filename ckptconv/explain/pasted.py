"""A pasted error message: read back into the two sides, as far as it tells them; and sentences for messages that name no keys.

Formats: `Module.load_state_dict` of torch (2.x: `torch/nn/modules/module.py`), the tables of transformers 5, the sentences of transformers 4,
each also cut off, wrapped by a terminal, or with a log's prefix before every line.
"""

from __future__ import annotations

import re

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.explain.sides import Part, Shape, only_names
from ckptconv.explain.trying import Question
from ckptconv.spec import Manifest, TensorSpec

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: A log's prefix: `rank0: `, `[rank0]: `, `2026-01-01 12:00:00 ERROR `, `E   ` of pytest.
_LOG = re.compile(r"^(?:\[?rank\s?\d+\]?:\s?|\d{4}-\d\d-\d\d[ T][\d:.,]+\s+\S+\s+|E {3}|\| ?|> ?)", re.MULTILINE)
_HEAD = re.compile(r"Error\(s\)\s+in\s+loading\s+state_dict\s+for\s+([\w.]+)\s*:")
#: No space before a comma: with two ways to match one space, a long row of them would be tried in every way.
_NAMES = r"((?:\s*[\"'][^\"']*[\"'],?)*\s*(?:\.\.\.|…)?)"
_MISSING = re.compile(rf"[Mm]issing\s+key(?:\(s\)|s)?\s+in\s+(?:the\s+)?(?:source\s+)?state_dict\s*:\s*[\[{{]?{_NAMES}")
_UNEXPECTED = re.compile(rf"[Uu]nexpected\s+key(?:\(s\)|s)?\s+in\s+(?:the\s+)?(?:source\s+)?state_dict\s*:\s*[\[{{]?{_NAMES}")
_INCOMPATIBLE = re.compile(rf"missing_keys\s*=\s*\[{_NAMES}\]\s*,\s*unexpected_keys\s*=\s*\[{_NAMES}\]")
_SIZE = re.compile(
    r"size\s+mismatch\s+for\s+(\S+?)\s*:\s*copying\s+a\s+param\s+with\s+shape\s+(?:torch\s*\.\s*Size\s*\()?\s*\[?([\d,\s]*)\]?\)?\s+from\s+"
    r"checkpoint\s*,\s*the\s+shape\s+in\s+current\s+model\s+is\s+(?:torch\s*\.\s*Size\s*\()?\s*\[?([\d,\s]*)\]?"
)
_WHILE = re.compile(
    r"While\s+(?:copying|swapping)\s+the\s+parameter\s+named\s+[\"']([^\"']+)[\"'],\s+whose\s+dimensions\s+in\s+the\s+model\s+are\s+torch\.Size\(\[([\d,\s]*)\]\)\s+"
    r"and\s+whose\s+dimensions\s+in\s+the\s+checkpoint\s+are\s+torch\.Size\(\[([\d,\s]*)\]\)"
)
_NOT_TENSOR = re.compile(
    r"While copying the parameter named [\"']([^\"']+)[\"'],\s+expected torch\.Tensor.*?received (<class [^>]+>)", re.DOTALL
)
_HF_NEW = re.compile(
    r"weights of (\w+) were not initialized from the model checkpoint[^:\[]*(?:and are newly initialized)?[^\[]*\[([^\]]*)\]?", re.DOTALL
)
_HF_UNUSED = re.compile(r"were not used when initializing (\w+)\s*:\s*[\[{]([^\]}]*)[\]}]?", re.DOTALL)
_HF_SHAPES = re.compile(
    r"^\s*-\s*(\S+): found shape torch\.Size\(\[([\d, ]*)\]\) in the checkpoint and torch\.Size\(\[([\d, ]*)\]\) in the model", re.MULTILINE
)
_HF_ROW = re.compile(r"([\w.{}, \-]+)\|\s*(MISSING|UNEXPECTED|MISMATCH)\b(.*)")
_HF_SIZES = re.compile(r"ckpt:\s*(?:torch\.Size\(\[?|\(?\[?)([\d, ]*)\]?\)?\s*vs\s*model:\s*(?:torch\.Size\(\[?|\(?\[?)([\d, ]*)")
_BRACES = re.compile(r"\{([^{}]*)\}")


class Pasted(Struct, frozen=True):
    """What a message says."""

    model: str = ""  #: class of the model
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    sizes: tuple[tuple[str, Shape, Shape], ...] = ()  #: name, in the checkpoint, in the model
    cut: bool = False  #: the message was shortened: there are more
    known: tuple[Known, ...] = ()  #: messages that name no keys

    @property
    def empty(self) -> bool:
        return not (self.missing or self.unexpected or self.sizes or self.known)


class Known(Struct, frozen=True):
    """A message that people meet, and what is behind it."""

    kind: str
    sentence: str
    try_: str = ""


#: Message -> (kind, what it means, what to do). The first group of the pattern may stand in the sentence as {0}.
_KNOWN: tuple[tuple[str, str, str, str], ...] = (
    (r"Unsupported (?:global|operand)[: ]+(?:GLOBAL )?(\S+)", "weights-only",
     "torch.load(weights_only=True) met an object that it may not build{0}; the tensors beside it are fine",
     "ckptconv reads the tensors without running anything, and lists what it skipped; do not set weights_only=False for a file of a stranger"),
    (r"Weights only load failed", "weights-only", "torch.load(weights_only=True) refused the file; the tensors in it may be fine",
     "ckptconv inspect FILE reads the tensors without running anything, and says what else is in it"),
    (r"No module named '?([\w.]+)'?|Can't get attribute '?(\w+)'?", "module",
     "the whole model was pickled, and unpickling wants the author's code{0}", "ckptconv recovers the tensors without that code: ckptconv inspect FILE"),
    (r"failed finding central directory|PytorchStreamReader failed", "truncated",
     "the file is cut off, or no torch file: the zip archive's end is missing", "ckptconv inspect FILE says which; fetch it again, and compare its size"),
    (r"invalid load key, '?([^'.]+)'?", "not-a-checkpoint",
     "the file is no pickle: its first byte is {0!r}; a 'v' is a git-lfs pointer, a '<' a web page", "ckptconv inspect FILE says what it is; git lfs pull"),
    (r"(?:HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer|Error while deserializing header)", "truncated",
     "the safetensors file is cut off, or none", "ckptconv inspect FILE says which; fetch it again"),
    (r"Some tensors share memory|tensors that share memory", "tied",
     "tied weights: safetensors wants each tensor once", "ckptconv keeps one and records the alias (--untie writes both)"),
    (r"parameter group that doesn't match the size of optimizer's group", "optimizer",
     "the optimizer's state was saved for another set of parameters: layers were added, frozen or dropped since",
     "load the weights alone and start the optimizer anew; ckptconv run … --optimizer follow converts the state with the weights"),
    (r"metadata\.get\(.?format.?\)|'NoneType' object has no attribute 'get'.*format|does not contain the valid metadata", "metadata",
     "the safetensors file does not say {{\"format\": \"pt\"}}, which transformers asks for", "ckptconv run plain-tensors in.safetensors out.safetensors"),
    (r"CUDA out of memory|DefaultCPUAllocator: can't allocate memory|Unable to allocate|MemoryError|Killed", "memory",
     "loading or converting the whole checkpoint at once needs more memory than there is",
     "ckptconv streams: it reads headers, then a tensor at a time. `ckptconv plan` says the peak beforehand, --max-memory holds it"),
    (r"Cannot copy out of meta tensor|is on the meta device", "meta",
     "the model was made on the meta device and not all of it was filled", "load with assign=True, and look for missing keys"),
    (r"Expected state_dict to be dict-like, got <class '([^']+)'>|'(\w+)' object has no attribute 'keys'", "module",
     "not a state_dict was given, but {0}: the file holds a whole model", "ckptconv run plain-tensors FILE DST takes the weights out of it"),
)  # fmt: skip


def parse(text: str) -> Pasted:
    """What a pasted message says; :attr:`Pasted.empty` where nothing in it is known.

    >>> parse('RuntimeError: Error(s) in loading state_dict for Net:\\n\\tMissing key(s) in state_dict: "a.weight". ').missing
    ('a.weight',)
    """
    text = _LOG.sub("", _ANSI.sub("", text.replace("\r", "")))
    head = _HEAD.search(text)
    model = head[1] if head else ""
    missing: list[str] = []
    unexpected: list[str] = []
    cut = False
    for pattern, into in ((_MISSING, missing), (_UNEXPECTED, unexpected)):
        for match in pattern.finditer(text):
            names, short = _listed(match[1])
            into.extend(names)
            cut |= short or re.match(r"\s*[\"'][^\"']*$", text[match.end() :]) is not None
    for match in _INCOMPATIBLE.finditer(text):
        missing += _listed(match[1])[0]
        unexpected += _listed(match[2])[0]
    for pattern, into in ((_HF_NEW, missing), (_HF_UNUSED, unexpected)):
        for match in pattern.finditer(text):
            model = model or match[1]
            names, short = _listed(match[2])
            into.extend(names)
            cut |= short
    sizes = [(_joined(match[1]), _shape(match[2]), _shape(match[3])) for match in _SIZE.finditer(text)]
    sizes += [(match[1], _shape(match[3]), _shape(match[2])) for match in _WHILE.finditer(text)]
    sizes += [(match[1], _shape(match[2]), _shape(match[3])) for match in _HF_SHAPES.finditer(text)]
    for match in filter(None, map(_HF_ROW.match, text.split("\n"))):
        for name in _expanded(match[1].strip()):
            if match[2] == "MISMATCH":
                both = _HF_SIZES.search(match[3])
                if both is not None:
                    sizes.append((name, _shape(both[1]), _shape(both[2])))
            else:
                (missing if match[2] == "MISSING" else unexpected).append(name)
    known = [] if missing or unexpected or sizes else _known(text)
    known += [
        Known("not-a-tensor", f"{match[1]} is {match[2]} in the file, not a tensor: another part of the file is the state_dict", "ckptconv inspect FILE")
        for match in _NOT_TENSOR.finditer(text)
    ]  # fmt: skip
    once = {name: (found, wanted) for name, found, wanted in sizes}
    return Pasted(
        model,
        tuple(dict.fromkeys(missing)),
        tuple(dict.fromkeys(unexpected)),
        tuple((name, *both) for name, both in once.items()),
        cut,
        tuple(known),
    )


def told(pasted: Pasted, question: Question) -> Question:
    """The question with what a message tells: the target's side where none was named, and the checkpoint's where there is no file.

    Of keys that a message calls missing or unexpected only the names are known.
    """
    missing, unexpected = only_names(pasted.missing), only_names(pasted.unexpected)
    here = {name: _spec(found) for name, found, _ in pasted.sizes}
    there = {name: _spec(wanted) for name, _, wanted in pasted.sizes}
    if question.parts and question.wanted is not None:
        return question  # both sides are known in full
    if question.parts:
        part = max(question.parts, key=lambda each: sum(name in each.manifest for name in (*unexpected, *there)))
        kept = {name: spec for name, spec in part.manifest.tensors.items() if name not in unexpected}
        changed = {name: replace(kept.get(name, spec), shape=spec.shape) for name, spec in there.items()}
        return replace(question, parts=(part,), wanted=Manifest({**kept, **changed, **missing}), unknown=frozenset(missing))
    if question.wanted is not None:
        kept = {name: spec for name, spec in question.wanted.tensors.items() if name not in missing}
        changed = {name: replace(kept.get(name, spec), shape=spec.shape) for name, spec in here.items()}
        return replace(question, parts=(Part(".", Manifest({**kept, **changed, **unexpected})),), unknown=frozenset(unexpected))
    found, wanted = Manifest({**unexpected, **here}), Manifest({**missing, **there})
    parts = (Part(".", found),) if found.tensors or wanted.tensors else ()
    return replace(question, parts=parts, wanted=wanted, unknown=frozenset(missing) | frozenset(unexpected))


def _spec(shape: tuple[int, ...]) -> TensorSpec:
    return replace(next(iter(only_names([""]).values())), shape=shape)


def _listed(text: str) -> tuple[list[str], bool]:
    """Names in quotes, a name that a terminal broke in two made whole again; whether dots stand for more of them."""
    names = [_joined(name) for name in re.findall(r"[\"']([^\"']*)[\"']", text)]
    return [name for name in names if name and name != "..."], bool(re.search(r"\.\.\.|…", re.sub(r"[\"'][^\"']*[\"']", "", text)))


def _joined(name: str) -> str:
    return re.sub(r"\s+", "", name)


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _expanded(name: str) -> list[str]:
    """Names that transformers writes as one: ``layers.{0, 1, 2}.weight``, ``layers.{0...11}.weight``."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    span = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\.|…|-)\s*(\d+)\s*", match[1])
    words = (
        [str(at) for at in range(int(span[1]), min(int(span[2]), int(span[1]) + 10_000) + 1)]
        if span
        else re.split(r"\s*,\s*", match[1].strip())
    )
    return [each for word in words for each in _expanded(name[: match.start()] + word + name[match.end() :])]


def _known(text: str) -> list[Known]:
    for pattern, kind, sentence, try_ in _KNOWN:
        match = re.search(pattern, text, re.DOTALL)
        if match is not None:
            group = next((each for each in match.groups() if each), "")
            shown = (
                sentence.format(group)
                if "{0!r}" in sentence
                else sentence.format(f" ({group.strip('.,')})" if group and "but {0}" not in sentence else group)
            )
            return [Known(kind, shown, try_)]
    return []

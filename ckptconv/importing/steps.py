"""One transform of transformers' mapping as steps of a rule file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from ckptconv.errors import Refusal, printable
from ckptconv.importing.regexes import other_part, whole_of

Step = dict[str, Any]
_AXES = "abcdefgh"


class Scope(Struct, frozen=True):
    """The names that a sub-model's transform is for: those under its place, with or without the base model's prefix."""

    literal: str = ""  #: the place that the model's own names have
    base: str = ""  #: what may be left out before it
    rest: str = ""
    heads: bool = False  #: whether the model has names beside the base model's

    @staticmethod
    def of(transform: Any, names: Sequence[str]) -> Scope:
        if transform.scope_prefix is None:
            return Scope()
        scope = f"{transform.scope_prefix}." if transform.scope_prefix else ""
        base = f"{transform.base_model_prefix}." if transform.base_model_prefix else ""
        literal = base + scope if any(name.startswith(base + scope) for name in names) else scope
        return Scope(literal, base, scope, any(not name.startswith(base) for name in names))

    def regex(self, source: str) -> str:
        """For the head of a regular expression; ``source`` is what comes after it.

        transformers takes the base model's prefix off whenever it is there, so a pattern that starts with it can only match what
        follows it once more.
        """
        if not self.base or self.rest:
            return (f"(?:{_escape(self.base)})?" if self.base else "") + _escape(self.rest)
        if not source.startswith("^"):
            return f"(?:{_escape(self.base)}|{other_part(self.base.rstrip('.'))}\\.)" if self.heads else _escape(self.base)
        must = source.replace("\\.", ".").startswith(f"^{self.base}")
        return _escape(self.base) if must else f"(?:{_escape(self.base)})?"


def renaming(transform: Any, names: Sequence[str]) -> Step:
    """A ``WeightRenaming`` of any kind as one ``rename``."""
    scope = Scope.of(transform, names)
    kind = type(transform).__name__
    sources, targets = transform.source_patterns, transform.target_patterns
    if kind == "GroupWeightRename":
        table = _table(whole_of([source], target, scope.regex(source)) for source, target in zip(sources, targets, strict=True))
        return {"rename": table, "optional": True, "when": {"any": [next(iter(table))]}}
    if kind == "Inkling2IndexOffsetWeightRename":
        return _with_offset(transform, scope)
    if kind == "PrefixChange":
        return _prefix(transform, scope)
    if kind != "WeightRenaming":
        raise Refusal(f"a {kind} does more than this importer knows", code="CK110")
    found = whole_of(sources, targets[0], scope.regex(sources[0]))
    return {"rename": _table([found]), "optional": True}


def _table(found: Any) -> dict[str, str]:
    return {f"regex:{each.pattern}": each.to for each in found}


def _prefix(transform: Any, scope: Scope) -> Step:
    inside = f"{transform.model_prefix}." if transform.model_prefix else ""
    if transform.prefix_to_remove is not None:
        head = scope.regex(f"^{inside}") + _escape(inside)
        pattern = f"regex:(?P<a>{head}){_escape(transform.prefix_to_remove)}\\.(?P<z>.+)"
        return {"rename": {pattern: r"\g<a>\g<z>"}, "optional": True}
    found = whole_of(
        [f"^{_escape(inside)}(?!{_escape(transform.prefix_to_add)}\\.)"], f"{inside}{transform.prefix_to_add}.", scope.regex(f"^{inside}")
    )
    return {"rename": _table([found]), "optional": True}


def _escape(text: str) -> str:
    return text.replace(".", r"\.")


def _with_offset(transform: Any, scope: Scope) -> Step:
    """A number that moves is arithmetic, which a pattern with ``{i:int}`` has and a regular expression has not."""
    source, target = (text.replace(r"\.", ".") for text in (transform.source_patterns[0], transform.target_patterns[0]))
    if source.count(r"(\d+)") != 1 or r"\1" not in target:
        raise Refusal(f"{printable(source)} is no name with one number in it", code="CK110")
    old, new = source.replace(r"(\d+)", "{i:int}"), target.replace(r"\1", f"{{i + {transform.offset}}}")
    return {"rename": {f"{scope.literal}{{m:**}}.{old}": f"{scope.literal}{{m}}.{new}"}, "optional": True}


class Facts(Struct):
    """What the model says and its mapping does not: sizes that a config gives, and shapes that a transform compares with."""

    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    names: Sequence[str] = field(default_factory=tuple)

    def heads(self, subconfig_key: str | None) -> str:
        """``num_attention_heads`` as an expression; the class' default stands in where config.json leaves it out."""
        config, path = self.model.config, "config"
        if subconfig_key is not None and hasattr(config, subconfig_key):
            config, path = getattr(config, subconfig_key), f"config.{subconfig_key}"
        if not hasattr(config, "num_attention_heads"):
            return "1"
        return expression(config, path, "num_attention_heads")


def expression(config: Any, path: str, name: str) -> str:
    """A field of a config as an expression, under the name that config.json has for it, with the class' default."""
    stored = getattr(config, "attribute_map", {}).get(name, name)
    default = getattr(type(config)(), name)
    return f"first({path}.{stored}, {default})" if isinstance(default, int) else f"{path}.{stored}"


def converting(transform: Any, facts: Facts) -> list[Step]:
    """A ``WeightConverter`` as steps, one or two for each of its operations."""
    steps: list[Step] = []
    for head in _heads_of_parts(transform, facts.names):
        chain = _Chain(transform, facts, head)
        for at, operation in enumerate(transform.operations):
            handler = _OPERATIONS.get(type(operation).__name__)
            if handler is None:
                raise Refusal(f"the operation {type(operation).__name__} does more than this importer knows", code="CK110")
            handler(chain, operation, at == len(transform.operations) - 1)
        steps += chain.steps
    return steps


def _heads_of_parts(transform: Any, names: Sequence[str]) -> list[str]:
    """What stands before a converter's pattern in the same part of the model's names: ``self_`` before ``attn.q_proj``, say."""
    target = transform.target_patterns[0].removeprefix("^").replace(r"\.", ".")
    if target.startswith("."):
        return [""]
    prefix = Scope.of(transform, names).literal
    before = {name[: name.index(target)].rpartition(".")[2] for name in names if target in name and name.startswith(prefix)}
    return sorted(before) or [""]


def _plain(pattern: str) -> str:
    """A converter's pattern as literal text with ``*``; raises for any other regular expression."""
    text = pattern.removeprefix("^").replace(r"\.", "\0")
    if re.search(r"[\\()\[\]+?|$^{}]", text):
        raise Refusal(f"{printable(pattern)}: a converter's pattern that is more than a name", code="CK110")
    return text.replace("\0", ".").removeprefix(".")


class _Chain:
    """The tensors of one converter on their way: which names hold them now, and the steps so far."""

    def __init__(self, transform: Any, facts: Facts, head: str) -> None:
        self.facts = facts
        self.scope = Scope.of(transform, facts.names)
        sources, targets = [_plain(text) for text in transform.source_patterns], [_plain(text) for text in transform.target_patterns]
        self.trailing = not re.search(r"(weight|bias)$", sources[0].rstrip("."))
        self.now = [head + text.rstrip(".") for text in sources]
        self.targets = [head + text.rstrip(".") for text in targets]
        self.steps: list[Step] = []

    def pattern(self, body: str) -> str:
        """A pattern for ``body`` wherever it stands; ``*`` counts the members of a module list."""
        return f"{self.scope.literal}{{m:**}}.{body.replace('*', '{e:int}')}" + (".{s:**}" if self.trailing else "")

    def name(self, body: str) -> str:
        """The name that ``body`` stands for."""
        return f"{self.scope.literal}{{m}}.{body}" + (".{s}" if self.trailing else "")

    def add(self, word: str, fields: Mapping[str, Any], **more: Any) -> None:
        self.steps.append({word: dict(fields), "optional": True, **more})

    def between(self, at: int) -> str:
        """A name for an intermediate tensor: of the first target, so that it cannot meet another converter's."""
        return f"{self.targets[0]}__{at}"


def _merge(chain: _Chain, operation: Any, last: bool) -> None:
    after = chain.targets[:1] if len(chain.now) == 1 and last else [chain.between(at) for at in range(len(chain.now))]
    for body, new in zip(chain.now, after, strict=True):
        chain.add("stack", {"from": chain.pattern(body), "over": "e", "to": chain.name(new)} | _dim(operation.dim))
    chain.now = after


def _dim(dim: int) -> Step:
    return {"dim": dim} if dim else {}


def _concatenate(chain: _Chain, operation: Any, last: bool) -> None:
    if not last or len(chain.targets) != 1:
        raise Refusal("Concatenate in the midst of a chain", code="CK110")
    sources = [chain.pattern(body) for body in chain.now]
    chain.add("concat", {"from": sources if len(sources) > 1 else sources[0], "to": chain.name(chain.targets[0])} | _dim(operation.dim))
    chain.now = chain.targets


def _chunk(chain: _Chain, operation: Any, last: bool) -> None:
    if operation.num_shards_attribute is not None:
        raise Refusal("a number of chunks that only the config knows", code="CK110")
    _cut(chain, _dim(operation.dim), last)


def _cut(chain: _Chain, fields: Mapping[str, Any], last: bool) -> None:
    after = chain.targets if last else [f"{body}__" for body in chain.targets]
    chain.add("split", {"from": chain.pattern(chain.now[0]), "to": [chain.name(body) for body in after], **fields})
    chain.now = after


def _split(chain: _Chain, operation: Any, last: bool) -> None:
    """Pieces as large as the model's own parameters: queries, keys and values of grouped heads, from the config."""
    config = chain.facts.model.config
    inner = getattr(config, "text_config", None)
    path = "config" if inner is None else "config.text_config"
    config = inner or config
    sizes = [f"{_heads(config, path, body)} * {expression(config, path, 'head_dim')}" for body in chain.targets]
    _cut(chain, {"sizes": sizes} | _dim(operation.dim), last)


def _heads(config: Any, path: str, body: str) -> str:
    kind = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}.get(body.rpartition(".")[2][:1])
    if kind is None or not body.endswith("_proj") or not hasattr(config, "head_dim"):
        raise Refusal(f"nothing says how many rows {printable(body)} has", code="CK110")
    return expression(config, path, kind)


def _each(chain: _Chain, fields: Mapping[str, Any], last: bool, which: Sequence[int] | None = None, when: str = "") -> None:
    """``rearrange`` of every tensor, or of those in ``which``; a chain's last operation gives them their final names."""
    after = chain.targets if last and len(chain.now) == len(chain.targets) else chain.now
    moved: dict[str, str] = {}
    more = {"when": when} if when else {}
    for at, (old, new) in enumerate(zip(chain.now, after, strict=True)):
        if which is not None and at not in which:
            moved |= {} if old == new else {chain.pattern(old): chain.name(new)}
        elif old == new:
            chain.add("rearrange", {"keys": chain.pattern(old), **fields}, **more)
        else:
            chain.add("rearrange", {"from": chain.pattern(old), "to": chain.name(new), **fields}, **more)
    if moved:
        chain.add("rename", moved)
    chain.now = after


def _transpose(chain: _Chain, operation: Any, last: bool) -> None:
    first, second = sorted((operation.dim0, operation.dim1))
    axes = list(_AXES[: second + 1])
    swapped = [*axes]
    swapped[first], swapped[second] = axes[second], axes[first]
    when = _other_way_round(chain, first, second) if operation.check_dims else ""
    _each(chain, {"pattern": f"{' '.join(axes)} ... -> {' '.join(swapped)} ..."}, last, when=when)


def _other_way_round(chain: _Chain, first: int, second: int) -> str:
    """When a tensor is not yet as the model has it. The rule sees no model, so the config's hidden size has to tell."""
    shapes = {name: shape for name, shape in chain.facts.shapes.items() if name.endswith(chain.targets[0])}
    if not shapes:
        raise Refusal(f"the model has no {printable(chain.targets[0])} whose shape could say whether to transpose", code="CK110")
    name, shape = next(iter(shapes.items()))
    config = chain.facts.model.config
    inner = config.get_text_config()
    path = next((f"config.{key}" for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is inner), "config")
    hidden = inner.hidden_size
    if shape[first] == shape[second] or hidden not in (shape[first], shape[second]):
        raise Refusal(f"{printable(name)} has shape {list(shape)}: nothing says which way round it is", code="CK110")
    where = second if shape[first] == hidden else first  # where the hidden size stands in a tensor the other way round
    return f"has({name!r}) and shape({name!r})[{where}] == {expression(inner, path, 'hidden_size')}"


def _interleave(chain: _Chain, operation: Any, last: bool) -> None:
    before = " ".join([*_AXES[: operation.dim], ""])
    two = ("(two n)", "(n two)") if operation.inverse else ("(n two)", "(two n)")
    _each(chain, {"pattern": f"{before}{two[0]} ... -> {before}{two[1]} ...", "two": 2}, last)


def _rope(chain: _Chain, operation: Any, last: bool) -> None:
    """Rotary pairs side by side become rotary halves."""
    old, new = ("(h two d)", "(h d two)") if operation.inverse else ("(h d two)", "(h two d)")
    wanted = operation.permute_layer_names
    which = None if wanted is None else [at for at, body in enumerate(chain.now) if any(name in body for name in wanted)]
    heads = chain.facts.heads(operation.subconfig_key)
    _each(chain, {"pattern": f"{old} ... -> {new} ...", "h": heads, "two": 2}, last, which)


def _ernie(chain: _Chain, operation: Any, last: bool) -> None:  # noqa: ARG001  (the same signature for all)
    """One list holds the experts of text, then those of vision, of other sizes: each half is stacked, then gate and up joined."""
    config = chain.facts.model.config
    if not hasattr(config, "text_config") or not hasattr(config.text_config, "moe_num_experts"):
        raise Refusal("nothing says where the experts of text end", code="CK110")
    count = expression(config.text_config, "config.text_config", "moe_num_experts")
    single = len(chain.now) == 1
    parts: list[list[str]] = [[] for _ in chain.targets]
    for at, body in enumerate(chain.now):
        halves = body.replace("*", "{}__{}")
        chain.add("rename", {chain.pattern(body): chain.name(halves.format(f"{{e // {count}}}", f"{{e % {count}}}"))})
        for half, target in enumerate(chain.targets):
            stacked = target if single else f"{target}__{at}"
            source = chain.pattern(body.replace("*", f"{half}__*"))
            chain.add("stack", {"from": source, "over": "e", "to": chain.name(stacked)} | _dim(operation.stack_dim))
            parts[half].append(stacked)
    if not single:
        for target, pieces in zip(chain.targets, parts, strict=True):
            fields = {"from": [chain.pattern(piece) for piece in pieces], "to": chain.name(target)}
            chain.add("concat", fields | _dim(operation.concat_dim))


_OPERATIONS: Mapping[str, Callable[[_Chain, Any, bool], None]] = {
    "MergeModulelist": _merge, "Concatenate": _concatenate, "Chunk": _chunk, "Split": _split, "Transpose": _transpose,
    "Interleave": _interleave, "PermuteForRope": _rope, "ErnieFuseAndSplitTextVisionExperts": _ernie,
}  # fmt: skip


def legacy(transforms: Sequence[Any], names: Sequence[str]) -> Iterator[Step]:
    """transformers' renames for very old checkpoints, where the model has a name that they lead to."""
    for transform in transforms:
        target = transform.target_patterns[0]
        if any(target in name for name in names) and len(transform.source_patterns) == 1:
            yield renaming(transform, names)


def without_prefix(names: Sequence[str], prefix: str) -> list[Step]:
    """The base model's prefix off these names again, where a mapping put it before heads that stand beside the base model."""
    table = {f"{prefix}.{each}": re.sub(r":int\}", "}", each) for each in dict.fromkeys(map(_numbered, names))}
    return [{"rename": table, "optional": True}] if table else []


def shielded(steps: list[Step], names: Sequence[str], spared: Sequence[str]) -> list[Step]:
    """The steps with names that must not meet them out of the way, under names that no pattern matches, and back at the end."""
    if not spared:
        return steps
    of_template: dict[str, set[str]] = {}
    for name in names:
        of_template.setdefault(_numbered(name), set()).add(name)
    chosen = set(spared)
    templates = dict.fromkeys(_numbered(name) for name in spared)
    if any(not of_template[each] <= chosen for each in templates) or len(templates) > _MAX_SHIELDED:
        raise Refusal(f"transformers spares {len(spared)} names of the model by looking at the model", code="CK110", found=spared[0])
    there = {each: f"={at}" + "".join(f"={{{i}}}" for i in _placeholders(each)) for at, each in enumerate(templates)}
    plain = {each: re.sub(r":int\}", "}", each) for each in templates}
    back = {re.sub(r"\{(\w+)\}", r"{\1:int}", each): plain[template] for template, each in there.items()}
    return [{"rename": there, "optional": True}, *steps, {"rename": back, "optional": True}]


_MAX_SHIELDED = 100


def _numbered(name: str) -> str:
    parts = name.split(".")
    return ".".join(f"{{i{at}:int}}" if part.isdigit() else part for at, part in enumerate(parts))


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w+):int\}", template)

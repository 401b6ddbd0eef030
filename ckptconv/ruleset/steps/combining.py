"""Steps from several named tensors to one: a formula, and the formulas that the field has names for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union

from msgspec import Meta, field

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Parsed
from ckptconv.plan import Dropped, Expr, apply, reads
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Absent, Lookup
from ckptconv.ruleset.patterns import Capture, Pattern, Template
from ckptconv.ruleset.steps.base import (
    Context,
    DTypeField,
    Entry,
    Number,
    PatternField,
    Step,
    Table,
    TemplateField,
    rendered,
    replaced,
    with_captures,
)  # fmt: skip
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import Combine, Decode
from ckptconv.transforms.formula import parse as parse_formula


def _formula(value: Any) -> str:
    if not isinstance(value, str):
        raise Refusal("a formula is text", code="CK104", found=printable(value))
    parse_formula(value)
    return value


Formula = Annotated[str, Parsed(_formula, {"type": "string", "minLength": 1})]
Members = Mapping[str, str]  #: what the rule calls a tensor -> its name in the table


class NamedStep(Step, frozen=True):
    """A step whose sources have names of their own: for every set of captures one group, each of its tensors called by its name."""

    def sources(self) -> Mapping[str, Pattern]:
        """Name -> pattern."""
        raise NotImplementedError

    def loner(self) -> str | None:
        """The source that may stand without the others; then it passes as it is."""
        return None

    def lost_alone(self, spec: TensorSpec) -> str:  # noqa: ARG002  (most sources mean the same without the others)
        """Why a tensor that stands without its partners means nothing; empty where it does."""
        return ""

    def may_lack(self) -> frozenset[str]:
        """Sources that a group may lack."""
        return frozenset()

    def matched(self) -> Sequence[Pattern]:
        return tuple(self.sources().values())

    @abstractmethod
    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        """What becomes of one group. Raises :class:`~ckptconv.errors.Refusal` where it does not fit."""

    def lower(self, table: Table, context: Context) -> Table:
        names = tuple(self.sources())
        groups: dict[tuple[tuple[str, Capture], ...], dict[str, str]] = {}
        for name, at, captures in self.claims(table, context):
            group = groups.setdefault(tuple(sorted(captures.items())), {})
            if names[at] in group:
                context.problem("CK205", f"{printable(name)} and {printable(group[names[at]])} are both {names[at]!r} of one group")
            group[names[at]] = name
        results: dict[str, list[tuple[str, Entry]]] = {}
        for key, members in groups.items():
            if set(members) == {self.loner()}:
                (alone,) = members.values()
                reason = self.lost_alone(table[alone].expr.spec)
                if reason:
                    context.problem("CK413", f"{printable(alone)} {reason}", found=str(table[alone].expr.spec))
                continue
            missing = [name for name in names if name not in members and name not in self.may_lack()]
            if missing:
                have = next(iter(members.values()))
                context.problem("CK205", f"{printable(have)} has no partner {self.sources()[missing[0]].text!r}",
                                found=printable(", ".join(f"{k}={v}" for k, v in key)))  # fmt: skip
                continue
            lookup = _with_members(context.scope.lookup(dict(key), table), members, table)
            try:
                made = self.results(members, table, lookup, context)
            except Refusal as refusal:
                context.refused(refusal, next(iter(members.values())))
                continue
            results.update({name: [] for name in members.values()})
            results[next(iter(members.values()))] = made
        return replaced(table, results, context)


def _with_members(lookup: Lookup, members: Members, table: Table) -> Lookup:
    """``a.shape[0]`` and ``a.dtype`` of the group's own tensors, before everything else that the names may mean."""
    specs = {name: table[tensor].expr.spec for name, tensor in members.items()}
    return with_captures(lookup, {name: {"shape": list(spec.shape), "dtype": spec.dtype.value} for name, spec in specs.items()})


def _number(name: str, lookup: Lookup) -> float:
    try:
        value = lookup(name)
    except (Absent, KeyError) as absent:
        what = absent.what if isinstance(absent, Absent) else f"variable {printable(name)!r} has no value"
        raise Refusal(what, code="CK104", try_=f"--set {printable(name)}=VALUE, or name a tensor so in `from`") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refusal(f"{printable(name)!r} must be a number in a formula", code="CK104", found=printable(value))
    return float(value)


def combined(formula: str, members: Members, table: Table, lookup: Lookup, dtype: DType | None = None) -> Expr:
    """The expression of ``formula`` over the group's tensors; other names in it are variables, which must be numbers.

    The result's dtype is that of the first tensor, where nothing is said.
    """
    used = parse_formula(formula).names()
    tensors = tuple(name for name in members if name in used)
    if not tensors:
        raise Refusal("the formula uses none of the tensors", code="CK104", found=printable(formula))
    constants = tuple((name, _number(name, lookup)) for name in used if name not in members)
    first = table[next(iter(members.values()))].expr.spec.dtype
    wanted = dtype or (first if table[members[tensors[0]]].expr.spec.dtype != first else None)
    return apply(
        Combine(names=tensors, formula=formula, constants=constants, dtype=wanted), *(table[members[name]].expr for name in tensors)
    )


class CombineStep(NamedStep, frozen=True):
    """A formula over named tensors, `w + s * (b @ a)`: + - * / @, sqrt, norm, sum, mean over axes, transpose, rows, columns."""

    op: ClassVar[str] = "combine"
    source: Annotated[dict[str, PatternField], Meta(min_length=1, description="name in the formula: pattern")] = field(name="from")
    to: TemplateField
    formula: Formula
    dtype: Annotated[DTypeField | None, Meta(description="of the result; that of the first tensor, where nothing is said")] = None
    alone: Annotated[str | None, Meta(description="the tensor that may lack its partners; then it passes as it is")] = None

    def __post_init__(self) -> None:
        first = next(iter(self.source.values()))
        for pattern in self.source.values():
            if sorted(pattern.names) != sorted(first.names):
                raise Refusal(f"{first.text!r} and {pattern.text!r} must have the same placeholders", code="CK102")
        if self.alone is not None and self.alone not in self.source:
            raise Refusal(f"`alone: {self.alone}` is no name in `from`", code="CK102", try_=", ".join(self.source))
        unused = [name for name in self.source if name not in parse_formula(self.formula).names()]
        if unused:
            raise Refusal(f"the formula does not use {printable(unused[0])!r}", code="CK102", found=printable(self.formula))

    def sources(self) -> Mapping[str, Pattern]:
        return self.source

    def loner(self) -> str | None:
        return self.alone

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        ordered = {name: members[name] for name in self.source}
        new = rendered(self.to, lookup, context, next(iter(members.values())))
        if new is None:
            return []
        return [(new, Entry(combined(self.formula, ordered, table, lookup, self.dtype), context.origin, f"combine {new}"))]


class MergeLora(NamedStep, frozen=True, kw_only=True):
    """LoRA merged into its base: `w + alpha / r * (b @ a)`. Base weights without an adapter pass as they are."""

    op: ClassVar[str] = "merge_lora"
    base: PatternField = Pattern.parse("{m:**}.weight")
    a: PatternField = Pattern.parse("adapter::base_model.model.{m:**}.lora_A.weight")
    b: PatternField = Pattern.parse("adapter::base_model.model.{m:**}.lora_B.weight")
    to: Annotated[TemplateField | None, Meta(description="the base's own name, where nothing is said")] = None
    alpha: Number
    rank: Annotated[Number, Meta(description="a's first size, where nothing is said")] = field(
        default_factory=lambda: expressions.parse("a.shape[0]")
    )
    transposed: Annotated[Number, Meta(description="true where the base stores (in, out), as GPT-2's Conv1D does")] = expressions.parse(
        "false"
    )
    rank_stabilised: Annotated[Number, Meta(description="alpha / sqrt(r), as in rsLoRA")] = expressions.parse("false")

    def sources(self) -> Mapping[str, Pattern]:
        return {"w": self.base, "a": self.a, "b": self.b}

    def loner(self) -> str | None:
        return "w"

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        ordered = {name: members[name] for name in ("w", "a", "b")}
        scale = "alpha / sqrt(r)" if expressions.evaluate(self.rank_stabilised, lookup) else "alpha / r"
        delta = "transpose(b @ a)" if expressions.evaluate(self.transposed, lookup) else "(b @ a)"
        values = {"alpha": expressions.evaluate(self.alpha, lookup), "r": expressions.evaluate(self.rank, lookup)}
        new = members["w"] if self.to is None else rendered(self.to, lookup, context, members["w"])
        if new is None:
            return []
        expr = combined(f"w + {scale} * {delta}", ordered, table, with_captures(lookup, values))
        return [(new, Entry(expr, context.origin, f"merge_lora {new}"))]


class WeightNorm(NamedStep, frozen=True):
    """Weight norm folded (`g * v / norm(v)`, one weight) or unfolded (a weight becomes its norm and itself), along `dim`."""

    op: ClassVar[str] = "weight_norm"
    fold: Annotated[bool, Meta(description="false: unfold")] = True
    g: str = "{m:**}.weight_g"
    v: str = "{m:**}.weight_v"
    weight: str = "{m:**}.weight"
    dim: Annotated[int | None, Meta(description="the axis that keeps its own norms; null: one norm for the whole tensor")] = 0

    def __post_init__(self) -> None:
        for text in (self.g, self.v, self.weight):
            pattern = Pattern.parse(text)
            _as_template(text)
            if sorted(pattern.names) != sorted(Pattern.parse(self.g).names):
                raise Refusal(f"{self.g!r} and {text!r} must have the same placeholders", code="CK102")

    def sources(self) -> Mapping[str, Pattern]:
        if self.fold:
            return {"v": Pattern.parse(self.v), "g": Pattern.parse(self.g)}
        return {"w": Pattern.parse(self.weight)}

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        shape = table[members["v" if self.fold else "w"]].expr.spec.shape
        if not shape or (self.dim is not None and not -len(shape) <= self.dim < len(shape)):
            raise Refusal(f"there is no dim {self.dim} in a tensor of rank {len(shape)}", code="CK206", found=str(list(shape)))
        axes = ", ".join(str(axis) for axis in range(len(shape)) if self.dim is None or axis != self.dim % len(shape))
        norm = f"norm({'v' if self.fold else 'w'}, axes=({axes}))"
        if self.fold:
            wanted = tuple(size if self.dim is not None and axis == self.dim % len(shape) else 1 for axis, size in enumerate(shape))
            g_shape = table[members["g"]].expr.spec.shape
            if g_shape != wanted:
                raise Refusal(
                    f"norms along dim {self.dim} have shape {list(wanted)}", code="CK206", found=f"{list(g_shape)} for {list(shape)}"
                )
            new = _as_template(self.weight).render(lookup)
            return [(new, Entry(combined(f"v * (g / {norm})", members, table, lookup), context.origin, f"weight_norm {new}"))]
        g, v = _as_template(self.g).render(lookup), _as_template(self.v).render(lookup)
        entry = table[members["w"]]
        return [(g, Entry(combined(norm, members, table, lookup), context.origin, f"weight_norm {g}")),
                (v, Entry(entry.expr, context.origin, entry.identity))]  # fmt: skip


def _as_template(pattern: str) -> Template:
    """The name that a pattern's captures make again: ``{m:**}.weight_g`` -> ``{m}.weight_g``."""
    placeholders = Pattern.parse(pattern).placeholders
    text = pattern
    for placeholder in placeholders:
        if not placeholder.name or placeholder.kind == "choice":
            raise Refusal(f"{pattern!r}: only {{p}}, {{i:int}} and {{m:**}} can stand here", code="CK103")
        text = text.replace(f"{{{placeholder.name}:{'**' if placeholder.kind == 'deep' else placeholder.kind}}}", f"{{{placeholder.name}}}")
    return Template.parse(text)


class FoldBatchnorm(NamedStep, frozen=True):
    """A batch norm folded into the convolution or linear layer before it; the norm is gone, the layer has a bias."""

    op: ClassVar[str] = "fold_batchnorm"
    layer: Annotated[str, Meta(description="the layer's name without `.weight`: 'layer{i:int}.conv'")]
    norm: Annotated[str, Meta(description="the norm's name without `.weight`: 'layer{i:int}.bn'")]
    eps: float = 1e-5
    transposed: Annotated[bool, Meta(description="true for a transposed convolution, whose outputs are axis 1")] = False

    def sources(self) -> Mapping[str, Pattern]:
        parts = {"w": f"{self.layer}.weight", "b": f"{self.layer}.bias", "scale": f"{self.norm}.weight", "shift": f"{self.norm}.bias",
                 "mean": f"{self.norm}.running_mean", "var": f"{self.norm}.running_var", "count": f"{self.norm}.num_batches_tracked"}  # fmt: skip
        return {name: Pattern.parse(text) for name, text in parts.items()}

    def may_lack(self) -> frozenset[str]:
        return frozenset({"b", "scale", "shift", "count"})

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        lookup = with_captures(lookup, {"eps": self.eps})
        gain = f"{'scale' if 'scale' in members else '1'} / sqrt(var + eps)"
        spread = "columns" if self.transposed else "rows"
        weight = combined(f"w * {spread}({gain}, w)", {"w": members["w"], **members}, table, lookup)
        bias = f"({'b' if 'b' in members else '0'} - mean) * ({gain})" + (" + shift" if "shift" in members else "")
        first = members["w"]
        name = first.removesuffix("weight") + "bias"
        dtype = table[first].expr.spec.dtype
        if "count" in members:
            expr = table[members["count"]].expr
            context.dropped.append(Dropped(members["count"], context.origin, "the norm is folded", reads(expr)))
        return [(first, Entry(weight, context.origin, f"fold {first}")),
                (name, Entry(combined(bias, members, table, lookup, dtype), context.origin, f"fold {name}"))]  # fmt: skip


class ApplyMask(NamedStep, frozen=True):
    """A pruning mask made final: `weight_orig * weight_mask`."""

    op: ClassVar[str] = "apply_mask"
    weight: PatternField = Pattern.parse("{m:**}.weight_orig")
    mask: PatternField = Pattern.parse("{m:**}.weight_mask")
    to: TemplateField = Template.parse("{m}.weight")

    def sources(self) -> Mapping[str, Pattern]:
        return {"w": self.weight, "mask": self.mask}

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        new = rendered(self.to, lookup, context, members["w"])
        ordered = {name: members[name] for name in ("w", "mask")}
        return [] if new is None else [(new, Entry(combined("w * mask", ordered, table, lookup), context.origin, f"apply_mask {new}"))]


class DecodeStep(NamedStep, frozen=True):
    """Block-quantised weights as plain floats: `layout: blocks` (fp8 with `weight_scale_inv`), mxfp4, int8, int4."""

    op: ClassVar[str] = "decode"
    layout: Literal["blocks", "mxfp4", "int8", "int4"]
    weight: Annotated[PatternField, Meta(description="the stored numbers")]
    scale: Annotated[PatternField, Meta(description="their scales")]
    zero: Annotated[PatternField | None, Meta(description="their zero points")] = None
    to: Annotated[TemplateField | None, Meta(description="the weight's own name, where nothing is said")] = None
    dtype: DTypeField = DType.float32
    block: Annotated[tuple[Number, Number], Meta(description="rows and columns of a block")] = (
        expressions.Node("literal", 128),
        expressions.Node("literal", 128),
    )
    axis: int | None = None
    plain: Annotated[Literal["pass", "refuse"], Meta(description="weights without a scale")] = "pass"

    def sources(self) -> Mapping[str, Pattern]:
        found = {"weight": self.weight, "scale": self.scale}
        return found if self.zero is None else {**found, "zero": self.zero}

    def loner(self) -> str | None:
        return "weight" if self.plain == "pass" else None

    def lost_alone(self, spec: TensorSpec) -> str:
        kinds = ("float",) if self.layout == "blocks" else ("int", "uint")
        return f"has no scale {self.scale.text!r}" if spec.dtype.bits == 8 and spec.dtype.kind in kinds else ""

    def results(self, members: Members, table: Table, lookup: Lookup, context: Context) -> list[tuple[str, Entry]]:
        new = members["weight"] if self.to is None else rendered(self.to, lookup, context, members["weight"])
        if new is None:
            return []
        sizes: list[Union[int, Any]] = [expressions.evaluate(size, lookup) for size in self.block]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise Refusal("a block has positive sizes", code="CK104", found=printable(sizes))
        block = (sizes[0], sizes[1]) if self.layout == "blocks" else None
        arguments = [table[members[name]].expr for name in ("weight", "scale", "zero") if name in members]
        expr = apply(Decode(layout=self.layout, dtype=self.dtype, block=block, axis=self.axis), *arguments)
        return [(new, Entry(expr, context.origin, f"decode {new}"))]

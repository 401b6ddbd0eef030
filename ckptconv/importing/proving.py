"""Whether an imported rule does what transformers does: the model's own names, shapes and values, and all of it back again.

The published checkpoint is made by transformers' own way back (what ``save_pretrained`` does), from tensors whose values tell one
element from another wherever that fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptconv.errors import CkptconvError, Refusal
from ckptconv.execute.memory_run import evaluate
from ckptconv.importing.building import model_for
from ckptconv.importing.transformers_mapping import reverted, rule_for, rule_name, transforms_for
from ckptconv.invert import invert
from ckptconv.plan import Plan
from ckptconv.planner import make_plan
from ckptconv.ruleset import model as rulefile
from ckptconv.spec import DType, Manifest, TensorSpec

#: More elements than this are proved by names and shapes alone.
MAX_VALUES = 800_000_000


def prove(model_type: str) -> str:
    """Empty when the rule of ``model_type`` is proved, else the reason."""
    try:
        rules = rulefile.parse(rule_for(model_type).encode(), f"{model_type}.yaml", stem=rule_name(model_type))
    except Refusal as refusal:
        return f"refused: {refusal.what}"
    except CkptconvError as error:
        return f"not a rule: {error.problems[0]}"
    model = model_for(model_type)
    wanted = tensors_of(model)
    reasons = []
    for variant, published in published_forms(model_type, model, wanted):
        reason = _proved(rules, model, published, wanted)
        if not reason:
            return ""
        reasons.append(f"{variant}: {reason}")
    return "; ".join(reasons)


def tensors_of(model: Any) -> dict[str, Any]:
    """The model's state_dict with bytes for values: 8-bit numbers, so that large models fit; on the meta device past that."""
    import torch

    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    device = "cpu" if sum(shape.numel() for shape in shapes.values()) <= MAX_VALUES else "meta"
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(shape, dtype=torch.uint8, device=device).random_(generator=generator)
        if device == "cpu"
        else torch.empty(shape, dtype=torch.uint8, device=device)
        for name, shape in shapes.items()
    }


def published_forms(model_type: str, model: Any, tensors: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The published checkpoint, as transformers itself would write it; then without the prefixes that it only writes at times."""
    from transformers.core_model_loading import PrefixChange

    whole = transforms_for(model_type, model)
    yield "published", reverted(model, tensors, whole)
    without = [each for each in whole if not isinstance(each, PrefixChange)]
    if len(without) < len(whole):
        yield "without prefixes", reverted(model, tensors, without)
    writable = [each for each in whole if not _is_garbled(each)]
    if len(writable) < len(whole):
        yield "without what transformers cannot write back", reverted(model, tensors, writable)


def _is_garbled(transform: Any) -> bool:
    """Whether transformers' own way back leaves a piece of a regular expression in the names that it writes (a nested look-ahead)."""
    return any(")" in target.replace(r"\1", "") for target in transform.reverse_transform().target_patterns)


def manifest_of(tensors: Mapping[str, Any]) -> Manifest:
    """Names, shapes and dtypes."""
    return Manifest(
        {name: TensorSpec(tuple(tensor.shape), DType(str(tensor.dtype).removeprefix("torch."))) for name, tensor in tensors.items()}
    )


def _proved(rules: rulefile.RuleFile, model: Any, published: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    source = manifest_of(published)
    try:
        plan = make_plan(rules, source, config=model.config.to_dict())
    except CkptconvError as error:
        return f"{error.problems[0].code} {error.problems[0].what} ({error.problems[0].found}) at {error.problems[0].where}"
    return _differences(plan, wanted) or _lost(plan) or _values(plan, published, wanted)


def _differences(plan: Plan, wanted: Mapping[str, Any]) -> str:
    found = {name: spec.shape for name, spec in plan.manifest.tensors.items()}
    want = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    missing, noisy = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
    wrong = [f"{name} is {found[name]}, not {shape}" for name, shape in want.items() if name in found and found[name] != shape]
    if not (missing or noisy or wrong):
        return ""
    return f"{len(missing)} missing {missing[:2]}, {len(noisy)} noisy {noisy[:2]}, {len(wrong)} wrong {wrong[:2]}"


def _lost(plan: Plan) -> str:
    lost = invert(plan).lost
    return f"the way back loses {len(lost)}: {lost[0].name}: {lost[0].reason}" if lost else ""


def _values(plan: Plan, published: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    import torch

    if any(tensor.is_meta for tensor in published.values()):
        return ""
    found = evaluate(plan, published)
    wrong = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    return f"{len(wrong)} with other values: {wrong[:3]}" if wrong else ""

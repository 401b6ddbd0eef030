"""transformers' own conversion mapping, as rule files of ckptconv.

``rule_for("mixtral")`` is the text of a rule file that turns a checkpoint as it is published into the names and the layout of the
installed transformers' ``model.state_dict()``. The mapping is read from the installed transformers; which parts of it apply to which
names depends on the sub-models that a model has, so transformers itself collects it, for the model of the type's default config on the
meta device. No weight is read and nothing is downloaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ckptconv.errors import CkptconvError, Refusal, printable
from ckptconv.importing.building import model_for, prepare
from ckptconv.importing.steps import Facts, Step, converting, legacy, renaming, shielded, without_prefix
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec


def model_types() -> list[str]:
    """Every key of the installed transformers' mapping: model types, and class names where classes of one type differ."""
    prepare()
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    return sorted(_build_checkpoint_conversion_mapping())


def rule_name(model_type: str) -> str:
    """The name of the rule, which is also its file's stem."""
    return f"hf-{model_type.lower().strip('_').replace('_', '-')}-published-to-5"


def rule_for(model_type: str, name: str = "") -> str:
    """The rule file of one key of the mapping, as YAML, with a test of the first of every layer.

    Raises :class:`~ckptconv.errors.Refusal` CK108 for a mapping that the rule language cannot say, with the reason.
    """
    if model_type not in model_types():
        from ckptconv.names import nearest

        close = nearest(model_type, model_types())
        raise Refusal(
            f"transformers' mapping has no {printable(model_type)!r}", code="CK110", try_=f"did you mean {close}?" if close else ""
        )
    model = model_for(model_type)
    steps = steps_for(model_type, model)
    if not steps:
        raise Refusal(f"the mapping of {model_type} changes nothing", code="CK110")
    rule = {
        "version": 1,
        "name": name or rule_name(model_type),
        "revision": 1,
        "summary": f"{model_type} as published to transformers 5 ({type(model).__name__})",
        "description": _description(),
        "steps": steps,
    }
    test = _test(rule, model, transforms_for(model_type, model))
    return yaml.safe_dump(
        {**rule, **({"tests": [test]} if test else {})}, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=None
    )


def _test(rule: dict[str, Any], model: Any, transforms: list[Any]) -> dict[str, Any]:
    """What the rule makes of the published names of every first layer; of all names, where these alone make no sense to it."""
    published = reverted(model, dict(model.state_dict()), transforms)
    first = {name: list(tensor.shape) for name, tensor in published.items() if not re.search(r"(?:^|\.)[1-9][0-9]*(?:\.|$)", name)}
    whole = {name: list(tensor.shape) for name, tensor in published.items()}
    parsed = parse(yaml.safe_dump(rule, width=10_000).encode(), f"{rule['name']}.yaml")
    for given in (first, whole):
        try:
            plan = make_plan(parsed, Manifest({name: TensorSpec(tuple(shape), DType.float32) for name, shape in given.items()}),
                             config=model.config.to_dict())  # fmt: skip
        except CkptconvError:
            continue
        expect = {output.name: list(output.expr.spec.shape) for output in plan.outputs}
        return {"name": "the first of every layer" if given is first else "every tensor", "given": given,
                "expect": "same" if expect == given else expect}  # fmt: skip
    return {}


def _description() -> str:
    import transformers

    return f"Imported from conversion_mapping.py of transformers {transformers.__version__}; see ckptconv.importing."


def transforms_for(model_type: str, model: Any) -> list[Any]:
    """The transforms, in transformers' order. A key that no class has as its own type stands for its list, on the whole model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False) or get_checkpoint_conversion_mapping(model_type) or []


def steps_for(model_type: str, model: Any) -> list[Step]:
    """The steps: all renames first, in order, then the converters, as transformers applies them to every name."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = [*shapes]
    facts = Facts(model, shapes, names)
    transforms = transforms_for(model_type, model)
    steps = [renaming(each, names) for each in transforms if not isinstance(each, WeightConverter)]
    spared, stripped = exceptions(model, transforms)
    steps += without_prefix(stripped, model.base_model_prefix)
    if model_type != "legacy":
        steps += legacy(get_checkpoint_conversion_mapping("legacy"), names)
    for each in transforms:
        if isinstance(each, WeightConverter):
            steps += converting(each, facts)
    return shielded(steps, names, spared)


def exceptions(model: Any, transforms: list[Any]) -> tuple[list[str], list[str]]:
    """Where transformers looks at the model and goes back on its mapping: names that stay, and names that lose a prefix again.

    A new name that the model does not know is given up for the old one; one that the model has without the base model's prefix loses it.
    """
    from transformers.core_model_loading import rename_source_key

    tensors = dict(model.state_dict())
    renames, converters = split_transforms(transforms)
    prefix = model.base_model_prefix
    spared, stripped = [], []
    for name in reverted(model, tensors, transforms):
        plain, converted = rename_source_key(name, renames, converters)
        new, _ = rename_source_key(name, renames, converters, prefix, tensors)
        if new not in tensors and name in tensors and plain != name:
            spared.append(name)
        elif new in tensors and converted is None and plain == f"{prefix}.{new}":
            stripped.append(new)
    return spared, stripped


def split_transforms(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    """Renamings and converters, as copies without what an earlier use left in them."""
    from transformers.core_model_loading import WeightConverter

    fresh = copy.deepcopy(transforms)
    return [each for each in fresh if not isinstance(each, WeightConverter)], [each for each in fresh if isinstance(each, WeightConverter)]


def reverted(model: Any, tensors: Mapping[str, Any], transforms: list[Any]) -> dict[str, Any]:
    """The tensors as transformers' ``save_pretrained`` would publish them, had the model been loaded through ``transforms``."""
    from transformers.core_model_loading import revert_weight_conversion

    transforms = copy.deepcopy(transforms)
    for operation in [operation for each in transforms for operation in getattr(each, "operations", ())]:
        if getattr(operation, "check_dims", False):
            operation.check_dims = False  # the layout on the hub; transformers saves its own, which needs no conversion
    model._weight_conversions = transforms
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    finally:
        del model._weight_conversions

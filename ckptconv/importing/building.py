"""The model behind a key of transformers' conversion mapping, small, and on the meta device: names and shapes, no weights.

A key is a config's ``model_type`` or a class name. Which sub-models a model has decides which mappings apply to which of its names,
so a rule is made from the mapping *as transformers collects it for the model*, never from one list alone.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.target.torchvision_ops import import_with_torchvision

#: What a small config has instead of its defaults. Sizes of axes stay: they depend on each other in ways that only the model knows.
_SMALL: Mapping[str, int] = {
    "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "depth": 2, "n_layer": 2, "n_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": 320,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1,
}  # fmt: skip
#: Fields that some configs leave empty and their models then need.
_NEEDED: Mapping[str, Any] = {
    "vocab_size": 320, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts": 4, "head_dim": 64, "pad_token_id": 1,
    "layer_types": ["full_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
_HEAD = {"upsample_out_channels": [64, 32], "conv_out_channels": [32, 16]}
_SCALED_HEAD = {**_HEAD, "scale_conv_out_channels": [32, 16], "scale_final_hidden_sizes": [16, 8]}
#: Values that one model asks for, by its class.
_ASKED: Mapping[str, Mapping[str, Any]] = {
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "Sapiens2ForSemanticSegmentation": {"head_config": _HEAD},
    "Sapiens2ForPoseEstimation": {"head_config": _HEAD},
    "Sapiens2ForNormalEstimation": {"head_config": _HEAD},
    "Sapiens2ForImageMatting": {"head_config": _HEAD},
    "Sapiens2ForPointmapEstimation": {"head_config": _SCALED_HEAD},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 9}, "text_config": {"num_hidden_layers": 2, "pad_token_id": 0}},
    "Emu3Model": {"vocabulary_map": {"<image>": 9}, "text_config": {"num_hidden_layers": 2, "pad_token_id": 0}},
    "T5Gemma2Encoder": {"text_config": {"dropout_rate": 0.0, "num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 4, "num_experts": 4, "layer_types": ["conv", "full_attention"] * 2},
}
#: Class names of the mapping that transformers spells otherwise, or that stand for a class of another name.
_ALIASES: Mapping[str, str] = {
    "legacy": "BertModel",
    "mlcd_vision": "MLCDVisionModel",
    "xCLIPVisionModel": "XCLIPVisionModel",
    "xCLIPTextModel": "XCLIPTextModel",
    "PPChart2TableModel": "GotOcr2Model",
    "pp_chart2table": "GotOcr2ForConditionalGeneration",
}
#: Heads that a published checkpoint of the type most often has, best first.
_HEADS = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ForPreTraining", "ForObjectDetection", "ForMaskedLM", "ForCTC",
          "ForUniversalSegmentation", "ForInstanceSegmentation", "ForImageClassification", "ForRetrieval", "Model")  # fmt: skip


@lru_cache(maxsize=1)
def prepare() -> None:
    """Imports transformers whole, and keeps its advice about default configs off the screen."""
    import_with_torchvision("transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()


@lru_cache(maxsize=1)
def _modules() -> tuple[str, ...]:
    import transformers.models as package

    return tuple(sorted(f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)))


def _modeling(package: str) -> Iterator[Any]:
    """The modeling modules of one model's package; ones that need what is not installed are passed over."""
    try:
        parent = importlib.import_module(package)
        names = [found.name for found in pkgutil.iter_modules(parent.__path__) if found.name.startswith("modeling_")]
    except (ImportError, AttributeError):
        return
    for name in names:
        try:
            yield importlib.import_module(f"{package}.{name}")
        except ImportError:
            continue


def _models_in(module: Any) -> dict[str, Any]:
    from transformers import PreTrainedModel

    return {
        name: found
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.__module__ == module.__name__
    }


def _class_named(name: str) -> Any | None:
    import transformers

    found = getattr(transformers, name, None)
    if inspect.isclass(found):
        return found
    stem = name.split("For", maxsplit=1)[0].removesuffix("Model").replace("_", "").lower()
    near = [package for package in _modules() if package.rpartition(".")[2].replace("_", "")[:4] == stem[:4]]
    for package in near or _modules():
        for module in _modeling(package):
            if name in _models_in(module):
                return _models_in(module)[name]
    return None


def _classes_of_type(model_type: str) -> list[Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return []
    config = CONFIG_MAPPING[model_type]
    package = config.__module__.rpartition(".")[0]
    found = [
        cls
        for module in _modeling(package)
        for cls in _models_in(module).values()
        if getattr(cls, "config_class", None) is config and "PreTrainedModel" not in cls.__name__
    ]
    found += [] if found else _auto_classes(config)
    return sorted(found, key=_rank)


def _auto_classes(config: Any) -> list[Any]:
    from transformers.models.auto import modeling_auto

    return [mapping[config] for name in ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_MAPPING")
            if config in (mapping := getattr(modeling_auto, name))]  # fmt: skip


def _rank(cls: Any) -> tuple[int, int, str]:
    name = cls.__name__
    return next((at for at, head in enumerate(_HEADS) if name.endswith(head)), len(_HEADS)), len(name), name


def candidates(key: str) -> list[Any]:
    """The classes that a key may stand for, best first. Raises :class:`Refusal` when there is none."""
    name = _ALIASES.get(key, key)
    named = _class_named(name) if name != name.lower() else None
    found = [named] if named is not None else _classes_of_type(key)
    if not found:
        raise Refusal(
            f"transformers has no model for {printable(key)!r}, so nothing says which names its mapping meets", code="CK110",
            try_="import the mapping of the model that holds it",
        )  # fmt: skip
    return found


def _small_values(config: Any, *, needed: bool = False) -> dict[str, Any]:
    """Constructor values of a small config: its own fields, and those of its sub-configs; ``needed`` ones where they are empty."""
    values: dict[str, Any] = {
        name: small for name, small in _SMALL.items() if isinstance(getattr(config, name, None), int) and getattr(config, name) > small
    }
    if needed:
        values |= {name: value for name, value in _NEEDED.items() if getattr(config, name, 0) is None}
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            small = _small_values(inner, needed=needed)
            if small:
                values[name] = {"model_type": inner.model_type, **small}
    return values


def _configs(cls: Any) -> Iterator[Any]:
    """A small config, then the default one: not every model can be made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = cls.config_class
    asked = _ASKED.get(cls.__name__)
    if asked is not None:
        yield config_class(**asked)
    base = config_class()
    try:
        yield config_class(**_small_values(base))
    except Exception:  # a default that depends on what was made small
        pass
    yield base
    try:
        yield config_class(**_small_values(base, needed=True))
    except Exception:
        pass
    if config_class.model_type in CONFIG_MAPPING and CONFIG_MAPPING[config_class.model_type] is not config_class:
        yield CONFIG_MAPPING[config_class.model_type]()


def build(cls: Any) -> Any:
    """The model on the meta device. Raises :class:`Refusal` with the last reason when no config builds it."""
    import torch

    reason = "it has no config"
    try:
        for config in _configs(cls):
            try:
                with torch.device("meta"):
                    return cls(config)
            except Exception as error:  # whatever a stranger's constructor raises
                reason = f"{type(error).__name__}: {error}"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    raise Refusal(f"{cls.__name__} cannot be built from its default config: {printable(reason)}", code="CK110")


@lru_cache(maxsize=2)
def model_for(key: str) -> Any:
    """The model that a key's rule is made from: the first of its classes that builds and to which a mapping applies."""
    prepare()
    from transformers.conversion_mapping import get_model_conversion_mapping

    if key == "MtpModel":
        return _prediction_layers()
    first: Refusal | None = None
    idle = None
    for cls in candidates(key):
        try:
            model = build(cls)
        except Refusal as refusal:
            first = first or refusal
            continue
        if key == "legacy" or get_model_conversion_mapping(model, add_legacy=False):
            return model
        idle = idle or model
    if idle is not None:
        return idle
    raise first or Refusal(f"{printable(key)} has no model", code="CK110")


def _prediction_layers() -> Any:
    """The layers for multi-token prediction, which are built beside a model of a type that has them."""
    import torch
    from transformers.modeling_layers import MtpModel

    main = next(cls for cls in candidates("deepseek_v3"))
    with torch.device("meta"):
        return MtpModel(build(main), 1)

"""What people write instead: the scripts that conversions are compared with. Each is a program of its own, with paths as arguments."""

from __future__ import annotations

_TORCH = "import sys, torch\nstate = torch.load(sys.argv[1], weights_only=True)\n"
_SAVE = "torch.save(out, sys.argv[2])\n"
_STRIP = "out = {name.removeprefix('module.'): value for name, value in state.items()}\n"
_BOTH = "import sys, torch\nfrom safetensors.torch import load_file, save_file\n"

RENAMES: dict[tuple[str, str], str] = {
    ("torch", "torch"): _TORCH + _STRIP + _SAVE,
    ("torch", "safetensors"): _BOTH + "state = torch.load(sys.argv[1], weights_only=True)\n" + _STRIP + "save_file(out, sys.argv[2])\n",
    ("safetensors", "safetensors"): _BOTH + "state = load_file(sys.argv[1])\n" + _STRIP + "save_file(out, sys.argv[2])\n",
    ("safetensors", "torch"): _BOTH + "state = load_file(sys.argv[1])\n" + _STRIP + _SAVE,
}

#: torchvision's compiled part may not fit the installed torch, and no language model needs it: transformers is told that it is not there.
_NO_TORCHVISION = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else found(name, *rest)
"""

TRANSFORMERS = (
    _NO_TORCHVISION
    + """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""
)

#: Builds the model that L2 loads into, and nothing more.
BUILD = (
    _NO_TORCHVISION
    + """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
"""
)

_LAYERS = "model.layers.{i:int}."

#: What is computed: the checkpoint, the steps of a rule, and the body of the script that makes ``out`` from ``state``.
COMPUTED: dict[str, tuple[str, str, str]] = {
    "cast fp32 → bf16": (
        "wide",
        "cast: {keys: '**', dtype: bfloat16}",
        "out = {name: value.to(torch.bfloat16) for name, value in state.items()}\n",
    ),
    "qkv split": (
        "fused",
        "split: {from: 'h.{i:int}.attn.c_attn.weight', to: 'h.{i}.attn.{x:q|k|v}.weight'}",
        "out = {}\nfor name, value in state.items():\n"
        "    for x, part in zip('qkv', value.chunk(3)):\n        out[name.replace('c_attn', x)] = part\n",
    ),
    "gate/up concat": (
        "wide",
        f"concat: {{from: ['{_LAYERS}mlp.gate_proj.weight', '{_LAYERS}mlp.up_proj.weight'], to: 'model.layers.{{i}}.mlp.gate_up_proj.weight'}}",
        "out = dict(state)\nfor name in list(state):\n    if 'gate_proj' in name:\n"
        "        pair = [out.pop(name), out.pop(name.replace('gate', 'up'))]\n        out[name.replace('gate', 'gate_up')] = torch.cat(pair)\n",
    ),
    "expert stack": (
        "experts",
        "stack: {from: 'layers.{i:int}.experts.{e:int}.w1.weight', over: e, to: 'layers.{i}.experts.w1'}",
        "out = {f'layers.{i}.experts.w1': torch.stack([state[f'layers.{i}.experts.{e}.w1.weight'] for e in range(16)]) for i in range(8)}\n",
    ),
    "transpose": (
        "wide",
        f"rearrange: {{keys: '{_LAYERS}{{m}}.{{x:q|k|v|o|gate|up|down}}_proj.weight', pattern: 'o i -> i o'}}",
        "out = {name: value.T.contiguous() if '_proj' in name else value for name, value in state.items()}\n",
    ),
    "RoPE rearrange": (
        "wide",
        f"rearrange: {{keys: '{_LAYERS}self_attn.{{x:q|k}}_proj.weight', pattern: '(h two d) i -> (h d two) i', two: 2, d: 32}}",
        "out = dict(state)\nfor name, value in state.items():\n    if 'q_proj' in name or 'k_proj' in name:\n"
        "        rows, width = value.shape\n"
        "        out[name] = value.view(rows // 64, 2, 32, width).transpose(1, 2).reshape(rows, width)\n",
    ),
}


def computed_script(name: str) -> str:
    return _TORCH + COMPUTED[name][2] + _SAVE


def rule(stem: str, step: str) -> str:
    return f"version: 1\nname: {stem}\nsummary: measured\nsteps:\n  - {step}\n"


def long_rule(steps: int = 660) -> str:
    """A rule file of about three lines a step."""
    lines = ["version: 1", "name: long", "summary: measured", "steps:"]
    for at in range(steps):
        lines += [
            "  - rename:",
            f"      'encoder.block{at}.{{i:int}}.attn.{{p}}': 'layers.{at}.{{i}}.attention.{{p}}'",
            "    optional: true",
        ]
    return "\n".join(lines) + "\n"


def patterns_rule(stem: str, count: int) -> str:
    """One table of rename patterns, of which the last ten match."""
    lines = [f"version: 1\nname: {stem}\nsummary: measured\nsteps:\n  - rename:"]
    lines += [f"      'other{at}.{{i:int}}.weight': 'away{at}.{{i}}.weight'" for at in range(count - 10)]
    lines += [f"      'blocks.{{i:int}}.part{at}.{{p}}': 'layers.{{i}}.piece{at}.{{p}}'" for at in range(10)]
    return "\n".join(lines) + "\n"

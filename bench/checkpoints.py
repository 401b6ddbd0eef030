"""The checkpoints that are measured, each made by a process of its own: a child's peak memory is counted from before it became another
program, so the one that measures must stay small.

Run as a program: ``checkpoints.py KIND FOLDER GIGABYTES``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS = 33
WIDTH_OF_2_GIB = 1536


def make(kind: str, folder: Path, gigabytes: float = 0.0) -> None:
    """Makes one kind of checkpoint in ``folder``."""
    subprocess.run([sys.executable, __file__, kind, str(folder), str(gigabytes)], check=True)


def config(gigabytes: float) -> dict[str, Any]:
    """A Llama of 300 tensors and about that size in bf16."""
    width = max(64, round(WIDTH_OF_2_GIB * (gigabytes / 2) ** 0.5 / 64) * 64)
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": LAYERS, "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": 32000,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def language_model(gigabytes: float, dtype: Any = None) -> dict[str, Any]:
    """Its state_dict; the values repeat, the storages do not."""
    import torch

    shape = config(gigabytes)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (32000, width)}
    for at in range(LAYERS):
        layer = f"model.layers.{at}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        shapes |= {f"{layer}mlp.gate_proj.weight": (inner, width), f"{layer}mlp.up_proj.weight": (inner, width)}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}input_layernorm.weight": (width,), f"{layer}post_attention_layernorm.weight": (width,)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (32000, width)}
    seed = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype or torch.bfloat16)
    return {name: _filled(torch, seed, size) for name, size in shapes.items()}


def _filled(torch: Any, seed: Any, size: tuple[int, ...]) -> Any:
    tensor = torch.empty(size, dtype=seed.dtype)
    flat = tensor.view(-1)
    for at in range(0, flat.numel(), seed.numel()):
        part = flat[at : at + seed.numel()]
        part.copy_(seed[: part.numel()])
    return tensor


def _made(kind: str, folder: Path, gigabytes: float) -> None:
    import torch
    from safetensors.torch import save_file

    if kind in ("torch", "safetensors"):
        state = {f"module.{name}": value for name, value in language_model(gigabytes).items()}
        if kind == "torch":
            torch.save(state, folder / "in.pth")
        else:
            save_file(state, folder / "in.safetensors")
    elif kind == "sharded":
        state = {f"module.{name}": value for name, value in language_model(gigabytes).items()}
        for form, save, pattern in (
            ("torch", torch.save, "pytorch_model-{:05}-of-{:05}.bin"),
            ("st", save_file, "model-{:05}-of-{:05}.safetensors"),
        ):
            (folder / form).mkdir()
            weight_map = {}
            shards = list(_shards(state, 5))
            for at, part in enumerate(shards, 1):
                name = pattern.format(at, len(shards))
                save(part, folder / form / name)
                weight_map |= dict.fromkeys(part, name)
            index = "pytorch_model.bin.index.json" if form == "torch" else "model.safetensors.index.json"
            nbytes = sum(value.nbytes for value in state.values())
            (folder / form / index).write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}))
    elif kind == "hf":
        (folder / "hf").mkdir()
        save_file(language_model(gigabytes), folder / "hf" / "model.safetensors", {"format": "pt"})
        (folder / "hf" / "config.json").write_text(json.dumps(config(gigabytes)))
    elif kind == "wide":
        state = language_model(gigabytes / 2, torch.float32)
        torch.save(state, folder / "wide.pth")
        torch.save(_fused(torch, state), folder / "fused.pth")
        torch.save(_experts(torch, gigabytes), folder / "experts.pth")
    elif kind == "small":
        torch.save({f"module.layers.{at}.norm.weight": torch.full((64,), float(at)) for at in range(20_000)}, folder / "small.pth")
        save_file({f"model.layers.{at}.norm.weight": torch.full((64,), float(at)) for at in range(20_000)}, folder / "small.safetensors")
    elif kind == "headers":
        for count in (20_000, 500_000):
            _header_only(folder / f"many{count}.safetensors", count)
    else:
        raise SystemExit(f"there is no {kind}")


def _header_only(path: Path, count: int) -> None:
    """A safetensors file whose data is a hole: for plans, which read nothing else."""
    size = 4 * 64 * 64
    entries = {
        f"blocks.{at // 10}.part{at % 10}.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [size * at, size * at + size]}
        for at in range(count)
    }
    header = json.dumps(entries, separators=(",", ":")).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size * count)


def _shards(state: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    names = list(state)
    size = -(-len(names) // count)
    for at in range(0, len(names), size):
        yield {name: state[name] for name in names[at : at + size]}


def _fused(torch: Any, state: dict[str, Any]) -> dict[str, Any]:
    fused = {}
    for at in range(LAYERS):
        parts = [state[f"model.layers.{at}.self_attn.{x}_proj.weight"] for x in "qkv"]
        fused[f"h.{at}.attn.c_attn.weight"] = torch.cat(parts)
    return fused


def _experts(torch: Any, gigabytes: float) -> dict[str, Any]:
    rows = max(16, int(gigabytes * 2**30 / 2 / (8 * 16 * 1024)))
    seed = torch.randn(1 << 20).to(torch.bfloat16)
    return {f"layers.{at}.experts.{e}.w1.weight": _filled(torch, seed, (rows, 1024)) for at in range(8) for e in range(16)}


if __name__ == "__main__":
    _made(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))

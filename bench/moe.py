"""A mixture-of-experts checkpoint of a terabyte, as names, shapes and places: nothing is on the disk.

python bench/moe.py                    plans it, cuts it into tasks, inverts it, and says how long each took
python bench/moe.py --scale 0.05       a twentieth of the layers
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptconv import formats
from ckptconv.formats.base import Placed, Storage
from ckptconv.spec import DType, Manifest, TensorSpec

RULES = "qwen2-moe-to-fused-experts"
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 78, 256, 4096, 2048, 151936
SHARD_NBYTES = 5_000_000_000
_HEADER_NBYTES = 65536


@dataclass(frozen=True)
class Checkpoint:
    """Names and shapes in published order, and where each tensor's bytes lie in shards of 5 GB."""

    manifest: Manifest
    placed: Mapping[str, Placed]
    shards: int


def names(layers: int = LAYERS, experts: int = EXPERTS) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor with its shape: Qwen3-MoE's layout."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        for name, shape in (
            ("q_proj", (2 * HIDDEN, HIDDEN)),
            ("k_proj", (512, HIDDEN)),
            ("v_proj", (512, HIDDEN)),
            ("o_proj", (HIDDEN, 2 * HIDDEN)),
        ):
            yield f"{at}.self_attn.{name}.weight", shape
        yield f"{at}.self_attn.q_norm.weight", (128,)
        yield f"{at}.self_attn.k_norm.weight", (128,)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.mlp.gate.weight", (experts, HIDDEN)
        for expert in range(experts):
            for name, shape in (
                ("gate_proj", (INTERMEDIATE, HIDDEN)),
                ("up_proj", (INTERMEDIATE, HIDDEN)),
                ("down_proj", (HIDDEN, INTERMEDIATE)),
            ):
                yield f"{at}.mlp.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def checkpoint(layers: int = LAYERS, experts: int = EXPERTS) -> Checkpoint:
    """The checkpoint in bf16, in safetensors shards."""
    specs = {name: TensorSpec(shape, DType.bfloat16) for name, shape in names(layers, experts)}
    placed: dict[str, Placed] = {}
    shard, offset = 0, _HEADER_NBYTES
    for name, spec in specs.items():
        if offset + spec.nbytes > SHARD_NBYTES and offset > _HEADER_NBYTES:
            shard, offset = shard + 1, _HEADER_NBYTES
        placed[name] = Placed(spec, Storage(shard, offset, spec.nbytes), 0, _strides(spec.shape))
        offset += spec.nbytes
    return Checkpoint(Manifest(specs), placed, shard + 1)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], 1) if len(shape) == 2 else (1,)


def main() -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--task-size", default="4GB")
    given = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)  # as the command does
    from ckptconv.invert import invert
    from ckptconv.layout import lay_out, parse_size
    from ckptconv.planner import make_plan
    from ckptconv.ruleset.builtin import find
    from ckptconv.tasks import cut

    formats.WRITERS["safetensors"]
    started = last = time.perf_counter()

    def said(what: str, found: str) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{what:<10} {now - last:6.2f} s   {found}", flush=True)
        last = time.perf_counter()

    made = checkpoint(max(1, round(LAYERS * given.scale)))
    said("manifest", f"{len(made.manifest):,} tensors, {made.manifest.nbytes / 1e12:.3f} TB in {made.shards} shards")
    plan = make_plan(find(RULES), made.manifest)
    said("plan", f"{len(plan.outputs):,} outputs")
    layout = lay_out(plan.manifest, Path("out"), format="safetensors", is_folder=True, shard_nbytes=SHARD_NBYTES)
    said("layout", f"{len(layout.files)} files")
    tasks = cut(plan, layout, made.placed, parse_size(given.task_size))
    said(
        "tasks",
        f"{len(tasks.tasks)} tasks, amplification {tasks.read_amplification:.3f}, peak {max(t.peak_nbytes for t in tasks.tasks) / 1e9:.1f} GB",
    )
    back = invert(plan)
    said("inverse", f"{len(back.plan.outputs):,} outputs, {len(back.lost)} lost")
    text = len(__import__("json").dumps(plan.to_json()))
    said("saved", f"{text / 1e6:.1f} MB of JSON, fingerprint {plan.fingerprint[:20]}")
    print(f"{'all':<10} {time.perf_counter() - started:6.2f} s")


if __name__ == "__main__":
    main()

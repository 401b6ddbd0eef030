"""The cost model against a simulated store: requests and seconds on paper, and as they were.

python bench/on_paper.py
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

from msgspec.structs import replace

import ckptconv
from ckptconv.costs import PLACES, Cost, cost, loads_of
from ckptconv.stage.preparing import Options, prepare
from ckptconv.stage.producing import begin
from ckptconv.stage.working import tasks_of

RULE = "version: 1\nname: plain\nsummary: a part of every name is dropped\nsteps: [{rename: {'model.{m:**}': '{m}'}}]\n"
TENSORS, SHARDS, SIDE = 96, 3, 1024


@dataclass(frozen=True)
class Case:
    """A checkpoint of square tensors, and a store."""

    tensors: int
    side: int
    shards: int
    latency_s: float
    bytes_per_s: float
    fitted: bool = False  #: the model's figures of a store were chosen to fit it; the others it has to foretell


CASES = (
    Case(TENSORS, SIDE, SHARDS, 0.1, 2e6, fitted=True), Case(TENSORS, SIDE, SHARDS, 0.1, 20e6, fitted=True),
    Case(TENSORS, SIDE, SHARDS, 1.0, inf, fitted=True), Case(12, 4096, 2, 0.05, 10e6), Case(40, 2048, 8, 0.2, 5e6), Case(600, 256, 1, 0.1, 5e6),
    Case(2000, 128, 20, 0.5, inf), Case(24, 2048, 24, 0.02, 3e6),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a run against the store took."""

    seconds: float
    requests: int
    by_kind: Mapping[str, int]
    read_nbytes: int
    written_nbytes: int


def checkpoint(folder: Path, tensors: int = TENSORS, side: int = SIDE, shards: int = SHARDS) -> None:
    """Tensors of one size in shards, and the rule beside them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    names = [f"model.layers.{at}.weight" for at in range(tensors)]
    shard_of = {name: f"model-{at * shards // tensors + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    for shard in sorted(set(shard_of.values())):
        mine = {name: torch.full((side, side), 1.0, dtype=torch.bfloat16) for name in names if shard_of[name] == shard}
        save_file(mine, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (folder.parent / "plain.yaml").write_text(RULE)


def on_paper(folder: Path, latency_s: float, bytes_per_s: float) -> Cost:
    """What the model says."""
    options = Options(verify=None)
    made = begin(prepare(folder.parent / "plain.yaml", folder, options), folder.parent / "out", options)
    place = replace(PLACES["s3"], latency_s=latency_s, stream_nbytes_per_s=bytes_per_s, worker_nbytes_per_s=inf)
    source = made.prepared.source
    loads = loads_of(made.prepared.plan, made.layout, source.placed, tasks_of(made), place, place)
    return cost(
        loads,
        1,
        place,
        place,
        tensors=len(source.placed),
        source_files=len(source.files),
        output_files=len(made.layout.files),
        verified=False,
    )


def measured(folder: Path, latency_s: float, bytes_per_s: float) -> Measured:
    """What a run takes, from the store to the store."""
    from store import LatencyStore

    store = LatencyStore(latency_s, bytes_per_s)
    for path in folder.iterdir():
        store.put(f"bucket/in/{path.name}", path)
    started = time.perf_counter()
    ckptconv.run(folder.parent / "plain.yaml", "slow://bucket/in", "slow://bucket/out", verify=None)
    return Measured(time.perf_counter() - started, store.requests, store.by_kind, store.read_nbytes, store.written_nbytes)


def main() -> None:
    """Prints the table of docs/scale.md."""
    print(
        "| tensors | shards | latency | stream | on paper | measured | requests on paper · measured | |\n|---|---|---|---|---|---|---|---|"
    )
    for at, case in enumerate(CASES):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "in"
            checkpoint(folder, case.tensors, case.side, case.shards)
            if not at:
                measured(folder, 0.0, inf)  # everything is imported
            paper, found = on_paper(folder, case.latency_s, case.bytes_per_s), measured(folder, case.latency_s, case.bytes_per_s)
            stream = "any" if case.bytes_per_s == inf else f"{case.bytes_per_s / 1e6:.0f} MB/s"
            print(
                f"| {case.tensors:,} of {case.side}² | {case.shards} | {case.latency_s * 1e3:.0f} ms | {stream} | {paper.seconds:.1f} s | "
                f"{found.seconds:.1f} s | {paper.reads + paper.writes} · {found.requests} | {'fitted' if case.fitted else 'foretold'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

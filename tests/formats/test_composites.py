"""Tensors that are stored in parts: sparse, quantised, chunks of a distributed checkpoint, partitions of ZeRO, ranks, TorchScript."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ckptconv
from ckptconv import formats
from ckptconv.errors import CkptconvError, Refusal
from ckptconv.ruleset.model import parse

PASS = parse(b'{"version": 1, "name": "t", "summary": "t", "steps": [{"drop": {"keys": "nothing", "optional": true}}]}', "t.yaml")


def rules(*steps, **header):
    return parse(json.dumps({"version": 1, "name": "t", "summary": "t", "steps": steps, **header}).encode(), "t.yaml")


def through(path, tmp_path, using=PASS, **options):
    """The checkpoint at ``path``, converted and read back by torch."""
    out = tmp_path / "out.pth"
    report = ckptconv.run(using, path, out, force=True, verify=4, **options)
    return torch.load(out, weights_only=True), report


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_are_written_out(tmp_path, layout):
    x = normal(5, 4) * (normal(5, 4, seed=1) > 0)
    torch.save({"w": x.to_sparse_coo() if layout == "coo" else x.to_sparse_csr(), "b": normal(3)}, tmp_path / "in.pth")
    found, report = through(tmp_path / "in.pth", tmp_path)
    assert torch.equal(found["w"], x)
    assert report.ladder.reached.startswith("L0 L1 L3")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_an_uncoalesced_sparse_tensor_is_summed(tmp_path):
    x = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.tensor([1.0, 2.0, 3.0]), (2, 3))
    torch.save({"w": x}, tmp_path / "in.pth")
    assert torch.equal(through(tmp_path / "in.pth", tmp_path)[0]["w"], x.to_dense())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantised_tensors_are_what_torch_dequantises(tmp_path, per_channel):
    x = normal(4, 6)
    if per_channel:
        q = torch.quantize_per_channel(x, torch.tensor([0.1, 0.2, 0.05, 0.3]).double(), torch.tensor([0, 1, 2, -3]), 0, torch.qint8)
    else:
        q = torch.quantize_per_tensor(x, 0.07, 3, torch.quint8)
    torch.save({"w": q, "packed": (q, normal(2), None)}, tmp_path / "in.pth")
    found, _ = through(tmp_path / "in.pth", tmp_path)
    assert list(found) == ["packed.1", "w", "packed.0"]
    assert torch.equal(found["w"], q.dequantize())
    assert torch.equal(found["packed.0"], q.dequantize())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_tensors_of_a_torchscript_archive_are_read_and_its_code_is_not(tmp_path, how):
    model = Small().eval()
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(2, 3))
    scripted.save(tmp_path / "in.pt")
    contents = formats.read(tmp_path / "in.pt")
    assert "a TorchScript archive: its tensors are read, its code is neither run nor carried along" in contents.warnings
    found, _ = through(tmp_path / "in.pt", tmp_path)
    wanted = model.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_distributed_checkpoint_is_read_like_torch_reads_it(tmp_path):
    model = Small()
    state = {"model": model.state_dict(), "step": 3, "optim": {"state": {"scale": {"exp_avg": normal(1)}}, "param_groups": [{"lr": 0.1}]}}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    contents = formats.read(tmp_path / "step-1")
    assert list(contents.containers) == ["model"]
    found, report = through(tmp_path / "step-1", tmp_path)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert report.ladder.reached == "L0 L1 L3 L4"


def test_a_distributed_checkpoint_with_a_missing_file_is_refused(tmp_path):
    dcp.save({"model": {"w": normal(2)}}, checkpoint_id=tmp_path / "c", no_dist=True)
    (data,) = (tmp_path / "c").glob("*.distcp")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="a data file is missing"):
        formats.read(tmp_path / "c")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="no plain file of the folder"):
        formats.read(tmp_path / "c")


@pytest.mark.parametrize("keep", [0, 40, 200, -1])
def test_a_cut_distributed_checkpoint_is_refused(tmp_path, keep):
    dcp.save({"model": {"w": normal(2, 3)}}, checkpoint_id=tmp_path / "c", no_dist=True)
    for path in [tmp_path / "c" / ".metadata", *(tmp_path / "c").glob("*.distcp")]:
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(Refusal):
            formats.read(tmp_path / "c")
        path.write_bytes(whole)


def test_chunks_along_two_axes_are_tiled():
    from ckptconv.formats.base import Composite, Container, Placed, Storage
    from ckptconv.planner import make_plan
    from ckptconv.spec import Box, DType, TensorSpec

    def chunk(*shape):
        return Placed(TensorSpec(shape, DType.float32), Storage(0, 0, 4 * shape[0] * shape[1]), 0, (shape[1], 1))

    boxes = (Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((0, 3), (4, 1)))
    whole = Composite("chunks", TensorSpec((4, 4), DType.float32), {str(at): chunk(*box.size) for at, box in enumerate(boxes)}, boxes)
    container = Container(".", {}, composites={"w": whole})
    plan = make_plan(PASS, container.stored_manifest, composites=container.composites)
    assert str(plan.manifest["w"]) == "[4, 4] float32"
    gap = Composite("chunks", whole.spec, {"0": chunk(2, 3)}, boxes[:1])
    container = Container(".", {}, composites={"w": gap})
    with pytest.raises(Refusal, match="the chunks of w do not make it up"):
        make_plan(PASS, container.stored_manifest, composites=container.composites)


def test_tensor_parallel_ranks_are_merged_by_rules(tmp_path):
    shards = [
        {"layers.0.wq": normal(2, 3, seed=rank), "layers.0.wo": normal(3, 2, seed=9 + rank), "norm": torch.ones(3)} for rank in (0, 1)
    ]
    for rank, shard in enumerate(shards):
        (tmp_path / "in").mkdir(exist_ok=True)
        torch.save(shard, tmp_path / "in" / f"consolidated.0{rank}.pth")
    merge = rules(
        {"concat": {"from": "{rank:int}::layers.{i:int}.wq", "to": "layers.{i}.wq", "dim": 0}},
        {"concat": {"from": "{rank:int}::layers.{i:int}.wo", "to": "layers.{i}.wo", "dim": 1}},
        {"check": {"keys": "{rank:int}::norm", "equal": True}},
        {"rename": {"00::norm": "norm"}}, {"drop": "{rank:int}::norm"},
    )  # fmt: skip
    found, _ = through(tmp_path / "in", tmp_path, merge)
    assert torch.equal(found["layers.0.wq"], torch.cat([shard["layers.0.wq"] for shard in shards]))
    assert torch.equal(found["layers.0.wo"], torch.cat([shard["layers.0.wo"] for shard in shards], 1))
    (tmp_path / "in" / "consolidated.00.pth").rename(tmp_path / "in" / "consolidated.02.pth")
    with pytest.raises(CkptconvError, match="rank 0 of the tensor-parallel set is missing"):
        through(tmp_path / "in", tmp_path, merge)


def test_a_second_source_is_named(tmp_path, cli):
    torch.save({"l.weight": normal(4, 3)}, tmp_path / "base.pth")
    (tmp_path / "ad").mkdir()
    a, b = normal(2, 3, seed=1), normal(4, 2, seed=2)
    torch.save({"base_model.model.l.lora_A.weight": a, "base_model.model.l.lora_B.weight": b}, tmp_path / "ad" / "adapter_model.bin")
    (tmp_path / "ad" / "adapter_config.json").write_text('{"lora_alpha": 8}')
    (tmp_path / "t.yaml").write_text(
        json.dumps({"version": 1, "name": "t", "summary": "t", "steps": [{"merge_lora": {"alpha": "adapter.config.lora_alpha"}}]})
    )
    result = cli("run", tmp_path / "t.yaml", tmp_path / "base.pth", tmp_path / "out.pth", "--also", f"adapter={tmp_path / 'ad'}")
    assert result.code == 0, result.err
    torch.testing.assert_close(torch.load(tmp_path / "out.pth")["l.weight"], normal(4, 3) + 4 * b @ a)
    result = cli("run", tmp_path / "t.yaml", tmp_path / "base.pth", tmp_path / "out2.pth", "--also", "adapter")
    assert result.code == 2
    assert "want NAME=PATH" in result.err


def test_include_runs_another_rule_under_a_prefix(tmp_path):
    (tmp_path / "inner.yaml").write_text(
        json.dumps({"version": 1, "name": "inner", "summary": "t", "steps": [{"rename": {"a.{p}": "b.{p}"}}, {"drop": "x"}]})
    )
    outer = {
        "version": 1,
        "name": "outer",
        "summary": "t",
        "steps": [{"include": {"rules": "inner.yaml", "scope": "tower."}}, {"include": "dataparallel", "optional": True}],
    }
    (tmp_path / "outer.yaml").write_text(json.dumps(outer))
    found = ckptconv.convert({"tower.a.w": normal(2), "a.w": normal(3), "tower.x": normal(1)}, tmp_path / "outer.yaml")
    assert list(found) == ["tower.b.w", "a.w"]


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("outer.yaml", "a rule file includes itself"),
        ("../inner.yaml", "an included file lies in the rule's own folder"),
        ("/etc/rules.yaml", "an included file lies in the rule's own folder"),
        ("link.yaml", "an included file lies in the rule's own folder, also behind links"),
        ("dataparalel", "there is no built-in rule 'dataparalel'"),
    ],
)
def test_what_cannot_be_included_is_refused(tmp_path, word, what):
    folder = tmp_path / "r"
    folder.mkdir()
    (tmp_path / "inner.yaml").write_text("{}")
    (folder / "link.yaml").symlink_to(tmp_path / "inner.yaml")
    (folder / "outer.yaml").write_text(json.dumps({"version": 1, "name": "outer", "summary": "t", "steps": [{"include": word}]}))
    ((_, problems),) = ckptconv.check([folder / "outer.yaml"])
    assert [problem.what for problem in problems] == [what]

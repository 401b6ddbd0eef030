"""Two models on the same inputs: equal, or the first module that differs, with the reason. Whatever a model does, it gets its sentence."""

import json
import math
import sys
import tempfile
import time

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from ckptconv import formats
from ckptconv.errors import FitError, InputError, UsageError
from ckptconv.stage.preparing import Options, prepare
from ckptconv.target.torchvision_ops import import_with_torchvision
from ckptconv.verify import Evidence, climb
from ckptconv.verify.parity import ParityReport, ParityRequest, Side, _data, _report, correspondence, parity
from ckptconv.verify.parity_child import Failed, Stage, answered
from ckptconv.verify.parity_trace import Models, agree, recorded, seen

NETS = """
import os, sys, time
import torch
from torch import nn
from torch.nn import functional as F

def mix(q, k, v, heads):
    batch, length, width = q.shape
    q, k, v = (x.view(batch, length, heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)

class Attention(nn.Module):
    def __init__(self, width, heads, names):
        super().__init__()
        self.num_heads, self.names = heads, names
        for name in names:
            setattr(self, name, nn.Linear(width, width))
    def forward(self, x):
        q, k, v, out = (getattr(self, name) for name in self.names)
        return out(mix(q(x), k(x), v(x), self.num_heads))

class Fused(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    def forward(self, x):
        return self.proj(mix(*self.qkv(x).chunk(3, -1), self.num_heads))

class Ours(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, ("q", "k", "v", "proj"))
        self.fc1, self.act, self.fc2 = nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))

class OursFused(Ours):
    def __init__(self, width=16, heads=4):
        super().__init__(width, heads)
        self.attn = Fused(width, heads)

class Mlp(nn.Module):
    def __init__(self, width, approximate):
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(width, 32), nn.GELU(approximate), nn.Dropout(0.5), nn.Linear(32, width)
    def forward(self, x):
        return self.down(self.drop(self.act(self.up(x))))

class Theirs(nn.Module):
    def __init__(self, width=16, heads=4, eps=1e-6, approximate="none"):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, ("query", "key", "value", "out"))
        self.mlp = Mlp(width, approximate)
    def forward(self, hidden, scale=1.0):
        hidden = hidden + self.attention(self.ln_1(hidden))
        return {"loss": None, "hidden": hidden + self.mlp(self.ln_2(hidden))}

class Behaving(Theirs):
    def __init__(self, how):
        super().__init__()
        self.how = how
    def forward(self, hidden):
        {"raises": self.fail, "hangs": lambda: time.sleep(99), "prints": lambda: print("x" * 1_000_000, {"equal": True}),
         "exits": lambda: sys.exit(3), "dies": lambda: os._exit(9)}[self.how]()
        return super().forward(hidden)
    def fail(self):
        raise ValueError("no image of this size")
"""
OWN_RUN = """
import nets

def theirs():
    return nets.Theirs()

def run(model, inputs):
    return model(inputs["picture"])["hidden"]
"""
NAMES = {"norm1": "ln_1", "norm2": "ln_2", "attn.q": "attention.query", "attn.k": "attention.key", "attn.v": "attention.value",
         "attn.proj": "attention.out", "fc1": "mlp.up", "fc2": "mlp.down"}  # fmt: skip
SHAPES = {"norm1": (16,), "norm2": (16,), "fc1": (32, 16), "fc2": (16, 32)}
MAPPING = {f"{new}.{kind}": [f"{old}.{kind}"] for old, new in NAMES.items() for kind in ("weight", "bias")}


def compared(request) -> ParityReport:
    """What the child does, done here: most cases are about the answer, and starting a process takes a second."""
    with tempfile.TemporaryFile() as stage:
        return _report(answered(_data(request, 60), Stage(stage.fileno())))


def state(degenerate=False):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in NAMES:
        shape = SHAPES.get(name, (16, 16))
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 0.5)
        found[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    if degenerate:
        found["norm1.weight"], found["norm2.weight"], found["fc2.bias"] = torch.ones(16), torch.ones(16), torch.zeros(16)
    return found


def converted(source, mapping):
    return {new: source[olds[0]] for new, olds in mapping.items()}


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Writes both checkpoints and the inputs, and gives what makes a request of them."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "ownrun.py").write_text(OWN_RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nets", "ownrun"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    torch.save([torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))], tmp_path / "inputs.pt")

    def request(target="py:nets:Theirs", mapping=MAPPING, weights=None, tell=True, **more):
        weights = state() if weights is None else weights
        torch.save({"model": weights}, tmp_path / "source.pth")
        save_file({name: value.contiguous() for name, value in converted(weights, mapping).items()}, tmp_path / "target.safetensors")
        sides = {"source": Side("py:nets:Ours", tmp_path / "source.pth", "model"), "inputs": tmp_path / "inputs.pt"}
        return ParityRequest(
            Side(target, tmp_path / "target.safetensors"), **{**sides, "mapping": mapping if tell else {}, "sensitivity": 0, **more}
        )

    return request


def test_equal(case):
    report = parity(case(sensitivity=64), timeout=60)
    assert report.equal
    assert report.verdict == "equal"
    assert (report.dtype, report.tolerance, report.where) == ("float32", 1e-4, "hidden (against output)")
    assert report.diverges is None
    assert report.differences == ()
    assert report.degenerate == ()
    assert report.max_rel < 1e-5
    assert report.probed == 16
    # The softmax does not change when every key is moved by the same amount.
    assert report.unseen == ("attention.key.bias",)
    assert report.sentence.startswith("outputs are equal within 0.0001 (largest difference ")


SWAPPED = {**MAPPING, "attention.query.weight": ["attn.k.weight"], "attention.query.bias": ["attn.k.bias"],
           "attention.key.weight": ["attn.q.weight"], "attention.key.bias": ["attn.q.bias"]}  # fmt: skip


def test_queries_and_keys_exchanged_show_in_the_attention(case):
    report = compared(case(mapping=SWAPPED))
    assert not report.equal
    assert report.verdict == "mapping wrong"
    assert (report.diverges.source, report.diverges.target) == ("attn", "attention")
    assert report.diverges.inputs_agree
    assert "the input of attn.proj / attention.out differs" in report.diverges.detail
    assert report.to_json()["diverges"]["target"] == "attention"
    assert "attn / attention is the first to differ" in str(report.diverges)


def test_without_a_mapping_modules_are_paired_by_order_and_shape(case):
    report = compared(case(mapping=SWAPPED, tell=False))
    assert report.verdict == "mapping wrong"
    assert (report.diverges.source, report.diverges.target) == ("attn.q", "attention.query")


@pytest.mark.parametrize("tell", [True, False])
def test_another_eps(case, tell):
    report = compared(case("py:nets:Theirs?eps=0.001", tell=tell))
    assert report.verdict == "hyper-parameters differ"
    assert report.differences[0] == "eps 1e-06 against 0.001 (norm1 / ln_1)"
    assert (report.diverges.source, report.diverges.target) == ("norm1", "ln_1")


def test_another_eps_is_told_where_it_is_lost_in_rounding(case):
    near = case("py:nets:Theirs?eps=0.00001")
    report = compared(near)
    assert report.equal
    assert report.differences == ("eps 1e-06 against 1e-05 (norm1 / ln_1, and 1 more)",)
    exact = compared(case("py:nets:Theirs?eps=0.00001", dtype="float64"))
    assert exact.verdict == "hyper-parameters differ"
    assert exact.tolerance == 1e-9


def test_another_activation(case):
    report = compared(case("py:nets:Theirs?approximate=tanh", tolerance=1e-6))
    assert report.verdict == "hyper-parameters differ"
    assert report.differences[0] == "approximate none against tanh (act / mlp.act)"
    assert (report.diverges.source, report.diverges.target) == ("act", "mlp.act")


def test_another_number_of_heads(case):
    report = compared(case("py:nets:Theirs?heads=2"))
    assert report.verdict == "hyper-parameters differ"
    assert report.differences[0] == "num_heads 4 against 2 (attn / attention)"


def test_a_fused_projection_and_its_parts(case, tmp_path):
    weights = state()
    source = {name: value for name, value in weights.items() if not name.startswith("attn.")}
    for kind in ("weight", "bias"):
        source[f"attn.qkv.{kind}"] = torch.cat([weights[f"attn.{part}.{kind}"] for part in "vkq"])  # the wrong order
        source[f"attn.proj.{kind}"] = weights[f"attn.proj.{kind}"]
    mapping = {name: [f"attn.qkv.{name.rpartition('.')[2]}"] if olds[0].split(".")[1] in "qkv" else olds for name, olds in MAPPING.items()}
    request = case()
    torch.save(source, tmp_path / "fused.pth")
    report = compared(
        ParityRequest(request.target, Side("py:nets:OursFused", tmp_path / "fused.pth"), inputs=request.inputs, mapping=mapping)
    )
    assert report.verdict == "mapping wrong"
    assert (report.diverges.source, report.diverges.target) == ("attn", "attention")


@pytest.mark.parametrize(("suffix", "right"), [(".pt", True), (".safetensors", True), (".safetensors", False)])
def test_golden_output(case, tmp_path, suffix, right):
    inputs = torch.load(tmp_path / "inputs.pt", weights_only=True)[0]
    namespace = {}
    exec(NETS, namespace)
    model = namespace["Theirs"]().eval()
    model.load_state_dict(converted(state(), MAPPING))
    with torch.no_grad():
        output = model(inputs)["hidden"]
    golden = tmp_path / f"golden{suffix}"
    expected = output if right else output + 0.1
    if suffix == ".pt":
        torch.save({"inputs": {"hidden": inputs}, "output": expected}, golden)
    else:
        save_file({"inputs.0": inputs, "output": expected}, golden)
    report = compared(case(source=None, inputs=None, golden=golden))
    assert report.equal is right
    assert report.verdict == ("equal" if right else "differs")
    assert report.diverges is None


def test_degenerate_weights_are_named(case):
    report = compared(case(weights=state(degenerate=True)))
    assert report.equal
    assert report.degenerate == ("ln_1.weight", "ln_2.weight", "mlp.down.bias")
    assert "mlp.down.bias" in report.warnings[0]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_source_stored_in_parts_is_put_together(case, tmp_path):
    request = case()
    weights = state()
    name = next(key for key, value in weights.items() if value.dim() == 2)
    torch.save({"model": {**weights, name: weights[name].to_sparse_coo()}}, tmp_path / "source.pth")
    assert compared(request).equal


def test_half_precision_has_its_own_tolerance(case):
    weights = state()
    request = case(weights=weights)
    save_file({name: value.half() for name, value in converted(weights, MAPPING).items()}, request.target.weights)
    report = compared(request)
    assert report.equal
    assert (report.dtype, report.tolerance) == ("float16", 3e-2)
    assert report.max_rel > 1e-6


def test_a_run_of_its_own(case, tmp_path):
    request = case("py:ownrun:theirs", inputs=tmp_path / "named.pt")
    torch.save({"picture": torch.randn(1, 3, 16)}, tmp_path / "named.pt")
    report = compared(request)
    assert report.equal
    assert report.where == "output"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("raises", "running the target model failed: ValueError: no image of this size"),
        ("exits", "running the target model ended the process (exit code 3)"),
        ("dies", "the process ended with exit code 9 while running the target model, without an answer"),
    ],
)
def test_a_model_that_fails_gets_its_sentence(case, how, sentence):
    with pytest.raises(FitError) as caught:
        parity(case(f"py:nets:Behaving?how={how}"), timeout=60)
    problem = caught.value.problems[0]
    assert problem.what == sentence
    assert problem.where == f"py:nets:Behaving?how={how}"
    assert problem.code == "CK411"


def test_a_model_that_hangs_is_stopped(case):
    started = time.monotonic()
    with pytest.raises(FitError, match=r"took longer than 8 s, and was stopped while running the target model"):
        parity(case("py:nets:Behaving?how=hangs"), timeout=8)
    assert time.monotonic() - started < 20


def test_what_a_model_prints_is_no_answer(case):
    assert parity(case("py:nets:Behaving?how=prints"), timeout=60).equal


def test_what_cannot_be_compared_is_refused(case, tmp_path):
    with pytest.raises(UsageError, match=r"either a source model or a golden output"):
        parity(case(source=None), timeout=60)
    with pytest.raises(UsageError, match=r"only a model can be run"):
        parity(case(str(tmp_path / "inputs.pt")), timeout=60)
    with pytest.raises(UsageError, match=r"there are no inputs to run the models on"):
        parity(case(inputs=None), timeout=60)
    with pytest.raises(FitError, match=r"does not load strictly into the target model: missing: ln_2.bias"):
        parity(case(mapping={name: olds for name, olds in MAPPING.items() if name != "ln_2.bias"}), timeout=60)
    request = case()
    (tmp_path / "source.pth").write_bytes(b"nothing")
    with pytest.raises(InputError):
        parity(request, timeout=60)


@pytest.mark.parametrize(
    ("level", "how", "rungs"),
    [
        (5, {}, [(5, "passed", "outputs are equal within")]),
        (6, {}, [(5, "passed", "outputs are equal within"), (6, "skipped", "nothing to look for: the outputs are equal")]),
        (5, {"mapping": SWAPPED}, [(5, "failed", "the outputs differ: mapping wrong"), (6, "failed", "attn / attention")]),
        (6, {"golden": 1.0}, [(5, "failed", "the outputs differ"), (6, "skipped", "a golden output has no modules to compare with")]),
        (6, {"golden": 0.0}, [(5, "passed", "outputs are equal within"), (6, "skipped", "nothing to look for")]),
        (6, {"target": "py:nets:Behaving?how=raises"}, [(5, "failed", "could not be built or compared")]),
        (6, None, [(5, "skipped", "no --parity source=… or golden=…"), (6, "skipped", "no models were compared")]),
    ],
)
def test_the_rungs_of_the_ladder(case, tmp_path, monkeypatch, level, how, rungs):
    def in_this_process(request, timeout):
        try:
            return compared(request)
        except Failed as failed:
            raise FitError(failed.problem) from None

    monkeypatch.setattr(sys.modules["ckptconv.verify.parity"], "parity", in_this_process)
    request = case(**{name: value for name, value in (how or {}).items() if name != "golden"})
    if how and "golden" in how:
        namespace = {}
        exec(NETS, namespace)
        model, inputs = namespace["Theirs"]().eval(), torch.load(tmp_path / "inputs.pt")
        model.load_state_dict(converted(state(), MAPPING))
        with torch.no_grad():
            torch.save({"inputs": inputs, "output": model(*inputs)["hidden"] + how["golden"]}, tmp_path / "golden.pt")
        request = case(source=None, inputs=None, golden=tmp_path / "golden.pt")
    written = request.target.weights
    ladder = climb(Evidence([written], lambda: formats.read(written), "safetensors", parity=None if how is None else request), level)
    found = [rung for rung in ladder.rungs if rung.level >= 5]
    assert [(rung.level, rung.status) for rung in found] == [(number, status) for number, status, _ in rungs]
    assert [sentence in rung.sentence for rung, (_, _, sentence) in zip(found, rungs, strict=True)] == [True] * len(rungs)
    assert (ladder.parity is not None) is (how is not None and "target" not in how)
    assert ladder.problems or all(rung.status != "failed" for rung in found)


def test_what_is_not_finite_is_no_json():
    report = ParityReport(False, "differs", math.inf, math.nan, 1e-4, "float32", "output")
    assert json.dumps(report.to_json(), allow_nan=False)
    assert report.to_json()["max_abs"] is None


def test_timm_against_transformers(tmp_path):
    timm, transformers = (import_with_torchvision(name) for name in ("timm", "transformers"))
    word = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=4&num_classes=11"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=11)
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()},
        tmp_path / "in.pth",
    )
    for folder, eps in (("hf", 1e-6), ("wrong", 1e-2)):
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8, num_labels=11,
            layer_norm_eps=eps, architectures=["ViTForImageClassification"],
        ).save_pretrained(tmp_path / folder)  # fmt: skip
    ckptconv.run("timm-vit-to-hf-vit", tmp_path / "in.pth", tmp_path / "out.safetensors")
    mapping = correspondence(prepare("timm-vit-to-hf-vit", tmp_path / "in.pth", Options()).plan)
    source = Side(word, tmp_path / "in.pth")
    report = parity(ParityRequest(Side(f"hf:{tmp_path / 'hf'}", tmp_path / "out.safetensors"), source, mapping=mapping), timeout=120)
    assert report.equal, report.sentence
    assert report.where == "logits (against output)"
    assert report.differences == ()
    assert len(report.unseen) == 2  # the biases of the keys
    wrong = parity(
        ParityRequest(Side(f"hf:{tmp_path / 'wrong'}", tmp_path / "out.safetensors"), source, mapping=mapping, sensitivity=0), timeout=120
    )
    assert wrong.verdict == "hyper-parameters differ"
    assert wrong.diverges.source == "blocks.0.norm1"
    assert wrong.differences[0].startswith("eps 1e-06 against 0.01 (blocks.0.norm1 / ")


def test_other_layouts_of_the_same_elements_agree():
    tensor = torch.randn(2, 3, 4, 4)
    assert agree(seen(tensor, 1 << 10), seen(tensor.permute(0, 2, 3, 1), 1 << 10), 1e-5)
    assert agree(seen(tensor, 1 << 10), seen(tensor.flip(1), 1 << 10), 1e-5)
    assert not agree(seen(tensor, 1 << 10), seen(tensor + 0.01, 1 << 10), 1e-5)
    assert not agree(seen(tensor, 1 << 10), None, 1e-5)


def test_recording_keeps_a_sample_and_removes_its_hooks():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(inplace=True))
    calls = recorded(model, lambda: model(torch.randn(512, 64)))
    assert [call.name for call in calls] == ["0", "1", ""]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert calls[1].given.ends[0] < 0 <= calls[1].gave.ends[0]  # as it was before the module wrote into it
    assert len(seen(torch.randn(5000), 100).sample) == 100
    assert Models(model, model, {}).groups() == []


class Rotary(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.register_buffer("inv_freq", base ** -torch.arange(4.0), persistent=False)

    def forward(self, x):
        return x * self.inv_freq


@pytest.mark.parametrize("names", [{"0.weight": ["0.weight"], "0.bias": ["0.bias"]}, {}])
def test_a_table_that_no_checkpoint_holds(names):
    linear = torch.nn.Linear(4, 4)
    models = [torch.nn.Sequential(linear, Rotary(base), torch.nn.Sequential(torch.nn.Identity())) for base in (10.0, 100.0)]
    x = torch.randn(3, 4)
    calls = [recorded(model, lambda model=model: model(x)) for model in models]
    verdict, differences, diverges = Models(*models, names).verdict(*calls, 1e-4)
    assert verdict == "hyper-parameters differ"
    assert differences == ["buffer inv_freq[1] 0.1 against 0.01 (1 / 1)"]
    assert (diverges.source, diverges.target) == ("1", "1")


def test_another_stride_shows_in_the_shape_of_the_output():
    models = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=stride), torch.nn.AdaptiveAvgPool2d(1)) for stride in (1, 2)]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(1, 3, 9, 9)
    calls = [recorded(model, lambda model=model: model(image)) for model in models]
    verdict, differences, diverges = Models(*models, {}).verdict(*calls, 1e-4)
    assert verdict == "hyper-parameters differ"
    assert differences[0] == "stride (1, 1) against (2, 2) (0 / 0)"
    assert "in shape" in str(diverges)

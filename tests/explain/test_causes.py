"""Every row of the table of causes: a file as the libraries write it, what it should load into, and the answer in words."""

import argparse
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptconv
from ckptconv.target.torchvision_ops import import_with_torchvision


class Net(nn.Module):
    def __init__(self, classes=6, width=10):
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)


def net(**changes):
    torch.manual_seed(0)
    return Net(**changes).state_dict()


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def shapes(**named):
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in named.items()}


def vit(depth=2, width=8, tokens=17, qkv=True):
    """The names and shapes of timm's VisionTransformer, or with queries, keys and values apart."""
    state = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    }
    for at in range(depth):
        names = ["qkv"] if qkv else ["q", "k", "v"]
        for name in names:
            state[f"blocks.{at}.attn.{name}.weight"] = (3 * width if qkv else width, width)
        state[f"blocks.{at}.attn.proj.weight"] = (width, width)
        state[f"blocks.{at}.mlp.fc1.weight"] = (4 * width, width)
        state[f"blocks.{at}.mlp.fc2.weight"] = (width, 4 * width)
        state[f"blocks.{at}.norm1.weight"] = (width,)
        state[f"blocks.{at}.norm2.weight"] = (width,)
    state |= {"norm.weight": (width,), "head.weight": (5, width), "head.bias": (5,)}
    return {name: torch.zeros(shape) for name, shape in state.items()}


def llama(layers=2, width=16, vocab=32, tp=1, head=True):
    """The names of transformers' Llama; with ``tp`` the shapes of one rank of several."""
    state = {"model.embed_tokens.weight": (vocab // tp, width)}
    for at in range(layers):
        for name in ("q", "k", "v"):
            state[f"model.layers.{at}.self_attn.{name}_proj.weight"] = (width // tp, width)
        state[f"model.layers.{at}.self_attn.o_proj.weight"] = (width, width // tp)
        for name in ("gate", "up"):
            state[f"model.layers.{at}.mlp.{name}_proj.weight"] = (3 * width // tp, width)
        state[f"model.layers.{at}.mlp.down_proj.weight"] = (width, 3 * width // tp)
        state[f"model.layers.{at}.input_layernorm.weight"] = (width,)
        state[f"model.layers.{at}.post_attention_layernorm.weight"] = (width,)
    state["model.norm.weight"] = (width,)
    if head:
        state["lm_head.weight"] = (vocab // tp, width)
    return {name: torch.zeros(shape) for name, shape in state.items()}


@dataclass(frozen=True)
class Row:
    """A checkpoint, what it should load into, and the answer."""

    id: str
    found: object  #: what torch.save is given
    wanted: object
    kind: str
    says: str  #: of the cause's sentence
    verdict: str
    command: str = ""  #: part of a command
    more: tuple[str, ...] = field(default=())  #: further kinds


def rows():
    plain = net()
    yield Row("data-parallel", nn.DataParallel(Net()).state_dict(), plain, "wrapper",
              "every key in the checkpoint carries what a wrapper adds: module. (nn.DataParallel or DistributedDataParallel)",
              "convertible", "ckptconv run dataparallel")  # fmt: skip
    yield Row("compile-around-ddp", prefixed(plain, "_orig_mod.module."), plain, "wrapper",
              "every key in the checkpoint carries what a wrapper adds: _orig_mod. (torch.compile), then module. (nn.DataParallel or "
              "DistributedDataParallel)", "convertible", "ckptconv run wrapper-stack")  # fmt: skip
    yield Row("ddp-around-compile", prefixed(plain, "module._orig_mod."), plain, "wrapper", "module. (nn.DataParallel or DistributedDataParallel), then _orig_mod.",
              "convertible", "ckptconv run wrapper-stack")  # fmt: skip
    yield Row("compile-in-the-middle", {name.replace("body.", "body._orig_mod."): value for name, value in plain.items()}, plain, "wrapper",
              "2 of 9 keys in the checkpoint carry what a wrapper adds: _orig_mod. (torch.compile)", "convertible", "ckptconv run torch-compile")  # fmt: skip
    yield Row("the-model-is-wrapped", plain, prefixed(plain, "module."), "wrapper", "every key in the model carries what a wrapper adds: module.",
              "convertible", "ckptconv suggest")  # fmt: skip
    lightning = {
        "epoch": 3,
        "state_dict": prefixed(plain, "model.") | {"criterion.weight": torch.ones(6)},
        "loops": {},
        "optimizer_states": [],
    }
    yield Row("lightning", lightning, plain, "container",
              "the weights are in 'state_dict' of a training checkpoint, beside epoch, loops, optimizer_states; load_state_dict(torch.load(…)) is given all of it",
              "convertible", "ckptconv run lightning ", ("prefix",))  # fmt: skip
    yield Row("fsdp1-flat", {"_flat_param": torch.zeros(30), "layers.0._fsdp_wrapped_module._flat_param": torch.zeros(8)}, plain, "flat",
              "2 tensors are flat parameters of FSDP1", "not convertible")  # fmt: skip
    yield Row("fsdp-wrapped", {name.replace("head.", "head._fsdp_wrapped_module."): value for name, value in plain.items()}, plain, "wrapper",
              "_fsdp_wrapped_module. (FSDP)", "convertible", "ckptconv run fsdp-wrapped")  # fmt: skip
    yield Row("tensor-parallel-rank", llama(tp=2), llama(), "parallel", "this is one rank of a tensor-parallel set of 2", "not convertible")
    yield Row("ema-beside", {"model": plain, "model_ema": net(), "epoch": 1}, plain, "averaged",
              "the file holds 2 sets of weights of the same names and shapes: model, model_ema; model_ema is averaged by its name (EMA). They load alike and "
              "score differently", "convertible", "--select model_ema", ("container",))  # fmt: skip
    yield Row("ema-without-dots", plain | {f"model_ema.{name.replace('.', '')}": value for name, value in plain.items() if name.count(".") and "num" not in name},
              plain, "flattened", "8 keys are an averaged copy (EMA) under names without dots: model_ema.bodyweight is body.weight", "convertible")  # fmt: skip
    yield Row("classes", net(classes=5), plain, "head",
              "the last layer is for 5 classes in the checkpoint and 6 in the model: head.weight, head.bias ([5, 10] in the checkpoint, [6, 10] in the model); "
              "left out, it stays random and has to be trained", "convertible with loss", "ckptconv run new-classes")  # fmt: skip
    yield Row("changed-layer", {"layer1.weight": torch.ones(5, 10), "layer2.weight": torch.ones(30, 30)},
              {"layer1.weight": torch.ones(6, 10), "layer2.weight": torch.ones(30, 30)}, "size",
              "a layer was changed: layer1.weight ([5, 10] in the checkpoint, [6, 10] in the model)", "convertible with loss")  # fmt: skip
    yield Row("positions", vit(tokens=578), vit(tokens=258), "positions",
              "position embeddings pos_embed have [1, 578, 8] in the checkpoint, [1, 258, 8] in the model: another resolution or patch size: 24×24 patches against "
              "16×16, with 2 prefix tokens before them", "convertible with loss")  # fmt: skip
    yield Row("first-convolution", shapes(conv1__weight=(16, 1, 3, 3), fc__weight=(5, 16), fc__bias=(5,)), shapes(conv1__weight=(16, 3, 3, 3), fc__weight=(5, 16), fc__bias=(5,)),
              "channels", "the first convolution takes 1 input channels in the checkpoint and 3 in the model: conv1.weight", "convertible with loss")  # fmt: skip
    yield Row("vocabulary", llama(vocab=128260, width=4), llama(vocab=128256, width=4), "vocabulary",
              "the vocabulary has 128,260 rows in the checkpoint and 128,256 in the model (model.embed_tokens.weight, lm_head.weight): 4 words more in the checkpoint: "
              "added tokens, or another tokenizer", "convertible with loss")  # fmt: skip
    yield Row("vocabulary-padded", llama(vocab=128), llama(vocab=101), "vocabulary", "the checkpoint pads its 101 words to a multiple of 128, the model does not",
              "convertible with loss")  # fmt: skip
    yield Row("position-ids", plain | {"embeddings.position_ids": torch.arange(4)[None]}, plain, "buffers",
              "buffers that a library added or dropped: embeddings.position_ids (0, 1, 2, …, which transformers stopped saving in 4.31) only in the checkpoint",
              "convertible", "ckptconv run hf-position-ids")  # fmt: skip
    yield Row("counters-missing", {name: value for name, value in plain.items() if "num_batches" not in name}, plain, "buffers",
              "norm.num_batches_tracked (batch norm's counter) only in the model", "convertible", "ckptconv suggest")  # fmt: skip
    yield Row("refactored", {name.replace("body", "encoder.stem").replace("head", "decoder.out"): value for name, value in plain.items()}, plain, "renamed",
              "4 of 4 missing tensors are there under other names, with the same shapes", "convertible", "ckptconv suggest")  # fmt: skip
    normed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    folded = normed.state_dict()
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 4)).state_dict()
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): value
        for name, value in new.items()
    }
    yield Row("weight-norm-new", old, new, "weight-norm",
              "weight normalisation is stored as weight_g/weight_v in the checkpoint (0.weight_g and 1 more) and as parametrizations.weight.original0/1 in the model "
              "(0.parametrizations.weight.original{0-1} ×2)", "convertible", "ckptconv run weight-norm-to-parametrizations")  # fmt: skip
    yield Row(
        "weight-norm-folded",
        old,
        folded,
        "weight-norm",
        "and as plain weights in the model (0.weight)",
        "convertible",
        "ckptconv run weight-norm-fold",
    )
    yield Row("fused-attention", vit(), vit(qkv=False), "attention",
              "the checkpoint fuses what the model keeps apart: blocks.{0-1}.attn.qkv.weight ×2 against blocks.{0-1}.attn.q.weight ×2", "convertible", "ckptconv suggest")  # fmt: skip
    yield Row(
        "split-attention",
        vit(qkv=False),
        vit(),
        "attention",
        "the model fuses what the checkpoint keeps apart",
        "convertible",
        "ckptconv suggest",
    )
    adapter = {f"base_model.model.model.layers.{at}.self_attn.{p}_proj.lora_{ab}.weight": torch.zeros((4, 16) if ab == "A" else (16, 4))
               for at in range(24) for p in "qkvo" for ab in "AB"}  # fmt: skip
    yield Row("lora", adapter, llama(), "adapter",
              "this is a LoRA adapter alone: 0 of 192 adapter keys would apply, and load_state_dict(strict=False) would silently leave the base model as it is; it "
              "changes a base model, which is another file", "not convertible")  # fmt: skip
    int8 = llama() | {f"model.layers.{at}.self_attn.q_proj.{x}": torch.zeros(16) for at in range(2) for x in ("SCB", "weight_format")}
    yield Row("bitsandbytes", int8, llama(), "quantised",
              "the weights are quantised, bitsandbytes int8: 4 keys are scales and the like, which no plain model has", "not convertible")  # fmt: skip
    fp8 = {}
    for name, value in llama().items():
        quantised = name.endswith("_proj.weight")
        fp8[name] = value.to(torch.float8_e4m3fn if quantised else torch.bfloat16)
        if quantised:
            fp8[name + "_scale_inv"] = torch.ones(1, 1)
    yield Row("fp8-blocks", fp8, llama(), "quantised", "block-scaled fp8 (DeepSeek's layout): 14 keys are scales and the like", "convertible",
              "ckptconv run fp8-blocks-to-float")  # fmt: skip
    yield Row("weights-only", {"state_dict": plain, "args": argparse.Namespace(lr=1)}, plain, "weights-only",
              "torch.load(weights_only=True) refuses the file (Unsupported global): it holds objects of argparse.Namespace (args); the tensors are read here "
              "without running anything", "convertible", "ckptconv run plain-tensors", ("container",))  # fmt: skip
    yield Row("whole-module", Net(), plain, "module",
              "the whole model was pickled, not its state_dict: torch.load needs the author's classes (No module named …); its tensors are recovered here without "
              "running anything", "convertible", "ckptconv run plain-tensors")  # fmt: skip
    trained = Net()
    optimizer = torch.optim.Adam(trained.parameters())
    trained.head(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    yield Row("optimizer", optimizer.state_dict(), plain, "optimizer",
              "this is an optimizer's state (2 parameters in 1 group), not a model: it holds moments, and knows parameters by number only", "not convertible")  # fmt: skip
    yield Row("doubled", {f"encoder.{name}": value for name, value in prefixed(plain, "encoder.").items()}, prefixed(plain, "encoder."), "doubled",
              "9 keys have a part twice: encoder.encoder.body.weight is encoder.body.weight; a mapping ran twice, or its inverse is wrong", "convertible")  # fmt: skip
    gpt2 = {f"h.{at}.attn.c_attn.weight": torch.zeros(8, 24) for at in range(2)} | {f"h.{at}.attn.c_proj.weight": torch.zeros(8, 8) for at in range(2)} | {
        f"h.{at}.mlp.c_fc.weight": torch.zeros(8, 32) for at in range(2)} | {f"h.{at}.mlp.c_proj.weight": torch.zeros(32, 8) for at in range(2)} | {"wte.weight": torch.zeros(50, 8)}  # fmt: skip
    yield Row("conv1d", gpt2, {name: value if "wte" in name else value.T.contiguous() for name, value in gpt2.items()}, "transposed",
              "6 matrices are stored the other way round, as GPT-2's Conv1D or TensorFlow do: h.{0-1}.attn.c_attn.weight ×2, h.{0-1}.mlp.c_fc.weight ×2, "
              "h.{0-1}.mlp.c_proj.weight ×2 ([8, 24] in the checkpoint, [24, 8] in the model); square ones (h.{0-1}.attn.c_proj.weight ×2) have to be turned too, "
              "which no shape can show", "convertible", "ckptconv run gpt2-conv1d-to-linear")  # fmt: skip
    experts = {
        f"model.layers.{at}.block_sparse_moe.experts.{e}.w{n}.weight": torch.zeros((4, 6) if n == 2 else (6, 4))
        for at in range(2)
        for e in range(4)
        for n in (1, 2, 3)
    }
    stacked = {f"model.layers.{at}.mlp.experts.gate_up_proj": torch.zeros(4, 12, 4) for at in range(2)} | {
        f"model.layers.{at}.mlp.experts.down_proj": torch.zeros(4, 4, 6) for at in range(2)}  # fmt: skip
    gates = [{f"model.layers.{at}.{place}.gate.weight": torch.zeros(4, 4) for at in range(2)} for place in ("block_sparse_moe", "mlp")]
    yield Row("experts", experts | gates[0], stacked | gates[1], "experts",
              "the checkpoint has one tensor for each of 4 experts (model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w{1-3}.weight ×24), the model one for all",
              "convertible", "ckptconv run mixtral-to-fused-experts")  # fmt: skip
    yield Row("one-by-one-convolution", shapes(a__weight=(4, 4, 1, 1), b__weight=(8, 4)), shapes(a__weight=(4, 4), b__weight=(8, 4)), "squeezed",
              "1 tensor has axes of size 1 more or less (a 1×1 convolution for a linear layer): a.weight", "convertible", "ckptconv suggest")  # fmt: skip
    yield Row("dtype", {name: value.double() if value.is_floating_point() else value for name, value in plain.items()}, plain, "dtype",
              "8 tensors are float64 in the checkpoint", "convertible")  # fmt: skip
    yield Row("depth", vit(depth=12), vit(depth=24), "depth",
              "the depth is another: the file has 12 blocks (blocks.*), the model 24 (blocks.*); the rest of the model would stay random, so no renaming can help",
              "not convertible")  # fmt: skip
    yield Row("depth-lost", vit(depth=24), vit(depth=12), "depth", "the rest of the file would be lost", "not convertible")
    yield Row(
        "width",
        vit(width=8),
        vit(width=16),
        "width",
        "the width is another: 18 of 19 tensors differ in size, most by 8 against 16",
        "not convertible",
    )
    yield Row(
        "family",
        vit(depth=4),
        llama(),
        "family",
        "the file is a ViT (4 blocks), the model a Llama-like language model (2 blocks)",
        "not convertible",
    )
    yield Row("partial", {name: value for name, value in plain.items() if "body" not in name}, plain, "missing",
              "2 keys are only in the model, 31.8% of its parameters: body.weight, body.bias; strict=False would leave them random, silently",
              "convertible with loss")  # fmt: skip
    yield Row("left-over", plain | {"aux.weight": torch.zeros(3, 3)}, plain, "unexpected",
              "1 key is only in the checkpoint, and nothing in the model is like them: aux.weight", "convertible")  # fmt: skip


ROWS = list(rows())


def explained(row, folder):
    torch.save(row.found, folder / "in.pth")
    torch.save(row.wanted, folder / "model.pth")
    return ckptconv.explain(folder / "in.pth", str(folder / "model.pth"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_each_cause_is_named_with_its_verdict(row, tmp_path):
    report = explained(row, tmp_path)
    causes = {cause.kind: cause.sentence for cause in report.causes}
    assert row.kind in causes, causes
    assert row.says in causes[row.kind]
    assert set(row.more) <= set(causes)
    assert report.verdict == row.verdict, report.sentence
    assert any(row.command in command for command in report.commands) or not row.command, report.commands
    assert report.exit_code == 1


@pytest.mark.parametrize("row", [row for row in ROWS if row.verdict == "convertible"], ids=lambda row: row.id)
def test_the_commands_do_what_they_say(row, tmp_path, monkeypatch):
    """Every verdict "convertible" is true: its commands, run one after another, give a file that loads."""
    from click.testing import CliRunner

    from ckptconv.cli import cli

    report = explained(row, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules").mkdir()
    runner = CliRunner()
    for command in report.commands:
        words = command.partition("   #")[0].split()[1:]
        result = runner.invoke(cli, [*words, "--force"], catch_exceptions=False)
        assert result.exit_code in (0, 1), f"{command}\n{result.output}"
    out = ckptconv.explain(tmp_path / "out.pth", str(tmp_path / "model.pth"))
    left = {cause.kind for cause in out.causes}
    assert out.verdict == "loads as it is" or (row.id == "counters-missing" and left == {"buffers"}), out.sentence


def test_a_real_resnet_with_other_blocks_is_refused_by_name(tmp_path):
    timm = import_with_torchvision("timm")
    with torch.device("meta"):
        names = {name: value.shape for name, value in timm.create_model("resnet50").state_dict().items()}
    torch.save({name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in names.items()}, tmp_path / "in.pth")
    report = ckptconv.explain(tmp_path / "in.pth", "timm:resnet18")
    assert report.verdict == "not convertible"
    assert report.sentence == (
        "because the file is a ResNet with bottleneck blocks (stages of 3, 4, 6, 3), the model a ResNet with basic blocks (stages of 2, 2, 2, 2): other blocks, so no "
        "renaming can help"
    )


def test_an_alias_that_is_left_out_is_no_loss(tmp_path):
    """DeepSpeed and save_pretrained keep one name of tied weights."""
    tied = llama(head=False)
    torch.save(tied, tmp_path / "in.pth")
    model = llama()
    model["lm_head.weight"] = model["model.embed_tokens.weight"]
    torch.save(model, tmp_path / "model.pth")
    report = ckptconv.explain(tmp_path / "in.pth", str(tmp_path / "model.pth"))
    assert report.verdict == "loads as it is"
    assert report.as_it_is == "strict=True raises: 1 missing, all of them aliases"
    assert [cause.sentence for cause in report.causes] == [
        "1 missing key is an alias of what is there (tied weights, of which files keep one name): lm_head.weight is model.embed_tokens.weight"
    ]


def test_a_missing_head_that_the_target_does_not_tie_is_the_embeddings(tmp_path):
    torch.save(llama(head=False), tmp_path / "in.pth")
    torch.save(llama(), tmp_path / "model.pth")
    report = ckptconv.explain(tmp_path / "in.pth", str(tmp_path / "model.pth"))
    assert report.verdict == "convertible"
    assert report.commands[0].startswith("ckptconv run hf-tie-lm-head ")


def test_safetensors_without_metadata_is_worth_a_note(tmp_path):
    save_file(net(), tmp_path / "in.safetensors")
    report = ckptconv.explain(tmp_path / "in.safetensors", str(tmp_path / "in.safetensors"))
    assert (report.verdict, report.exit_code) == ("loads as it is", 0)
    assert [cause.kind for cause in report.causes] == ["metadata"]


def test_a_folder_of_distributed_checkpoint_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": net(), "step": 3}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    torch.save(net(), tmp_path / "model.pth")
    report = ckptconv.explain(tmp_path / "step-3", str(tmp_path / "model.pth"))
    assert report.verdict == "convertible"
    assert [cause.kind for cause in report.causes] == ["layout"]
    assert report.commands == (f"ckptconv run plain-tensors {tmp_path}/step-3 out.pth --target {tmp_path}/model.pth",)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "this is a git-lfs pointer (63 bytes), not the file itself",
        ),
        (b"<!DOCTYPE html><html>Access denied</html>", "this is a web page, not a checkpoint: a download that went wrong"),
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08\x00", "this is a gzip archive, not a checkpoint"),
    ],
    ids=["git-lfs", "web-page", "empty", "gzip"],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, raw, says):
    (tmp_path / "in.pth").write_bytes(raw)
    report = ckptconv.explain(tmp_path / "in.pth", None)
    assert (report.verdict, report.sentence, report.exit_code) == ("cannot be read", says, 3)


def test_a_file_that_is_cut_off_says_so(tmp_path):
    torch.save(net(), tmp_path / "whole.pth")
    (tmp_path / "in.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1500])
    report = ckptconv.explain(tmp_path / "in.pth")
    assert report.sentence == "the archive's end is missing: the file is cut off"
    assert report.exit_code == 3


def test_a_training_checkpoint_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 1, "loss": 0.5}, tmp_path / "in.pth")
    report = ckptconv.explain(tmp_path / "in.pth")
    assert report.exit_code == 3
    assert [problem.found for problem in report.problems] == ["at its top: epoch, loss"]


def test_several_networks_in_one_state_dict_are_never_guessed(tmp_path):
    torch.save({"state_dict": prefixed(net(), "net.") | prefixed(net(), "teacher.")}, tmp_path / "in.pth")
    torch.save(net(), tmp_path / "model.pth")
    report = ckptconv.explain(tmp_path / "in.pth", str(tmp_path / "model.pth"))
    assert "one state_dict holds 2 networks with the same names, under net. and teacher.: they fit equally well" in [
        cause.sentence for cause in report.causes
    ]
    assert report.commands[0].endswith(" --set network=net")


def test_without_a_target_the_rules_are_named_that_are_meant_for_the_file(tmp_path):
    torch.save(prefixed(net(), "module."), tmp_path / "in.pth")
    report = ckptconv.explain(tmp_path / "in.pth")
    assert (report.verdict, report.exit_code) == ("no target", 0)
    assert ("dataparallel",) in [each.rules for each in report.tried]
    assert report.commands[0].startswith("ckptconv run ")

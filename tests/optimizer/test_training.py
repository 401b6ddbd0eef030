"""Proved by training: some steps on one implementation, the checkpoint converted, and the other goes on as the first would have gone on.

The counter-proofs show that the comparison can fail: an optimizer that starts anew, and one with two moments exchanged, part from the curve.
"""

from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from making import target as saved_target
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import ckptconv
from ckptconv.target.torchvision_ops import import_with_torchvision

BEFORE, AFTER = 3, 4
#: float32, two implementations with their sums in another order
TOLERANCE = 1e-5


@dataclass
class Run:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    loss: object
    losses: list = field(default_factory=list)

    def steps(self, count):
        for _ in range(count):
            loss = self.loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
        return torch.tensor(self.losses[-count:], dtype=torch.float64)


def by_rank(model):
    """The usual two groups: no weight decay for what has one axis."""
    return [
        {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
        {"params": [each for each in model.parameters() if each.ndim >= 2], "weight_decay": 0.1},
    ]


@dataclass(frozen=True)
class Pair:
    """Two implementations of one network, the rule between them, and how they are trained."""

    make: object  #: gives both models
    rule: object  #: its name, or its steps
    optimize: object  #: model -> optimizer
    loss: object  #: of the first
    target_loss: object = None
    options: dict = field(default_factory=dict)
    form: str = "number"  #: of the optimizer's state in the file
    swapped: tuple = (0, 1)  #: two of the written states that have moments of one shape


def image_loss(call=lambda model, x: model(x), size=32, count=6, classes=5):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return lambda model: nn.functional.cross_entropy(call(model, images), labels)


def logits(model, images):
    return model(pixel_values=images).logits


def token_loss(call, vocabulary=61):
    ids = torch.randint(0, vocabulary, (4, 12), generator=torch.Generator().manual_seed(3))
    return lambda model: nn.functional.cross_entropy(call(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def vits():
    timm, transformers = import_with_torchvision("timm"), import_with_torchvision("transformers")
    source = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=5
    )
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=192, layer_norm_eps=1e-6,
        num_labels=5, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return source, transformers.ViTForImageClassification(config)


def resnets():
    torchvision, timm = import_with_torchvision("torchvision"), import_with_torchvision("timm")
    source = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return source, timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def gpts():
    transformers = import_with_torchvision("transformers")
    config = transformers.GPT2Config(
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), linear(transformers.GPT2LMHeadModel(config))


def linear(model):
    """GPT-2 as nanoGPT and its kin have it: with nn.Linear in the place of Conv1D."""
    for block in model.transformer.h:
        for holder, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            old = getattr(holder, name)
            setattr(holder, name, nn.Linear(*old.weight.shape))
    return model


def llamas():
    transformers = import_with_torchvision("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), fused(transformers.LlamaForCausalLM(config))


def fused(model):
    """Queries, keys and values of a layer in one weight; gate and up in another."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        width = attention.q_proj.in_features
        attention.qkv = nn.Linear(width, sum(parts), bias=False)
        for at, name in enumerate(("q_proj", "k_proj", "v_proj")):
            delattr(attention, name)
            vars(attention)[name] = lambda x, qkv=attention.qkv, parts=parts, at=at: qkv(x).split(parts, -1)[at]
        size = mlp.gate_proj.out_features
        mlp.gate_up = nn.Linear(width, 2 * size, bias=False)
        for at, name in enumerate(("gate_proj", "up_proj")):
            delattr(mlp, name)
            vars(mlp)[name] = lambda x, both=mlp.gate_up, at=at: both(x).chunk(2, -1)[at]
    return model


FUSE = """
  - concat: {from: "{m:**}.self_attn.{x:q|k|v}_proj.weight", to: "{m}.self_attn.qkv.weight", dim: 0}
  - concat: {from: ["{m:**}.gate_proj.weight", "{m:**}.up_proj.weight"], to: "{m}.gate_up.weight", dim: 0}
"""


def of_tokens(model, ids):
    return model(input_ids=ids).logits


PAIRS = {
    "timm ViT to transformers, AdamW amsgrad, two groups": Pair(
        vits, "timm-vit-to-hf-vit", lambda model: torch.optim.AdamW(by_rank(model), lr=3e-3, amsgrad=True), image_loss(), image_loss(logits), {"set": {"H": 3}}
    ),
    "torchvision ResNet to timm, SGD with momentum": Pair(
        resnets, "torchvision-resnet-to-timm-resnet", lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True),
        image_loss(size=16, count=4), swapped=(1, 2),
    ),
    "GPT-2 Conv1D to Linear, Adam amsgrad, named, tied": Pair(
        gpts, "gpt2-conv1d-to-linear", lambda model: torch.optim.Adam(model.named_parameters(), lr=3e-3, amsgrad=True), token_loss(of_tokens), swapped=(2, 3),
    ),
    "Llama to fused weights, AdamW, two groups, by name": Pair(
        llamas, FUSE, lambda model: torch.optim.AdamW(by_rank(model), lr=3e-3), token_loss(of_tokens), form="name",
        swapped=("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    ),
    "Llama to fused weights, AdamW, flat": Pair(
        llamas, FUSE, lambda model: torch.optim.AdamW(by_rank(model), lr=3e-3), token_loss(of_tokens), form="flat",
    ),
}  # fmt: skip
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def started(pair, model, loss):
    torch.manual_seed(1)
    model.train()
    optimizer = pair.optimize(model)
    return Run(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), loss)


@cache
def trained(name, folder):
    """The first model after some steps, its checkpoint, what the rules make of it, and the losses of its further steps."""
    pair = PAIRS[name]
    torch.manual_seed(0)
    source, target = pair.make()
    run = started(pair, source, pair.loss)
    run.steps(BEFORE)
    state = run.optimizer.state_dict() if pair.form == "number" else get_optimizer_state_dict(
        source, run.optimizer, options=FLAT if pair.form == "flat" else None
    )  # fmt: skip
    torch.save({"model": source.state_dict(), "optimizer": state, "scheduler": run.scheduler.state_dict(), "epoch": 7}, folder / "in.pth")
    saved_target(folder, target)
    rule = pair.rule
    if "\n" in rule:
        rule = folder / "mine.yaml"
        rule.write_text(f"version: 1\nname: mine\nsummary: s\nsteps:{pair.rule}")
    report = ckptconv.run(
        rule, folder / "in.pth", folder / "out.pth", target=str(folder / "target.json"), optimizer="follow", verify=4, **pair.options
    )
    written = torch.load(folder / "out.pth", weights_only=True)
    return SimpleNamespace(
        pair=pair, target=target, report=report, written=written, first=target.state_dict(), curve=run.steps(AFTER), optimizer=run.optimizer
    )


def continued(found, state):
    """The losses of the second model, from the converted weights and this optimizer's state."""
    pair = found.pair
    run = started(pair, found.target, pair.target_loss or pair.loss)
    run.model.load_state_dict(found.written["model"], strict=True)
    run.model.zero_grad()
    if state is not None and pair.form == "number":
        run.optimizer.load_state_dict(state)
    elif state is not None:
        set_optimizer_state_dict(run.model, run.optimizer, state, options=FLAT if pair.form == "flat" else None)
    run.scheduler.load_state_dict(found.written["scheduler"])
    if state is None:  # else the rate is the state's
        for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    return run.steps(AFTER)


def parted(found, curve):
    return float(((curve - found.curve).abs() / found.curve.abs()).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("trained")

    def of(name):
        made = base / str(list(PAIRS).index(name))
        made.mkdir(exist_ok=True)
        return made

    return of


@pytest.mark.parametrize("name", PAIRS)
def test_the_other_implementation_goes_on_as_the_first_would(name, folder):
    found = trained(name, folder(name))
    assert found.report.ladder.reached == "L0 L1 L3 L4"
    assert found.written["epoch"] == 7
    assert parted(found, continued(found, found.written["optimizer"])) < TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_without_its_state_it_does_not(name, folder):
    found = trained(name, folder(name))
    assert parted(found, continued(found, None)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.form != "flat"])
def test_with_two_states_exchanged_it_does_not(name, folder):
    found = trained(name, folder(name))
    states = dict(found.written["optimizer"]["state"])
    one, other = found.pair.swapped
    key = "momentum_buffer" if "momentum_buffer" in states[one] else "exp_avg"
    assert states[one][key].shape == states[other][key].shape
    states[one], states[other] = states[other], states[one]
    assert parted(found, continued(found, {**found.written["optimizer"], "state": states})) > 100 * TOLERANCE

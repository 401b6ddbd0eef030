"""Tiny models of a few well-known layouts, as manifests."""

from ckptconv.spec import DType, Manifest, TensorSpec


def manifest(ties=(), **shapes):
    """Names with `__` for a dot; a shape, or a shape and a dtype."""
    tensors = {}
    for name, given in shapes.items():
        shape, dtype = given if isinstance(given, tuple) else (given, "float32")
        tensors[name.replace("__", ".")] = TensorSpec(tuple(shape), DType(dtype))
    return Manifest(tensors, ties)


class Builder:
    """Modules one after the other, as a constructor registers them."""

    def __init__(self, prefix=""):
        self.prefix, self.tensors = prefix, {}

    def tensor(self, name, *shape, dtype="float32"):
        self.tensors[self.prefix + name] = TensorSpec(tuple(shape), DType(dtype))
        return self

    def linear(self, name, out, size, bias=True):
        self.tensor(f"{name}.weight", out, size)
        return self.tensor(f"{name}.bias", out) if bias else self

    def turned(self, name, size, out):
        return self.tensor(f"{name}.weight", size, out).tensor(f"{name}.bias", out)

    def norm(self, name, size, names=("weight", "bias")):
        for each in names:
            self.tensor(f"{name}.{each}", size)
        return self

    def batch_norm(self, name, size, counted=True):
        for each in ("weight", "bias", "running_mean", "running_var"):
            self.tensor(f"{name}.{each}", size)
        return self.tensor(f"{name}.num_batches_tracked", dtype="int64") if counted else self

    def conv(self, name, out, size, kernel):
        return self.tensor(f"{name}.weight", out, size, kernel, kernel)

    @property
    def manifest(self):
        return Manifest(self.tensors)


def fused_vit(depth=3, width=8, classes=11, positions=17, channels=3, prefix=""):
    """The fused queries, keys and values of one library."""
    made = Builder(prefix).tensor("cls_token", 1, 1, width).tensor("pos_embed", 1, positions, width)
    made.tensor("patch_embed.proj.weight", width, channels, 4, 4).tensor("patch_embed.proj.bias", width)
    for at in range(depth):
        block = f"blocks.{at}"
        made.norm(f"{block}.norm1", width).linear(f"{block}.attn.qkv", 3 * width, width).linear(f"{block}.attn.proj", width, width)
        made.norm(f"{block}.norm2", width).linear(f"{block}.mlp.fc1", 4 * width, width).linear(f"{block}.mlp.fc2", width, 4 * width)
    made.norm("norm", width)
    return made.linear("head", classes, width).manifest if classes else made.manifest


def split_vit(depth=3, width=8, classes=11):
    """The same network with three matrices, in another order."""
    made = Builder("vit.").tensor("embeddings.cls_token", 1, 1, width).tensor("embeddings.position_embeddings", 1, 17, width)
    made.tensor("embeddings.patch.projection.weight", width, 3, 4, 4).tensor("embeddings.patch.projection.bias", width)
    for at in range(depth):
        block = f"layers.{at}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made.linear(f"{block}.attention.{name}", width, width)
        made.norm(f"{block}.layernorm_before", width).norm(f"{block}.layernorm_after", width)
        made.linear(f"{block}.mlp.fc1", 4 * width, width).linear(f"{block}.mlp.fc2", width, 4 * width)
    made.norm("layernorm", width)
    made.prefix = ""
    return made.linear("classifier", classes, width).manifest


def experts(depth=2, count=3):
    """One tensor for each expert."""
    made = Builder("model.").tensor("embed_tokens.weight", 31, 8)
    for at in range(depth):
        block = f"layers.{at}"
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            made.linear(f"{block}.self_attn.{name}", rows, 8, bias=False)
        made.linear(f"{block}.moe.gate", count, 8, bias=False)
        for expert in range(count):
            for name, rows, size in (("w1", 12, 8), ("w2", 8, 12), ("w3", 12, 8)):
                made.linear(f"{block}.moe.experts.{expert}.{name}", rows, size, bias=False)
        made.norm(f"{block}.input_layernorm", 8, ["weight"]).norm(f"{block}.post_attention_layernorm", 8, ["weight"])
    return made.norm("norm", 8, ["weight"]).manifest


def stacked_experts(depth=2, count=3):
    """All experts in one tensor, the gate above the up projection."""
    made = Builder("model.").tensor("embed_tokens.weight", 31, 8)
    for at in range(depth):
        block = f"layers.{at}"
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            made.linear(f"{block}.self_attn.{name}", rows, 8, bias=False)
        made.linear(f"{block}.mlp.router", count, 8, bias=False)
        made.tensor(f"{block}.mlp.experts.gate_up_proj", count, 24, 8).tensor(f"{block}.mlp.experts.down_proj", count, 8, 12)
        made.norm(f"{block}.input_layernorm", 8, ["weight"]).norm(f"{block}.post_attention_layernorm", 8, ["weight"])
    return made.norm("norm", 8, ["weight"]).manifest


def gpt(turned, depth=2):
    """Linear layers, or the same stored `in x out`."""
    made = Builder("transformer.").tensor("wte.weight", 31, 8).tensor("wpe.weight", 20, 8)
    layer = made.turned if turned else lambda name, size, out: made.linear(name, out, size)
    for at in range(depth):
        block = f"h.{at}"
        made.norm(f"{block}.ln_1", 8)
        layer(f"{block}.attn.c_attn", 8, 24)
        layer(f"{block}.attn.c_proj", 8, 8)
        made.norm(f"{block}.ln_2", 8)
        layer(f"{block}.mlp.c_fc", 8, 32)
        layer(f"{block}.mlp.c_proj", 32, 8)
    return made.norm("ln_f", 8).manifest


def resnet(blocks=(1, 2), first=0):
    """Basic blocks in stages, the projection of the shortcut after the convolutions."""
    made = Builder().conv("conv1", 8, 3, 7).batch_norm("bn1", 8)
    size = 8
    for stage, count in enumerate(blocks, 1):
        out = 8 * 2 ** (stage - 1)
        for at in range(count):
            block = f"layer{stage}.{at + first}"
            made.conv(f"{block}.conv1", out, size, 3).batch_norm(f"{block}.bn1", out)
            made.conv(f"{block}.conv2", out, out, 3).batch_norm(f"{block}.bn2", out)
            if size != out:
                made.conv(f"{block}.downsample.0", out, size, 1).batch_norm(f"{block}.downsample.1", out)
            size = out
    return made.linear("fc", 5, size).manifest


def staged_resnet(blocks=(1, 2)):
    """The same network, the projection first, everything called otherwise."""
    made = Builder("encoder.").conv("embedder.convolution", 8, 3, 7).batch_norm("embedder.normalization", 8)
    size = 8
    for stage, count in enumerate(blocks):
        out = 8 * 2**stage
        for at in range(count):
            block = f"stages.{stage}.layers.{at}"
            if size != out:
                made.conv(f"{block}.shortcut.convolution", out, size, 1).batch_norm(f"{block}.shortcut.normalization", out)
            for each, inner in enumerate((size, out)):
                made.conv(f"{block}.layer.{each}.convolution", out, inner, 3).batch_norm(f"{block}.layer.{each}.normalization", out)
            size = out
    made.prefix = ""
    return made.linear("classifier.1", 5, size).manifest

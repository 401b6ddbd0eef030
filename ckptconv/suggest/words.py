"""What names say: their words in one spelling, and how alike two of them are among others that could be meant.

No table of models: only words that people use for one another everywhere, and the few that tell which of two alike comes first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import log

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

#: Words for one thing, the last of each line standing for all.
_SPELLINGS = (
    "attention attn", "ffn mlp", "query wq q", "key wk k", "value wv v", "wo o", "layernorm ln norm", "bn norm", "batchnorm norm",
    "normalization norm", "convolution conv", "projection proj", "position pos", "positional pos", "class cls", "embeddings embed", "embedding embed",
    "tok token", "tokens token", "wte token", "word token", "wpe pos", "classifier head", "unembed head", "fc linear", "lin linear", "dense linear",
    "downsample shortcut", "skip shortcut", "dist distillation", "dw depthwise", "sa attn", "ls scale", "lambda scale", "gamma scale",
    "layer block", "layers block", "blocks block", "h block", "groups stage", "levels stage", "stages stage", "reg register", "registers register",
    "se squeeze", "squeezeexcitation squeeze", "attn_mask mask",
)  # fmt: skip
_SAME: dict[str, str] = {word: line.split()[-1] for line in _SPELLINGS for word in line.split()}
#: Words that say nothing of what a module is, because nearly every model has them somewhere above everything.
_EMPTY = frozenset({"model", "module", "net", "backbone", "the", "self", "block", "transformer", "to"})
_SPLIT: dict[str, tuple[str, ...]] = {
    "layernorm": ("layernorm",),
    "feedforward": ("mlp",),
    "inproj": ("in", "proj"),
    "outproj": ("out", "proj"),
}

#: Attention to another sequence is called in four ways.
_PHRASES = (
    ("feed forward", "mlp"), ("squeeze excitation", "squeeze"), ("encoder attn", "cross attn"), ("encdec attn", "cross attn"),
    ("output block", "head"), ("lm head", "head"), ("src attn", "cross attn"), ("multihead attn", "cross attn"),
)  # fmt: skip

#: Which of two alike comes first: `pre`, `input`, `before`; and what stands before or after another part is told by that part.
_FIRST = frozenset({"before", "input", "in", "first", "expand", "start"})
_SECOND = frozenset({"after", "output", "out", "second", "reduce", "final", "end"})
QUERY_KEY_VALUE = ("q", "k", "v")
_LETTERS = frozenset(QUERY_KEY_VALUE)

#: Tensors that libraries make themselves and sometimes save: masks, indices, counters, frequencies.
BUFFERS = frozenset({
    "num_batches_tracked", "position_ids", "token_type_ids", "inv_freq", "relative_position_index", "attn_mask", "masked_bias", "causal_mask",
    "freqs", "freqs_cis", "rope_freqs", "relative_coords_table", "original_inv_freq", "cos_cached", "sin_cached", "logit_mask",
})  # fmt: skip
#: What an optimizer keeps for every parameter: a file of these has the shapes of a model, and none of its weights.
OPTIMIZER = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq", "square_avg", "grad_avg", "acc_delta"})
ADAPTERS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
HEADS = frozenset({"head", "heads", "classifier", "pooler", "fc", "logits", "output", "predictions", "classification", "pool"})
TOKENS = frozenset({"token", "cls", "distillation", "mask", "register"})


@lru_cache(maxsize=1 << 17)
def words(name: str) -> tuple[str, ...]:
    """The words of a name in one spelling, numbers left out.

    >>> words("model.self_attn.q_proj"), words("attention.wq")
    (('attn', 'q', 'proj'), ('attn', 'q'))
    """
    found: list[str] = []
    for segment in name.split("."):
        pieces = [piece.lower() for piece in _WORD.findall(segment) if not piece.isdigit()]
        spelled = [word for piece in pieces for word in _SPLIT.get(piece, (piece,))]
        joined = " ".join(_SAME.get(word, word) for word in spelled)
        for phrase, said in _PHRASES:
            joined = joined.replace(phrase, said)
        found += [word for word in joined.split() if word not in _EMPTY]
    return tuple(found)


def place(name: str) -> int:
    """1 or 2 where a name says that it is the first or the second of two alike, else 0.

    What stands after the attention, or before the feed-forward part, belongs to the latter.

    >>> [place(name) for name in ("layernorm_before", "post_attention_layernorm", "attention_norm", "mlp_norm", "norm")]
    [1, 2, 1, 2, 0]
    """
    last = name.rpartition(".")[2]
    spelled = [piece.lower() for piece in _WORD.findall(last)]
    said = set(words(last))
    if "post" in spelled:
        return 2 if "attn" in said else 0
    if "attn" in said and "norm" in said:
        return 1
    if "mlp" in said and "norm" in said:
        return 2
    if _FIRST & set(spelled):
        return 1
    return 2 if _SECOND & set(spelled) else 0


def letter(name: str) -> str:
    """Whether a name is that of queries, keys or values: one of these letters, or nothing.

    >>> [letter(name) for name in ("self.query", "attn.k_proj", "attn.qkv", "out")]
    ['q', 'k', '', '']
    """
    said = [word for word in words(name.rpartition(".")[2]) if set(word) <= _LETTERS]
    return said[0] if len(said) == 1 and len(said[0]) == 1 else ""


def likeness(left: Sequence[str], right: Sequence[str]) -> list[list[float]]:
    """How alike every name of ``left`` is to every one of ``right``, 0 to 1: words that tell none of them apart count little.

    >>> [[round(each, 1) for each in row] for row in likeness(["attn.q_proj", "attn.k_proj"], ["attention.wq", "attention.wk"])]
    [[0.6, 0.2], [0.2, 0.6]]
    """
    ours, theirs = [Counter(words(name)) for name in left], [Counter(words(name)) for name in right]
    spread = Counter(word for each in (*ours, *theirs) for word in each)
    total = len(ours) + len(theirs)
    weight = {word: log(1 + total / count) for word, count in spread.items()}
    return [[_overlap(one, other, weight) for other in theirs] for one in ours]


def _overlap(one: Counter[str], other: Counter[str], weight: dict[str, float]) -> float:
    both = sum(weight[word] * count for word, count in (one & other).items())
    either = sum(weight[word] * count for word, count in (one | other).items())
    return both / either if either else 0.5


def says_all(names: Iterable[str], wanted: Sequence[str]) -> list[int] | None:
    """``names`` in the order of the ``wanted`` letters, where each is carried by exactly one of them; else None.

    >>> says_all(["attn.v_proj", "attn.query", "attn.key"], ("q", "k", "v")), says_all(["kv", "q"], ("q", "k", "v"))
    ([1, 2, 0], [1, 0])
    """
    carried = [set("".join(word for word in words(name.rpartition(".")[2]) if set(word) <= _LETTERS)) for name in names]
    said = [letter for each in carried for letter in each]
    if not all(carried) or len(said) != len(wanted) or set(said) != set(wanted):
        return None
    return sorted(range(len(carried)), key=lambda at: min(wanted.index(letter) for letter in carried[at]))

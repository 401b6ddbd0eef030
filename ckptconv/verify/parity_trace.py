"""L6: what every module of two models was given and gave, which modules are each other's, and the first pair that differs.

Modules are paired by what they hold: a target module belongs to the source module whose tensors its own were made from. That holds for
containers too (an attention block with one fused qkv, and one with three projections), and it is in the containers that a mistake shows
which leaves every single layer right, like an exchange of q and k. What holds nothing (an activation) is paired by what it was given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ckptconv.verify.parity import Divergence

if TYPE_CHECKING:
    from torch import Tensor, nn

BUDGET = 256 << 20  #: bytes kept of one model's activations
MAX_SORTED = 1 << 24  #: elements; above, sums are compared
_SHUFFLED = 0.05  #: a permutation changes single elements by more than this
#: Of a module itself: what it is called -> under which attribute it stands.
_OWN: Mapping[str, tuple[str, ...]] = {
    "eps": ("eps", "variance_epsilon", "epsilon"), "approximate": ("approximate",), "negative_slope": ("negative_slope",),
    **{name: (name,) for name in (
        "normalized_shape", "num_groups", "stride", "padding", "dilation", "groups", "ceil_mode", "kernel_size", "count_include_pad",
        "output_size", "padding_mode", "upscale_factor", "alpha", "beta", "dim",
    )},
}  # fmt: skip
#: Of a module or of what lies in it, where that is one value: libraries cut attention into more or fewer modules.
_DEEP: Mapping[str, tuple[str, ...]] = {
    "num_heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_size", "dim_head", "head_size"),
    "scale": ("scale", "scaling", "softmax_scale"), "is_causal": ("is_causal",), "norm_first": ("norm_first",),
    "window_size": ("window_size",), "rope_theta": ("rope_theta",),
}  # fmt: skip
_ACTIVATION = re.compile(r"(act|activation|nonlinearity)(_fn|_layer)?|\w+_act_fn|\w+_activation")


class Seen(Struct, frozen=True):
    """What is kept of one tensor that passed: a sample of its elements, and sums over all of them that no permutation changes."""

    shape: tuple[int, ...]
    sums: tuple[float, ...]  #: of x, |x|, x², |x|³
    ends: tuple[float, float]
    sample: Tensor

    @property
    def numel(self) -> int:
        found = 1
        for size in self.shape:
            found *= size
        return found

    @property
    def biggest(self) -> float:
        return max(abs(self.ends[0]), abs(self.ends[1]), 1e-300)


class Call(Struct, frozen=True):
    """One call of one module."""

    name: str
    given: Seen | None
    gave: Seen | None
    position: int = 0  #: when it ended, among all calls


def sample_size(*models: nn.Module) -> int:
    """How many elements of each tensor are kept; as many of one model as of the other, or samples could not be compared."""
    most = max(sum(1 for _ in model.modules()) for model in models)
    return max(256, min(1 << 18, BUDGET // (16 * most)))


def recorded(model: nn.Module, run: Callable[[], Any], limit: int = 1 << 12) -> list[Call]:
    """Every call of every module while ``run`` runs, in the order in which they end, with samples of ``limit`` elements."""
    modules = dict(model.named_modules())
    calls: list[Call] = []
    given: list[Seen | None] = []
    handles = []
    for name, module in modules.items():

        def before(_: nn.Module, arguments: Any, keywords: Any) -> None:
            given.append(seen((arguments, keywords), limit))

        def after(_: nn.Module, _arguments: Any, output: Any, name: str = name) -> None:
            calls.append(Call(name, given.pop(), seen(output, limit), len(calls)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def seen(value: Any, limit: int) -> Seen | None:
    """What is kept of the first floating-point tensor of ``value``, or of its first tensor."""
    import torch

    tensors = list(_tensors(value))
    if not tensors:
        return None
    tensor = next((each for each in tensors if each.is_floating_point()), tensors[0]).detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.numel():
        return Seen(tuple(tensor.shape), (0.0,) * 4, (0.0, 0.0), tensor.reshape(-1).to(torch.float32))
    flat = tensor.reshape(-1)
    wide = flat.to(torch.float64)
    size = wide.abs()
    sums = tuple(float(part.sum()) for part in (wide, size, wide.square(), size.pow(3)))
    # The places depend on the number of elements only, so that both models' samples are of the same ones; evenly spaced ones could all lie
    # in one channel.
    places = torch.randint(flat.numel(), (limit,), generator=torch.Generator().manual_seed(flat.numel())) if flat.numel() > limit else None
    sample = (flat if places is None else flat[places]).to(flat.dtype if flat.dtype == torch.float64 else torch.float32, copy=True)
    return Seen(tuple(tensor.shape), sums, (float(wide.min()), float(wide.max())), sample)


def _tensors(value: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def apart(left: Seen, right: Seen) -> tuple[float, float]:
    """Largest difference of the samples, absolute and relative to the left's range."""
    if left.sample.shape != right.sample.shape:
        return float("inf"), float("inf")
    if not left.numel:
        return 0.0, 0.0
    gap = float((left.sample.double() - right.sample.double()).abs().nan_to_num(float("inf")).max())
    return gap, gap / left.biggest


def agree(left: Seen | None, right: Seen | None, tolerance: float) -> bool:
    """Equal within the tolerance; or the same elements in another order, as a rule may lay them out (channels last, rotary halves)."""
    if left is None or right is None:
        return left is right
    if left.numel != right.numel:
        return False
    if _plain(left.shape) == _plain(right.shape):
        gap = apart(left, right)[1]
        if gap <= tolerance or gap < _SHUFFLED:
            return gap <= tolerance
    scales = (left.sums[1], left.sums[1], left.sums[2], left.sums[3])
    sums = all(abs(one - other) <= tolerance * max(scale, 1e-300) for one, other, scale in zip(left.sums, right.sums, scales, strict=True))
    return sums and all(abs(one - other) <= tolerance * left.biggest for one, other in zip(left.ends, right.ends, strict=True))


def _plain(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


class Checked(Struct, frozen=True):
    """A pair (or several that mean one thing) after the run."""

    position: int  #: of the target's call
    source: Call
    target: Call
    same: bool
    inputs_agree: bool


def _inside_out(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules, each after those in it."""
    around: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        while around and around[-1][0] and not name.startswith(f"{around[-1][0]}."):
            yield around.pop()
        around.append((name, module))
    yield from reversed(around)


class Held:
    """Which tensors each module of a model holds, itself or further in; tied ones under their first name."""

    def __init__(self, model: nn.Module) -> None:
        import torch

        self.modules: dict[str, nn.Module] = dict(_inside_out(model))
        self.state: dict[str, Tensor] = {
            name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
        }
        first: dict[int, str] = {}
        self.canonical = {name: first.setdefault(id(value), name) for name, value in self.state.items()}
        self.under: dict[str, set[str]] = {}
        for name, tensor in self.canonical.items():
            parts = name.split(".")
            for length in range(len(parts)):
                self.under.setdefault(".".join(parts[:length]), set()).add(tensor)

    def of(self, module: str) -> set[str]:
        return self.under.get(module, set())

    def own(self, module: str) -> dict[str, str]:
        """Local names of what the module holds itself."""
        prefix = f"{module}." if module else ""
        return {name[len(prefix) :]: name for name in self.state if name.startswith(prefix) and "." not in name[len(prefix) :]}

    def is_leaf(self, module: str) -> bool:
        return not any(True for _ in self.modules[module].children())


class Models:
    """Both models, and from which source tensors each target tensor was made."""

    def __init__(self, source: nn.Module, target: nn.Module, mapping: Mapping[str, Sequence[str]]) -> None:
        self.source, self.target = Held(source), Held(target)
        self.mapping: Mapping[str, Sequence[str]] = mapping

    def groups(self) -> list[tuple[list[str], list[str]]]:
        """Target modules and source modules that hold the same tensors, innermost first: mostly one of each, more where one wraps another."""
        made: dict[str, set[str]] = {}
        for name, sources in self.mapping.items():
            if name in self.target.canonical:
                canonical = {self.source.canonical.get(each, each) for each in sources}
                made.setdefault(self.target.canonical[name], set()).update(canonical)
        used = set().union(*made.values()) if made else set()
        by_set: dict[frozenset[str], list[str]] = {}
        for module in self.source.modules:
            by_set.setdefault(frozenset(self.source.of(module) & used), []).append(module)
        found: dict[frozenset[str], list[str]] = {}
        for module in self.target.modules:
            key = frozenset(each for name in self.target.of(module) for each in made.get(name, ()))
            if key and key in by_set:
                found.setdefault(key, []).append(module)
        return [(targets, by_set[key]) for key, targets in found.items()]

    def differences(self) -> list[str]:
        """Hyper-parameters of paired modules that differ, each once, with the first pair that has it."""
        found: dict[str, list[str]] = {}
        for targets, sources in self.groups():
            for source, target in ((source, target) for target in targets for source in sources):
                for text in unlike(self.source.modules[source], self.target.modules[target]):
                    found.setdefault(text, []).append(_names(source, target))
        return [f"{text} ({names[0]}{f', and {len(names) - 1} more' if len(names) > 1 else ''})" for text, names in found.items()]

    def verdict(self, left: Sequence[Call], right: Sequence[Call], tolerance: float) -> tuple[str, list[str], Divergence | None]:
        """Why the outputs differ, what is set differently, and where it starts."""
        if not self.mapping:
            self.mapping = self._aligned(left, right)
        first, walked = None, []
        for level in (tolerance, tolerance / 10, tolerance / 100):  # many small differences may add up to one that is seen
            walked = self._walk(left, right, level)
            first = next((pair for pair in walked if not pair.same and pair.inputs_agree), None)
            if first is not None and first.target.name:
                break
        if first is None or not first.target.name:
            # Only the whole model stands out: what differs lies outside of any pair, and the first pair that it reaches says more.
            first = next((pair for pair in walked if not pair.same), first)
        differences = self.differences()
        if first is None:
            return ("hyper-parameters differ" if differences and self._same_values("", "") else "mapping wrong"), differences, None
        source, target = first.source.name, first.target.name
        own = unlike(self.source.modules[source], self.target.modules[target])
        if not own and not (self.source.of(source) or self.target.of(target)):
            own = _other_class(self.source.modules[source], self.target.modules[target])
        known = [f"{text} ({_names(source, target)})" for text in own]
        blamed = bool(own) and first.inputs_agree and self._same_values(source, target)
        texts = known + [text for text in differences if not any(text.startswith(f"{each} (") for each in own)]
        return ("hyper-parameters differ" if blamed else "mapping wrong"), texts, self._divergence(first, walked)

    def _divergence(self, pair: Checked, walked: Sequence[Checked]) -> Divergence:
        inside = [each for each in walked if each.position < pair.position and each.target.name.startswith(f"{pair.target.name}.")]
        reached = next((each for each in inside if not each.same), None)
        fine = [each for each in inside if each.same and (reached is None or each.position < reached.position)]
        detail = f"inside it {_names(fine[-1].source.name, fine[-1].target.name)} still agrees" if fine else ""
        if reached is not None:
            detail += f"{', and ' if detail else 'inside it '}the input of {_names(reached.source.name, reached.target.name)} differs"
        gap = apart(pair.source.gave, pair.target.gave) if pair.source.gave and pair.target.gave else (float("inf"),) * 2
        return Divergence(pair.source.name, pair.target.name, gap[0], gap[1], pair.inputs_agree, detail)

    def _walk(self, left: Sequence[Call], right: Sequence[Call], tolerance: float) -> list[Checked]:
        """Every pair with whether it agrees, in the order in which the target's modules ended."""
        found = [*self._held_pairs(left, right, tolerance), *self._bare_pairs(left, right, tolerance)]
        return sorted(found, key=lambda pair: pair.position)

    def _held_pairs(self, left: Sequence[Call], right: Sequence[Call], tolerance: float) -> Iterator[Checked]:
        sources, targets = _by_name(left), _by_name(right)
        for target_names, source_names in self.groups():
            times = max((len(targets.get(name, ())) for name in target_names), default=0)
            for time in range(times):
                pairs = [
                    (sources[source][time], targets[target][time])
                    for target in target_names for source in source_names
                    if time < len(targets.get(target, ())) and time < len(sources.get(source, ()))
                ]  # fmt: skip
                checked = _checked([pair for pair in pairs if self._comparable(*pair)], tolerance)
                if checked is not None:
                    yield checked

    def _comparable(self, left: Call, right: Call) -> bool:
        """False for a fused projection and one of its parts, which are made of the same tensor and give different amounts."""
        if left.gave is None or right.gave is None:
            return False
        held = (sum(one.state[name].numel() for name in one.of(call.name)) for one, call in ((self.source, left), (self.target, right)))
        return left.gave.numel == right.gave.numel or len(set(held)) == 1

    def _bare_pairs(self, left: Sequence[Call], right: Sequence[Call], tolerance: float) -> Iterator[Checked]:
        """Leaves that hold nothing, by their inputs. Those that change nothing (dropout) say nothing, and have no partner in the other."""
        bare = [
            [call for call in calls if not held.of(call.name) and held.is_leaf(call.name) and not _idle(call)]
            for held, calls in ((self.source, left), (self.target, right))
        ]
        for call in bare[1]:
            near = [each for each in bare[0] if agree(each.given, call.given, tolerance) and self._may_pair(each, call)]
            # The one of the same class, else the one at about the same place in the run.
            near.sort(key=lambda each: (not self._same_class(each, call), abs(each.position * len(right) - call.position * len(left))))
            checked = _checked([(each, call) for each in near], tolerance)
            if checked is not None:
                yield checked

    def _same_class(self, left: Call, right: Call) -> bool:
        return type(self.source.modules[left.name]).__name__ == type(self.target.modules[right.name]).__name__

    def _may_pair(self, left: Call, right: Call) -> bool:
        return self._same_class(left, right) or (left.gave is not None and right.gave is not None and left.gave.numel == right.gave.numel)

    def _aligned(self, left: Sequence[Call], right: Sequence[Call]) -> dict[str, tuple[str, ...]]:
        """A mapping from the order in which layers run and the shapes of what they hold."""

        def layers(held: Held, calls: Sequence[Call]) -> dict[str, list[list[int]]]:
            found: dict[str, list[list[int]]] = {}
            for call in calls:
                own = held.own(call.name)
                if own and held.is_leaf(call.name):
                    found.setdefault(call.name, sorted(sorted(held.state[name].shape) for name in own.values()))
            return found

        one, other = layers(self.source, left), layers(self.target, right)
        sources, targets = list(one), list(other)
        mapping: dict[str, tuple[str, ...]] = {}
        for block in SequenceMatcher(None, [*map(str, one.values())], [*map(str, other.values())], autojunk=False).get_matching_blocks():
            for offset in range(block.size):
                held, wanted = self.source.own(sources[block.a + offset]), self.target.own(targets[block.b + offset])
                for (local, name), by_order in zip(wanted.items(), held.values(), strict=False):
                    mapping[name] = (held.get(local, by_order),)
        return mapping

    def _same_values(self, source: str, target: str) -> bool:
        """True where both modules hold the same numbers, in any order and shape: what a conversion without arithmetic keeps."""
        import torch

        flat = []
        for held, module in ((self.source, source), (self.target, target)):
            tensors = [
                held.state[name].detach().double().reshape(-1) for name in sorted(held.of(module)) if held.state[name].is_floating_point()
            ]
            flat.append(torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.float64))
        if flat[0].numel() != flat[1].numel():
            return False
        if flat[0].numel() > MAX_SORTED:
            flat = [torch.stack([values.sum(), values.square().sum(), values.abs().sum()]) for values in flat]
        else:
            flat = [values.sort().values for values in flat]
        return torch.allclose(flat[0], flat[1], rtol=1e-2, atol=1e-6)  # a cast to half precision is a conversion too


def _by_name(calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.name, []).append(call)
    return found


def _checked(pairs: Sequence[tuple[Call, Call]], tolerance: float) -> Checked | None:
    """One verdict on pairs that mean one thing: fine where any of them agrees. A wrapper that adds a residual has no equal in the other."""
    if not pairs:
        return None
    for source, target in pairs:
        if agree(source.gave, target.gave, tolerance):
            return Checked(target.position, source, target, True, True)
    source, target = next((pair for pair in pairs if agree(pair[0].given, pair[1].given, tolerance)), pairs[0])
    return Checked(target.position, source, target, False, agree(source.given, target.given, tolerance))


def _idle(call: Call) -> bool:
    return call.given is None or call.gave is None or (call.given.shape == call.gave.shape and apart(call.given, call.gave)[0] == 0)


def _names(source: str, target: str) -> str:
    return f"{source or '(the model)'} / {target or '(the model)'}"


def unlike(source: nn.Module, target: nn.Module) -> list[str]:
    """Attributes that both have and that differ.

    >>> from torch import nn
    >>> unlike(nn.LayerNorm(4, eps=1e-6), nn.LayerNorm(4))
    ['eps 1e-06 against 1e-05']
    >>> unlike(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, (3, 3), padding=(1, 1)))
    []
    """
    found = []
    for name, names in (*_OWN.items(), *_DEEP.items()):
        read = _value if name in _OWN else _common
        left, right = read(source, names), read(target, names)
        if left is not None and right is not None and not _equal(left, right):
            found.append(f"{name} {_shown(left)} against {_shown(right)}")
    found += _unlike_tables(source, target)
    left, right = _activation(source), _activation(target)
    if left is not None and right is not None and not _equal(left[1], right[1]):
        found.append(f"activation {left[0]} against {right[0]}")
    return found


def _unlike_tables(source: nn.Module, target: nn.Module) -> list[str]:
    """Buffers that a model computes by itself (rotary frequencies, relative positions): they come from hyper-parameters, not from a file."""
    import torch

    found = []
    for name in sorted(source._non_persistent_buffers_set & target._non_persistent_buffers_set):
        left, right = source._buffers.get(name), target._buffers.get(name)
        if left is None or right is None:
            continue
        if left.shape != right.shape:
            found.append(f"buffer {name} of shape {list(left.shape)} against {list(right.shape)}")
        elif left.dtype != right.dtype or not torch.allclose(left, right, rtol=1e-5, atol=1e-8, equal_nan=True):
            places = (left != right).reshape(-1).nonzero()
            first = int(places[0]) if len(places) else 0
            values = (_shown(each.reshape(-1)[first].item()) for each in (left, right))
            found.append(f"buffer {name}[{first}] {' against '.join(values)}")
    return found


def _other_class(source: nn.Module, target: nn.Module) -> list[str]:
    one, other = type(source).__name__, type(target).__name__
    return [f"activation {one} against {other}"] if one != other else []


def _value(module: nn.Module, names: Sequence[str]) -> Any:
    """A number, text, flag, or tuple of numbers that the module has under one of the names."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (int, float, str)):
            return value
        if isinstance(value, (list, tuple)) and value and all(isinstance(each, (int, float)) for each in value):
            return tuple(value)
    return None


def _common(module: nn.Module, names: Sequence[str]) -> Any:
    """The module's own value, else the one that all modules in it share."""
    own = _value(module, names)
    if own is not None:
        return own
    values = [value for value in (_value(each, names) for each in module.modules()) if value is not None]
    return values[0] if values and all(_equal(values[0], value) for value in values) else None


def _activation(module: nn.Module) -> tuple[str, tuple[float, ...]] | None:
    """The one activation of a module, told by what it does to a few numbers; functions and modules of any name are compared that way."""
    found: list[tuple[str, tuple[float, ...]]] = []
    for each in module.modules():
        for name, value in (*vars(each).items(), *each.named_children()):
            if _ACTIVATION.fullmatch(name) and callable(value) and not isinstance(value, type):
                done = _applied(value)
                if done is not None:
                    found.append((_called(value), done))
    return found[0] if found and all(_equal(found[0][1], other[1]) for other in found) else None


def _applied(function: Any) -> tuple[float, ...] | None:
    import torch

    if isinstance(function, torch.nn.Module) and any(True for _ in function.parameters()):
        return None
    try:
        with torch.no_grad():
            done = function(torch.linspace(-4, 4, 33, dtype=torch.float64))
    except Exception:
        return None
    return tuple(done.tolist()) if isinstance(done, torch.Tensor) and done.shape == (33,) else None


def _called(function: Any) -> str:
    import torch

    if isinstance(function, torch.nn.Module):
        return " ".join(str(function).split())
    return str(getattr(function, "__name__", type(function).__name__))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, tuple) or isinstance(right, tuple):
        left, right = (value if isinstance(value, tuple) else (value,) for value in (left, right))
        length = max(len(left), len(right))
        left, right = (value * length if len(value) == 1 else value for value in (left, right))
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, str) or isinstance(right, str):
        return bool(left == right)
    return math.isclose(left, right, rel_tol=1e-6)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

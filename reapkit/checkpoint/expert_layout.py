"""Which tensors of a checkpoint carry an expert axis, from their names and shapes together. Torch-free.

Four kinds of names are told apart inside a layer that routes:

    ....experts.7.gate_proj.weight          per expert: the index is in the name (with all its scales and shapes)
    ....experts.gate_up_proj[_blocks]       stacked: axis 0 counts experts (granitemoe and step spell it without
    `experts`) ....gate.weight, ....router.bias, ...   router: one axis has as many entries as there are experts
    everything else                         no expert axis: attention, norms, shared experts, dense parts

A tensor that fits none of them and yet could count experts is an error that names it, never a guess.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from weakref import WeakKeyDictionary

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint, collector_paused
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import TensorInfo

EXPERTS = ".experts."
STACKED_WITHOUT_EXPERTS = re.compile(
    r"^(?P<site>.*?)\.(?:(?:input|output)_linear|(?<=\.moe\.)(?:gate|up|down|gate_up)_proj)\."
)
LAYER = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)*)(?P<index>[0-9]{1,9})\.")
MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_[a-z_]+)?\.")
SHARED = re.compile(r"(?:^|[._])shared?(?:[._]|$)")
ROUTER = re.compile(
    r"(?:^|\.)(?:gate|wg|router\w*|moe_statics|classifier|\w*expert\w*|\w*correction_bias|tid2eid)(?:\.|$)"
)
ATTENTION = re.compile(r"(?:^|\.)\w*(?:attn|attention|mamba|conv|norm|rotary|latent)\w*(?:\.|$)")
DENSE = re.compile(r"(?:^|\.)(?:mlps?|feed_forward|ffn)\.(?:\d+\.)?(?:gate|up|down|gate_up|w[123])(?:_proj)?\.")
QUANTIZER_STATE = re.compile(
    r"(?:^|_)(?:weight|input|output|proj)_(?:global_)?scale(?:_\d|_inv)?$|scales$|weight_shape$|"
    r"zero_point$|^qzeros$|^g_idx$|weight_g_idx$"
)


@dataclass(frozen=True)
class MoeLayer:
    """The tensors of one layer that carry its expert axis.

    `parts`: what follows the expert's number, such as `gate_proj.weight` -> expert -> name. `stacked`: name -> axis
    that counts the experts, for weights and router rows alike; where that axis is longer than `num_experts`, its last
    entries belong to no routed expert (zero experts, shared rows) and stay. `table` names a fixed token-to-expert
    table: a layer that has one can only stay whole.
    """

    index: int
    num_experts: int
    parts: Mapping[str, Mapping[int, str]]
    stacked: Mapping[str, int]
    table: str | None = None

    @cached_property
    def per_expert(self) -> Mapping[int, tuple[str, ...]]:
        """Expert -> names, where each expert has tensors of its own."""
        found: dict[int, list[str]] = defaultdict(list)
        for names in self.parts.values():
            for expert, name in names.items():
                found[expert].append(name)
        return {expert: tuple(names) for expert, names in sorted(found.items())}

    @property
    def names(self) -> Iterable[str]:
        yield from self.stacked
        for names in self.parts.values():
            yield from names.values()


@dataclass(frozen=True)
class Kind:
    """A tensor, or the tensors of one layer that differ in nothing but their expert: `names`, alike in dtype and shape.

    `layer` owns the expert axis, if there is one; `axis` is its place in the shape, None where the experts lie one by
    one. Sums over a checkpoint go over its kinds: there are thousands of them where there are hundreds of thousands of
    tensors.
    """

    tensor: TensorInfo
    names: tuple[str, ...]
    layer: MoeLayer | None = None
    axis: int | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def experts(self) -> int:
        """Experts on the axis: the layer's, or more where an axis has entries of no routed expert."""
        return self.layer.num_experts if self.axis is None else self.tensor.shape[self.axis]


@dataclass(frozen=True)
class Layout:
    """Decoder layers that route, multi-token-prediction blocks that route, and every tensor of such blocks, routing or
    not.

    `stack` is the decoder layers' common prefix, such as `model.layers.`; `mtp` continues the decoder's numbers.
    `kinds` hold every tensor once.
    """

    layers: Mapping[int, MoeLayer]
    mtp: Mapping[int, MoeLayer]
    mtp_tensors: frozenset[str]
    stack: str
    kinds: tuple[Kind, ...]


def read_layout(checkpoint: Checkpoint) -> Layout:
    """Finds every expert axis of the checkpoint, once; tensors of multi-token-prediction blocks are kept apart.

    Raises UnusableError naming a tensor that might carry an expert axis but cannot be decided, or counts that
    contradict each other.
    """
    if checkpoint not in _LAYOUTS:
        with collector_paused():
            _LAYOUTS[checkpoint] = _read_layout(checkpoint)
    return _LAYOUTS[checkpoint]


_LAYOUTS: WeakKeyDictionary[Checkpoint, Layout] = WeakKeyDictionary()


def _read_layout(checkpoint: Checkpoint) -> Layout:
    depth = checkpoint.architecture.num_hidden_layers
    sites, others = _expert_sites(checkpoint)
    stack = _decoder_stack(checkpoint, sites)
    mtp_tensors = frozenset(_mtp_names(sites, others, stack, depth))
    layers: dict[int, MoeLayer] = {}
    mtp: dict[int, MoeLayer] = {}
    for site, (parts, stacked) in sites.items():
        parent, index = _place(site)
        is_mtp = bool(MTP.search(f"{parent}.")) or index >= depth
        index += depth if is_mtp and parent != stack else 0
        found = mtp if is_mtp else layers
        if index in found:
            raise UnusableError(
                f"{checkpoint.path}: layer {index} holds routed experts in two places, one of them {site}. "
                "reapkit prunes one set of routed experts per layer."
            )
        layer = MoeLayer(index, _num_experts(site, parts, stacked, checkpoint), parts, dict.fromkeys(stacked, 0))
        found[index] = _with_router(layer, site, others.pop((parent, _place(site)[1]), ()), checkpoint)
    for names in others.values():
        if lost := next((name for name in names if "expert" in name and not SHARED.search(name)), None):
            raise UnusableError(
                f"{checkpoint.path}: tensor {lost} names an expert in a layer where reapkit finds none. {_ASK}"
            )
    if not layers:
        raise UnusableError(
            f"{checkpoint.path}: its config declares experts, but no tensor holds any. Choose the checkpoint "
            "of a MoE model whose expert weights are stored as `experts`."
        )
    _agree_with_config(layers, checkpoint)
    kinds = tuple(_kinds(checkpoint, [*layers.values(), *mtp.values()]))
    return Layout(dict(sorted(layers.items())), dict(sorted(mtp.items())), mtp_tensors, stack, kinds)


def _kinds(checkpoint: Checkpoint, layers: Iterable[MoeLayer]) -> Iterator[Kind]:
    tensors, rest = checkpoint.tensors, dict(checkpoint.tensors)
    for layer in layers:
        for part in layer.parts.values():
            alike: dict[tuple, list[str]] = defaultdict(list)
            for name in part.values():
                tensor = rest.pop(name)
                alike[tensor.dtype, tensor.shape].append(name)
            for names in alike.values():
                yield Kind(tensors[names[0]], tuple(names), layer)
        for name, axis in layer.stacked.items():
            yield Kind(rest.pop(name), (name,), layer, axis)
    for name, tensor in rest.items():
        yield Kind(tensor, (name,))


def _mtp_names(sites: Mapping[str, Any], others: Mapping[Any, Iterable[str]], stack: str, depth: int) -> Iterator[str]:
    """Names of multi-token-prediction blocks; an expert's number says nothing about that, so one expert speaks for
    all."""
    for parts, stacked in sites.values():
        for part in parts.values():
            if is_mtp_name(next(iter(part.values())), stack, depth):
                yield from part.values()
        yield from (name for name in stacked if is_mtp_name(name, stack, depth))
    for names in others.values():
        yield from (name for name in names if is_mtp_name(name, stack, depth))


_ASK = (
    "It might count experts, and reapkit does not guess: please report the model, with this name and its config.json."
)


def _expert_sites(
    checkpoint: Checkpoint,
) -> tuple[dict[str, tuple[dict[str, dict[int, str]], list[str]]], dict[tuple[str, int], list[str]]]:
    """Modules that hold routed experts: path -> (names by part and expert, stacked names); and the other names, by
    (stack, layer)."""
    parts: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    stacked: dict[str, list[str]] = defaultdict(list)
    others: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in checkpoint.tensors:
        site, found, rest = name.partition(EXPERTS)
        if found and "shared" not in site:
            number, dot, own = rest.partition(".")
            expert = _expert_number(number) if dot else None
            if expert is not None:
                parts[site][own][expert] = name
            else:
                stacked[site].append(name)
        elif (match := STACKED_WITHOUT_EXPERTS.match(name)) and not SHARED.search(name):
            stacked[match["site"]].append(name)
        else:
            others[_place(name)].append(name)
    sites = {site: (dict(parts.get(site, {})), stacked.get(site, [])) for site in dict.fromkeys([*parts, *stacked])}
    return sites, others


@cache
def _expert_number(text: str) -> int | None:
    """7 of `7`; None of what is no number, or none that a number would be written as."""
    return int(text) if text.isascii() and text.isdecimal() and (text[0] != "0" or text == "0") else None


def _place(name: str) -> tuple[str, int]:
    """('model.layers.', 3) of `model.layers.3.mlp.gate.weight`; ('', -1) of what lies in no numbered layer."""
    match = LAYER.match(f"{name}.")
    return (match["stack"], int(match["index"])) if match else ("", -1)


def _own_path(name: str) -> str:
    """What follows the layer's number."""
    match = LAYER.match(name)
    return name[match.end() :] if match else name


def _decoder_stack(checkpoint: Checkpoint, sites: Iterable[str]) -> str:
    """The one prefix such as `model.layers.` below which the decoder routes."""
    stacks = Counter(_place(site)[0] for site in sites)
    decoders = [stack for stack in stacks if not MTP.search(stack)]
    if len(decoders) > 1 or "" in decoders:
        raise UnusableError(
            f"{checkpoint.path}: routed experts lie below {' and '.join(repr(stack) for stack in decoders)}; "
            "reapkit prunes models with one stack of decoder layers."
        )
    return decoders[0] if decoders else ""


def is_mtp_name(name: str, stack: str, depth: int) -> bool:
    """Whether a tensor or module belongs to a multi-token-prediction block: by its prefix, or by its number beyond the
    decoder's."""
    if name.startswith(stack):
        number = name[len(stack) : name.find(".", len(stack))]
        if number.isascii() and number.isdecimal():
            return int(number) >= depth
    return ("mtp" in name or "nextn" in name) and MTP.search(name) is not None


def _num_experts(
    site: str, parts: Mapping[str, Mapping[int, str]], stacked: Iterable[str], checkpoint: Checkpoint
) -> int:
    """As many as the names or the stacked axes say, all of them alike."""
    axes = {name: checkpoint.tensors[name].shape for name in stacked if checkpoint.tensors[name].numel != 1}
    first = Counter(shape[0] for shape in axes.values() if shape)
    experts = set().union(*parts.values())
    count = len(experts) or (first.most_common(1)[0][0] if first else 0)
    if not count:
        raise UnusableError(
            f"{checkpoint.path}: {site} names experts, but none of its tensors has an axis that counts them. {_ASK}"
        )
    if experts and max(experts) != count - 1:
        missing = next(expert for expert in range(count) if expert not in experts)
        raise UnusableError(
            f"{checkpoint.path}: {site} has experts up to {max(experts)} but no expert {missing}. Download it again."
        )
    for name, shape in axes.items():
        if not shape or shape[0] != count:
            raise UnusableError(
                f"{checkpoint.path}: tensor {name} has shape {list(shape)} in a layer of {count} experts. {_ASK}"
            )
    return count


def _with_router(layer: MoeLayer, site: str, names: Iterable[str], checkpoint: Checkpoint) -> MoeLayer:
    """The layer with its router's tensors added, and scalars that only look stacked removed."""
    text = text_config(checkpoint.config)
    lengths = [layer.num_experts] + [
        layer.num_experts + text[key]
        for key in ("zero_expert_num", "n_shared_experts")
        if isinstance(text.get(key), int) and text[key] > 0
    ]
    stacked = {name: axis for name, axis in layer.stacked.items() if checkpoint.tensors[name].numel != 1}
    own_site = _own_path(f"{site}.").rstrip(".")  # empty (gemma4): the experts' neighbours are the layer's other parts
    table, routes = None, False
    for name in names:
        tensor, own = checkpoint.tensors[name], _own_path(name)
        if tensor.numel == 1 or SHARED.search(own) or ATTENTION.search(own):
            continue
        if "tid2eid" in own:
            table = name
        elif ROUTER.search(own):
            axis = _router_axis(tensor, own, lengths, text.get("hidden_size"), checkpoint)
            if axis is not None:
                stacked[name] = axis
                routes = routes or len(tensor.shape) == 2
        elif (
            own_site and own.startswith(f"{own_site}.") and not DENSE.search(own) and layer.num_experts in tensor.shape
        ):
            raise UnusableError(
                f"{checkpoint.path}: tensor {name} has shape {list(tensor.shape)} in a layer of "
                f"{layer.num_experts} experts. {_ASK}"
            )
    if not routes:
        raise UnusableError(
            f"{checkpoint.path}: {site} holds {layer.num_experts} experts, but no router with as many rows was "
            "found beside them. Known names: gate.weight, router.weight, gate.wg.weight, router.layer.weight, "
            "router.proj.weight."
        )
    return MoeLayer(layer.index, layer.num_experts, layer.parts, stacked, table)


def _router_axis(
    tensor: TensorInfo, own: str, lengths: list[int], hidden: int | None, checkpoint: Checkpoint
) -> int | None:
    for length in lengths:
        axes = [axis for axis, size in enumerate(tensor.shape) if size == length]
        if axes == [0, 1] and own.endswith("weight"):
            return 0  # as many experts as hidden channels: a linear layer's rows are its outputs
        if len(axes) == 1:
            return axes[0]
        if axes:
            break
    else:
        if tensor.shape == (hidden,):  # an input scale or bias of the router acts on channels
            return None
    raise UnusableError(
        f"{checkpoint.path}: tensor {tensor.name} has shape {list(tensor.shape)} in a layer of {lengths[0]} "
        f"experts. {_ASK}"
    )


def _agree_with_config(layers: Mapping[int, MoeLayer], checkpoint: Checkpoint) -> None:
    text = text_config(checkpoint.config)
    per_layer = text.get("num_routed_experts_per_layer")
    for index, layer in layers.items():
        listed = isinstance(per_layer, list) and index < len(per_layer)
        declared = per_layer[index] if listed else checkpoint.architecture.num_experts
        if layer.num_experts != declared:
            raise UnusableError(
                f"{checkpoint.path}: layer {index} holds {layer.num_experts} experts where config.json says "
                f"{declared}. The two must agree; download the checkpoint again or correct its config."
            )

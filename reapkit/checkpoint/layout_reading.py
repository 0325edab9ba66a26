"""Finds which tensors of a checkpoint carry an expert axis, from their names and shapes together. Torch-free.

Four kinds of names are told apart inside a layer that routes:

    ....experts.7.gate_proj.weight          per expert: the index is in the name (with all its scales and shapes)
    ....experts.gate_up_proj[_blocks]       stacked: one axis counts experts (some rows of SPELLINGS have no `experts`)
    ....gate.weight, ....router.bias, ...   router: one axis has as many entries as there are experts
    everything else                         no expert axis: attention, norms, shared experts, dense parts

A tensor that fits none of them and yet could count experts is an error that names it, never a guess.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from reapkit.checkpoint.architecture import Architecture, text_config
from reapkit.checkpoint.expert_layout import LAYER, MTP, Kind, Layout, MoeLayer, is_mtp_name
from reapkit.checkpoint.projection_names import (
    DENSE,
    KNOWN_ROUTERS,
    SHARED,
    SPELLINGS,
    Role,
    Spelling,
    expert_modules,
    spelling_of,
)
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import TensorInfo

ATTENTION = re.compile(r"(?:^|\.)\w*(?:attn|attention|mamba|conv|norm|rotary|latent)\w*(?:\.|$)")
_ASK = (
    "It might count experts, and reapkit does not guess: please report the model, with this name and its config.json."
)


@dataclass(frozen=True)
class _Source:
    """What a layout is read from; `path` is for messages."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_config(self.config)


@dataclass
class _Site:
    """The experts of one block: names by part and expert, and names of stacks.

    Either `experts`, the module that holds them, or `row`, by which stacks in the block itself were found.
    """

    block: str
    experts: str = ""
    row: Spelling | None = None
    parts: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    stacked: list[str] = field(default_factory=list)

    @cached_property
    def spelling(self) -> Spelling:
        """The row that knows most of the names."""
        if self.row is not None:
            return self.row
        if self.parts:
            return spelling_of(self.experts, self.parts, stacked=False)
        owns = (name.partition(f".{self.experts}.")[2] for name in self.stacked)
        return spelling_of(self.experts, owns, stacked=True)

    @property
    def axis(self) -> int:
        """The axis of stacks that counts the experts; beside experts with tensors of their own, the first."""
        return self.spelling.expert_axis or 0


_Others = dict[tuple[str, int], list[str]]  # (stack, layer) -> names that belong to no expert


def read_layout(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Layout:
    """Finds every expert axis of a checkpoint; tensors of multi-token-prediction blocks are kept apart.

    `tensors`: by name, with dtypes and shapes from the headers; no weight is read. Raises UnusableError naming a tensor
    that might carry an expert axis but cannot be decided, or counts that contradict each other.
    """
    source = _Source(path, config, tensors)
    depth = source.architecture.num_hidden_layers
    sites, others = _expert_sites(tensors)
    stack = _decoder_stack(source, sites)
    mtp_tensors = frozenset(_mtp_names(sites, others, stack, depth))
    layers, mtp = _layers(source, sites, others, stack)
    for names in others.values():
        if lost := next((name for name in names if "expert" in name and not SHARED.search(name)), None):
            raise UnusableError(f"{path}: tensor {lost} names an expert in a layer where reapkit finds none. {_ASK}")
    if not layers:
        raise UnusableError(
            f"{path}: config.json declares experts, but no tensor holds any. Choose the checkpoint of a MoE model whose"
            " expert weights are stored as `experts`."
        )
    _agree_with_config(layers, source)
    kinds = tuple(_kinds(tensors, [*layers.values(), *mtp.values()]))
    return Layout(dict(sorted(layers.items())), dict(sorted(mtp.items())), mtp_tensors, stack, kinds)


def _layers(
    source: _Source, sites: Iterable[_Site], others: _Others, stack: str
) -> tuple[dict[int, MoeLayer], dict[int, MoeLayer]]:
    """Decoder layers and multi-token-prediction blocks by their index; their routers are taken out of `others`."""
    layers: dict[int, MoeLayer] = {}
    mtp: dict[int, MoeLayer] = {}
    depth = source.architecture.num_hidden_layers
    for site in sites:
        parent, index = _place(site.block)
        is_mtp = bool(MTP.search(f"{parent}.")) or index >= depth
        index += depth if is_mtp and parent != stack else 0
        found = mtp if is_mtp else layers
        if index in found:
            raise UnusableError(
                f"{source.path}: layer {index} holds routed experts in two places, one of them {site.block}. "
                "reapkit prunes one set of routed experts per layer."
            )
        layer = MoeLayer(
            index, _num_experts(site, source), site.parts, dict.fromkeys(site.stacked, site.axis), site.spelling, {}
        )
        found[index] = _with_router(layer, site.block, others.pop(_place(site.block), []), source)
    return layers, mtp


def _kinds(tensors: Mapping[str, TensorInfo], layers: Iterable[MoeLayer]) -> Iterator[Kind]:
    rest = dict(tensors)
    for layer in layers:
        for part in layer.parts.values():
            alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
            for name in part.values():
                tensor = rest.pop(name)
                alike[tensor.dtype, tensor.shape].append(name)
            for names in alike.values():
                yield Kind(tensors[names[0]], tuple(names), layer)
        for name, axis in layer.stacked.items():
            yield Kind(rest.pop(name), (name,), layer, axis)
    for name, tensor in rest.items():
        yield Kind(tensor, (name,))


def _mtp_names(sites: Iterable[_Site], others: _Others, stack: str, depth: int) -> Iterator[str]:
    """Names of multi-token-prediction blocks; an expert's number says nothing about that, so one expert speaks for
    all."""
    for site in sites:
        for part in site.parts.values():
            if is_mtp_name(next(iter(part.values())), stack, depth):
                yield from part.values()
        yield from (name for name in site.stacked if is_mtp_name(name, stack, depth))
    for names in others.values():
        yield from (name for name in names if is_mtp_name(name, stack, depth))


def _expert_sites(names: Iterable[str]) -> tuple[list[_Site], _Others]:
    """The blocks that hold routed experts, and the names that belong to none."""
    sites: dict[tuple[str, str], _Site] = {}
    others: _Others = defaultdict(list)
    modules = tuple((module, f".{module}.") for module in expert_modules())
    rows = [row for row in SPELLINGS.values() if row.experts is None]
    for name in names:
        for module, marker in modules:
            block, found, rest = name.partition(marker)
            if not found or "shared" in block:
                continue
            site = sites.get((block, module))
            if site is None:
                site = sites[block, module] = _Site(block, module)
            number, dot, own = rest.partition(".")
            expert = _expert_number(number) if dot else None
            if expert is not None:
                site.parts[own][expert] = name
            else:
                site.stacked.append(name)
            break
        else:
            row, block = _stack_in_block(name, rows)
            if row is None:
                others[_place(name)].append(name)
            else:
                sites.setdefault((block, ""), _Site(block, row=row)).stacked.append(name)
    return list(sites.values()), others


def _stack_in_block(name: str, rows: Iterable[Spelling]) -> tuple[Spelling | None, str]:
    """The row by which a name is that of a stack of experts beside the router, and the block they lie in."""
    for row in rows:
        if (found := row.in_block(name)) and not SHARED.search(name):
            return row, found[0]
    return None, ""


@cache
def _expert_number(text: str) -> int | None:
    """7 of `7`; None of what is not a number, or not one that a number would be written as."""
    return int(text) if text.isascii() and text.isdecimal() and (text[0] != "0" or text == "0") else None


def _place(name: str) -> tuple[str, int]:
    """('model.layers.', 3) of `model.layers.3.mlp.gate.weight`; ('', -1) of what lies in no numbered layer."""
    match = LAYER.match(f"{name}.")
    return (match["stack"], int(match["index"])) if match else ("", -1)


def _own_path(name: str) -> str:
    """What follows the layer's number."""
    match = LAYER.match(name)
    return name[match.end() :] if match else name


def _decoder_stack(source: _Source, sites: Iterable[_Site]) -> str:
    """The one prefix such as `model.layers.` below which the decoder routes."""
    stacks = Counter(_place(site.block)[0] for site in sites)
    decoders = [stack for stack in stacks if not MTP.search(stack)]
    if len(decoders) > 1 or "" in decoders:
        raise UnusableError(
            f"{source.path}: routed experts lie below {' and '.join(repr(stack) for stack in decoders)}; "
            "reapkit prunes models with one stack of decoder layers."
        )
    return decoders[0] if decoders else ""


def _num_experts(site: _Site, source: _Source) -> int:
    """As many as the names or the stacked axes say, all of them alike."""
    axes = {name: source.tensors[name].shape for name in site.stacked if source.tensors[name].numel != 1}
    counts = Counter(shape[site.axis] for shape in axes.values() if len(shape) > site.axis)
    experts = set().union(*site.parts.values())
    count = len(experts) or (counts.most_common(1)[0][0] if counts else 0)
    if not count:
        raise UnusableError(
            f"{source.path}: {site.block} names experts, but none of its tensors has an axis that counts them. {_ASK}"
        )
    if experts and max(experts) != count - 1:
        missing = next(expert for expert in range(count) if expert not in experts)
        raise UnusableError(
            f"{source.path}: {site.block} has experts up to {max(experts)} but no expert {missing}. Download it again."
        )
    for name, shape in axes.items():
        if len(shape) <= site.axis or shape[site.axis] != count:
            raise UnusableError(
                f"{source.path}: tensor {name} has shape {list(shape)} in a layer of {count} experts. {_ASK}"
            )
    return count


def _with_router(layer: MoeLayer, block: str, names: Iterable[str], source: _Source) -> MoeLayer:
    """The layer with its router's tensors added, and scalars that only look stacked removed."""
    lengths = _router_lengths(layer, source)
    own_block = _own_path(f"{block}.").rstrip(
        "."
    )  # empty (gemma4): the experts' neighbours are the layer's other parts
    table: str | None = None
    routers: dict[str, Role] = {}
    axes: dict[str, int] = {}
    for name in names:
        tensor, own = source.tensors[name], _own_path(name)
        if tensor.numel == 1 or SHARED.search(own) or ATTENTION.search(own):
            continue
        role = layer.spelling.router_role(own)
        if role is Role.TABLE:
            table = name
        elif role is not None:
            axis = _router_axis(tensor, own, lengths, source)
            if axis is not None:
                routers[name], axes[name] = role, axis
        elif own_block and own.startswith(f"{own_block}.") and not DENSE.search(own):
            _refuse_if_it_counts(tensor, layer, source)
    if not any(len(source.tensors[name].shape) == 2 for name in routers):
        raise UnusableError(
            f"{source.path}: {block} holds {layer.num_experts} experts, but no router with as many rows was "
            f"found beside them. Known names: {', '.join(KNOWN_ROUTERS)}."
        )
    experts = {name: axis for name, axis in layer.stacked.items() if source.tensors[name].numel != 1}
    return replace(layer, stacked=experts | axes, routers=routers, table=table)


def _router_lengths(layer: MoeLayer, source: _Source) -> list[int]:
    """The lengths that an axis of the router may have: the experts, with or without rows of no routed expert."""
    text = text_config(source.config)
    further = [text.get(key) for key in ("zero_expert_num", "n_shared_experts")]
    return [layer.num_experts, *(layer.num_experts + more for more in further if isinstance(more, int) and more > 0)]


def _refuse_if_it_counts(tensor: TensorInfo, layer: MoeLayer, source: _Source) -> None:
    if layer.num_experts in tensor.shape:
        raise UnusableError(
            f"{source.path}: tensor {tensor.name} has shape {list(tensor.shape)} in a layer of {layer.num_experts} "
            f"experts. {_ASK}"
        )


def _router_axis(tensor: TensorInfo, own: str, lengths: list[int], source: _Source) -> int | None:
    for length in lengths:
        axes = [axis for axis, size in enumerate(tensor.shape) if size == length]
        if axes == [0, 1] and own.endswith("weight"):
            return 0  # as many experts as hidden channels: a linear layer's rows are its outputs
        if len(axes) == 1:
            return axes[0]
        if axes:
            break
    else:
        hidden = text_config(source.config).get("hidden_size")
        if tensor.shape == (hidden,):  # an input scale or bias of the router acts on channels
            return None
    raise UnusableError(
        f"{source.path}: tensor {tensor.name} has shape {list(tensor.shape)} in a layer of {lengths[0]} experts. {_ASK}"
    )


def _agree_with_config(layers: Mapping[int, MoeLayer], source: _Source) -> None:
    per_layer = text_config(source.config).get("num_routed_experts_per_layer")
    for index, layer in layers.items():
        listed = per_layer[index : index + 1] if isinstance(per_layer, list) else []
        declared = listed[0] if listed else source.architecture.num_experts
        if layer.num_experts != declared:
            raise UnusableError(
                f"{source.path}: layer {index} holds {layer.num_experts} experts where config.json says "
                f"{declared}. The two must agree; download the checkpoint again or correct its config."
            )

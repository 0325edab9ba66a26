"""Records which tensors of a checkpoint have an expert axis; `layout_reading` fills them. Torch-free."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from reapkit.checkpoint.projection_names import Role, Spelling
from reapkit.core.safetensors_header import TensorInfo

LAYER = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)*)(?P<index>[0-9]{1,9})\.")
MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_[a-z_]+)?\.")


@dataclass(frozen=True)
class MoeLayer:
    """The tensors of one layer that carry its expert axis.

    `parts`: what follows the expert's number, such as `gate_proj.weight` -> expert -> name. `stacked`: name -> axis
    that counts the experts, for weights and router rows alike; where that axis is longer than `num_experts`, its last
    entries belong to no routed expert (zero experts, shared rows) and stay. `routers`: those of `stacked` that belong
    to the router -> role. `table` names a fixed token-to-expert table: a layer that has one can only stay whole.
    `spelling`: the row that spells the experts' matrices.
    """

    index: int
    num_experts: int
    parts: Mapping[str, Mapping[int, str]]
    stacked: Mapping[str, int]
    spelling: Spelling
    routers: Mapping[str, Role]
    table: str | None = None

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """What is known of the roles: by part where each expert has tensors of its own, by name where they are stacked
        and of the router."""
        experts = {part: self.spelling.role(part) for part in self.parts}
        experts |= {
            name: self.spelling.role(self.spelling.own(name)) for name in self.stacked if name not in self.routers
        }
        return {name: role for name, role in experts.items() if role is not None} | dict(self.routers)

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
        if self.axis is not None:
            return self.tensor.shape[self.axis]
        return cast(MoeLayer, self.layer).num_experts


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


def is_mtp_name(name: str, stack: str, depth: int) -> bool:
    """Whether a tensor or module belongs to a multi-token-prediction block: by its prefix, or by its number beyond the
    decoder's."""
    if name.startswith(stack):
        number = name[len(stack) : name.find(".", len(stack))]
        if number.isascii() and number.isdecimal():
            return int(number) >= depth
    return ("mtp" in name or "nextn" in name) and MTP.search(name) is not None

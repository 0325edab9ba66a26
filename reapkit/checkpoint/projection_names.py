"""Lists how checkpoints name the tensors of routed experts: one row per spelling, and the role of every name.
Torch-free.

To teach reapkit another spelling, add a row to SPELLINGS and its tiny model to
tests/checkpoint/test_projection_names.py. A name that no row knows still lies with its expert and is cut with it;
only what a tensor does is unknown then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import NamedTuple


class Role(StrEnum):
    """What a tensor of a layer that routes is for, whatever it is called."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate and up in one matrix"
    ROUTER = "router"
    CORRECTION = "bias of the choice of experts alone"
    EXPERT_SCALE = "scale per expert"
    TABLE = "table from tokens to experts"

    @property
    def projections(self) -> tuple[Role, ...]:
        """The projections that one matrix of this role holds, in their order."""
        return (Role.GATE, Role.UP) if self is Role.GATE_UP else (self,)


class Part(StrEnum):
    """What a stored tensor is of the matrix that it belongs to."""

    WEIGHT = "weight"
    PACKED = "packed weight"
    BIAS = "bias"
    SCALE = "scale"
    ZERO_POINT = "zero point"
    SHAPE = "shape"
    ORDER = "order of the columns"


ROUTERS: Mapping[str, Role] = {
    r"\w*tid2eid\w*": Role.TABLE,
    r"\w*correction_bias|expert_bias": Role.CORRECTION,
    r"per_expert_scale": Role.EXPERT_SCALE,
    r"gate|wg|router\w*|moe_statics|classifier|\w*expert\w*": Role.ROUTER,
}
"""A pattern that one part of a dotted name below the layer matches -> the role; the first that matches decides."""
KNOWN_ROUTERS = ("gate.weight", "router.weight", "gate.wg.weight", "router.layer.weight", "router.proj.weight")
"""Names of router matrices that models are published with, for messages."""
ROUTER_MODULES = re.compile(r"gate|gating|.*router.*|.*statics.*")
"""What transformers' classes call the modules that hold the router's tensors, in memory."""


@dataclass(frozen=True)
class Spelling:
    """How a family of checkpoints spells the matrices of its routed experts.

    `matrices`: their names -> roles; a model without a gate leaves the gate's out. `experts`: the module that holds
    experts and nothing else; None where their stacks lie in the block itself, beside the router, and only there if
    `block` names one. `expert_axis`: the axis of a stack that counts the experts; None where each expert has tensors
    of its own, with its number behind `experts`. `split`: the row in whose words a stack is written when each of its
    experts becomes a module of its own; `taken_apart`: whether llm-compressor can make it so. `routers`: as ROUTERS.
    """

    name: str
    matrices: Mapping[str, Role]
    experts: str | None = "experts"
    block: str | None = None
    expert_axis: int | None = None
    split: str = "gate_up_down"
    taken_apart: bool = True
    routers: Mapping[str, Role] = field(default_factory=lambda: ROUTERS)

    def role(self, own: str) -> Role | None:
        """The role of an expert's tensor by what follows `experts` (and the number): `w1.weight`, `down_proj_bias`."""
        words = [word for word in self.matrices if own == word or own.startswith((f"{word}.", f"{word}_"))]
        return self.matrices[max(words, key=len)] if words else None

    def word(self, role: Role) -> str:
        """What this spelling calls the matrix of a role. Raises KeyError where it has no word for it."""
        found = next((word for word, its_role in self.matrices.items() if its_role is role), None)
        if found is None:
            raise KeyError(f"{self.name} has no matrix that is {role}")
        return found

    def router_role(self, own: str) -> Role | None:
        """The role of a tensor beside the experts by its name below the layer, such as `mlp.gate.weight`."""
        words = own.split(".")
        return next(
            (role for pattern, role in self.routers.items() if any(re.fullmatch(pattern, word) for word in words)), None
        )

    def in_block(self, name: str) -> tuple[str, str] | None:
        """(block, what follows it) of a stack that lies in the block itself; None of every other name."""
        match = _block_pattern(self.block, tuple(self.matrices)).fullmatch(name) if self.experts is None else None
        return None if match is None else (match[1], match[2])

    def block_of(self, name: str) -> str:
        """The block in which a stack of this name lies, such as `model.layers.3.mlp`."""
        found = self.in_block(name)
        return found[0] if found else name.partition(f".{self.experts}.")[0]

    def own(self, name: str) -> str:
        """What follows the module that holds a stack in the name of one of its tensors, as `role` takes it."""
        if self.experts is not None:
            return name.partition(f".{self.experts}.")[2]
        found = self.in_block(name)
        return found[1] if found else name

    def renumbered(self, name: str, expert: int, new: int) -> str:
        """`name`, a tensor of `expert` that has tensors of its own, as one of expert `new`."""
        return name.replace(f".{self.experts}.{expert}.", f".{self.experts}.{new}.", 1)


@cache
def _block_pattern(block: str | None, matrices: tuple[str, ...]) -> re.Pattern[str]:
    inside = "" if block is None else rf"\.{re.escape(block)}"
    return re.compile(rf"(.*?{inside})\.((?:{'|'.join(map(re.escape, matrices))})\..*)")


SPELLINGS: dict[str, Spelling] = {
    row.name: row
    for row in (
        Spelling("gate_up_down", {"gate_proj": Role.GATE, "up_proj": Role.UP, "down_proj": Role.DOWN}),
        Spelling("mixtral", {"w1": Role.GATE, "w3": Role.UP, "w2": Role.DOWN}),
        Spelling(
            "stacked",
            {"gate_up_proj": Role.GATE_UP, "gate_proj": Role.GATE, "up_proj": Role.UP, "down_proj": Role.DOWN},
            expert_axis=0,
        ),
        Spelling(
            "granite",
            {"input_linear": Role.GATE_UP, "output_linear": Role.DOWN},
            experts=None,
            expert_axis=0,
            split="mixtral",
        ),
        Spelling(
            "step",
            {"gate_up_proj": Role.GATE_UP, "gate_proj": Role.GATE, "up_proj": Role.UP, "down_proj": Role.DOWN},
            experts=None,
            block="moe",
            expert_axis=0,
            taken_apart=False,
            routers={"router_bias": Role.CORRECTION, **ROUTERS},
        ),
    )
}
"""Every spelling that is known, by its name; of two that fit equally well the earlier one is meant."""
LOADED = SPELLINGS["stacked"]
"""How transformers' experts interface spells them in memory, whatever the file says."""
LINEARISED = SPELLINGS["gate_up_down"]
"""How llm-compressor spells them in memory, once each expert is a list of linear layers."""


def spelling_of(experts: str, owns: Iterable[str], *, stacked: bool) -> Spelling:
    """The row for what a module called `experts` holds: the one that knows most of the names `owns`, which are as
    `Spelling.role` takes them; a row without names where none knows any."""
    names = tuple(owns)
    rows = [row for row in SPELLINGS.values() if row.experts == experts and (row.expert_axis is not None) == stacked]
    unknown = Spelling("unknown", {}, experts=experts, expert_axis=0 if stacked else None)
    return max((unknown, *rows), key=lambda row: sum(row.role(own) is not None for own in names))


def expert_modules() -> tuple[str, ...]:
    """The modules that hold experts and nothing else, under all their names."""
    return tuple(dict.fromkeys(row.experts for row in SPELLINGS.values() if row.experts is not None))


class ExpertTensor(NamedTuple):
    """The name of one expert's tensor, taken apart: `model.layers.3.mlp.experts.` `7` `w1` `weight`."""

    before: str
    expert: int
    matrix: str
    part: str


def expert_tensor(name: str) -> ExpertTensor | None:
    """The parts of `….experts.7.w1.weight`; None of a name that is not that of one expert's tensor."""
    match = _expert_pattern(expert_modules()).fullmatch(name)
    return None if match is None else ExpertTensor(match[1], int(match[2]), match[3], match[4])


@cache
def _expert_pattern(modules: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(.*\.(?:{'|'.join(map(re.escape, modules))})\.)([0-9]+)\.(.+)\.(\w+)")


# ---------------------------------------------------------------------------------------------- beside the experts

SHARED = re.compile(r"(?:^|[._])shared?(?:[._]|$)")
"""Shared experts, which every token passes through and which are never cut."""
DENSE = re.compile(r"(?:^|\.)(?:mlps?|feed_forward|ffn)\.(?:\d+\.)?(?:gate|up|down|gate_up|w[123])(?:_proj)?\.")
"""A dense MLP beside the experts."""

# ---------------------------------------------------------------------------------------------- how a matrix is stored

BLOCK_SCALE = "_scale_inv"
"""What follows the name of a block-FP8 weight in the name of its scales."""
MXFP4_BLOCKS = "_blocks"
"""What follows the name of an MXFP4 matrix in the name of its weights, two of which lie in a byte."""
COMPRESSED_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
    "weight",
)
"""What a matrix of compressed-tensors may consist of, by the last part of the names."""
CONSTANT_PARTS = ("weight_shape", "weight_global_scale")
"""Those of COMPRESSED_PARTS that have the same size whatever the matrix's is."""
PARTS: Mapping[Part, re.Pattern[str]] = {
    Part.SCALE: re.compile(r"(?:^|_)(?:weight|input|output|proj)_(?:global_)?scale(?:_\d|_inv)?$|scales$"),
    Part.SHAPE: re.compile(r"weight_shape$"),
    Part.ZERO_POINT: re.compile(r"zero_point$|^qzeros$"),
    Part.ORDER: re.compile(r"^g_idx$|weight_g_idx$"),
    Part.PACKED: re.compile(rf"weight_packed$|^qweight$|{MXFP4_BLOCKS}$"),
    Part.BIAS: re.compile(r"bias$"),
}
"""Found in the last part of a name; what none of them finds is a weight."""
QUANTIZER_STATE = (Part.SCALE, Part.SHAPE, Part.ZERO_POINT, Part.ORDER)
"""Parts that hold no weight of the model."""


def part_of(name: str) -> Part:
    """What a stored tensor is of its matrix, by the last part of its name."""
    leaf = name.rpartition(".")[2]
    return next((part for part, pattern in PARTS.items() if pattern.search(leaf)), Part.WEIGHT)

"""Decides which matrices of a checkpoint are quantized, and why the others are not. Torch-free.

Quantized are the matrices of the decoder layers: attention, dense and shared MLPs, every routed expert. Never
quantized, found by what they are and not by one name: everything outside the decoder layers (embeddings, head, vision
and audio towers), multi-token-prediction blocks, routers, gates with a single output, indexers, vectors and
convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import LAYER, Kind, Layout, MoeLayer
from reapkit.checkpoint.projection_names import SPELLINGS, Part, Role, Spelling, part_of
from reapkit.core.dtypes import FLOATS
from reapkit.core.safetensors_header import TensorInfo
from reapkit.recipe.schema import QuantizeSpec

INDEXER = re.compile(r"(?:^|[._])indexer(?:[._]|$)")


@dataclass(frozen=True)
class Matrix:
    """A tensor that will be quantized: `count` matrices [rows, columns] (a stack of experts counts each projection).

    `role`: what a matrix of routed experts does, where that is known. `spelling`: how a stack of them is spelled.
    """

    tensor: TensorInfo
    count: int
    rows: int
    columns: int
    layer: int
    routed: bool
    role: Role | None = None
    spelling: Spelling | None = None

    @property
    def module(self) -> str:
        return self.tensor.name.removesuffix(".weight")


@dataclass(frozen=True)
class Targets:
    """What a quantization touches: matrices by tensor name, and the modules left alone (every 2-D weight that is not in
    it) by reason."""

    matrices: Mapping[str, Matrix]
    left: Mapping[str, str]

    @property
    def has_stacked_experts(self) -> bool:
        """Whether experts are stored as one stacked tensor, which quantized formats cannot hold."""
        return any(len(matrix.tensor.shape) == 3 for matrix in self.matrices.values())


class ExpertPiece(NamedTuple):
    """One expert's projection out of a stack: the module it is written as, whose it is, and what it does."""

    prefix: str
    expert: int
    role: Role


def expert_pieces(matrix: Matrix) -> list[ExpertPiece]:
    """What a stack of experts is written as: one module per expert and projection, as engines with such modules spell
    it, expert by expert, gate before up."""
    assert matrix.spelling is not None and matrix.role is not None, "a stack of experts is spelled and has a role"
    block, split = matrix.spelling.block_of(matrix.tensor.name), SPELLINGS[matrix.spelling.split]
    return [
        ExpertPiece(f"{block}.{split.experts}.{expert}.{split.word(role)}", expert, role)
        for expert in range(matrix.tensor.shape[0])
        for role in matrix.role.projections
    ]


def expert_prefixes(matrix: Matrix) -> list[str]:
    """The modules of `expert_pieces`."""
    return [piece.prefix for piece in expert_pieces(matrix)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name is one of the patterns: names as they are, `re:` patterns matched from the start."""
    return any(re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name for pattern in patterns)


def targets(checkpoint: Checkpoint, spec: QuantizeSpec) -> Targets:
    """Decides for every matrix of the checkpoint whether it is quantized, and says why not where it is not. A quantized
    checkpoint's are those of its plain form."""
    checkpoint = checkpoint.plain
    layout = checkpoint.layout
    routed = {
        name: layer.roles.get(part)
        for layer in layout.layers.values()
        for part, names in layer.parts.items()
        for name in names.values()
    }
    decide = _decider(checkpoint, spec, layout)
    matrices: dict[str, Matrix] = {}
    left: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        decided = decide(tensor)
        if isinstance(decided, Matrix):
            matrices[name] = replace(decided, routed=True, role=routed[name]) if name in routed else decided
        elif decided is not None:
            left[name.removesuffix(".weight")] = decided
    return Targets(matrices, left)


def _decider(checkpoint: Checkpoint, spec: QuantizeSpec, layout: Layout) -> Callable[[TensorInfo], Matrix | str | None]:
    """What becomes of a tensor: a matrix that is quantized, the reason why not, or None for what is no matrix at
    all."""
    stacked = {name: layer for layer in layout.layers.values() for name in layer.stacked}
    decoder = _decoder(layout)

    def decide(tensor: TensorInfo) -> Matrix | str | None:
        name = tensor.name
        if name in stacked and len(tensor.shape) == 3 and part_of(name) is Part.WEIGHT:
            return _left_by_user(name, spec) or _stacked_experts(tensor, stacked[name], checkpoint)
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS:
            match = LAYER.match(name)
            return (
                _why_left(name, tensor, stacked, layout, decoder)
                or _left_by_user(name, spec)
                or Matrix(tensor, 1, *tensor.shape, layer=int(match["index"]) if match else -1, routed=False)
            )
        return None

    return decide


def decided_kinds(checkpoint: Checkpoint, spec: QuantizeSpec) -> Iterator[tuple[Kind, Matrix | None]]:
    """Every tensor of the checkpoint's plain form, those that differ in their expert only together, and the matrix it
    is quantized as, if it is.

    Patterns of the user may tell experts apart; then each comes by itself.
    """
    checkpoint = checkpoint.plain
    layout = checkpoint.layout
    decide = (
        _decider(checkpoint, spec, layout) if spec.scheme is not None and spec.recipe is None else lambda tensor: None
    )
    for kind in layout.kinds:
        each = (
            (kind,)
            if not spec.ignore
            else (replace(kind, tensor=checkpoint.tensors[name], names=(name,)) for name in kind.names)
        )
        for one in each:
            decided = decide(one.tensor)
            yield one, decided if isinstance(decided, Matrix) else None


def needs_plain_copy(checkpoint: Checkpoint, spec: QuantizeSpec) -> bool:
    """Whether a quantized checkpoint is written in plain numbers before it is quantized again: what calibrates reads
    models, and llm-compressor's data-free quantization weights under their own names, scales of dtypes that it
    knows."""
    if not checkpoint.quantization:
        return False
    strange = any(
        matrix.parts[matrix.packing.root].name != name or any(part.dtype == "F8_E8M0" for part in matrix.parts.values())
        for name, matrix in checkpoint.matrices.items()
    )
    return strange or spec.recipe is not None or spec.method != "rtn" or targets(checkpoint, spec).has_stacked_experts


def _left_by_user(name: str, spec: QuantizeSpec) -> str | None:
    return "the recipe ignores it" if matches(name.removesuffix(".weight"), spec.ignore) else None


def _decoder(layout: Layout) -> str:
    """The prefix of the decoder layers' names, such as `model.layers.`."""
    name = next(iter(next(iter(layout.layers.values())).names))
    match = LAYER.match(name)
    assert match is not None, "a layout has experts in numbered layers only"
    return match["stack"]


def _why_left(name: str, tensor: TensorInfo, stacked: Collection[str], layout: Layout, decoder: str) -> str | None:
    if name in layout.mtp_tensors:
        return "multi-token prediction"
    if not name.startswith(decoder) or not LAYER.match(name):
        return "outside the decoder layers"
    if name in stacked:
        return "router"
    if tensor.shape[0] == 1:
        return "a gate with one output"
    if INDEXER.search(name):
        return "indexer"
    return None


def _stacked_experts(tensor: TensorInfo, layer: MoeLayer, checkpoint: Checkpoint) -> Matrix | str:
    """The stack as its projections: into the hidden width and out of it, whichever way round the file stores them. Or
    why it is left alone."""
    role = layer.roles.get(tensor.name)
    if role is None or tensor.name in layer.routers:
        return "a stack whose part in the experts is not known"
    if layer.stacked[tensor.name] != 0:
        return "a stack whose first axis does not count the experts"
    experts, first, second = tensor.shape
    hidden = text_config(checkpoint.config).get("hidden_size")
    inputs_first = first != second and (second if role is Role.DOWN else first) == hidden
    rows, columns = (second, first) if inputs_first else (first, second)
    parts = len(role.projections)
    return Matrix(tensor, experts * parts, rows // parts, columns, layer.index, True, role, layer.spelling)

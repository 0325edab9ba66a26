"""A checkpoint's config against its headers: layers, widths, vocabulary. Torch-free.

A config that says less than the files hold drops layers in silence; one that says more runs into its end. Expert
counts are compared where the layout is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reapkit.checkpoint.architecture import Architecture, text_config, whole_number
from reapkit.checkpoint.expert_layout import LAYER, Kind, Layout, MoeLayer
from reapkit.checkpoint.projection_names import Part, Role, part_of
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import ranges
from reapkit.core.safetensors_header import TensorInfo

PREDICTION = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head|\w*(?:mtp|nextn)\w*)\.")
"""What only multi-token-prediction blocks hold, in whichever numbering."""
VOCABULARY = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|lm_head)\.weight$")
OWN_WIDTH = re.compile(r"(?:moe|expert|ffn).*(?:size|dim|width)")
PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
"""Dtypes in which a matrix is stored in its own shape; packed ones, and bytes, which may hold two weights, say nothing
about widths before they are taken apart (`Checkpoint.plain`)."""


def require_agreement(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], layout: Layout) -> None:
    """Raises UnusableError where config.json and the headers contradict each other; `path` is for the message."""
    text = text_config(config)
    depth = Architecture.from_config(config).num_hidden_layers
    for problem in (
        *_layers(tensors, layout, depth),
        *_vocabulary(text, tensors, layout),
        *_expert_widths(text, layout),
    ):
        raise UnusableError(
            f"{path}: {problem}. The two must agree; download the checkpoint again or correct its config."
        )


def _layers(tensors: Mapping[str, TensorInfo], layout: Layout, depth: int) -> Iterator[str]:
    """The decoder's numbers are 0 to depth - 1, and only multi-token-prediction blocks follow them."""
    says, found = f"config.json says num_hidden_layers {depth}, but", _numbered(tensors, layout.stack)
    decoder = {number for number in found if number < depth}
    if len(decoder) < depth:
        missing = next(number for number in range(depth) if number not in decoder)
        yield f"{says} no tensor of layer {missing} is there"
    if behind := sorted(number for number in found.keys() - decoder if not found[number]):
        yield f"{says} there are tensors of layer {ranges(behind)}, which is no multi-token-prediction block"
    if inside := [number for number in sorted(decoder) if found[number]]:
        yield f"{says} layer {inside[0]} is a multi-token-prediction block, which lies behind the decoder"


def _numbered(tensors: Mapping[str, TensorInfo], stack: str) -> dict[int, bool]:
    """Numbers below the decoder's prefix -> whether something there is only found in multi-token-prediction blocks."""
    found: dict[int, bool] = defaultdict(bool)
    for name in tensors:
        if name.startswith(stack) and (match := LAYER.match(name)) and match["stack"] == stack:
            found[int(match["index"])] |= PREDICTION.search(name) is not None
    return found


def _vocabulary(text: Mapping[str, Any], tensors: Mapping[str, TensorInfo], layout: Layout) -> Iterator[str]:
    """Embedding and head: [vocab_size, hidden_size]."""
    root = layout.stack.rpartition("layers.")[0]
    for tensor in tensors.values():
        outside = not LAYER.match(tensor.name) and tensor.name not in layout.mtp_tensors
        ours = tensor.name.startswith(root) or "lm_head" in tensor.name
        if outside and ours and len(tensor.shape) == 2 and tensor.dtype in PLAIN and VOCABULARY.search(tensor.name):
            for key, length in zip(("vocab_size", "hidden_size"), tensor.shape, strict=True):
                if (said := whole_number(text, key)) is not None and said != length:
                    yield _contradiction(key, said, tensor)


def _expert_widths(text: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """The experts' last projection lies between their own width and the model's (or that of its latent experts)."""
    outer, inner = _field(text, "moe_latent_size", "hidden_size"), _inner_widths(text)
    if outer is None or not inner:
        return
    for kind in layout.kinds:
        shape = _down_shape(kind)
        if shape is not None and not any(sorted(shape) == sorted((outer[1], width)) for _, width in inner):
            key, said = inner[0] if outer[1] in shape else outer
            yield _contradiction(key, said, kind.tensor)


def _inner_widths(text: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The fields that may say the experts' width; none where it may have a name that nobody here knows.

    Hunyuan's experts are `intermediate_size` wide, whatever stands in `moe_intermediate_size`.
    """
    known = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    unknown = any(OWN_WIDTH.search(key) and key not in known for key in text)
    fields = [_field(text, key) for key in known[: 2 if unknown else 3]]
    listed = any(isinstance(text.get(key), list) for key in known)
    return [] if listed else [field for field in fields if field is not None]


def _field(text: Mapping[str, Any], *keys: str) -> tuple[str, int] | None:
    """The first of the fields that is there, if it holds one number."""
    key = next((key for key in keys if text.get(key) is not None), None)
    return (key, text[key]) if key is not None and type(text[key]) is int else None


def _down_shape(kind: Kind) -> tuple[int, ...] | None:
    """Of one expert's last projection; None of every other tensor, and of packed ones."""
    tensor, layer = kind.tensor, kind.layer
    if layer is None or tensor.dtype not in PLAIN or part_of(tensor.name) is not Part.WEIGHT:
        return None
    part = tensor.name if kind.axis is not None else _part_name(tensor.name, layer)
    shape = tuple(size for axis, size in enumerate(tensor.shape) if axis != kind.axis)
    return shape if layer.roles.get(part) is Role.DOWN and len(shape) == 2 else None


def _part_name(name: str, layer: MoeLayer) -> str:
    return next(part for part in layer.parts if name.endswith(f".{part}"))


def _contradiction(key: str, said: int, tensor: TensorInfo) -> str:
    return f"config.json says {key} {said}, but tensor {tensor.name} has shape {list(tensor.shape)}"

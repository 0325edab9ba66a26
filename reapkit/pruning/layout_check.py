"""Checks that reapkit and transformers agree on which tensors have an expert axis."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.core.errors import UnusableError
from reapkit.pruning.byte_ranges import cut_tensors
from reapkit.pruning.config_edits import Counts, config_edits, edit_json

LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")


def confirm_layout(source: Checkpoint, layout: Layout, keep: Mapping[int, Sequence[int]]) -> bool:
    """True where the model built without weights shrinks, layer by layer, by exactly the numbers that the layout would
    cut.

    False where that cannot be asked: a model type of remote code, a quantized source whose tensors are not the model's
    own, or layers that keep different numbers. Raises UnusableError naming the layer where model and layout disagree.
    """
    counts = {len(keep[index]) for index in layout.layers}
    model_class = getattr(transformers, (source.config.get("architectures") or [""])[0], None)
    if model_class is None or len(counts) > 1 or source.quantization:
        return False
    architecture = source.architecture
    top_k = architecture.num_experts_per_tok
    change = Counts((architecture.num_experts, counts.pop()), (top_k, top_k), architecture.n_group)
    text = (source.path / "config.json").read_text(encoding="utf-8")
    edited = edit_json(text, config_edits(source.config, change, lambda name: name))
    before, after = (_numel_by_layer(model_class, config) for config in (text, edited))
    cut: Counter[int] = Counter()
    whole = {index: tuple(keep[index]) for index in layout.layers}
    for one in cut_tensors(source, layout, whole, drop_mtp=True):
        cut[_layer(one.name)] += _numel(one.shape)
    stored: Counter[int] = Counter()
    for tensor in source.tensors.values():
        if tensor.name not in layout.mtp_tensors:
            stored[_layer(tensor.name)] += tensor.numel
    for index in stored.keys() | before.keys():
        if stored[index] - cut[index] != before[index] - after[index]:
            raise UnusableError(
                f"{source.path}: in layer {index} the checkpoint's names say that pruning removes "
                f"{stored[index] - cut[index]} numbers, the model that transformers builds "
                f"{before[index] - after[index]}. "
                "Please report the model, with its config.json and the names of that layer's tensors."
            )
    return True


def _numel_by_layer(model_class: type, config: str) -> Counter[int]:
    with (
        tempfile.TemporaryDirectory() as directory
    ):  # only reading from a file decodes every value as the library wrote it
        Path(directory, "config.json").write_text(config, encoding="utf-8")
        parsed = model_class.config_class.from_pretrained(directory)
    with torch.device("meta"):
        model = model_class(parsed)
    numel: Counter[int] = Counter()
    for name, tensor in model.state_dict().items():
        numel[_layer(name)] += tensor.numel()
    return numel


def _layer(name: str) -> int:
    match = LAYER.search(name)
    return int(match[1]) if match else -1


def _numel(shape: Sequence[int]) -> int:
    number = 1
    for extent in shape:
        number *= extent
    return number

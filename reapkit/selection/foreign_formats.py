"""Reads the results of other tools: llm-compressor's REAP report, and the state of Cerebras' observer."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.observation.observation import Observation
from reapkit.selection.criteria.reap import REAP
from reapkit.selection.selection import LayerSelection, Selection

SUMS_THERE = {
    "count": "expert_frequency",
    "gate_sum": "weighted_expert_frequency_sum",
    "norm_sum": "ean_sum",
    "gate_norm_sum": "weighted_ean_sum",
}
"""Our sums by the names that Cerebras' observer gives them. Its `max_activations` leaves out the sign, and its
`pairwise_expert_frequency` adds the counts of two experts per batch; neither is a statistic of ours."""
LARGEST_COUNT = 1 << 53
"""No file counts more tokens; beyond it float64 has no longer every whole number."""
MOST_LAYER_DIGITS = 6
MEANS_THERE = {"norm_sum": "ean_mean", "gate_norm_sum": "reap"}
"""Means over an expert's tokens, from which a sum that older files lack follows."""


def read_foreign(file: Path, architecture: Architecture | None = None) -> Observation | Selection:
    """A Selection from a llm-compressor `report_path` JSON, an Observation from a Cerebras observer file (`.pt`, or
    JSON with its sums).

    No code of the file is ever run. What the file lacks is absent from the observation, and whatever needs it says so.
    `architecture`: the model's, for what a file does not say: how many experts there were. Raises UnusableError for any
    other or unsafe file.
    """
    data = _json(file) if file.suffix == ".json" else _pickle(file)
    if isinstance(data, Mapping) and isinstance(data.get("layers"), Mapping):
        data = data["layers"]
    if isinstance(data, Mapping) and data:
        if all(isinstance(entry, Mapping) and "expert_frequency" in entry for entry in data.values()):
            return _observation(file, data, architecture)
        if all(isinstance(entry, list) and all(type(expert) is int for expert in entry) for entry in data.values()):
            return _selection(file, data, architecture)
    raise UnusableError(
        f"{file}: the file is neither a llm-compressor REAP report (layer names with the experts retained) nor the"
        " state of Cerebras' observer (layers with expert_frequency, ean_sum, ...). Give one of these."
    )


def _json(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableError(f"{file}: the file cannot be read as JSON ({error}).") from None


def _pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported (?:global|operand|class)[^\n.]*|GLOBAL \S+", str(error))
        raise UnusableError(
            f"{file}: the file holds more than tensors and plain data ({reason[0] if reason else 'code'}). Reading it"
            " could run any program, so reapkit refuses it. Save tensors and plain dicts only."
        ) from None
    except Exception as error:  # torch's reader of damaged files ends in errors of many kinds
        raise UnusableError(
            f"{file}: the file was not written by torch.save ({str(error)[:200]}). Give the file that"
            " the observer saved."
        ) from None


def _layer(file: Path, name: Any) -> int:
    """`model.layers.3.mlp` -> 3, 3 -> 3."""
    found = re.findall(r"(?<![\w])\d+(?![\w])", str(name))
    if len(found) != 1 or not found[0].isascii() or len(found[0]) > MOST_LAYER_DIGITS:
        raise UnusableError(
            f"{file}: the name of layer '{name}' contains no layer number. Names such as"
            " 'model.layers.3.mlp' are expected."
        )
    return int(found[0])


def _selection(file: Path, data: Mapping[str, list[int]], architecture: Architecture | None) -> Selection:
    if architecture is None:
        raise UnusableError(
            f"{file}: a llm-compressor report names the experts that stay, but not how many there were. Add --model"
            " with the directory of the model before pruning."
        )
    total = architecture.num_experts
    layers = {}
    for name, kept in data.items():
        if len(set(kept)) < len(kept) or not kept or min(kept) < 0 or max(kept) >= total:
            raise UnusableError(
                f"{file}: {name} retains {kept}, which are not distinct experts from 0 to {total - 1}. Check that the"
                " report is of this model."
            )
        layers[_layer(file, name)] = LayerSelection(
            tuple(sorted(kept)), tuple(sorted(set(range(total)) - set(kept))), ()
        )
    return Selection(
        REAP.name, dict(sorted(layers.items())), details={"imported": "llm-compressor REAP report", "file": file.name}
    )


def _observation(file: Path, data: Mapping[Any, Mapping[str, Any]], architecture: Architecture | None) -> Observation:
    by_layer = dict(sorted((_layer(file, name), entry) for name, entry in data.items()))
    counts = {layer: _column(file, layer, entry, "expert_frequency") for layer, entry in by_layer.items()}
    if odd := [layer for layer, column in counts.items() if bool((column > LARGEST_COUNT).any())]:
        raise UnusableError(f"{file}: expert_frequency of layer {odd[0]} holds a number that counts no tokens.")
    sizes = {len(column) for column in counts.values()}
    if len(sizes) > 1 or (architecture is not None and sizes != {architecture.num_experts}):
        allowed = "one number for all layers" if architecture is None else f"{architecture.num_experts}, as the model"
        raise UnusableError(
            f"{file}: the layers have {', '.join(map(str, sorted(sizes)))} experts; needed is {allowed}."
        )
    statistics = {"count": np.stack(list(counts.values()))[:, None]}
    for ours in ("gate_sum", "norm_sum", "gate_norm_sum"):
        columns = [_sum(file, layer, entry, ours, counts[layer]) for layer, entry in by_layer.items()]
        there = [column for column in columns if column is not None]
        if len(there) == len(columns):
            statistics[ours] = np.stack(there)[:, None]
    tokens = max(_total(file, layer, entry) for layer, entry in by_layer.items())
    top_k = architecture.num_experts_per_tok if architecture else _top_k(file, counts, tokens)
    return Observation(
        model_type=architecture.model_type if architecture else "unknown",
        layers=tuple(by_layer),
        num_experts=sizes.pop(),
        num_experts_per_tok=top_k,
        sources=("imported",),
        tokens=np.array([tokens]),
        scored_tokens=np.array([tokens]),
        statistics=statistics,
        maxima={},
        coactivation=None,
        snapshots={},
        meta={
            "imported": "Cerebras observer",
            "file": file.name,
            "gates": "softmax of the router's logits, as that observer has them",
        },
    )


def _sum(file: Path, layer: int, entry: Mapping[str, Any], ours: str, count: ndarray) -> ndarray | None:
    if SUMS_THERE[ours] in entry:
        return _column(file, layer, entry, SUMS_THERE[ours], len(count))
    mean = MEANS_THERE.get(ours)
    return None if mean is None or mean not in entry else _column(file, layer, entry, mean, len(count)) * count


def _column(file: Path, layer: int, entry: Mapping[str, Any], name: str, length: int | None = None) -> ndarray:
    try:
        column = torch.as_tensor(entry[name]).to(torch.float64).cpu().numpy()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UnusableError(f"{file}: {name} of layer {layer} does not hold numbers ({error}).") from None
    if column.ndim != 1 or not len(column) or (length is not None and len(column) != length):
        raise UnusableError(
            f"{file}: {name} of layer {layer} has shape {list(column.shape)}; needed is one number per expert."
        )
    if not bool(np.isfinite(column).all()) or bool((column < 0).any()):
        raise UnusableError(
            f"{file}: {name} of layer {layer} holds NaN, infinity or a negative number. Run the observer again."
        )
    return column


def _total(file: Path, layer: int, entry: Mapping[str, Any]) -> int:
    value = entry.get("total_tokens", 0)
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if type(value) not in (int, float) or not 0 <= value <= LARGEST_COUNT or value != int(value):
        raise UnusableError(f"{file}: total_tokens of layer {layer} is {str(value)[:40]}, which counts no tokens.")
    return int(value)


def _top_k(file: Path, counts: Mapping[int, ndarray], tokens: int) -> int:
    """Experts per token, from the counts: every token counts once for each."""
    routed = int(next(iter(counts.values())).sum())
    if tokens < 1 or routed % tokens:
        raise UnusableError(
            f"{file}: the number of experts per token cannot be derived from {routed} routed positions of {tokens}"
            " tokens. Add --model with the model's directory."
        )
    return routed // tokens

"""The selection: which experts stay and which are dropped, with a reason for each, as plain data for people and later
stages.

Neither reading nor deciding one needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.core.atomic_files import write_text
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json

if TYPE_CHECKING:
    from reapkit.checkpoint.architecture import Architecture

FORMAT_VERSION = 1
TABLE = "routed by a fixed table"
"""Why the experts of a layer stay whose router reads them from a table."""
MOST_DIGITS = 6


@dataclass(frozen=True)
class LayerSelection:
    """One layer: experts kept and dropped (ascending), saliency by expert (-inf: never routed), reason by expert."""

    keep: tuple[int, ...]
    drop: tuple[int, ...]
    saliency: tuple[float, ...]
    reasons: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """The decision for every MoE layer, by decoder index; multi-token-prediction blocks follow under the next numbers.

    `experts_per_token`: the pruned model's top-k, None as it was. `details`: how it was decided (budget, EAFT regions,
    super experts, near-ties, warnings), for people and the report; no later stage acts on it.
    """

    criterion: str
    layers: Mapping[int, LayerSelection]
    experts_per_token: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> dict[int, tuple[int, ...]]:
        """Kept experts by layer."""
        return {layer: chosen.keep for layer, chosen in self.layers.items()}

    def decoder(self, architecture: Architecture) -> Selection:
        """Without multi-token-prediction blocks, which a loaded model does not have."""
        return replace(
            self,
            layers={layer: chosen for layer, chosen in self.layers.items() if layer < architecture.num_hidden_layers},
        )

    @property
    def table_layers(self) -> tuple[int, ...]:
        """Layers that keep all their experts because a fixed table routes their tokens."""
        return tuple(layer for layer, chosen in self.layers.items() if set(chosen.reasons.values()) == {TABLE})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user must be told about this decision."""
        return tuple(self.details.get("warnings", ()))

    def to_json(self) -> dict[str, Any]:
        """JSON data; a saliency of -inf (never routed) is null, which JSON can say."""
        layers = {
            str(layer): {
                "keep": list(chosen.keep),
                "drop": list(chosen.drop),
                "saliency": [None if value == -inf else value for value in chosen.saliency],
                "reasons": {str(expert): reason for expert, reason in chosen.reasons.items()},
            }
            for layer, chosen in self.layers.items()
        }
        return {
            "format": FORMAT_VERSION,
            "criterion": self.criterion,
            "experts_per_token": self.experts_per_token,
            "details": dict(self.details),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Selection:
        """The inverse of `to_json`. Raises UnusableError for a layer that does not name each of its experts once."""
        if data.get("format", FORMAT_VERSION) != FORMAT_VERSION:
            raise UnusableError(
                f"selection.json: found format {data['format']}, but this version of reapkit reads format"
                f" {FORMAT_VERSION}. Run select again."
            )
        layers = {_number(name): _layer(name, entry) for name, entry in data["layers"].items()}
        top_k, details = data.get("experts_per_token"), data.get("details", {})
        fewest = min((len(layer.keep) for layer in layers.values()), default=0)
        if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= fewest):
            raise UnusableError(
                f"selection.json: experts_per_token is {str(top_k)[:40]}, but it must be null or a whole number from 1"
                f" to {fewest}, the fewest experts that a layer keeps."
            )
        if not isinstance(data["criterion"], str) or not isinstance(details, Mapping) or not _are_warnings(details):
            raise UnusableError("selection.json: criterion must be a name, and details an object. Select again.")
        return cls(data["criterion"], layers, top_k, details)

    def save(self, directory: Path) -> None:
        """Writes selection.json: one line per layer's list, so that it can be read and compared."""
        write_text(directory / "selection.json", _readable(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: Path) -> Selection:
        """From selection.json or the directory that holds it. Raises UnusableError where there is none that can be
        read."""
        path = Path(path)
        file = path / "selection.json" if path.is_dir() else path
        try:
            return cls.from_json(parse_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableError(
                f"{file}: the selection cannot be read ({error}). Give a selection's directory."
            ) from None


def _number(text: str) -> int:
    """A layer's or an expert's number as JSON's keys spell it."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS and str(int(text)) == text):
        raise UnusableError(f"selection.json: {text[:40]!r} is not the number of a layer or an expert. Select again.")
    return int(text)


def _layer(name: str, entry: Mapping[str, Any]) -> LayerSelection:
    keep, drop = entry["keep"], entry["drop"]
    named = [*keep, *drop]
    if {type(expert) for expert in named} != {int} or sorted(named) != list(range(len(named))) or not keep:
        raise UnusableError(
            f"selection.json: layer {name} must name each of its experts once, in keep or in drop, and "
            "keep at least one."
        )
    saliency = entry.get("saliency", ())
    if not all(value is None or type(value) in (int, float) for value in saliency) or len(saliency) not in (
        0,
        len(named),
    ):
        raise UnusableError(f"selection.json: layer {name} must have a saliency, a number or null, for each expert.")
    reasons = {_number(expert): reason for expert, reason in entry.get("reasons", {}).items()}
    if not all(isinstance(reason, str) and expert < len(named) for expert, reason in reasons.items()):
        raise UnusableError(f"selection.json: layer {name} must give its reasons in words, by expert.")
    values = tuple(-inf if value is None else float(value) for value in saliency)
    return LayerSelection(tuple(sorted(keep)), tuple(sorted(drop)), values, reasons)


def _are_warnings(details: Mapping[str, Any]) -> bool:
    warnings = details.get("warnings", [])
    return isinstance(warnings, (list, tuple)) and all(isinstance(warning, str) for warning in warnings)


def _readable(data: Mapping[str, Any]) -> str:
    """JSON whose lists and innermost mappings stay on one line."""
    return _lines(data, 0)


def _lines(value: Any, depth: int) -> str:
    nested = isinstance(value, dict) and value and any(isinstance(item, (dict, list)) for item in value.values())
    if not nested:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad = "  " * (depth + 1)
    body = ",\n".join(
        f"{pad}{json.dumps(str(key), ensure_ascii=False)}: {_lines(item, depth + 1)}" for key, item in value.items()
    )
    return f"{{\n{body}\n{'  ' * depth}}}"

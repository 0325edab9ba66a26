"""Names what evaluation measures by everything that decides it, so that judging again measures nothing. Torch-free.

What is measured are hidden states and signals at a pack's measured positions, and continuations of its prompts. Limits,
quantiles and tokenizers only enter the numbers that are made of these: those are computed whenever they are judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reapkit.core.hashing import digest
from reapkit.core.measurements import KEPT_NOWHERE, Measure, Measurements
from reapkit.recipe.schema import GenerationSpec
from reapkit.selection.selection import Selection

BASE = "base"
"""What is measured, where it is the model itself."""
Of = str | Mapping[str, Any]
"""What is measured: `base`, or what names a mask or a directory by content."""


def mask(selection: Selection, weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Names a selection as a mask on the base; `weights`: sha256 of the files of its re-fitted experts."""
    keep = digest({str(layer): list(kept) for layer, kept in selection.keep.items()})
    return {"keep": keep, "experts_per_token": selection.experts_per_token, "weights": weights and digest(weights)}


@dataclass(frozen=True)
class Measures:
    """The measurements of one model on its packs, and where they are kept.

    `model` and `rows`, by row length, name them by content. `version`: of the stage whose code measures. `top_k`: of
    the entropies.
    """

    version: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[int, Any] = field(default_factory=dict)
    top_k: int = 20
    kept: Measurements = KEPT_NOWHERE

    def hidden(self, part: str, length: int) -> Measure:
        """The base's final hidden states on a part of the pack of this length."""
        return self._on_rows("hidden", f"base, hidden states ({length} tokens, {part})", part, length)

    def signals(self, part: str, length: int, name: str, of: Of) -> Measure:
        """What `of` says at the measured positions, beside the base; people call it `name`."""
        title = f"{name} ({length} tokens, {part})"
        return self._on_rows("signals", title, part, length, top_k=self.top_k, of=of)

    def continuations(self, length: int, name: str, of: Of, spec: GenerationSpec) -> Measure:
        """What `of` writes after the prompts of the decide rows."""
        settings = spec.model_dump(mode="json")
        return self._on_rows("continuations", f"{name} (continuations)", "decide", length, of=of, generation=settings)

    def _on_rows(self, kind: str, title: str, part: str, length: int, **spec: Any) -> Measure:
        rows = {"tokens": self.rows.get(length), "part": part}
        return Measure(kind, self.version, {"model": self.model, "rows": rows, **spec}, title)

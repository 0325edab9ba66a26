"""The knock-outs: how far the model's output moves without each expert, by layer and source. Torch-free.

KO[l, e, s] = Σ over scored positions t of the sampled rows of source s of KL(p_t ‖ p_t without expert e of layer l)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy import ndarray
from safetensors.numpy import save_file

from reapkit.core.atomic_files import replacing, write_text
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.core.mapped_safetensors import as_arrays, map_tensors

FORMAT_VERSION = 1
FACTS, TENSORS = "knockouts.json", "knockouts.safetensors"
ARRAYS = ("rows", "positions", "kl", "kl_sq", "floor")


@dataclass(frozen=True, eq=False)
class Knockouts:
    """Knock-outs of L layers, S sources of the calibration and E experts, in nats.

    `layers`: decoder indices. `rows`, `positions`: int64 [S], sampled rows of each source, and the scored positions in
    them. `kl`: float64 [L, S, E], KL(p ‖ p without the expert) summed over those positions. `kl_sq`: float64 [L, S, E],
    the sum over rows of the square of the row's own sum. `floor`: float64 [L, S], the same sum where nothing was taken
    out and all was computed along the same path: what rounding alone does. `meta`: how it was measured.
    """

    layers: tuple[int, ...]
    sources: tuple[str, ...]
    rows: ndarray
    positions: ndarray
    kl: ndarray
    kl_sq: ndarray
    floor: ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        as_arrays(self, *ARRAYS)

    def save(self, directory: Path) -> None:
        """Writes knockouts.safetensors and knockouts.json: equal inputs, equal bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / TENSORS) as partial:
            save_file({name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}, partial)
        facts = {
            "format": FORMAT_VERSION,
            "layers": list(self.layers),
            "sources": list(self.sources),
            "meta": dict(self.meta),
        }
        write_text(directory / FACTS, json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises UnusableError where the directory holds no knock-outs that this version can read."""
        try:
            facts = parse_json((directory / FACTS).read_text(encoding="utf-8"))
            layers, sources = tuple(facts["layers"]), tuple(facts["sources"])
            meta, version = facts["meta"], facts["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnusableError(
                f"{directory}: {FACTS} cannot be read ({error}). Give the directory of a knockout stage."
            ) from None
        if version != FORMAT_VERSION:
            raise UnusableError(
                f"{directory}: found knock-outs of format {version}, but this version of reapkit reads format"
                f" {FORMAT_VERSION}. Measure them again, or use the version of reapkit that wrote them."
            )
        tensors = map_tensors(directory / TENSORS)
        if missing := [name for name in ARRAYS if name not in tensors]:
            raise UnusableError(f"{directory}: {TENSORS} has no {', '.join(missing)}. Measure the knock-outs again.")
        found = cls(layers, sources, **{name: tensors[name] for name in ARRAYS}, meta=meta)
        depth, width, experts = len(layers), len(sources), found.kl.shape[-1]
        shapes = {"rows": (width,), "positions": (width,), "floor": (depth, width)}
        for name in ARRAYS:
            if getattr(found, name).shape != shapes.get(name, (depth, width, experts)):
                raise UnusableError(
                    f"{directory}: {name} of {TENSORS} has the shape {list(getattr(found, name).shape)}, which does not"
                    f" fit {depth} layers and {width} sources. Measure the knock-outs again."
                )
        return found

    def of_sources(self, sources: tuple[str, ...]) -> Self:
        """The same with one slice per name of `sources`, in that order: nothing for those that were not measured.

        Raises UnusableError where a measured source is none of them.
        """
        if unknown := [name for name in self.sources if name not in sources]:
            raise UnusableError(
                f"the knock-outs were measured on {', '.join(unknown)}, which the observation does not have. Observe"
                " and measure on the same calibration."
            )
        places = [sources.index(name) for name in self.sources]

        def spread(values: ndarray, axis: int) -> ndarray:
            wide = np.zeros((*values.shape[:axis], len(sources), *values.shape[axis + 1 :]), values.dtype)
            wide[(slice(None),) * axis + (places,)] = values
            return wide

        axes = {"rows": 0, "positions": 0}
        parts = {name: spread(getattr(self, name), axes.get(name, 1)) for name in ARRAYS}
        return type(self)(self.layers, sources, **parts, meta=self.meta)

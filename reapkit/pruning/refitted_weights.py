"""Stores re-fitted weights on disk: one safetensors file per layer with the checkpoint's own tensor names, and an
index. Torch-free to read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.checkpoint.projection_names import Role
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.core.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor, nn

INDEX = "repair.json"


@dataclass(frozen=True)
class LayerNames:
    """Where a layer's re-fitted matrices are: `stacked` names one tensor [kept, rows, columns], else `experts` names
    one tensor [rows, columns] each; rows and columns lie as in the source, in its dtype."""

    file: str
    keep: tuple[int, ...]
    stacked: str | None
    experts: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "keep": list(self.keep),
            "stacked": self.stacked,
            "experts": {str(expert): name for expert, name in self.experts.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerNames:
        return cls(
            data["file"],
            tuple(data["keep"]),
            data["stacked"],
            {int(expert): name for expert, name in data["experts"].items()},
        )


@dataclass(frozen=True)
class RepairedWeights:
    """The re-fitted `down_proj` of every repaired layer of one selection, by decoder index."""

    directory: Path
    layers: Mapping[int, LayerNames]
    facts: Mapping[str, Any]

    def save_index(self) -> None:
        write_json(self.directory / INDEX, self.describe())

    def describe(self) -> dict[str, Any]:
        """What the index file holds: the tensors' names, and how the fit went."""
        return {
            "layers": {str(layer): names.to_json() for layer, names in self.layers.items()},
            "facts": dict(self.facts),
        }

    @classmethod
    def load(cls, directory: str | Path) -> RepairedWeights:
        """Raises UnusableError where there is none."""
        path = Path(directory) / INDEX
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnusableError(
                f"{path}: the re-fitted weights cannot be read ({error}). Run the repair stage again."
            ) from None
        return cls(
            path.parent,
            {int(layer): LayerNames.from_json(names) for layer, names in data["layers"].items()},
            data["facts"],
        )

    def tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        """Source tensor name -> the file that holds its re-fitted bytes (a stacked one already cut to the kept
        experts)."""
        return {
            name: (self.directory / names.file, info)
            for names in self.layers.values()
            for name, info in read_header(self.directory / names.file).items()
        }

    def down_proj(self, layer: int) -> Mapping[int, Tensor]:
        """Expert (its number before pruning) -> its re-fitted matrix [rows, columns], on the host, in the orientation
        and the dtype that the source stores it in."""
        from safetensors.torch import load_file

        names = self.layers[layer]
        found = load_file(self.directory / names.file)
        if names.stacked is not None:
            return dict(zip(names.keep, found[names.stacked], strict=True))
        return {expert: found[name] for expert, name in names.experts.items()}


@contextmanager
def repaired(
    model: nn.Module, weights: RepairedWeights | None, layers: Collection[int] | None = None
) -> Iterator[None]:
    """Inside the block the kept experts of `model`, which has all experts of the source in memory, have their re-fitted
    matrices, rounded to the model's dtype; the block's end restores all to the bit.

    `layers`: only these (in streaming, the one that is in memory).
    """
    import torch

    from reapkit.model.routed_experts import find_experts

    held: list[tuple[Tensor, Tensor]] = []
    try:
        if weights is not None:
            for site in find_experts(model):
                matrix = site.matrix(Role.DOWN)
                if site.layer not in weights.layers or (layers is not None and site.layer not in layers):
                    continue
                for expert, tensor in weights.down_proj(site.layer).items():
                    place = matrix.data[expert]
                    held.append((place, place.clone()))
                    place.copy_(tensor)
        yield
    finally:
        with torch.no_grad():
            for place, old in reversed(held):
                place.copy_(old)

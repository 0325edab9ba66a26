"""Maps a checkpoint's tensors to loaded parameters, by transformers' own conversion mapping."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from reapkit.checkpoint.projection_names import MXFP4_BLOCKS

PACKED = re.compile(rf"(?:(?<=\.)(?:weight_packed|qweight)|{MXFP4_BLOCKS})$")
"""What packed weights are called beyond the name of the parameter that they are unpacked to."""


@dataclass(frozen=True)
class LoadedNames:
    """The renamings of one model class, the parameters and buffers it has, and its linear modules. `tied`: parameter ->
    the one it is tied to."""

    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    parameters: dict[str, Any]
    tied: Mapping[str, str]
    linears: frozenset[str]

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> LoadedNames:
        """Of a model that is loaded or on the meta device, before its experts are linearised."""
        mapping = copy.deepcopy(get_model_conversion_mapping(model))
        return cls(
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
            model.base_model_prefix,
            dict.fromkeys(model.state_dict(), True),
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear)),
        )

    @classmethod
    def of_class(cls, kind: type[Any], config: PretrainedConfig, *, trust_remote_code: bool = False) -> LoadedNames:
        """Of a model class, or an Auto class, for a config; the model is built on the meta device."""
        with torch.device("meta"):
            if kind.__name__.startswith("Auto"):
                return cls.of_model(kind.from_config(config, trust_remote_code=trust_remote_code))
            return cls.of_model((getattr(kind, "from_config", None) or kind._from_config)(config))

    def rename(self, name: str) -> str:
        """The parameter that a tensor becomes, or becomes a part of; the first of several."""
        return self._renamed(name)[0]

    def targets(self, name: str) -> set[str]:
        """All parameters that a tensor becomes or becomes a part of: a fused matrix may be split on its way."""
        target, pattern = self._renamed(name)
        several = [entry for entry in self.converters if pattern is not None and pattern in entry.source_patterns]
        return {
            target.replace(entry.target_patterns[0], other, 1) for entry in several for other in entry.target_patterns
        } or {target}

    def unfilled(self, names: Iterable[str]) -> set[str]:
        """The parameters that tensors of these names do not fill; those tied to a filled one are not among them."""
        filled = {target for name in names for target in self.targets(PACKED.sub(_unpacked, name))}
        return {name for name in self.parameters.keys() - filled if self.tied.get(name) not in filled}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self.renamings, self.converters, self.prefix, self.parameters)


def _unpacked(match: re.Match[str]) -> str:
    return "" if match[0] == MXFP4_BLOCKS else "weight"

"""Maps a checkpoint's tensors to loaded parameters, by transformers' own conversion mapping."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.model.loading import load_config, model_class


@dataclass(frozen=True)
class LoadedNames:
    """The renamings of one model class and the names it has parameters for."""

    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    parameters: dict[str, Any]

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> LoadedNames:
        """Of a model that is loaded or on the meta device, before its experts are linearised."""
        mapping = copy.deepcopy(get_model_conversion_mapping(model))
        return cls(
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
            model.base_model_prefix,
            dict.fromkeys(model.state_dict(), True),
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> LoadedNames:
        """Of the class that would load the checkpoint; no weight is read."""
        config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
        kind = model_class(config, trust_remote_code)
        build = getattr(kind, "from_config", None) or kind._from_config
        with torch.device("meta"):
            model = (
                build(config, trust_remote_code=trust_remote_code)
                if kind.__name__.startswith("Auto")
                else build(config)
            )
        return cls.of_model(model)

    def rename(self, name: str) -> str:
        """The parameter that a tensor becomes, or becomes a part of."""
        return rename_source_key(name, self.renamings, self.converters, self.prefix, self.parameters)[0]

"""Says which class a checkpoint's tensors fit, where the class that would load them lacks some."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.model.loaded_names import LoadedNames

CLASSES: tuple[Mapping[Any, str], ...] = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
"""transformers' classes by model type: of text alone, of images too, of more."""


def missing_weights(path: Path, model: PreTrainedModel, missing: Collection[str]) -> UnusableError:
    """What to tell of parameters of `model` that the checkpoint at `path` does not fill: another class whose every
    parameter it does, or that the files are incomplete.

    Raises UnusableError where the checkpoint's config or headers cannot be read.
    """
    loaded = type(model).__name__
    found = f"{path}: {len(missing)} tensors that {loaded} needs are missing, such as {min(missing)}"
    names = tuple(Checkpoint.open(path).tensors)
    for kind, config, field in _other_classes(model):
        if not LoadedNames.of_class(kind, config).unfilled(names):
            inside = f" and {field} in the place of the whole config" if field else ""
            return UnusableError(
                f"{found}. The checkpoint's tensors are named as {kind.__name__} has them, which finds all of its own."
                f' Set "architectures": ["{kind.__name__}"]{inside} in config.json, or name the tensors as'
                f" {loaded} has them."
            )
    return UnusableError(f"{found}; transformers would initialise them randomly. Download the checkpoint again.")


def _other_classes(model: PreTrainedModel) -> Iterator[tuple[type[PreTrainedModel], PretrainedConfig, str | None]]:
    """(class, its config, the field of config.json that holds it) of all that may load a model of this config or of its
    text part."""
    config, text = model.config, model.config.get_text_config()
    field = next((key for key, value in vars(config).items() if value is text), None)
    parts = [(config, None)] if text is config else [(config, None), (text, field)]
    known = {type(model).__name__}
    for part, where in parts:
        for mapping in CLASSES:
            kind = getattr(transformers, str(mapping.get(part.model_type)), None)
            if kind is not None and kind.__name__ not in known and isinstance(part, kind.config_class):
                known.add(kind.__name__)
                yield kind, part, where

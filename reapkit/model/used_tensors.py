"""Refuses a checkpoint that holds weights which the model's class has no place for: left out in silence, they would
change what the model computes, and the wrong experts would be kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import is_mtp_name
from reapkit.checkpoint.projection_names import QUANTIZER_STATE, Part, part_of
from reapkit.checkpoint.readable import way_out
from reapkit.core.errors import UnusableError
from reapkit.model.fitting_class import missing_weights
from reapkit.model.loaded_names import LoadedNames

Target = tuple[str, str | None]
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)position_ids$|\.attention\.(?:masked_)?bias$")
"""Tables that old checkpoints store and every class computes."""
SHOWN = 3


class Conversions:
    """How transformers turns a checkpoint's tensors into a model's parameters: by name, and by operations where several
    make one."""

    def __init__(self, model: PreTrainedModel):
        """`model` may be on the meta device; its weights are not read."""
        entries = cast(  # who makes the list and who takes it name its type differently
            "list[WeightConverter | WeightRenaming]", get_model_conversion_mapping(model)
        )
        self.entries = entries
        self.converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self.expected: Mapping[str, Tensor] = model.state_dict()

    def target(self, name: str) -> Target:
        """The parameter that a tensor becomes (part of), and the pattern of the conversion that makes it so."""
        found = rename_source_key(name, self._renamings, self.converters, self._prefix, cast(Any, self.expected))
        if found[0] not in self.expected and name in self.expected:
            return rename_source_key(name, [], [], self._prefix, cast(Any, self.expected))
        return found


def require_all_used(
    model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, Target], expected: Mapping[str, Tensor]
) -> None:
    """Raises UnusableError where a tensor of a decoder layer, or a scale or packed weight anywhere, has no place in the
    model's class, or another shape than its parameter.

    `targets`: of every tensor of `checkpoint.plain`. `expected`: the class's parameters and buffers, of any shape and
    dtype. Left aside are multi-token-prediction blocks, which reapkit loads
    or drops by itself, and what the class itself says that it leaves out.
    """
    if unused := unused_tensors(model, checkpoint, targets, expected):
        if missing := LoadedNames.of_model(model).unfilled(checkpoint.plain.tensors):
            raise missing_weights(checkpoint.path, model, missing)  # named as another class has them
        raise UnusableError(_unused_text(model, checkpoint, unused))
    for name, (target, pattern) in targets.items():
        if pattern is None and target in expected:
            stored, wanted = checkpoint.plain.tensors[name].shape, tuple(expected[target].shape)
            if stored != wanted:
                raise UnusableError(
                    f"{checkpoint.path}: tensor {name} has shape {list(stored)}, but {type(model).__name__} of"
                    f" transformers {transformers.__version__} wants {list(wanted)}. The config and the weights must be"
                    " of one model; download the checkpoint again, or upgrade transformers."
                )


def unused_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, Target], expected: Mapping[str, Tensor]
) -> list[str]:
    """Names of the tensors that `require_all_used` refuses for having no place in `expected`, whose shapes and dtypes
    do not count here (any shape, any dtype)."""
    unplaced = [name for name, (target, _) in targets.items() if target not in expected]
    return harmful(unplaced, checkpoint, _left_out_by(model))


def harmful(names: Iterable[str], checkpoint: Checkpoint, left_out: re.Pattern[str] | None = None) -> list[str]:
    """Those of the tensors, which a class had no place for, that it must not leave out, sorted.

    They are all that belong to the decoder's layers, and what says anywhere how weights are to be read. `left_out`:
    names that the class itself says it leaves out.
    """
    if not (names := list(names)):
        return []
    stack, depth = checkpoint.layout.stack, checkpoint.architecture.num_hidden_layers
    return sorted(
        name
        for name in names
        if not is_mtp_name(name, stack, depth)
        and not COMPUTED.search(name)
        and not (left_out is not None and left_out.search(name))
        and (name.startswith(stack) or part_of(name) in (*QUANTIZER_STATE, Part.PACKED))
    )


def _left_out_by(model: PreTrainedModel) -> re.Pattern[str] | None:
    patterns = sorted(model._keys_to_ignore_on_load_unexpected or ())
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None


def _unused_text(model: PreTrainedModel, checkpoint: Checkpoint, unused: list[str]) -> str:
    shown = ", ".join(unused[:SHOWN]) + (", …" if len(unused) > SHOWN else "")
    stored = f"quantized ({checkpoint.method_name})" if checkpoint.quantization else "not quantized"
    advice = (
        way_out()
        if checkpoint.quantization
        else "Upgrade transformers, or check that config.json is of the model whose weights these are."
    )
    return (
        f"{checkpoint.path}: {type(model).__name__} of transformers {transformers.__version__} has no place for"
        f" {len(unused)} tensors: {shown}. The weights are {stored}; without these the model would compute something"
        f" else, and the wrong experts would be kept. {advice}"
    )


def on_meta(cls: type[Any], config: transformers.PretrainedConfig, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    """The class of a model, or transformers' auto class, built without weights."""
    with torch.device("meta"):
        if hasattr(cls, "from_config"):
            model = cls.from_config(config, dtype=dtype, trust_remote_code=trust)
        else:
            model = cls._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)

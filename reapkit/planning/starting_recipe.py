"""Writes a first recipe for a checkpoint from its config and headers, with comments where the user must decide.
Torch-free."""

from __future__ import annotations

import os
import re
from math import gcd
from pathlib import Path

import yaml

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import model_checkpoint
from reapkit.checkpoint.readable import require_readable
from reapkit.core.formatting import gigabytes
from reapkit.quantization.sizes import quantized_widths
from reapkit.recipe.schema import DEFAULT_CRITERION, ModelSpec, QuantizeSpec
from reapkit.selection.criteria.registry import criterion

GROUP_SIZES = (128, 64, 32, 16)


def starting_recipe(model: str, directory: Path, folder: Path | None = None) -> tuple[str, str]:
    """(name, YAML) of a recipe for the model at a path, hub id or builtin name; a relative path starts from
    `directory`. `folder`: where the recipe will lie, if not there; its paths start from it.

    Raises UnusableError where there is no such model or it is not an MoE.
    """
    checkpoint = model_checkpoint(ModelSpec(source=model), directory)
    require_readable(checkpoint)
    architecture, layout = checkpoint.architecture, checkpoint.layout
    name = (
        re.sub(r"[^A-Za-z0-9_.-]+", "-", model.removeprefix("builtin:").rstrip("/").split("/")[-1]).strip("-.")
        or "model"
    )
    group, longest = group_size(checkpoint), text_config(checkpoint.config).get("max_position_embeddings") or 2048
    mix = _MIX_BUILTIN if model.startswith("builtin:") else _MIX
    facts = (
        f"{architecture.model_type}: {len(layout.layers)} MoE layers of {architecture.num_hidden_layers}, top-"
        f"{architecture.num_experts_per_tok} of {architecture.num_experts} experts, "
        + gigabytes(checkpoint.nbytes, ".3g")
    )
    quantize = _quantize(checkpoint, group)
    return name, _TEMPLATE.format(
        name=name,
        model=_written(_from_folder(model, directory, folder or directory)),
        facts=facts,
        mix=mix,
        quantize=quantize,
        criterion=DEFAULT_CRITERION,
        ranked_by=criterion(DEFAULT_CRITERION).summary,
        keep=architecture.num_experts - architecture.num_experts // 2,
        experts=architecture.num_experts,
        top_k=architecture.num_experts_per_tok,
        length=min(2048, longest),
        lengths=[length for length in (1024, 2048) if length <= longest] or [longest],
    )


def _from_folder(model: str, directory: Path, folder: Path) -> str:
    """A model's relative path as a recipe in `folder` writes it; anything else as it is."""
    if Path(model).is_absolute() or not (directory / model).exists():
        return model
    return os.path.relpath((directory / model).absolute(), folder.absolute())


def _written(text: str) -> str:
    """Text as a YAML scalar, in quotes where it needs them."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def group_size(checkpoint: Checkpoint) -> int | None:
    """The largest usual group size that divides every quantized width, or None."""
    common = gcd(*quantized_widths(checkpoint, QuantizeSpec(scheme="W3A16", method="rtn")))
    return next((size for size in GROUP_SIZES if common % size == 0), None)


def _quantize(checkpoint: Checkpoint, group: int | None) -> str:
    if kind := checkpoint.method_name:
        return (
            f"quantize: {{scheme: null}}            # the weights are {kind} already; see `reapkit schema` for what can"
            " follow"
        )
    if group is None:
        return "quantize: {scheme: null}            # no usual group size divides every width of this model"
    return (
        f"quantize: {{scheme: W3A16, method: gptq, group_size: {group}}}   # group_size divides every width of this"
        " model"
    )


_MIX = """    # Weights are shares of samples. Replace these by what the model is for: pruning keeps what it is shown.
    - {name: code,  source: theblackcat102/evol-codealpaca-v1,    weight: 0.51, \
format: {prompt: instruction, completion: output}}
    - {name: tools, source: Salesforce/xlam-function-calling-60k, weight: 0.24, format: xlam}
    - {name: agentic, source: SWE-bench/SWE-smith-trajectories, split: tool, weight: 0.25, format: messages}
    # - {name: mine, source: data/*.jsonl, weight: 0.2, format: messages}     # local files, relative to this recipe"""

_MIX_BUILTIN = """    # Weights are shares of samples.
    - {name: code,  source: "builtin:code",  weight: 0.4}
    - {name: tools, source: "builtin:tools", weight: 0.3}
    - {name: prose, source: "builtin:prose", weight: 0.3}
    # - {name: mine, source: data/*.jsonl, weight: 0.2, format: messages}     # local files, relative to this recipe"""

_TEMPLATE = """\
# {facts}
# Check it with `reapkit validate`, see what it would do with `reapkit plan`, run it with `reapkit apply`.
version: 1
name: {name}

model:
  source: {model}

calibration:
  samples: 1360                 # more samples: steadier decisions, longer observation
  max_length: {length:<4}              # tokens per row
  mix:
{mix}

saliency:
  criterion: {criterion:<18} # {ranked_by}

prune:
  ratio: 0.5                    # keeps {keep} of {experts} experts; each token is routed to {top_k}
  # candidates: {{ratio: [0.5, 0.4, 0.25]}}   # instead of ratio: the smallest that passes the gates wins

evaluate:
  packs: {{lengths: {lengths}}} # held-out rows are compared at these lengths
  gates: near-lossless          # strict, near-lossless, size-first, or limits of your own; \
nothing is written unless they pass
  gates_quantized: size-first   # the same for the final directory; null: measured and reported, not judged

{quantize}
"""

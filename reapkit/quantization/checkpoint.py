"""Quantizes a checkpoint with llm-compressor, safely: causal calibration, the source's tensor names, the source's
config.

`rtn` goes shard by shard without a model (`rtn.py`); `gptq`, `awq` and `autoround` calibrate a loaded model
(`calibrated.py`); what they decided is written under the names of the source (`writing.py`). Nothing here needs an
accelerator.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import Problem, RecipeError, StageFailed
from reapkit.core.progress import SILENT, Progress
from reapkit.quantization.checks import check_quantize
from reapkit.quantization.formats import preset, weights_of
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.targets import needs_plain_copy, targets
from reapkit.quantization.writing import finish_directory, measure
from reapkit.recipe.schema import QuantizeSpec

__all__ = ["quantize_checkpoint"]


def quantize_checkpoint(
    source: Path,
    out: Path,
    spec: QuantizeSpec,
    *,
    calibration: CalibrationTokens | None = None,
    device: str = "cpu",
    batch_tokens: int = 8192,
    max_shard_bytes: int = 5_000_000_000,
    offload: Path | None = None,
    trust_remote_code: bool = False,
    work: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes `source` quantized as `spec` says to `out`, complete: weights under the source's names, config, tokenizer,
    templates.

    The config is the source's own with `quantization_config` set. Returns facts for the report: scheme, method, bits
    per weight measured on disk, modules left alone by reason, experts that saw few calibration tokens. `work`: where a
    dequantized copy of a quantized source may live meanwhile. `offload`: a directory where the decoder layers of a
    model that does not fit into host memory wait for their turn (not with `rtn`, which holds a shard at most); it is
    gone afterwards. Raises RecipeError where spec and checkpoint contradict, StageFailed where a matrix was not
    written, ValueError where a method that calibrates got no calibration.
    """
    source, out = Path(source), Path(out)
    checkpoint = Checkpoint.open(source)
    if problems := check_quantize(checkpoint, spec):
        raise RecipeError(problems)
    raw = spec.recipe is not None
    plan = targets(checkpoint, spec)
    if not plan.matrices:
        raise RecipeError(
            [
                Problem(
                    "quantize.ignore",
                    "the patterns leave no matrix to quantize. Remove some of them, or set scheme: null.",
                )
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    copy = (work or out.parent) / f"{out.name}.dequantized"
    if not raw and spec.method == "rtn" and not plan.has_stacked_experts:
        from reapkit.quantization.rtn import quantize_shards

        scheme = preset(spec)
        with _plain(checkpoint, spec, copy, progress) as plain:
            written, facts = quantize_shards(
                plain, out, plan, scheme, device=target, max_shard_bytes=max_shard_bytes, progress=progress
            )
    else:
        from reapkit.quantization.calibrated import quantize_loaded

        if calibration is None and (raw or spec.method != "rtn"):
            raise ValueError(f"quantize: {'a raw recipe' if raw else spec.method} needs calibration tokens")
        with _plain(checkpoint, spec, copy, progress) as plain:
            done = quantize_loaded(
                plain,
                out,
                plan,
                spec,
                None if raw else preset(spec),
                calibration,
                device=target,
                batch_tokens=batch_tokens,
                max_shard_bytes=max_shard_bytes,
                offload=offload,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        written, plan, scheme, facts = done.written, done.plan, done.scheme, done.facts
    finish_directory(checkpoint, out, scheme, plan, trust_remote_code=trust_remote_code)
    if lost := sorted(set(plan.matrices) - set(written)):
        raise StageFailed(
            f"quantize: {len(lost)} matrices were not quantized, such as {lost[0]}. This is a defect; please report the"
            " model."
        )
    named = (
        {"scheme": "raw recipe", "method": "raw recipe", "experts_reload_in_transformers": None}
        if raw
        else {
            "scheme": scheme_of(spec).name,
            "method": spec.method,
            "experts_reload_in_transformers": scheme_of(spec).experts_reload and not plan.has_stacked_experts,
        }
    )
    return {
        **named,
        "group_size": weights_of(scheme).group_size,
        **measure(out, plan, written),
        "left": _left_by_reason(plan.left),
        **facts,
    }


@contextmanager
def _plain(checkpoint: Checkpoint, spec: QuantizeSpec, directory: Path, progress: Progress) -> Iterator[Checkpoint]:
    """The checkpoint itself, or for the block a copy in plain numbers of one that must be read as such."""
    if not needs_plain_copy(checkpoint, spec):
        yield checkpoint
        return
    from reapkit.quantization.rtn import dequantized_copy

    try:
        yield dequantized_copy(checkpoint, directory, progress=progress)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _left_by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for module, reason in left.items():
        reasons.setdefault(reason, []).append(module)
    return reasons

"""Defines a proof's result, and the parts that all proofs share: reading tensors, loading once, comparing logits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import disable_quantization
from safetensors import safe_open
from torch import Tensor
from transformers import CompressedTensorsConfig, PretrainedConfig, PreTrainedModel

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import ReapkitError
from reapkit.core.formatting import gigabytes
from reapkit.model.causal_lm import generate
from reapkit.model.loading import load_config, load_model, model_class
from reapkit.model.used_tensors import Conversions, harmful

LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of two models' logits, as a share of their standard deviation, that counts as rounding."""
GENERATED_TOKENS = 8
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Proof:
    """One claim about one directory and whether it holds; `value` is the number behind it.

    Where a claim could not be tested here `measured` is False, `passed` True, and `detail` says why. `by_layer`: that
    number for each decoder layer, where it has one.
    """

    name: str
    passed: bool
    detail: str
    value: float | None = None
    measured: bool = True
    directory: str = ""
    by_layer: Mapping[str, float] | None = None


def not_measured(name: str, why: str) -> Proof:
    """A claim that could not be tested."""
    return Proof(name, True, f"not measured: {why}", measured=False)


def attempt(name: str, proof: Callable[[], Proof]) -> Proof:
    """A proof that dies is a proof that failed; the text of the error is its detail."""
    try:
        return proof()
    except (ReapkitError, RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        return Proof(name, False, f"{type(error).__name__}: {str(error)[:500]}")
    finally:
        gc.collect()


class Reader:
    """Tensors of a checkpoint by name; its files stay open for the block."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, name: str) -> Tensor:
        shard = self.checkpoint.tensors[name].shard
        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(safe_open(self.checkpoint.path / shard, "pt"))
        return self._files[shard].get_tensor(name)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Two tensors of any shape and dtype have equal dtype, shape and bytes; NaNs with equal bits are equal."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.reshape(-1).contiguous().view(torch.uint8), right.reshape(-1).contiguous().view(torch.uint8)
    )


def names_differ(expected: set[str], found: set[str]) -> str | None:
    """What is missing and what is too many, or None."""
    parts = [
        f"{len(names)} {what}, such as {sorted(names)[0]}"
        for what, names in (("missing", expected - found), ("too many", found - expected))
        if names
    ]
    return "tensors: " + "; ".join(parts) if parts else None


def probe_rows(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> Tensor:
    """Token rows of one length, [rows, tokens] int64; made up, and the same every time, where none are given."""
    if rows:
        length = min(len(row) for row in rows)
        return torch.tensor([list(row)[:length] for row in rows])
    vocabulary = int(text_config(checkpoint.config).get("vocab_size", 256))
    return torch.randint(min(10, vocabulary - 1), vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))


def too_large(checkpoint: Checkpoint, bits: int, device: str) -> str | None:
    """Why a model with this many bits per weight is not loaded here, or None where it fits."""
    import psutil

    on_gpu = device != "cpu" and torch.cuda.is_available()
    free = (
        sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        if on_gpu
        else psutil.virtual_memory().available
    )
    needed = checkpoint.numel * bits // 8
    if needed <= free * MEMORY_SHARE:
        return None
    return f"the model needs {gigabytes(needed)} of memory, {gigabytes(free)} are free"


def logits_of(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits [rows, tokens, vocabulary], in the model's dtype, on the host, of rows [rows, tokens] int64."""
    with torch.no_grad():
        return model(rows.to(model.device), use_cache=False).logits.cpu()


def loaded(
    directory: Path,
    rows: Tensor,
    expected: Tensor | None,
    reference: str,
    *,
    device: str,
    trust_remote_code: bool,
    dtype: str | torch.dtype = "auto",
    weights_only: bool = False,
    dequantizing: bool = False,
    further: Callable[[PreTrainedModel], list[Proof]] = lambda model: [],
) -> list[Proof]:
    """Loads the directory once and proves three things: every key is expected and none is missing, its logits, that it
    generates; and what `further` proves of the loaded model. Multi-token-prediction blocks, which no model has a place
    for, are not unexpected.

    `rows`: [rows, tokens] int64. `expected`: [rows, tokens, vocabulary] in any float dtype; None: the logits are only
    checked to be finite, and `reference` says why. `weights_only`: formats that also round activations are loaded
    without doing so, since the reference does not. `dequantizing`: the directory keeps the format of a source that
    reapkit reads by itself, so it is loaded as that was.
    """
    if dequantizing:
        model, keys = load_model(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code), _KEYS
    else:
        model, keys = _by_transformers(directory, device, dtype, trust_remote_code, weights_only)
    logits = logits_of(model, rows)
    equal = (
        equal_logits(logits, expected, reference)
        if expected is not None
        else Proof("logits", bool(torch.isfinite(logits).all()), f"finite; not compared: {reference}", measured=False)
    )
    return [keys, equal, attempt("generates", lambda: _generates(model, rows[0])), *further(model)]


_KEYS = Proof("loads", True, "the class has a place for every tensor, dequantized by reapkit, and lacks none")


def _by_transformers(
    directory: Path, device: str, dtype: str | torch.dtype, trust_remote_code: bool, weights_only: bool
) -> tuple[PreTrainedModel, Proof]:
    """The directory as transformers loads it by itself, and what it says of the names."""
    config = load_config(directory, trust_remote_code=trust_remote_code)
    plain = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if weights_only else _dequantized(config)
    model, info = model_class(config, trust_remote_code).from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        device_map=device,
        trust_remote_code=trust_remote_code,
        **({"experts_implementation": "eager"} if device == "cpu" else {}),
        **plain,
    )
    model.eval()
    if weights_only:
        model.apply(disable_quantization)
    return model, _keys(info, Checkpoint.open(directory), model)


def _dequantized(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which transformers itself turns what this package writes into plain weights."""
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    method = _setting(settings, "quant_method")
    if method == "compressed-tensors":  # else weights are unpacked by a hook on the whole model's forward
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


def _setting(settings: Any, name: str) -> Any:
    """One of a config's quantization settings, which are a dictionary or an object; None where it has none."""
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)


def equal_logits(got: Tensor, expected: Tensor, reference: str) -> Proof:
    """Logits `[..., vocabulary]` are finite, and equal to `reference`'s of the same shape but for rounding in the dtype
    they were computed in.

    Measured is max |got − expected| / std(expected), in float32.
    """
    if not torch.isfinite(got).all():
        return Proof("logits", False, "some logits are not finite")
    gap = ((got.float() - expected.float()).abs().max() / expected.float().std()).item()
    allowed = LOGITS_TOLERANCE.get(got.dtype, LOGITS_TOLERANCE[torch.bfloat16])
    return Proof(
        "logits",
        gap <= allowed,
        f"differ from {reference} by at most {gap:.2g} of their standard deviation (allowed: {allowed:g})",
        gap,
    )


def unexpected(info: dict[str, Any], checkpoint: Checkpoint, model: PreTrainedModel) -> list[str]:
    """Tensors that the loaded class had no place for, under the names that transformers gave them; those aside that it
    may leave out, see `harmful`."""
    if not (names := set(map(str, info.get("unexpected_keys") or ()))):
        return []
    conversions = Conversions(model)
    targets = {name: conversions.target(name)[0] for name in checkpoint.tensors}
    unplaced = {name for name, target in targets.items() if target not in conversions.expected}
    may = unplaced - set(harmful(unplaced, checkpoint))
    return sorted(names - may - {targets[name] for name in may})


def _keys(info: dict[str, Any], checkpoint: Checkpoint, model: PreTrainedModel) -> Proof:
    info = {**info, "unexpected_keys": unexpected(info, checkpoint, model)}
    wrong = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected", "mismatched")}
    found = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in wrong.items() if names)
    return Proof(
        "loads",
        not found,
        f"transformers finds tensors: {found}" if found else "transformers finds every tensor it expects and no other",
    )


def _generates(model: PreTrainedModel, row: Tensor) -> Proof:
    prompt = row[:16].unsqueeze(0).to(model.device)
    with torch.no_grad():
        text = generate(
            model,
            prompt,
            torch.ones_like(prompt),
            max_new_tokens=GENERATED_TOKENS,
            min_new_tokens=GENERATED_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    made = text.shape[1] - prompt.shape[1]
    return Proof("generates", made == GENERATED_TOKENS, f"{made} tokens generated greedily", float(made))

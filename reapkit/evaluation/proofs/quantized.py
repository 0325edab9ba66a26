"""Proves a quantized directory: its format, values and loading, and its logits against a model with the dequantized
weights."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.projection_names import COMPRESSED_PARTS, CONSTANT_PARTS
from reapkit.core.dtypes import BITS, torch_dtypes
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import TensorInfo
from reapkit.evaluation.proofs.proof import (
    Proof,
    Reader,
    attempt,
    loaded,
    logits_of,
    names_differ,
    not_measured,
    probe_rows,
    same_bits,
    too_large,
    unexpected,
)
from reapkit.model.loading import load_config, model_class, plain_config
from reapkit.model.stored_tensors import PlainTensors
from reapkit.quantization.dense import PackedDirectory, relative_error
from reapkit.quantization.formats import preset, round_to_nearest, spec_on_disk
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.targets import Matrix, Targets, expert_prefixes, targets
from reapkit.recipe.schema import QuantizeSpec

CONSTANTS = tuple(f".{part}" for part in CONSTANT_PARTS)
WORST_ERROR = 0.99
"""A matrix that has nothing of its source left, or another matrix in its place, is further away than this."""


def prove_quantized(
    source: Path,
    directory: Path,
    spec: QuantizeSpec | None = None,
    *,
    probe: Sequence[Sequence[int]] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Proof]:
    """Exactly the tensors the format has, each packed matrix near its source, every key expected, logits, generation.

    The logits are compared with the source's class holding every packed matrix dequantized one by one, which does not
    trust the loader that it tests. Where transformers cannot read a format for routed experts, that model stands in and
    `loads` says so.
    """
    old, new = Checkpoint.open(source), Checkpoint.open(directory)
    spec = spec or spec_on_disk(new.config)
    if spec.recipe is not None:
        return _whatever_it_is(directory, old, probe_rows(old, probe), device, trust_remote_code)
    plan, rows = targets(old, spec), probe_rows(old, probe)
    proofs = [
        attempt("tensors", lambda: _tensors(old, new, plan, spec)),
        attempt("dequantized", lambda: _near_source(old, new, plan, spec)),
    ]
    if (shortage := too_large(old.plain, 16, device)) is not None:
        return proofs + [not_measured(name, shortage) for name in ("loads", "logits", "generates")]
    try:
        expected = _reference_logits(old, new, plan, rows, device, trust_remote_code)
        if unread := _unread(plan, spec):
            finite = bool(torch.isfinite(expected).all())
            return [
                *proofs,
                not_measured("loads", unread),
                not_measured("generates", unread),
                Proof(
                    "logits", finite, f"of a model with the dequantized weights: {'finite' if finite else 'not finite'}"
                ),
            ]
        return proofs + loaded(
            directory,
            rows,
            expected,
            "a model with the dequantized weights",
            device=device,
            trust_remote_code=trust_remote_code,
            weights_only=preset(spec).input_activations is not None,
        )
    except Exception as error:  # whatever the loader dies of is the finding
        return [*proofs, Proof("loads", False, f"{type(error).__name__}: {str(error)[:500]}")]


def _unread(plan: Targets, spec: QuantizeSpec) -> str | None:
    """Why transformers cannot read the directory, or None."""
    if plan.has_stacked_experts:
        return "transformers reads this architecture's experts stacked only, and no quantized format stacks them"
    routed = any(matrix.routed for matrix in plan.matrices.values())
    if routed and not scheme_of(spec).experts_reload:
        return (
            f"transformers cannot read routed experts in {scheme_of(spec).name}; engines with one module per expert,"
            " such as vLLM, can"
        )
    return None


def _whatever_it_is(
    directory: Path, old: Checkpoint, rows: Tensor, device: str, trust_remote_code: bool
) -> list[Proof]:
    """A raw llm-compressor recipe decides its own format: the loader's word and finite logits are what can be had."""
    try:
        return loaded(
            directory,
            rows,
            None,
            "a raw llm-compressor recipe has no prediction",
            device=device,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever the loader dies of is the finding
        return [Proof("loads", False, f"{type(error).__name__}: {str(error)[:500]}")]


def _tensors(old: Checkpoint, new: Checkpoint, plan: Targets, spec: QuantizeSpec) -> Proof:
    """Names, shapes and dtypes of every packed matrix are the format's, what is not quantized is the source's, nothing
    else is there."""
    expected = _format(plan, spec)
    plain = old.plain.tensors
    others = {name for name in plain if name not in plan.matrices}
    if difference := names_differ(set(expected) | others, set(new.tensors)):
        return Proof("tensors", False, difference)
    for name, (shape, dtype) in expected.items():
        found = new.tensors[name]
        if found.shape != shape or torch_dtypes().get(found.dtype) != dtype:
            return Proof(
                "tensors", False, f"{name} is {found.dtype} {list(found.shape)}, the format has {dtype} {list(shape)}"
            )
    if wrong := _wrong_bits(new, plan, spec):
        return Proof("tensors", False, wrong)
    changed = 0
    with PlainTensors(old) as read_old, Reader(new) as read_new:
        for name in sorted(others):
            if plain[name].dtype == new.tensors[name].dtype and not same_bits(read_old(name), read_new(name)):
                changed += 1
                if spec.method != "awq":  # awq moves scales into norms, routers and other layers
                    return Proof("tensors", False, f"{name} is not quantized and yet differs from its source")
    moved = f", {changed} of them rescaled by awq" if changed else ""
    bits = {round(_bits_per_weight(new, matrix), 4) for matrix in plan.matrices.values()}
    spread = f"{min(bits):g}" if len(bits) == 1 else f"{min(bits):g} to {max(bits):g}"
    return Proof(
        "tensors",
        True,
        f"{len(expected)} packed tensors of the format's shapes, {spread} bits per weight in every matrix, and "
        f"{len(others)} others{moved}",
        float(len(expected)),
    )


def _wrong_bits(new: Checkpoint, plan: Targets, spec: QuantizeSpec) -> str | None:
    """The first matrix that takes other bytes than its scheme's arithmetic says, whatever the libraries think the
    format is."""
    scheme = scheme_of(spec)
    for name, matrix in plan.matrices.items():
        bits = BITS[matrix.tensor.dtype]
        allowed = matrix.count * scheme.nbytes(matrix.rows, matrix.columns, spec.group_size, bits)
        found = sum(tensor.nbytes for tensor in _parts(new, matrix))
        if found != allowed:
            return (
                f"{name} takes {found} bytes, {scheme.name} takes {allowed} for {matrix.count} x {matrix.rows} x"
                f" {matrix.columns} weights"
            )
    return None


def _bits_per_weight(new: Checkpoint, matrix: Matrix) -> float:
    """Packed weights and scales; constants per matrix aside."""
    nbytes = sum(tensor.nbytes for tensor in _parts(new, matrix) if not tensor.name.endswith(CONSTANTS))
    return nbytes * 8 / (matrix.count * matrix.rows * matrix.columns)


def _parts(new: Checkpoint, matrix: Matrix) -> list[TensorInfo]:
    prefixes = [matrix.module] if len(matrix.tensor.shape) == 2 else expert_prefixes(matrix)
    return [
        new.tensors[name]
        for prefix in prefixes
        for part in COMPRESSED_PARTS
        if (name := f"{prefix}.{part}") in new.tensors
    ]


def _format(plan: Targets, spec: QuantizeSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every packed tensor, from quantizing one matrix of each shape."""
    scheme, examples = preset(spec), {}
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for matrix in plan.matrices.values():
        key = (matrix.rows, matrix.columns, matrix.tensor.dtype)
        if key not in examples:
            examples[key] = round_to_nearest(torch.ones(key[0], key[1], dtype=torch_dtypes()[key[2]]), scheme)
        prefixes = [matrix.module] if len(matrix.tensor.shape) == 2 else expert_prefixes(matrix)
        expected |= {
            f"{prefix}.{part}": (tuple(tensor.shape), tensor.dtype)
            for prefix in prefixes
            for part, tensor in examples[key].items()
        }
    return expected


def _near_source(old: Checkpoint, new: Checkpoint, plan: Targets, spec: QuantizeSpec) -> Proof:
    """Every matrix resembles its source; by layer √(Σ‖packed − source‖² / Σ‖source‖²) over the layer's matrices."""
    if spec.method == "awq":
        return not_measured(
            "dequantized", "awq rescales weights, so single matrices have no reference; the logits have"
        )
    worst, where, total = 0.0, "", 0.0
    squares: dict[int, list[tuple[float, float]]] = {}
    with PackedDirectory(old, new, plan) as packed:
        for name, matrix in plan.matrices.items():
            source = packed.source_dense(name)
            error = relative_error(packed.dense(name), source)
            total += error
            if not error <= worst:
                worst, where = error, name
            size = source.float().norm().item() ** 2
            squares.setdefault(matrix.layer, []).append((error**2 * size, size))
    by_layer = {str(layer): _share_of_norm(parts) for layer, parts in sorted(squares.items())}
    detail = f"relative error of the matrices: mean {total / len(plan.matrices):.3g}, worst {worst:.3g} ({where})"
    return Proof("dequantized", worst < WORST_ERROR, detail, worst, by_layer=by_layer)


def _share_of_norm(parts: Sequence[tuple[float, float]]) -> float:
    """√(Σ error² / Σ size²) of matrices given as (error², size²)."""
    errors, sizes = map(sum, zip(*parts, strict=True))
    return (errors / sizes) ** 0.5 if sizes else 0.0


def _reference_logits(
    old: Checkpoint, new: Checkpoint, plan: Targets, rows: Tensor, device: str, trust_remote_code: bool
) -> Tensor:
    model = dequantized_model(old, new, plan, device=device, trust_remote_code=trust_remote_code)
    logits = logits_of(model, rows)
    del model
    gc.collect()
    return logits


def dequantized_model(
    old: Checkpoint, new: Checkpoint, plan: Targets, *, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The source's own class with the weights that the packed directory stands for. Raises UnusableError where they do
    not fit it."""
    config = plain_config(load_config(old.path, trust_remote_code=trust_remote_code))
    options: dict[str, Any] = {"experts_implementation": "eager"} if device == "cpu" else {}
    with PackedDirectory(old, new, plan) as packed:
        model, info = model_class(config, trust_remote_code).from_pretrained(
            None,
            config=config,
            state_dict=dict(packed.state_dict()),
            dtype=getattr(config, "dtype", None) or torch.bfloat16,
            output_loading_info=True,
            **options,
        )
    if strange := sorted({*info["missing_keys"], *unexpected(info, old, model)}):
        raise UnusableError(
            f"{new.path}: {len(strange)} dequantized tensors do not fit {type(model).__name__}, such as {strange[0]}."
            " Please report the model."
        )
    return model.eval().to(device)

"""Proves a pruned directory: its bytes, config and loading, and its logits against the original with the dropped
experts masked."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.evaluation.proofs.mtp import MtpPair
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
)
from reapkit.model.loading import load_model
from reapkit.model.masking import masked
from reapkit.pruning.refitted_weights import RepairedWeights
from reapkit.pruning.refitted_weights import repaired as with_repaired
from reapkit.selection.selection import Selection


@dataclass(frozen=True)
class _PrunedTensor:
    """How a source tensor appears in the pruned directory: under which name (None: not at all), cut along which
    axis."""

    name: str | None
    axis: int | None = None
    keep: tuple[int, ...] = ()


def prove_pruned(
    source: Path,
    directory: Path,
    selection: Selection,
    *,
    probe: Sequence[Sequence[int]] = (),
    repaired: Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Proof]:
    """Tensors bit-equal to their source slices, config in agreement, every key expected, logits of the masked original,
    generation.

    `repaired`: the directory of re-fitted expert weights; then those are what tensors and masked original are made of.
    """
    old, new = Checkpoint.open(source), Checkpoint.open(directory)
    layout = old.layout
    rows = probe_rows(old, probe)
    weights = RepairedWeights.load(repaired) if repaired else None
    proofs = [
        attempt("tensors", lambda: _tensors(old, new, layout, selection, weights)),
        attempt("config", lambda: _config(new, layout, selection)),
    ]
    if (why := too_large(old.plain, 16, device)) is not None:
        return proofs + [not_measured(name, why) for name in ("loads", "logits", "generates")]

    def computed(dtype: str) -> list[Proof]:
        return _computed(old, new, selection, weights, rows, dtype, device, trust_remote_code)

    try:
        return proofs + in_doubt_wider(computed, None if too_large(old.plain, 32, device) else "float32")
    except Exception as error:  # whatever the loader dies of is the finding
        return [*proofs, Proof("loads", False, f"{type(error).__name__}: {str(error)[:500]}")]


def in_doubt_wider(computed: Callable[[str], list[Proof]], wider: str | None) -> list[Proof]:
    """The proofs in the dtype that the model runs in. Where logits differ there, near-ties of a router may have fallen
    the other way by rounding: `wider`, where memory has room for it, tells that from an expert that is not the same."""
    proofs = computed("auto")
    failed = next((proof for proof in proofs if proof.name == "logits" and not proof.passed), None)
    if failed is None or wider is None:
        return proofs
    again = computed(wider)
    return [
        replace(proof, detail=f"in {wider} they {proof.detail}; in the model's own dtype they {failed.detail}")
        if proof.name == "logits" and proof.passed
        else proof
        for proof in again
    ]


def _computed(
    old: Checkpoint,
    new: Checkpoint,
    selection: Selection,
    weights: RepairedWeights | None,
    rows: Tensor,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> list[Proof]:
    """What loading the directory in `dtype` proves, against the masked original in the same."""
    reference = "the original with the dropped experts masked" + (" and the kept ones re-fitted" if weights else "")
    blocks = MtpPair.of(old, new, selection, trust_remote_code=trust_remote_code)
    expected = _masked(old, selection, weights, rows, dtype, device, trust_remote_code, blocks)
    return loaded(
        new.path,
        rows,
        expected,
        reference,
        device=device,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        dequantizing=bool(new.quantization),
        further=lambda model: blocks.prove(model, rows),
    )


def _masked(
    old: Checkpoint,
    selection: Selection,
    weights: RepairedWeights | None,
    rows: Tensor,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    blocks: MtpPair,
) -> Tensor:
    model = load_model(old.path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with (
        masked(model, selection.decoder(old.architecture).keep, selection.experts_per_token),
        with_repaired(model, weights),
    ):
        logits = logits_of(model, rows)
        blocks.expect(model, rows)
    del model
    gc.collect()
    return logits


def _tensors(
    old: Checkpoint, new: Checkpoint, layout: Layout, selection: Selection, weights: RepairedWeights | None
) -> Proof:
    """Every tensor against the bytes it was cut from; no name missing, none too many; multi-token prediction is there
    whole or not at all."""
    cuts = {name: _PrunedTensor(name) for name in old.tensors} | dict(_cuts(old, layout, selection))
    if not layout.mtp_tensors & set(new.tensors):
        cuts |= dict.fromkeys(layout.mtp_tensors, _PrunedTensor(None))
    if difference := names_differ({cut.name for cut in cuts.values() if cut.name is not None}, set(new.tensors)):
        return Proof("tensors", False, difference)
    compared, refitted = 0, weights.tensors() if weights else {}
    with Reader(old) as read_old, Reader(new) as read_new:
        for name, cut in cuts.items():
            if cut.name is None:
                continue
            if name in refitted:
                tensor = _refitted(refitted[name][0], name)
            else:
                tensor = (
                    read_old(name)
                    if cut.axis is None
                    else read_old(name).index_select(cut.axis, torch.tensor(cut.keep))
                )
            if not same_bits(tensor, read_new(cut.name)):
                return Proof("tensors", False, f"{cut.name} differs from what it was cut from, {name} of the source")
            compared += 1
    return Proof(
        "tensors",
        True,
        f"{compared} tensors equal the bytes they were cut from, none is missing or too many",
        float(compared),
    )


def _refitted(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _cuts(old: Checkpoint, layout: Layout, selection: Selection) -> Iterator[tuple[str, _PrunedTensor]]:
    for index, layer in {**layout.layers, **layout.mtp}.items():
        if index not in selection.layers:
            continue
        keep = selection.layers[index].keep
        position = {expert: place for place, expert in enumerate(keep)}
        for expert, names in layer.per_expert.items():
            for name in names:
                new = layer.spelling.renumbered(name, expert, position[expert]) if expert in position else None
                yield name, _PrunedTensor(new)
        for name, axis in layer.stacked.items():
            beyond = range(layer.num_experts, old.tensors[name].shape[axis])  # rows of no routed expert stay
            yield name, _PrunedTensor(name, axis, (*keep, *beyond))


def _config(new: Checkpoint, old_layout: Layout, selection: Selection) -> Proof:
    layout = new.layout  # raises where config.json and the tensors count differently
    for index, chosen in selection.layers.items():
        found = {**layout.layers, **layout.mtp}.get(index)
        if found is None and index in old_layout.mtp:
            continue
        if found is None or found.num_experts != len(chosen.keep):
            return Proof(
                "config",
                False,
                f"layer {index} holds {found.num_experts if found else 0} experts, {len(chosen.keep)} were kept",
            )
    top_k = new.architecture.num_experts_per_tok
    if selection.experts_per_token not in (None, top_k):
        return Proof(
            "config",
            False,
            f"config.json routes to {top_k} experts per token, {selection.experts_per_token} were decided",
        )
    return Proof(
        "config", True, f"config.json and tensors agree: {new.architecture.num_experts} experts, {top_k} per token"
    )

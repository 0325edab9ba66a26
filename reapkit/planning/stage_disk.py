"""Counts what every stage puts on disk: what stays, what is there meanwhile, and where. From config and headers alone;
torch-free.

Tensors are counted to the byte; headers, JSON and what only the run can tell from above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from reapkit.checkpoint.projection_names import Role
from reapkit.planning.disk_use import (
    OFFLOAD,
    STORE,
    TEMPORARY,
    TOKEN_BYTES,
    DiskUse,
    TokenRows,
    calibration_rows,
    hidden_bytes,
    offloads,
    on_disk,
    pack_rows,
    streams,
)
from reapkit.planning.measuring import unmeasured
from reapkit.planning.model_disk import (
    PACKED_PARTS,
    companion_bytes,
    largest,
    plain_bytes,
    pruned_directory,
    quantized_directory,
)
from reapkit.planning.quantization_memory import quantize_memory
from reapkit.quantization.schemes import scheme_of
from reapkit.quantization.sizes import kept_share, matrices_by_layer
from reapkit.quantization.targets import needs_plain_copy, targets

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan
    from reapkit.selection.candidates import Candidate

CACHED_LENGTHS = 4
"""Row lengths that a sample is counted as where it is kept before it is cut."""
SAMPLE_FACTS_BYTES = 192
"""Of a sample in calibration.json or in the journal: its hash, its number, its lengths."""
EXAMPLE_BYTES = 16_384
"""Of a source in calibration.json: its example, and what was counted."""
STATISTICS_BYTES = 6 * 8 + 6 * 4
"""Of an expert in one layer and source: six sums, six maxima."""
SNAPSHOT_BYTES = 4 * 2 * 8
TABLE_CELLS = 32 * 16
SELECTION_BYTES = 96
"""Of an expert in one layer of selection.json: its saliency, and why it stays."""
SIGNALS_BYTES = 5 * 4 + 8
"""Of a measured position, beside its hidden state."""
METRICS_BYTES = 4096
"""Of one candidate on the rows of one length and source, in evaluation.json."""
SMALLER_CUTS = 4
MEASUREMENT_FILES = 7
"""Of one measurement: what was measured, its shape, manifest, lock and who uses it."""
CONTINUED_BYTES = 16
"""Of one token that was written, in JSON."""
PAGE_BYTES, PAGE_EXPERT_BYTES = 2_400_000, 64
CARD_BYTES = 32_768
FACTS_BYTES = 65_536
"""Of what a run says about itself: manifests, run.json, lock.json."""


def _tokens_written(rows: TokenRows, sources: int) -> DiskUse:
    told = rows.samples * SAMPLE_FACTS_BYTES + rows.groups * 12 + sources * EXAMPLE_BYTES
    linked = on_disk(rows.file_bytes)
    return DiskUse(STORE, linked + on_disk(told), linked=linked, copied=on_disk(told))


def _samples_kept(samples: int, length: int, sources: int) -> DiskUse:
    """What is kept of the samples before they are cut, for the next recipe that draws of them."""
    return DiskUse(STORE, on_disk(samples * (CACHED_LENGTHS * length * TOKEN_BYTES + SAMPLE_FACTS_BYTES), 4 * sources))


def calibrate(plan: Plan) -> tuple[DiskUse, ...]:
    """Rows of tokens, and the samples that they were cut from."""
    spec, rows = plan.recipe.calibration, calibration_rows(plan)
    return (
        _tokens_written(rows, len(spec.mix)),
        _samples_kept(rows.samples, min(spec.max_length, rows.tokens), len(spec.mix)),
    )


def packs(plan: Plan) -> tuple[DiskUse, ...]:
    """The same, at every row length."""
    evaluate, found = plan.recipe.evaluate, pack_rows(plan)
    sources = len(plan.recipe.calibration.mix) + len(evaluate.extra_packs)
    samples = max(rows.samples for rows in found.values())
    return (
        *(_tokens_written(rows, sources) for rows in found.values()),
        _samples_kept(samples, plan.recipe.calibration.max_length, sources),
    )


# ---------------------------------------------------------------------------------------------- observation


def observe(plan: Plan) -> tuple[DiskUse, ...]:
    """The observation and its trace; meanwhile sums of row groups, spools, and what a killed run goes on from."""
    rows, spec = calibration_rows(plan), plan.recipe.observe
    layers, sources = len(plan.layout.layers) + len(plan.mtp), len(plan.recipe.calibration.mix)
    architecture = plan.checkpoint.architecture
    experts, decoder = architecture.num_experts, len(plan.layout.layers)
    sums = layers * sources * experts * STATISTICS_BYTES
    pairs = layers * sources * experts**2 * 8
    trace = rows.signals * (4 + 4 + 2 + layers * architecture.num_experts_per_tok * (4 + 2)) if spec.eaft else 0
    table = 0
    if trace > spec.trace_bytes:
        table = sources * TABLE_CELLS * 8 + 2 * layers * sources * TABLE_CELLS * experts * 8
    sampled = min(spec.reroute_tokens, rows.tokens)
    paths = decoder * (sources * 2 + 2) * experts * 16 if sampled else 0
    result = sums + layers * sources * experts * SNAPSHOT_BYTES + pairs + table + paths
    in_place = 0 if table else trace
    kept = on_disk(result) + (on_disk(in_place) if in_place else 0)
    meanwhile, offloaded = _while_observing(plan, rows, sums, pairs, table)
    meanwhile += on_disk(trace, rows.groups) if trace else 0
    meanwhile += (hidden_bytes(plan, sampled) + 4 * sampled) * decoder
    meanwhile += 2 * paths
    uses = DiskUse(STORE, kept + on_disk(4096), meanwhile, kept, on_disk(4096), rows.is_exact and not streams(plan))
    return (uses, *([DiskUse(OFFLOAD, meanwhile=offloaded)] if offloaded else ()))


def _while_observing(plan: Plan, rows: TokenRows, sums: int, pairs: int, table: int) -> tuple[int, int]:
    """Bytes of partial sums and saved hidden states in the store, and of hidden states in the offload directory."""
    if not streams(plan):
        return on_disk(rows.groups * (sums + pairs + table + 64), rows.groups), 0
    waves, layers = plan.estimates.waves, len(plan.layout.layers) + len(plan.mtp)
    hidden = hidden_bytes(plan, rows.tokens)
    summed = on_disk(rows.groups * sums + waves * (sums + pairs) + 2 * table, waves * layers + 2)
    saved = on_disk(2 * hidden / waves, 2 * rows.groups)  # the next layer's inputs are saved before the last's go
    return summed + saved, max(0, hidden // waves - plan.estimates.host_budget) if offloads(plan) else 0


def knockout(plan: Plan) -> tuple[DiskUse, ...]:
    """Sums by layer, source and expert; meanwhile every row's own."""
    spec, sources = plan.recipe.observe, len(plan.recipe.calibration.mix)
    rows = calibration_rows(plan)
    layers, experts = len(plan.layout.layers), plan.checkpoint.architecture.num_experts
    kept = on_disk(layers * sources * (2 * experts + 1) * 8) + on_disk(4096)
    sampled = min(rows.rows, spec.knockout_tokens)
    units = layers * (1 + 2 * rows.tokens // plan.recipe.runtime.batch_tokens)
    return (DiskUse(STORE, kept, on_disk(layers * sampled * (experts + 1) * 8, units), kept),)


# ---------------------------------------------------------------------------------------------- decisions


def _candidates(plan: Plan) -> int:
    """Candidates, and their controls."""
    return len(plan.candidates) * (1 + len(plan.recipe.evaluate.controls))


def select(plan: Plan) -> tuple[DiskUse, ...]:
    """One selection per candidate and control."""
    layers, files = len(plan.layout.layers) + len(plan.mtp), _candidates(plan) + 1
    one = layers * (plan.checkpoint.architecture.num_experts * SELECTION_BYTES + 1024) + 4096
    copied = on_disk(files * one, files) + on_disk(1024)
    return (DiskUse(STORE, copied, copied=copied),)


def repair(plan: Plan) -> tuple[DiskUse, ...]:
    """The kept experts' output matrices, of every candidate and control."""
    linked, layers = 0, len(plan.layout.layers)
    for candidate in plan.candidates:
        linked += (1 + len(plan.recipe.evaluate.controls)) * on_disk(_down_bytes(plan, candidate), 2 * layers)
    copied = on_disk(_candidates(plan) * layers * plan.checkpoint.architecture.num_experts * 128, _candidates(plan))
    meanwhile = _waiting(plan, calibration_rows(plan).tokens, 1 + _candidates(plan))
    uses = DiskUse(STORE, linked + copied, linked=linked, copied=copied, is_exact=True)
    return (uses, *([DiskUse(OFFLOAD, meanwhile=meanwhile)] if meanwhile else ()))


def _down_bytes(plan: Plan, candidate: Candidate) -> int:
    kept, found = plan.kept(candidate), 0.0
    for kind in plan.layout.kinds:
        layer = kind.layer
        if layer is None or layer.index not in plan.layout.layers:
            continue
        named = kind.names[0] if kind.axis is not None else next(
            (part for part, names in layer.parts.items() if kind.names[0] in names.values()), ""
        )  # fmt: skip
        if layer.roles.get(named) is Role.DOWN:
            found += kind.count * kind.tensor.nbytes * kept_share(kind, kept)
    return ceil(found)


def _waiting(plan: Plan, tokens: int, models: int) -> int:
    """Bytes of hidden states of so many models that wait in the offload directory, beyond what the host holds."""
    if not (streams(plan) and offloads(plan)):
        return 0
    hidden = hidden_bytes(plan, tokens)
    return max(0, models * hidden - plan.estimates.host_budget)


def evaluate(plan: Plan) -> tuple[DiskUse, ...]:
    """Numbers, and what they are made of: the base's hidden states at the measured positions, every candidate's
    signals, continuations; but for what was measured before."""
    found, models = pack_rows(plan), 1 + _candidates(plan)
    copied = on_disk(_numbers(plan, models + SMALLER_CUTS)) + on_disk(_selection_bytes(plan))
    positions = sum(rows.signals for rows in found.values())
    signals = on_disk(positions * SIGNALS_BYTES + _continuations(plan), 2 * MEASUREMENT_FILES * len(found) + 1)
    measured = ceil(unmeasured(plan, "evaluate", ("signals", "continuations")) * models * signals)
    measured += SMALLER_CUTS * signals if not streams(plan) else 0
    measured += ceil(unmeasured(plan, "evaluate", ("hidden",)) * _hidden_kept(plan))
    use = DiskUse(STORE, copied + measured, copied=copied)
    waiting = _waiting(plan, sum(rows.tokens for rows in found.values()), models)
    return (use, *([DiskUse(OFFLOAD, meanwhile=on_disk(waiting, 4))] if waiting else ()))


def _hidden_kept(plan: Plan) -> int:
    """The base's hidden states at the measured positions of every pack."""
    found = pack_rows(plan)
    hidden = hidden_bytes(plan, sum(rows.signals for rows in found.values()))
    return on_disk(hidden, 2 * MEASUREMENT_FILES * len(found))


def _continuations(plan: Plan) -> int:
    spec = plan.recipe.evaluate.generation
    return 0 if spec is None else 2 * spec.prompts * (64 + spec.max_new_tokens * CONTINUED_BYTES)


def _numbers(plan: Plan, models: int) -> int:
    evaluate = plan.recipe.evaluate
    sources = len(plan.recipe.calibration.mix) + len(evaluate.extra_packs) + 1
    written = 0 if evaluate.generation is None else 8 * 16 * evaluate.generation.max_new_tokens * models
    return models * 2 * len(evaluate.packs.lengths) * sources * METRICS_BYTES + written + FACTS_BYTES


def _selection_bytes(plan: Plan) -> int:
    return select(plan)[0].kept // (_candidates(plan) + 1)


# ---------------------------------------------------------------------------------------------- models


def prune(plan: Plan) -> tuple[DiskUse, ...]:
    """The pruned checkpoint."""
    return (pruned_directory(plan),)


def quantize(plan: Plan) -> tuple[DiskUse, ...]:
    """The quantized one; meanwhile layers that wait for their turn, or a quantized source in plain numbers."""
    made, memory = quantized_directory(plan), quantize_memory(plan)
    offloaded = _spread(plan, memory.disk) if memory is not None and memory.offloads else 0
    copied = needs_plain_copy(plan.checkpoint, plan.recipe.quantize)
    plain = plain_bytes(plan, plan.kept(largest(plan))) if copied else 0
    apart = offloads(plan) and offloaded
    store = replace(made, meanwhile=made.meanwhile + (plain if apart else plain + offloaded))
    return (store, *([DiskUse(OFFLOAD, meanwhile=offloaded)] if apart else ()))


def _spread(plan: Plan, nbytes: int) -> int:
    """Layers on disk have a file per tensor of every matrix."""
    matrices = matrices_by_layer(plan.checkpoint, plan.recipe.quantize, plan.kept(largest(plan)))
    files = PACKED_PARTS * sum(count for each in matrices.values() for _, count in each)
    return on_disk(nbytes, files + len(plan.checkpoint.tensors)) if nbytes else 0


def verify(plan: Plan) -> tuple[DiskUse, ...]:
    """Numbers; meanwhile hidden states, and models that are written in plain numbers to be measured."""
    recipe, found = plan.recipe, pack_rows(plan)
    positions = sum(rows.signals for rows in found.values())
    left = unmeasured(plan, "verify", ("signals",))
    plain = _plain_directory(plan, plan.kept(largest(plan))) if left and _needs_dense(plan) else 0
    control = _plain_directory(plan) if left and recipe.evaluate.equal_bytes else 0
    models = 4
    measured = ceil(left * models * on_disk(positions * SIGNALS_BYTES, MEASUREMENT_FILES * len(found)))
    measured += on_disk(3 * FACTS_BYTES, 3 * MEASUREMENT_FILES)  # proofs, speeds, task benchmarks
    measured += _hidden_kept(plan) if left and not plan.stage("evaluate").must_run else 0
    copied = on_disk(_numbers(plan, models))
    waiting = _waiting(plan, sum(rows.tokens for rows in found.values()), 2)
    offloaded = on_disk(waiting + hidden_bytes(plan, positions), 4) if streams(plan) and offloads(plan) else 0
    uses = [
        DiskUse(STORE, copied + measured, plain + control, copied=copied),
        DiskUse(TEMPORARY, meanwhile=on_disk(FACTS_BYTES, 2)),
    ]
    return (*uses, *([DiskUse(OFFLOAD, meanwhile=offloaded)] if offloaded else ()))


def _plain_directory(plan: Plan, kept: Mapping[int, int] | None = None) -> int:
    return on_disk(plain_bytes(plan, kept), len(plan.checkpoint.shards) + 4) + companion_bytes(plan)


def _needs_dense(plan: Plan) -> bool:
    spec = plan.recipe.quantize
    if spec.scheme is None or spec.recipe is not None:
        return False
    return streams(plan) or not scheme_of(spec).experts_reload or targets(plan.checkpoint, spec).has_stacked_experts


def report(plan: Plan) -> tuple[DiskUse, ...]:
    """The page and the cards."""
    layers, sources = len(plan.layout.layers) + len(plan.mtp), len(plan.recipe.calibration.mix)
    experts = layers * plan.checkpoint.architecture.num_experts
    page = PAGE_BYTES + experts * PAGE_EXPERT_BYTES * (1 + sources // 4) + _numbers(plan, _candidates(plan) + 1)
    copied = on_disk(page) + on_disk(2 * CARD_BYTES, 2)
    return (DiskUse(STORE, copied, copied=copied),)

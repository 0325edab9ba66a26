"""Exports an observation for other tools and people: saliency.parquet, ranking_by_layer.json and profile.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from reapkit.core.atomic_files import replacing, write_text
from reapkit.observation.observation import MAXIMA, SUMS, Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.saliency import formula, saliency
from reapkit.selection.statistics import concentration

PARQUET, RANKING, PROFILE = "saliency.parquet", "ranking_by_layer.json", "profile.md"
ALL_SOURCES = "all"
TOP_EXPERTS = 10


def export(
    observation: Observation,
    directory: Path,
    *,
    spec: SaliencySpec | None = None,
    calibration: Mapping[str, Any] | None = None,
    model: str | None = None,
    tokens_per_second: float | None = None,
    reproduce: str | None = None,
) -> list[Path]:
    """Writes the three files into `directory` and returns their paths; the same observation gives the same bytes.

    `spec` ranks the experts (default: reap). `calibration`: what calibration.json says, for datasets and prompts hash;
    `model`: its name; `reproduce`: the command that made the observation. What is not given is left out of the profile,
    never guessed.
    """
    directory = Path(directory)
    spec = spec or SaliencySpec()
    ranking = ranking_by_layer(observation, saliency(observation, spec))
    with replacing(directory / PARQUET) as partial:
        pq.write_table(saliency_table(observation), partial)
    write_text(directory / RANKING, json.dumps(ranking, indent=None).replace("], ", "],\n ") + "\n")
    text = profile(
        observation,
        ranking,
        spec,
        calibration=calibration,
        model=model,
        tokens_per_second=tokens_per_second,
        reproduce=reproduce,
    )
    write_text(directory / PROFILE, text)
    return [directory / name for name in (PARQUET, RANKING, PROFILE)]


def saliency_table(observation: Observation) -> pa.Table:
    """One row per layer, expert and source, plus source `all`; the columns of the observation and `saliency_mean`.

    `saliency_mean` = gate_norm_sum / count, null where the expert received no scored token. Rows by layer, source,
    expert.
    """
    sources = (*observation.sources, ALL_SOURCES)
    shape = (len(observation.layers), len(sources), observation.num_experts)
    layers, source_index, experts = (index.ravel() for index in np.indices(shape))
    columns = {
        "layer": pa.array(np.array(observation.layers, np.int32)[layers]),
        "expert": pa.array(experts.astype(np.int32)),
        "source": pa.array([sources[i] for i in source_index.tolist()]),
    }
    sums = {
        name: _with_all(observation.statistics[name], "sum").ravel() for name in SUMS if name in observation.statistics
    }
    columns |= {name: pa.array(values.astype(np.int64) if name == "count" else values) for name, values in sums.items()}
    columns |= {
        name: pa.array(_with_all(observation.maxima[name], "max").ravel())
        for name in MAXIMA
        if name in observation.maxima
    }
    columns["saliency_mean"] = pa.array(sums["gate_norm_sum"] / np.maximum(sums["count"], 1), mask=sums["count"] == 0)
    return pa.table(columns)


def _with_all(values: ndarray, reduce: str) -> ndarray:
    """[L, S, E] with the sources' sum or maximum appended as one more source."""
    return np.concatenate([values, getattr(values, reduce)(1, keepdims=True)], axis=1)


def ranking_by_layer(observation: Observation, values: ndarray) -> dict[str, list[int]]:
    """`layer_<decoder index>` -> experts, most salient first; ties and experts never routed by index.

    `values`: float64 [L, E], saliencies; -inf for experts never routed.
    """
    order = np.argsort(-values, axis=1, kind="stable").tolist()
    return {f"layer_{layer}": row for layer, row in zip(observation.layers, order, strict=True)}


def prompts_hash(calibration: Mapping[str, Any]) -> str:
    """sha256 (hex) over the sources' content hashes, in the order of the mix."""
    return hashlib.sha256("".join(source["sha256"] for source in calibration["sources"]).encode()).hexdigest()


def profile(
    observation: Observation,
    ranking: Mapping[str, list[int]],
    spec: SaliencySpec,
    *,
    calibration: Mapping[str, Any] | None,
    model: str | None,
    tokens_per_second: float | None,
    reproduce: str | None,
) -> str:
    """The saliency profile as Markdown: what was observed, top experts, concentration, files."""
    name = model or observation.model_type
    blocks = [
        f"# Saliency profile: {name}",
        "\n".join(_facts(observation, spec, calibration, name, tokens_per_second)),
        f"## Top experts by layer (top {TOP_EXPERTS}, ranked by {formula(spec)})",
        "\n".join(f"- {layer}: {row[:TOP_EXPERTS]}" for layer, row in ranking.items()),
        "## Saliency concentration (by gate_norm_sum mass)",
        _concentration_table(observation),
        "## Artifacts",
        f"- `{PARQUET}` (one row per layer, expert and source: counts, gate, norm and saliency sums, maxima)\n"
        f"- `{RANKING}` (experts of each layer, most salient first)",
    ]
    if reproduce:
        blocks += ["## Reproduce", f"```bash\n{reproduce}\n```"]
    return "\n\n".join(blocks) + "\n"


def _facts(
    observation: Observation,
    spec: SaliencySpec,
    calibration: Mapping[str, Any] | None,
    model: str,
    tokens_per_second: float | None,
) -> list[str]:
    tokens, scored = observation.tokens.tolist(), observation.scored_tokens.tolist()
    facts = [f"- Model: `{model}` ({observation.model_type})"]
    facts += [
        f"- Source {_source(name, calibration)}: {t:,} tokens, {s:,} scored"
        for name, t, s in zip(observation.sources, tokens, scored, strict=True)
    ]
    if calibration is not None:
        facts.append(
            f"- Rows: {calibration['rows']:,} | Max row length: {calibration['max_length']} | "
            f"Packing: {calibration['packing']} | Score: {calibration['score']}"
        )
    top_k = observation.num_experts_per_tok
    facts += [
        f"- Layers: {len(observation.layers)} | Experts: {observation.num_experts} | Top-k: {top_k}",
        f"- Total tokens processed: {sum(tokens):,} | Kept (scored) tokens: {sum(scored):,}",
        f"- Saliency: {spec.criterion}, {formula(spec)}",
    ]
    if tokens_per_second is not None:
        facts.append(f"- Forward throughput: {tokens_per_second:.0f} tokens/s")
    if calibration is not None:
        facts.append(f"- Prompts hash: `{prompts_hash(calibration)}`")
    return facts


def _source(name: str, calibration: Mapping[str, Any] | None) -> str:
    entry = next((source for source in (calibration or {"sources": ()})["sources"] if source["name"] == name), None)
    if entry is None:
        return f"`{name}`"
    kept = f" where {entry['filter']}" if entry.get("filter") else ""
    config = f" config `{entry['config']}`" if entry.get("config") else ""
    return f"`{name}` = `{entry['source']}`{config} split `{entry['split']}`{kept}, {entry['samples']:,} samples"


def _concentration_table(observation: Observation) -> str:
    shares = concentration(observation.statistics["gate_norm_sum"].sum(1))
    lines = ["| layer | " + " | ".join(f"top_{size}" for size in shares) + " |", "|---:|" + "---:|" * len(shares)]
    for row, layer in enumerate(observation.layers):
        cells = ("n/a" if column[row] is None else f"{column[row]:.3f}" for column in shares.values())
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

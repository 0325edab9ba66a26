"""Judges candidates as masks on the loaded model: smallest first; the first that passes wins and is confirmed on fresh
rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import cache
from itertools import groupby
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from reapkit.calibration.packing import PARTS
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation.advice import advice
from reapkit.evaluation.bench import Bench, MaskedBench, MaskedCandidate
from reapkit.evaluation.gates import UNION, Gate, judge, overall
from reapkit.evaluation.measures import Measures
from reapkit.evaluation.metrics.table import is_generation
from reapkit.evaluation.outputs import EAFT
from reapkit.recipe.schema import GenerationSpec, ObserveSpec, SaliencySpec

FORMAT_VERSION = 1
SEARCH_STEPS = 4
"""Smaller cuts that are measured after a rejection: the nearest that passes is known to a sixteenth of what was to be
removed."""

SmallerCut = Callable[[str, Fraction], MaskedCandidate | None]
"""The named candidate with this share of its removals, None where there is no such budget."""


def eaft_settings(saliency: SaliencySpec, observe: ObserveSpec) -> dict[str, Any]:
    """Where confident conflict begins, as the recipe's EAFT section and `observe.entropy_top_k` say it."""
    return {
        "p_low": str(saliency.eaft.quantiles.p_low),
        "h_low": str(saliency.eaft.quantiles.h_low),
        "thresholds": saliency.eaft.thresholds,
        "top_k": observe.entropy_top_k,
    }


def evaluate(
    load: Callable[[], PreTrainedModel],
    packs: Mapping[int, CalibrationTokens],
    candidates: Sequence[MaskedCandidate],
    gates: Sequence[Gate],
    *,
    controls: Sequence[MaskedCandidate] = (),
    eaft: Mapping[str, Any] = EAFT,
    generation: GenerationSpec | None = None,
    tokenizer: Any = None,
    pack_samples: int | None = None,
    steps: Mapping[str, Any] = MappingProxyType({}),
    batch_tokens: int = 16384,
    smaller_cut: SmallerCut | None = None,
    measures: Measures | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The verdict on `candidates` (masks on the base, which `load` gives) with every number behind it; JSON-able.

    The base is loaded once something must be measured that `measures` does not find.
    `packs` by row length; their "decide" rows judge, their "confirm" rows (if any) give the winner's final numbers and
    verdict. Candidates are tried from the smallest to the largest; of the smallest size at which one passes, the one
    with the lowest kl_mean wins, larger ones are not tried. `controls` of the chosen candidate are measured, not
    judged. Sources of `evaluate.extra_packs` stay outside the union. `tokenizer` is needed for tool calls and examples
    only, `pack_samples` and `steps` (see `pipeline.stages.evaluate`) for the advice only. After a rejection
    `smaller_cut` gives less pruned versions of the chosen candidate, among which the nearest that passes is searched.

    Shape: `{"format", "eaft", "packs": {length: {part: {rows, tokens, positions}}}, "outside": [source], "gates":
    [gate], "base": {length: {group: metrics}}, "base_generation": {group: metrics} | None, "candidates": [{name,
    criterion, kept: {layer: n}, removed: share, ratio, num_experts, experts, experts_per_token, bytes, metrics:
    {length: {group: metrics}} | None, generation: {group: metrics} | None, examples, gates: [result], verdict}],
    "controls": [{name, ..., metrics, against: {length: {group: what it loses more than the chosen}}}], "confirm":
    {candidate, base, metrics, gates, verdict} | None, "search": [candidate] | None, "winner": name | None, "chosen":
    the winner's name, else that of the nearest to passing, "verdict": "pass" | "reject" | "undecided", "advice": text,
    "pack_samples", "steps"}`. A group is `all` (the mix) or a source; a metric is `{"value", "interval": [low, high] |
    None}` (see `metrics.rows`); counts are integers.

    Raises UnusableError where no pack has a row to decide on.
    """
    settings = {
        "eaft": eaft,
        "batch_tokens": batch_tokens,
        "measures": measures or Measures(top_k=eaft["top_k"]),
        "progress": progress,
    }
    once = cache(load)
    decide = MaskedBench.of_part(once, packs, "decide", writing=generation, tokenizer=tokenizer, **settings)
    confirm = MaskedBench.of_part(once, packs, "confirm", **settings)
    return give_verdict(
        decide,
        confirm,
        candidates,
        gates,
        controls=controls,
        pack_samples=pack_samples,
        steps=steps,
        smaller_cut=smaller_cut,
    )


def give_verdict(
    decide: Bench,
    confirm: Bench,
    candidates: Sequence[MaskedCandidate],
    gates: Sequence[Gate],
    *,
    controls: Sequence[MaskedCandidate] = (),
    pack_samples: int | None = None,
    steps: Mapping[str, Any] = MappingProxyType({}),
    smaller_cut: SmallerCut | None = None,
) -> dict[str, Any]:
    """The evaluation (see `evaluate`) of candidates on benches, wherever they measure."""
    if not decide.packs:
        raise UnusableError(
            "evaluate: the packs hold no row to decide on. Raise evaluate.packs.samples or lower"
            " evaluate.packs.confirm."
        )
    table = _try_candidates(decide, candidates, gates)
    passed = [entry for entry in table if entry["verdict"] == "pass"]
    by_name = {candidate.name: candidate for candidate in candidates}
    chosen = _winner(passed, by_name) if passed else _nearest(table)
    confirmed = _confirm(confirm, by_name[chosen["name"]], gates) if confirm.packs else None
    verdict = confirmed["verdict"] if passed and confirmed is not None else chosen["verdict"]
    evaluation = {
        "format": FORMAT_VERSION,
        "eaft": dict(decide.eaft),
        "packs": _describe_packs(dict(zip(PARTS, (decide, confirm), strict=True))),
        "outside": sorted(next(iter(decide.packs.values())).outside),
        "gates": [asdict(gate) for gate in gates],
        "base": decide.base_metrics(),
        "base_generation": decide.generation(None)["generation"],
        "candidates": table,
        "controls": [
            each.describe()
            | {"metrics": decide.metrics(each), "against": decide.against(by_name[chosen["name"]], each)}
            for each in controls
            if each.control_of in (None, chosen["name"])
        ],
        "confirm": confirmed,
        "search": _search(*((confirm, _of_packs(gates)) if passed else (decide, gates)), chosen["name"], smaller_cut)
        if verdict == "reject" and smaller_cut is not None
        else None,
        "winner": chosen["name"] if verdict == "pass" else None,
        "chosen": chosen["name"],
        "verdict": verdict,
        "pack_samples": pack_samples,
        "steps": dict(steps),
    }
    return evaluation | {"advice": advice(evaluation)}


def _describe_packs(benches: Mapping[str, Bench]) -> dict[str, Any]:
    lengths = dict.fromkeys(length for bench in benches.values() for length in bench.packs)
    return {
        str(length): {
            part: {"rows": len(pack.rows), "tokens": pack.num_tokens, "positions": pack.num_positions}
            for part, bench in benches.items()
            if (pack := bench.packs.get(length)) is not None
        }
        for length in lengths
    }


def _try_candidates(bench: Bench, candidates: Sequence[MaskedCandidate], gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """The table: every candidate, smallest first, those larger than a passing one left untried."""
    table: list[dict[str, Any]] = []
    for _, same_size in groupby(sorted(candidates, key=lambda each: each.size), key=lambda each: each.size):
        done = not bench.measures_all and any(entry["verdict"] == "pass" for entry in table)
        table += [_untried(each) if done else _judged(bench, each, gates) for each in same_size]
    return table


def _untried(candidate: MaskedCandidate) -> dict[str, Any]:
    return candidate.describe() | {
        "metrics": None,
        "generation": None,
        "examples": [],
        "gates": [],
        "verdict": "not evaluated",
    }


def _judged(bench: Bench, candidate: MaskedCandidate, gates: Sequence[Gate]) -> dict[str, Any]:
    measured, written = bench.metrics(candidate), bench.generation(candidate)
    results = judge(measured | ({"generation": written["generation"]} if written["generation"] else {}), gates)
    return candidate.describe() | {
        "metrics": measured,
        **written,
        "gates": [result.to_json() for result in results],
        "verdict": overall(results),
    }


def kl_mean(entry: Mapping[str, Any]) -> float:
    """A candidate's mean KL over the union, averaged over the lengths."""
    values = [groups[UNION]["kl_mean"]["value"] for groups in entry["metrics"].values()]
    return sum(values) / len(values)


def _winner(passed: Sequence[dict[str, Any]], by_name: Mapping[str, MaskedCandidate]) -> dict[str, Any]:
    """The smallest; of equal size the one closest to the base."""
    return min(passed, key=lambda entry: (by_name[entry["name"]].size, kl_mean(entry)))


def _nearest(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of candidates none of which passed: the smallest undecided one, else the one closest to the base."""
    undecided = [entry for entry in table if entry["verdict"] == "undecided"]
    return undecided[0] if undecided else min(table, key=kl_mean)


def _search(bench: Bench, gates: Sequence[Gate], name: str, smaller_cut: SmallerCut) -> list[dict[str, Any]]:
    """Less pruned versions of a rejected candidate, judged on the rows that rejected it, in the order in which halving
    tries them."""
    tried: dict[str, dict[str, Any]] = {}
    passes, fails = Fraction(0), Fraction(1)
    for _ in range(SEARCH_STEPS):
        share = (passes + fails) / 2
        candidate = smaller_cut(name, share)
        if candidate is None or candidate.name in tried:
            break
        tried[candidate.name] = _judged(bench, candidate, gates)
        passes, fails = (share, fails) if tried[candidate.name]["verdict"] == "pass" else (passes, share)
    return list(tried.values())


def _confirm(bench: Bench, candidate: MaskedCandidate, gates: Sequence[Gate]) -> dict[str, Any]:
    """The chosen candidate on the confirm rows; generation has been judged on the decide rows' prompts."""
    found = bench.metrics(candidate)
    results = judge(found, _of_packs(gates))
    return {
        "candidate": candidate.name,
        "base": bench.base_metrics(),
        "metrics": found,
        "gates": [result.to_json() for result in results],
        "verdict": overall(results),
    }


def _of_packs(gates: Sequence[Gate]) -> list[Gate]:
    """The gates that rows alone can answer."""
    return [gate for gate in gates if not is_generation(gate.metric)]

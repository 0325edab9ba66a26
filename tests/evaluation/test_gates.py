"""Gates: presets as published, and the three verdicts with their numbers."""

import subprocess
import sys

import pytest

from reapkit.core.errors import RecipeError
from reapkit.evaluation.advice import power
from reapkit.evaluation.gates import PRESETS, UNION, Gate, GateResult, judge, overall, resolve
from reapkit.recipe.schema import EvaluateSpec, GatesSpec


def measured(value, interval, metric="kl_mean", source=UNION, pack="1024", rows=16):
    return {pack: {source: {"rows": rows, metric: {"value": value, "interval": interval}}}}


def verdict(gate, value, interval, **where):
    [result] = judge(measured(value, interval, gate.metric, **where), [gate])
    return result.verdict


def test_presets_are_the_published_ones():
    values = {
        name: [limits["perplexity_ratio"]["max"], limits["kl_mean"]["max"], limits["top1_agreement"]["min"]]
        for name, limits in PRESETS.items()
    }
    assert values == {"strict": [1.01, 0.01, 0.97], "near-lossless": [1.05, 0.05, 0.93], "size-first": [1.5, 0.5, 0.7]}
    assert PRESETS["near-lossless"]["conflict_rate_delta"] == {"min": -0.002, "max": 0.002}
    assert {metric for limits in PRESETS.values() for metric in limits} == set(GatesSpec.model_fields) - {"preset"}
    for name in PRESETS:
        assert EvaluateSpec.model_validate({"gates": name}).gates == name


def test_a_gate_passes_inside_rejects_outside_and_is_undecided_across():
    gate = Gate("kl_mean", max=0.05)
    assert verdict(gate, 0.03, [0.02, 0.05]) == "pass"
    assert verdict(gate, 0.08, [0.051, 0.1]) == "reject"
    assert verdict(gate, 0.04, [0.02, 0.06]) == "undecided"
    assert verdict(gate, 0.03, None) == "undecided"
    agreement = Gate("top1_agreement", min=0.93)
    assert verdict(agreement, 0.95, [0.93, 0.97]) == "pass"
    assert verdict(agreement, 0.9, [0.88, 0.92]) == "reject"
    conflict = Gate("conflict_rate_delta", min=-0.002, max=0.002)
    assert verdict(conflict, 0.0, [-0.001, 0.001]) == "pass"
    assert verdict(conflict, -0.004, [-0.005, -0.003]) == "reject"
    assert verdict(conflict, 0.0019, [0.0005, 0.003]) == "undecided"


def test_undecided_says_how_many_more_rows_it_would_take():
    [result] = judge(measured(0.04, [0.03, 0.06]), [Gate("kl_mean", max=0.05)])
    assert result.more_rows == 48  # the interval reaches twice as far as the limit: four times the rows
    [above] = judge(measured(0.06, [0.04, 0.1]), [Gate("kl_mean", max=0.05)])
    assert above.more_rows == 48 and above.excess == pytest.approx(0.01)
    [below] = judge(measured(0.94, [0.92, 0.99], "top1_agreement"), [Gate("top1_agreement", min=0.93)])
    assert below.more_rows == 48
    [on_it] = judge(measured(0.05, [0.04, 0.06]), [Gate("kl_mean", max=0.05)])
    assert on_it.verdict == "undecided" and on_it.more_rows is None


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (-0.016, [-0.057, 0.024], "undecided"),  # straddles 0, whichever metric it is
        (-0.05, [-0.08, -0.01], "pass"),
        (0.0, [0.0, 0.0], "pass"),
        (0.2, [0.05, 0.3], "reject"),
    ],
)
def test_one_rule_for_all_gates(value, interval, expected):
    loops, conflicts = Gate("loop_share_delta", max=0.0), Gate("conflict_rate_delta", max=0.0)
    assert verdict(loops, value, interval, pack="generation") == verdict(conflicts, value, interval) == expected


def test_a_presets_limit_on_text_rejects_but_does_not_hold_up_and_a_recipes_own_does():
    found = {"generation": {UNION: {"rows": 64, "loop_share_delta": {"value": -0.016, "interval": [-0.057, 0.024]}}}}
    [of_preset] = [r for r in judge(found, resolve("strict")) if r.gate.metric == "loop_share_delta"]
    [own] = judge(found, resolve({"loop_share_delta": {"max": 0.0}}))
    assert of_preset.verdict == own.verdict == "undecided"
    assert overall([of_preset]) == "pass" and overall([own]) == "undecided"
    found["generation"][UNION]["loop_share_delta"] = {"value": 0.2, "interval": [0.1, 0.3]}
    [collapsed] = [r for r in judge(found, resolve("strict")) if r.gate.metric == "loop_share_delta"]
    assert overall([collapsed]) == "reject"


def test_generation_gates_of_a_preset_may_go_unmeasured_others_may_not():
    passing = {
        "1024": {
            UNION: {
                "rows": 9,
                **{
                    metric: {"value": at, "interval": [at, at]}
                    for metric, at in {
                        "perplexity_ratio": 1.0,
                        "kl_mean": 0.0,
                        "top1_agreement": 1.0,
                        "conflict_rate_delta": 0.0,
                    }.items()
                },
            }
        }
    }
    results = judge(passing, resolve("near-lossless"))
    assert [r.verdict for r in results if r.gate.metric == "loop_share_delta"] == ["not measured"]
    assert overall(results) == "pass"
    demanded = judge(passing, resolve({"loop_share_delta": {"max": 0.0}}))
    assert overall(demanded) == "undecided"


def test_every_length_is_judged_and_one_rejection_rejects():
    both = measured(0.01, [0.0, 0.02]) | measured(0.2, [0.1, 0.3], pack="2048")
    results = judge(both, [Gate("kl_mean", max=0.05)])
    assert [(r.pack, r.verdict) for r in results] == [("1024", "pass"), ("2048", "reject")]
    assert overall(results) == "reject"
    doubtful = judge(both | measured(0.04, [0.02, 0.06], pack="4096"), [Gate("kl_mean", max=0.05)])
    assert {result.verdict for result in doubtful} == {"pass", "reject", "undecided"} and overall(doubtful) == "reject"
    assert overall([result for result in doubtful if result.verdict != "reject"]) == "undecided"
    assert str(results[1]) == "kl_mean 0.2 [0.1, 0.3] (all, 2048 tokens), limit ≤ 0.05: reject"
    told = results[1].to_json()
    assert told["interval"] == [0.1, 0.3] and told["limit"] == "≤ 0.05" and told["metric"] == "kl_mean"
    assert GateResult.from_json(told) == results[1]


def test_limits_by_metric_replace_a_preset_and_sources_have_their_own():
    spec = EvaluateSpec.model_validate({"gates": {"perplexity_ratio": {"max": 1.2}}})
    assert resolve(spec.gates) == (Gate("perplexity_ratio", max=1.2),)
    by_source = {"preset": "size-first", "kl_mean": {"max": 0.1, "sources": {"tools": {"max": 0.02}}}}
    gates = resolve(EvaluateSpec.model_validate({"gates": by_source}).gates, ["tools"])
    assert gates == resolve(by_source)
    assert {(g.metric, g.source): (g.max, g.min) for g in gates} == {
        ("perplexity_ratio", UNION): (1.5, None),
        ("kl_mean", UNION): (0.1, None),
        ("top1_agreement", UNION): (None, 0.7),
        ("kl_mean", "tools"): (0.02, None),
    }
    assert resolve(None) == ()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        RecipeError,
        match=r"'near-loss' is not a preset\. Known: strict, near-lossless, size-first\. Did you mean near-lossless",
    ):
        resolve("near-loss")
    with pytest.raises(
        RecipeError,
        match=r"evaluate\.gates\.kl_mean\.sources\.tool: 'tool' is not a source of the mix or of .*Known: code, tools",
    ) as found:
        resolve({"kl_mean": {"sources": {"tool": {"max": 1.0}, "code": {}}}}, ["code", "tools"])
    assert "evaluate.gates.kl_mean.sources.code: the limit has no number" in str(found.value)


def test_gates_import_without_torch():
    code = "import sys, reapkit.evaluation.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_undecided_limit_on_loops_says_what_the_prompts_can_show() -> None:
    [result] = [
        found
        for found in judge(
            {"generation": {UNION: {"rows": 64, "loop_share_delta": {"value": -0.016, "interval": [-0.057, 0.024]}}}},
            resolve("near-lossless"),
        )
        if found.pack == "generation"
    ]
    base = {"base_generation": {UNION: {"rows": 64, "loop_share": {"value": 0.036, "interval": None}}}}
    assert power(result, base) == (
        "64 prompts show a rise of 15.1 % or more over the base's 3.6 %; about 400 would decide."
    )
    assert power(result, {"base_generation": None}) == ""

"""The verdict: order of candidates, gates on masks, confirmation, advice; and a mask equals the checkpoint it stands
for."""

import json
import random
import subprocess
import sys

import pytest
import torch

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.artifact_store import Store
from reapkit.evaluation import bench
from reapkit.evaluation import candidates as module
from reapkit.evaluation.advice import summary_rows
from reapkit.evaluation.bench import Bench, MaskedBench, MaskedCandidate, packs_of_part
from reapkit.evaluation.candidates import eaft_settings, evaluate, give_verdict
from reapkit.evaluation.directory import Yardstick
from reapkit.evaluation.gates import Gate, resolve
from reapkit.evaluation.measures import Measures
from reapkit.evaluation.outputs import EAFT
from reapkit.model.loading import load_model
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.measurements import KeptMeasurements
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.recipe.schema import GenerationSpec, ObserveSpec, SaliencySpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import tiny
from tests.support.held_out import held_out

SETTINGS = {"batch_tokens": 64, "pack_samples": 18}
LOOSE = (Gate("perplexity_ratio", max=1e6), Gate("kl_mean", max=1e3))
TIGHT = (Gate("kl_mean", max=1e-6),)


def candidate(kept: int, name: str | None = None, seed: int = 0, **more) -> MaskedCandidate:
    draw = random.Random(seed)
    layers = {}
    for layer in range(3):
        keep = tuple(sorted(draw.sample(range(16), kept)))
        layers[layer] = LayerSelection(keep, tuple(sorted(set(range(16)) - set(keep))), (0.0,) * 16)
    return MaskedCandidate(
        name or f"keep{kept}", Selection("random", layers, more.pop("experts_per_token", None)), **more
    )


@pytest.fixture(scope="module")
def model():
    return tiny.build("qwen3_moe").requires_grad_(False)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return {
        24: held_out(tmp_path_factory.mktemp("pack24")),
        12: held_out(tmp_path_factory.mktemp("pack12"), lengths=(12,) * 18, seed=5),
    }


@pytest.fixture(scope="module")
def loose(model, packs):
    given = [candidate(12), candidate(8), candidate(8, "other8", seed=3)]
    return evaluate(lambda: model, packs, given, LOOSE, controls=[candidate(8, "control", seed=9)], **SETTINGS)


def test_the_smallest_that_passes_wins_and_larger_ones_are_not_tried(loose):
    table = {entry["name"]: entry for entry in loose["candidates"]}
    assert [entry["name"] for entry in loose["candidates"]] == ["keep8", "other8", "keep12"]
    assert table["keep12"]["verdict"] == "not evaluated" and table["keep12"]["metrics"] is None
    eights = {name: module.kl_mean(table[name]) for name in ("keep8", "other8")}
    assert loose["winner"] == loose["chosen"] == min(eights, key=eights.get)
    assert loose["verdict"] == "pass" and table["keep8"]["verdict"] == "pass"
    assert loose["confirm"]["candidate"] == loose["winner"]
    assert table["keep8"]["kept"] == {"0": 8, "1": 8, "2": 8} and table["keep8"]["experts"] == "8"
    assert [control["name"] for control in loose["controls"]] == ["control"]


def test_a_control_is_compared_with_the_chosen_row_by_row(loose):
    [control] = loose["controls"]
    chosen = next(entry for entry in loose["candidates"] if entry["name"] == loose["chosen"])
    for length, groups in control["against"].items():
        for group, found in groups.items():
            own, other = (entry["metrics"][length][group] for entry in (chosen, control))
            assert found["kl_mean_delta"]["value"] == pytest.approx(
                other["kl_mean"]["value"] - own["kl_mean"]["value"], rel=1e-5, abs=1e-9
            )
            assert found["nll_delta"]["value"] == pytest.approx(
                other["nll"]["value"] - own["nll"]["value"], rel=1e-4, abs=1e-7
            )
    low, high = control["against"]["24"]["all"]["kl_mean_delta"]["interval"]
    assert low < control["against"]["24"]["all"]["kl_mean_delta"]["value"] < high


def test_a_control_that_is_better_is_advised(model, packs):
    worse, better = candidate(5, "worse"), candidate(14, "better", control_of="worse")
    found = evaluate(lambda: model, {24: packs[24]}, [worse], TIGHT, controls=[better], **SETTINGS)
    assert found["controls"][0]["against"]["24"]["all"]["kl_mean_delta"]["interval"][1] < 0
    assert "    --set saliency.criterion=random" in found["advice"]
    assert "    --set prune.ratio=0.3438" in found["advice"]


@pytest.mark.parametrize(
    ("steps", "override"),
    [
        ({}, "prune.ratio=0.125"),
        ({"budget": "ratio", "grid": False}, "prune.ratio=0.125"),
        ({"budget": "keep_ratio", "grid": False}, "prune.keep_ratio=0.875"),
        ({"budget": "keep_experts", "grid": False}, "prune.keep_experts=14"),
        ({"budget": "", "grid": True}, "'prune.candidates.ratio=[0.125, 0.0625]'"),
    ],
)
def test_a_smaller_cut_is_advised_in_the_field_that_the_recipe_uses(model, packs, steps, override):
    found = evaluate(lambda: model, {24: packs[24]}, [candidate(12)], TIGHT, steps=steps, **SETTINGS)
    assert f"    --set {override}" in found["advice"].splitlines()


def test_what_keeps_the_size_is_advised_before_a_smaller_cut(model, packs):
    steps = {"same_size": [{"override": "saliency.reduction=sum", "why": "rank by sums"}]}
    lines = evaluate(lambda: model, {24: packs[24]}, [candidate(12)], TIGHT, steps=steps, **SETTINGS)[
        "advice"
    ].splitlines()
    overrides = [line for line in lines if line.startswith("    --set ")]
    assert overrides[:2] == ["    --set saliency.reduction=sum", "    --set prune.ratio=0.125"]


def test_an_evaluation_is_json_and_names_every_group(loose):
    assert json.loads(json.dumps(loose, allow_nan=False)) == loose
    assert list(loose["base"]) == ["24", "12"] and list(loose["base"]["24"]) == ["all", "code", "prose", "french"]
    decide = loose["packs"]["24"]["decide"]
    assert (
        decide["rows"] == 9 and loose["base"]["24"]["all"]["rows"] == 6 and loose["base"]["24"]["french"]["rows"] == 3
    )
    assert sum(loose["base"]["24"][name]["positions"] for name in ("code", "prose", "french")) == decide["positions"]


def test_confirm_rows_are_others_than_those_that_decided(model, packs, loose):
    confirm = Yardstick.of(lambda: model, packs, batch_tokens=64)
    assert confirm.base_metrics == loose["confirm"]["base"] != loose["base"]


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_size_the_one_nearer_to_the_base_wins_in_whatever_order(packs, order):
    class Told(Known):
        def metrics(self, given):
            self.each = {"near": 0.001, "far": 0.002}[given.name]
            return super().metrics(given)

    given = [candidate(8, "near"), candidate(8, "far", seed=1)][::order]
    found = give_verdict(Told(packs[24], "decide", 0), Told(packs[24], "confirm", 0), given, LOOSE[1:])
    assert found["winner"] == "near" and [entry["verdict"] for entry in found["candidates"]] == ["pass", "pass"]


def test_controls_of_other_candidates_are_left_out(model, packs):
    controls = [candidate(8, "mine", seed=5, control_of="keep8"), candidate(12, "theirs", seed=5, control_of="keep12")]
    found = evaluate(
        lambda: model, {24: packs[24]}, [candidate(8), candidate(12)], LOOSE, controls=controls, **SETTINGS
    )
    assert [control["name"] for control in found["controls"]] == ["mine"]


def test_rejection_says_which_gate_by_how_much_and_what_to_change(model, packs):
    found = evaluate(lambda: model, packs, [candidate(8), candidate(12)], TIGHT, **SETTINGS)
    assert found["verdict"] == "reject" and found["winner"] is None and found["chosen"] == "keep12"
    assert all(entry["verdict"] == "reject" for entry in found["candidates"])
    lines = found["advice"].splitlines()
    assert lines[0] == "None of 2 candidates passes the gates; nearest is keep12 (12 experts kept): rejected."
    assert lines[1].split() == ["gate", "source", "row", "length", "measured", "limit", "beyond", "by"]
    assert lines[2].split()[:3] == ["kl_mean", "all", "24"] and " ≤ 1e-06 " in lines[2]
    by = found["candidates"][1]["gates"][0]["excess"]
    assert lines[2].endswith(f" {by:.3g}") and by > 0
    assert lines[4] == "  kl_mean: how far its predictions are from the base's, in nats; 0 is the same"
    groups = found["candidates"][1]["metrics"]["24"]
    worst = max(("code", "prose"), key=lambda name: groups[name]["kl_mean"]["value"])
    assert lines[5].startswith(f"  worst source: kl_mean {groups[worst]['kl_mean']['value']:.4g} ({worst})")
    assert "    --set prune.ratio=0.125" in lines  # of 16 experts 4 were removed: now 2
    assert lines[-1] == "    --set evaluate.on_reject=warn" and "it passes no preset" in lines[-2]


def test_undecided_says_how_many_samples_it_would_take(model, packs):
    first = evaluate(lambda: model, packs, [candidate(8)], LOOSE, **SETTINGS)["candidates"][0]["metrics"]["24"]["all"][
        "kl_mean"
    ]
    limit = (first["value"] + first["interval"][1]) / 2
    found = evaluate(lambda: model, {24: packs[24]}, [candidate(8)], [Gate("kl_mean", max=limit)], **SETTINGS)
    assert found["verdict"] == "undecided" and found["winner"] is None and found["chosen"] == "keep8"
    [result] = found["candidates"][0]["gates"]
    assert result["more_rows"] == pytest.approx(18, abs=1)
    rows = result["more_rows"] + result["rows"]
    assert f"    --set evaluate.packs.samples={-(-18 * rows // result['rows'])}\n" in found["advice"]
    assert "    --set evaluate.on_undecided=warn" in found["advice"]


def test_a_winner_that_fails_on_the_confirm_rows_is_no_winner(model, packs, monkeypatch):
    confirm = module._confirm
    monkeypatch.setattr(module, "_confirm", lambda bench, chosen, gates: confirm(bench, chosen, TIGHT))
    found = evaluate(lambda: model, packs, [candidate(8)], LOOSE, **SETTINGS)
    assert found["verdict"] == "reject" and found["winner"] is None and found["candidates"][0]["verdict"] == "pass"
    assert (
        "The candidate keep8 (8 experts kept): rejected on the confirm rows, after passing on the others."
        in found["advice"]
    )


def test_without_confirm_rows_the_deciding_ones_are_final(model, tmp_path):
    pack = {24: held_out(tmp_path, parts="decide")}
    found = evaluate(lambda: model, pack, [candidate(8)], LOOSE, **SETTINGS)
    assert found["confirm"] is None and found["winner"] == "keep8"
    assert Yardstick.of(lambda: model, pack, batch_tokens=64).base_metrics == found["base"]


class Known(Bench):
    """Loses `each` nats per expert removed, twice that on rows of the source outside and three times on those of the
    other."""

    def __init__(self, tokens, part, each):
        self.packs, self.eaft, self.each, self.measured = packs_of_part({24: tokens}, part), EAFT, each, []

    def positions(self, candidate, length):
        raise AssertionError("its metrics are known: nothing runs the model for them")

    def base_metrics(self):
        return {"24": {}}

    def metrics(self, candidate):
        self.measured.append(candidate.name)
        lost = self.each * (16 - candidate.kept[0])
        return {
            "24": {
                group: {
                    "rows": 9,
                    "positions": 90,
                    "kl_mean": {"value": times * lost, "interval": [0.9 * times * lost, 1.1 * times * lost]},
                }
                for group, times in {"all": 1, "code": 0.5, "prose": 1.5, "french": 2}.items()
            }
        }


def smaller_cut(name, share):
    removed = int((16 - int(name.removeprefix("keep"))) * share)
    return candidate(16 - removed, ratio=f"{removed / 16:g}") if removed else None


def verdict_on(packs, given, limit, confirmed=0.01):
    decide, confirm = Known(packs[24], "decide", 0.01), Known(packs[24], "confirm", confirmed)
    found = give_verdict(decide, confirm, given, [Gate("kl_mean", max=limit)], smaller_cut=smaller_cut)
    return found, decide.measured, confirm.measured


def test_after_a_rejection_the_nearest_that_passes_is_searched_by_halving(packs):
    found, measured, _ = verdict_on(packs, [candidate(4)], 0.034)  # 0.03 with its interval is inside, 0.04 is not
    assert measured == ["keep4", "keep10", "keep13", "keep12"]  # of 12 removed 6, 3, 4; the next would be 3 again
    assert [(entry["name"], entry["verdict"]) for entry in found["search"]] == [
        ("keep10", "reject"),
        ("keep13", "pass"),
        ("keep12", "reject"),
    ]
    assert found["winner"] is None and [entry["name"] for entry in found["candidates"]] == ["keep4"]
    lines = found["advice"].splitlines()
    assert "Nearest candidate that passes: keep13 (13 experts kept)." in lines
    at = lines.index("  prune 0.1875 instead of 0.75; it passed on the same rows:")
    assert lines[at + 1] == "    --set prune.ratio=0.1875"
    assert "  worst source: kl_mean 0.18 (prose)" in lines, "french is outside the union that the gate judges"
    assert [row["name"] for row in summary_rows(found) if row["role"] == "searched"] == ["keep10", "keep13", "keep12"]
    assert max(map(len, lines)) <= 80


def test_where_nothing_smaller_passes_that_is_said_and_no_ratio_advised(packs):
    found, measured, _ = verdict_on(packs, [candidate(4)], 0.001)
    assert measured == ["keep4", "keep10", "keep13", "keep15"]
    assert (
        "None of the smaller cuts that were tried passes either: keep10, keep13, keep15." in found["advice"]
        and "ratio" not in found["advice"]
    )


def test_a_winner_that_the_confirm_rows_reject_is_searched_on_those(packs):
    found, decided, confirmed = verdict_on(packs, [candidate(8)], 0.1, confirmed=0.02)
    assert (
        decided == ["keep8"] and confirmed == ["keep8", "keep12", "keep10", "keep11"] and found["verdict"] == "reject"
    )
    assert [entry["verdict"] for entry in found["search"]] == ["pass", "reject", "undecided"]
    assert "Nearest candidate that passes: keep12 (12 experts kept)." in found["advice"]


@pytest.mark.parametrize(("limit", "verdict"), [(0.2, "pass"), (0.08, "undecided")])
def test_only_a_rejection_starts_a_search(packs, limit, verdict):
    found, measured, _ = verdict_on(packs, [candidate(8)], limit)
    assert found["verdict"] == verdict and found["search"] is None and measured == ["keep8"]


def test_a_limit_on_text_where_none_is_written_is_not_a_matter_of_samples(packs):
    found = give_verdict(
        Known(packs[24], "decide", 0.01),
        Known(packs[24], "confirm", 0.01),
        [candidate(8)],
        [Gate("loop_share_delta", max=0.0)],
    )
    assert found["verdict"] == "undecided"
    assert (
        "    --set evaluate.gates.loop_share_delta=null" in found["advice"] and "packs.samples" not in found["advice"]
    )


def test_a_killed_evaluation_goes_on_with_the_candidates_it_finished(model, packs, tmp_path, monkeypatch):
    pack, given = {24: packs[24]}, [candidate(8, of="8"), candidate(12, of="12")]
    undisturbed = evaluate(lambda: model, pack, given, TIGHT, **SETTINGS)
    real, measured = bench.measure, []

    def killed(*args, title, **kwargs):
        if title == "evaluate keep12":
            raise KeyboardInterrupt
        return real(*args, title=title, **kwargs)

    def kept():
        return Measures(kept=KeptMeasurements(Store(tmp_path / "store"), tmp_path / "run", SoundPlans(), module.SILENT))

    monkeypatch.setattr(bench, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lambda: model, pack, given, TIGHT, measures=kept(), **SETTINGS)
    monkeypatch.setattr(
        bench, "measure", lambda *args, **kwargs: measured.append(kwargs["title"]) or real(*args, **kwargs)
    )
    again = evaluate(lambda: model, pack, given, TIGHT, measures=kept(), **SETTINGS)
    assert again == undisturbed
    assert measured == ["evaluate keep12", "evaluate keep12"]  # decide, then confirm
    measured.clear()
    assert evaluate(lambda: 1 / 0, pack, given, TIGHT, measures=kept(), **SETTINGS) == undisturbed and not measured


def test_summary_rows_show_base_candidates_controls_and_the_confirmed_choice(loose):
    rows = list(summary_rows(loose))
    assert [(row["role"], row["name"], row["length"]) for row in rows if row["length"] != "12"] == [
        ("base", "base", "24"),
        ("candidate", "keep8", "24"),
        ("candidate", "other8", "24"),
        ("candidate", "keep12", "-"),
        ("control", "control", "24"),
        ("confirm", "base", "24"),
        ("confirm", loose["winner"], "24"),
    ]
    shown = rows[2]
    assert shown["kl_mean"] == loose["candidates"][0]["metrics"]["24"]["all"]["kl_mean"]["value"]
    assert shown["kl_mean_interval"] == loose["candidates"][0]["metrics"]["24"]["all"]["kl_mean"]["interval"]
    assert next(summary_rows(loose, "french"))["perplexity"] == loose["base"]["24"]["french"]["perplexity"]["value"]


def test_what_prints_and_advises_imports_without_torch():
    modules = "reapkit.evaluation.advice, reapkit.evaluation.tool_calls, reapkit.evaluation.equal_bytes"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_eaft_settings_are_the_recipes():
    assert eaft_settings(SaliencySpec(), ObserveSpec()) == EAFT


@torch.no_grad()
def test_a_masked_candidate_has_the_pruned_checkpoints_own_numbers(model, packs, tmp_path):
    tiny.save_hub_layout(model, tmp_path / "base")
    chosen = candidate(8, experts_per_token=3)
    prune_checkpoint(Checkpoint.open(tmp_path / "base"), chosen.selection, tmp_path / "pruned", max_shard_bytes=10**9)
    yardstick = Yardstick.of(lambda: model, packs, batch_tokens=64)
    assert load_model(tmp_path / "pruned").config.num_experts == 8
    on_disk = yardstick.metrics(yardstick.measure_directory(tmp_path / "pruned"))
    how = {"eaft": EAFT, "batch_tokens": 64, "measures": Measures(), "progress": module.SILENT}
    confirm = MaskedBench.of_part(lambda: model, packs, "confirm", **how)
    as_mask = confirm.metrics(chosen)
    for length, groups in as_mask.items():
        for group, metrics in groups.items():
            for name, value in metrics.items():
                if isinstance(value, dict):
                    assert on_disk[length][group][name]["value"] == pytest.approx(value["value"], rel=1e-4, abs=1e-6), (
                        length,
                        group,
                        name,
                    )
    unpruned = yardstick.metrics(yardstick.measure_directory(tmp_path / "base"))
    assert unpruned["24"]["all"]["kl_mean"]["value"] == pytest.approx(0, abs=1e-6)  # another kernel on load


def test_generation_is_measured_and_judged(model, packs):
    found = evaluate(
        lambda: model,
        packs,
        [candidate(8)],
        resolve({"loop_share_delta": {"max": 1.0}}),
        generation=GenerationSpec(prompts=6, max_new_tokens=12),
        **SETTINGS,
    )
    written = found["candidates"][0]["generation"]["all"]
    assert written["rows"] == 4 and written["unfinished_share"]["value"] >= 0
    [result] = found["candidates"][0]["gates"]
    assert result["pack"] == "generation" and result["verdict"] == "pass"
    assert found["base_generation"]["all"]["loop_share_delta"]["value"] == 0

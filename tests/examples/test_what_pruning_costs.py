"""What the packaged model lets us claim: saliency beats chance by far, and pruning keeps what it was shown."""

from __future__ import annotations

import importlib.util
import sys
from decimal import Decimal

import numpy as np
import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "examples" / "what_pruning_costs.py"
HALF = Decimal("0.5")


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("what_pruning_costs", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(script, tmp_path_factory: pytest.TempPathFactory):
    return script.Study(tmp_path_factory.mktemp("study"), samples=96, held_out=32)


@pytest.fixture(scope="module")
def observation(study):
    return study.calibrated()


def test_informed_criteria_lose_less_than_half_of_random(script, study, observation) -> None:
    informed = {
        name: script.CRITERIA[name]
        for name in ("frequency", "weighted-frequency", "ean", "reap", "reap, sum", "eaft-reap")
    }
    table = script.criteria_table(study, [observation], None, informed, [HALF])
    random = sum(script.random_costs(study, observation, [HALF])[HALF]) / 5
    assert {name: costs[HALF].value for name, costs in table.items() if costs[HALF].value >= random / 2} == {}
    assert table["reap"][HALF].against(table["reap"][HALF]) == ""
    text = script.markdown("calibrated on all", table, {HALF: [random]})
    assert f"| reap | {table['reap'][HALF].value:.3f} [" in text


def test_code_alone_keeps_code_and_loses_the_rest(script, study, observation) -> None:
    increase = script.by_source(study, observation, {"code": Decimal(1)})
    assert all(increase[name] > 4 * increase["code"] for name in ("tools", "prose", "math")), increase


def test_cells_and_their_noise_against_a_loop(script) -> None:
    random = np.random.default_rng(5)
    source = np.array([0, 1, 2, 3] * 6)
    base = script.Losses(random.random(24) * 50, random.integers(5, 60, 24), source)
    draws = [script.Losses(base.nll + random.random(24), base.count, source) for _ in range(3)]
    noise = script.Noise.of(base, 3, resamples=40)
    cost = script.Cost.of(base, draws, noise)

    def mean(taken_rows: list[int], taken_draws: list[int]) -> float:
        values = []
        for draw in taken_draws:
            per_source = []
            for s in range(4):
                rows = [row for row in taken_rows if source[row] == s]
                per_source.append(
                    sum(draws[draw].nll[row] - base.nll[row] for row in rows) / sum(base.count[row] for row in rows)
                )
            values.append(sum(per_source) / 4)
        return sum(values) / len(values)

    assert cost.value == pytest.approx(mean(list(range(24)), [0, 1, 2]))
    for number in (0, 7, 39):
        rows = [row for row in range(24) for _ in range(noise.rows[number, row])]
        taken = [draw for draw in range(3) for _ in range(noise.draws[number, draw])]
        assert cost.resampled[number] == pytest.approx(mean(rows, taken))
    assert all(noise.rows[:, source == s].sum(1).tolist() == [6] * 40 for s in range(4))
    worse = script.Cost.of(base, [script.Losses(draw.nll + 1, base.count, source) for draw in draws], noise)
    assert (worse.against(cost), cost.against(worse)) == ("higher", "lower")

"""What the packaged model lets us claim: saliency beats chance by far, and pruning keeps what it was shown."""

from __future__ import annotations

import importlib.util
from decimal import Decimal
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "what_pruning_costs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("what_pruning_costs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(script, tmp_path_factory: pytest.TempPathFactory):
    return script.Study(tmp_path_factory.mktemp("study"), samples=96, held_out=32)


def test_informed_criteria_lose_less_than_half_of_random(script, study) -> None:
    half = Decimal("0.5")
    informed = {name: script.CRITERIA[name] for name in ("frequency", "weighted-frequency", "ean", "reap", "reap, sum", "eaft-reap")}
    costs = script.criteria_table(study, informed, [half])
    random = sum(costs["random"][half]) / 5
    assert {name: costs[name][half][0] for name in informed if costs[name][half][0] >= random / 2} == {}


def test_code_alone_keeps_code_and_loses_the_rest(script, study) -> None:
    increase = script.code_only_table(study)["code alone"]
    assert all(increase[name] > 4 * increase["code"] for name in ("tools", "prose", "math")), increase

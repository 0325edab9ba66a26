"""The public names do what the documentation says, and importing them costs nothing."""

from __future__ import annotations

import subprocess
import sys

import reapkit
from tests.support.paths import ROOT


def test_public_names_are_there_and_typed() -> None:
    for name in reapkit.__all__:
        assert getattr(reapkit, name).__doc__, name
        assert name in dir(reapkit)


def test_a_submodule_never_hides_a_public_function() -> None:
    code = (
        "import reapkit, reapkit.planning.plan, reapkit.pipeline.run, reapkit.selection.selection; assert"
        " callable(reapkit.plan) and callable(reapkit.select)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_plan_takes_a_path_a_name_or_a_recipe() -> None:
    recipe = reapkit.load_recipe(ROOT / "recipes" / "demo.yaml")
    plans = [reapkit.plan(recipe), reapkit.plan(str(ROOT / "recipes" / "demo.yaml")), reapkit.plan("demo")]
    assert len({tuple(stage.key for stage in plan.stages) for plan in plans}) == 1

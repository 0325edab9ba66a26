"""Names of criteria: built-in, installed, or module:function; nothing of the user's is imported to check a name."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from reapkit.core.errors import RecipeError
from reapkit.recipe.loading import load
from reapkit.selection.criteria import registry
from reapkit.selection.criteria.registry import BUILTIN, criterion, criterion_fingerprint, criterion_problem, described
from reapkit.selection.saliency import saliency
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT
from tests.support.specs import saliency_spec


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "offered_criteria.py").write_text("def steady(totals, spec):\n    return totals.count\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("steady", "offered_criteria:steady", registry.ENTRY_POINT_GROUP),
        EntryPoint("number", "offered_criteria:number", registry.ENTRY_POINT_GROUP),
        EntryPoint("reap", "offered_criteria:steady", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    return tmp_path


def test_built_in_names_are_known_and_have_no_file_of_the_users() -> None:
    assert all(criterion(name) is described(name) is record for name, record in BUILTIN.items())
    assert all(criterion_problem(name) is None and criterion_fingerprint(name) is None for name in BUILTIN)


def test_an_installed_criterion_goes_by_its_name(installed: Path) -> None:
    assert criterion_problem("steady") is None
    observation = observe_routing(random_routing(0), trace=False)
    assert np.array_equal(
        saliency(observation, saliency_spec("steady")), saliency(observation, saliency_spec("frequency"))
    )
    assert "reap" not in registry.installed_criteria(), "a built-in name cannot be taken over"


def test_what_is_no_function_is_refused(installed: Path) -> None:
    with pytest.raises(RecipeError, match=r"'number' is a int, not a function of \(totals, spec\)"):
        saliency(observe_routing(random_routing(0), trace=False), saliency_spec("number"))


def test_an_unknown_name_lists_the_known_ones(installed: Path) -> None:
    problem = criterion_problem("stedy", "prune.candidates.criterion[2]")
    assert (
        str(problem)
        == "prune.candidates.criterion[2]: found 'stedy'. Known: reap, reap-relative, eaft-reap, frequency,"
        " weighted-frequency, ean, ean-mean, reroute, reroute-single, knockout, random, number, steady, or your own as"
        " module:function. Did you mean 'steady'?"
    )
    with pytest.raises(RecipeError, match=r"found 'nothing like it'\. Known: reap, .* as module:function\.$"):
        criterion("nothing like it")


def test_a_name_is_checked_without_importing() -> None:
    record = criterion("module_that_is_not_there:function")
    assert record.formula(saliency_spec()) == record.name and not record.from_sums
    with pytest.raises(
        RecipeError, match=r"cannot be imported .*Put the folder that holds module_that_is_not_there on PYTHONPATH"
    ):
        saliency(observe_routing(random_routing(0), trace=False), saliency_spec(record.name))


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, body in (("first_own", "1"), ("second_own", "2"), ("third_own", "1")):
        (tmp_path / f"{name}.py").write_text(f"def mine(totals, spec):\n    return totals.count * {body}\n")
    first, second, third = (criterion_fingerprint(f"{name}:mine") for name in ("first_own", "second_own", "third_own"))
    assert first == third != second


def test_a_file_that_is_not_there_has_no_fingerprint() -> None:
    for name in ("module_that_is_not_there:function", "os.nowhere:function", "sys:exit"):
        with pytest.raises(RecipeError, match="cannot be imported"):
            criterion_fingerprint(name)


def test_the_example_decides_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples/own_criterion"
    monkeypatch.syspath_prepend(folder)
    recipe = load(folder / "recipe.yaml")
    observation = observe_routing(random_routing(0, dead=(1,)), trace=False)
    found, mean = saliency(observation, recipe.saliency), saliency(observation, saliency_spec())
    routed = observation.statistics["count"].sum(1) > 0
    assert (
        np.isfinite(found[routed]).all() and (found <= mean).all() and not np.array_equal(found[routed], mean[routed])
    )
    assert (found[~routed] == -np.inf).all()

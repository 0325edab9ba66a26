"""The public names do what the documentation says, and importing them costs nothing."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import reapkit
from reapkit import api
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT


def callables(thing: Any) -> Iterator[Callable[..., Any]]:
    """A function, or what a class of the package defines for its users: methods, class methods and properties."""
    if not inspect.isclass(thing):
        yield thing
        return
    for base in thing.__mro__:
        if base.__module__.startswith("reapkit"):
            for name, member in vars(base).items():
                if name.startswith("_"):
                    continue
                if isinstance(member, property):
                    yield member.fget
                elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
                    yield inspect.unwrap(getattr(member, "__func__", member))


def unannotated(function: Callable[..., Any]) -> list[str]:
    """Parameters without a type, and `return` where the result has none."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in (*names, "return") if name not in function.__annotations__]


def test_public_names_are_there() -> None:
    assert {*reapkit.__all__} <= {*api.__all__} and {*reapkit.__all__} <= {*dir(reapkit)}
    assert all(getattr(reapkit, name) is getattr(api, name) for name in reapkit.__all__)


@pytest.mark.parametrize("name", sorted(api.__all__))
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(api, name)
    assert thing.__doc__
    assert {function.__qualname__: missing for function in callables(thing) if (missing := unannotated(function))} == {}


def test_a_missing_type_is_found() -> None:
    class Loose:
        def typed(self, a: int, *, b: str = "") -> None: ...

        def half(self, a: int, b) -> None: ...

        @property
        def size(self): ...

    Loose.__module__ = "reapkit.made_up"
    assert {function.__name__: unannotated(function) for function in callables(Loose)} == {
        "typed": [],
        "half": ["b"],
        "size": ["return"],
    }


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert resources.files("reapkit").joinpath("py.typed").is_file()


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


def test_the_errors_of_users_code_are_exported() -> None:
    for name in ("ReapkitError", "RecipeError", "UnusableError", "StageFailed", "RejectedByGates"):
        assert issubclass(getattr(reapkit, name), reapkit.ReapkitError)
    with pytest.raises(reapkit.RecipeError, match="must be below 1"):
        reapkit.load_recipe("demo", ["prune.ratio=3"])


def test_a_plan_shows_itself_in_a_line_and_in_a_notebook(tmp_path: Path) -> None:
    plan = reapkit.plan(reapkit.load_recipe("demo", [f"runtime.store={tmp_path / 'store'}"]))
    assert repr(plan) == (
        "<Plan demo: builtin:demo, 32 experts in 4 layers; to run: calibrate, packs, observe, select, evaluate, prune,"
        " quantize, verify, report>"
    )
    page = plan._repr_html_()
    assert "<td>quantize</td><td>will run</td><td>first run of this stage</td>" in page and "<td>3.62 M</td>" in page


@pytest.fixture
def observed(tmp_path: Path) -> Path:
    routing = random_routing(seed=3)
    observe_routing(routing).save(tmp_path / "payload")
    return tmp_path / "payload"


def test_an_observation_shows_itself_and_its_numbers(observed: Path) -> None:
    observation = reapkit.Observation.load(observed)
    told = repr(observation)
    assert told.startswith("<Observation of ") and "3 layers x 8 experts" in told and len(told) < 300
    assert all(f"<td>{name}</td>" in observation._repr_html_() for name in observation.sources)
    table = observation.to_pandas()
    sources = [*observation.sources, "all"]
    assert len(table) == len(observation.layers) * observation.num_experts * len(sources)
    layer, expert, source = 1, 2, 0
    row = table[
        (table.layer == observation.layers[layer]) & (table.expert == expert) & (table.source == sources[source])
    ]
    assert row["gate_norm_sum"].item() == observation.statistics["gate_norm_sum"][layer, source, expert]
    both = table[(table.layer == observation.layers[layer]) & (table.expert == expert)].set_index("source")["count"]
    assert both["all"] == both.drop("all").sum()


def test_an_observation_is_found_in_a_run(observed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(observed, run / "observation")
    (run / "run.json").write_text("{}")
    assert reapkit.Observation.load(run).sources == reapkit.Observation.load(observed).sources
    with pytest.raises(reapkit.ReapkitError, match="no such file or directory"):
        reapkit.Observation.load(tmp_path / "nowhere")

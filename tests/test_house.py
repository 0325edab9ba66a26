"""The house keeps its plan: no circle among modules, rooms import rooms above them only, torch-free files are free of
torch.

    python -m tests.test_house

prints the rooms with their modules, lines and arrows.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.house import LOOSE, ROOMS, House, room
from tests.support.paths import ROOT

HOUSE = House(ROOT / "reapkit")
SHARED_NAMES = {"Observation": ["reapkit.api", "reapkit.observation.observation"]}
"""Names of two classes that mean one thing: what users import as `reapkit.Observation` is the recorded observation
itself, with its saliencies."""


def test_there_is_no_circle() -> None:
    assert not (circle := HOUSE.circle()), " -> ".join(circle)


def test_every_module_has_a_room() -> None:
    assert not HOUSE.without_a_room()
    assert {room(module) for module in HOUSE.modules} == {*ROOMS, *LOOSE}


@pytest.mark.parametrize("module", [module for module in HOUSE.modules if room(module) in ROOMS])
def test_rooms_import_rooms_below_them(module: str) -> None:
    wrong = HOUSE.upward(module)
    assert not wrong, f"{module} imports {wrong}, which stand above or beside {room(module)}"


@pytest.mark.parametrize("module", HOUSE.torch_free)
def test_torch_free_modules_are(module: str) -> None:
    assert not HOUSE.heavy(module)


@pytest.mark.parametrize(
    "module", ["reapkit", "reapkit.api", "reapkit.planning.plan", "reapkit.cli.main", "reapkit.pipeline.run"]
)
def test_torch_stays_out_until_the_plan_is_made(module: str) -> None:
    assert not HOUSE.heavy(module)


def built(directory: Path, **files: str) -> House:
    """A package `reapkit` of these files; `core__hashing` is `core/hashing.py`."""
    for name, text in {"__init__": "", **files}.items():
        path = directory / "reapkit" / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return House(directory / "reapkit")


def test_a_circle_is_found_also_where_an_import_waits_in_a_function(tmp_path: Path) -> None:
    house = built(
        tmp_path,
        core__hashing="from reapkit.core import ranks\n",
        core__ranks="def join():\n    from reapkit.core.errors import Error\n",
        core__errors="import reapkit.core.hashing\n",
    )
    assert {*house.circle()} == {f"reapkit.core.{name}" for name in ("hashing", "ranks", "errors")}
    (tmp_path / "reapkit/core/errors.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import reapkit.core.hashing\n"
    )
    assert House(house.package).circle() == []


def test_imports_from_rooms_above_and_beside_are_found(tmp_path: Path) -> None:
    house = built(
        tmp_path,
        core__errors="",
        recipe__loading="from reapkit.core.errors import Error\nfrom reapkit.report import page\n",
        report__page="from reapkit.recipe import loading\n",
        calibration__tokens="def read():\n    from reapkit.model import loading\n",
        model__loading="",
    )
    found = {module: wrong for module in house.modules if room(module) in ROOMS and (wrong := house.upward(module))}
    assert found == {
        "reapkit.recipe.loading": ["reapkit.report.page"],
        "reapkit.calibration.tokens": ["reapkit.model.loading"],
    }


def test_torch_is_found_behind_other_modules_of_a_torch_free_file(tmp_path: Path) -> None:
    house = built(
        tmp_path,
        core__plain='"""Plain. Torch-free."""\nimport json\n\ndef load():\n    import torch\n',
        core__direct='"""Direct. Torch-free."""\nfrom torch import nn\n',
        core__behind='"""Behind. Torch-free."""\nfrom reapkit.model import loading\n',
        core__silent="import torch\n",
        model__loading="import transformers\n",
    )
    assert {module: house.heavy(module) for module in house.torch_free} == {
        "reapkit.core.plain": set(),
        "reapkit.core.direct": {"torch"},
        "reapkit.core.behind": {"transformers"},
    }


def test_modules_without_a_room_are_found(tmp_path: Path) -> None:
    house = built(tmp_path, api="", utils="", attic__old="", core__errors="", recipe="")
    assert {*house.without_a_room()} == {"reapkit.utils", "reapkit.attic", "reapkit.attic.old", "reapkit.recipe"}


def test_a_name_of_a_class_has_one_meaning() -> None:
    assert HOUSE.namesakes() == SHARED_NAMES


def test_classes_of_one_name_are_found(tmp_path: Path) -> None:
    house = built(
        tmp_path,
        core__errors="class Error(Exception): ...\nclass Reader: ...\n",
        recipe__loading="class _Reader: ...\ndef load():\n    class Error: ...\n",
        report__page="class Page: ...\n",
    )
    assert house.namesakes() == {
        name: ["reapkit.core.errors", "reapkit.recipe.loading"] for name in ("Error", "Reader")
    }


def test_saliency_is_followed_through_three_rooms() -> None:
    """From the recipe's section to each expert's number and the experts that stay: recipe, observation, selection."""
    followed = {"reapkit.selection.saliency", "reapkit.selection.decide", "reapkit.selection.criteria.registry"}
    waiting = list(followed)
    while waiting:
        found = HOUSE.own(waiting.pop()) - followed - {"reapkit"}
        followed |= found
        waiting += [module for module in found if room(module) in ("recipe", "observation", "selection")]
    aside = {"reapkit.checkpoint.architecture"}  # integers of the config, which budgets are checked against
    assert {room(module) for module in followed - aside} == {"core", "recipe", "observation", "selection"}


def main() -> None:
    """Prints the house."""
    arrows = Counter(
        (room(module), room(other))
        for module in HOUSE.modules
        for other in HOUSE.own(module)
        if room(module) != room(other)
    )
    for name in (*ROOMS, *sorted(LOOSE)):
        inside = [module for module in HOUSE.modules if room(module) == name]
        lines = sum(len(HOUSE.modules[module].read_text().splitlines()) for module in inside)
        reads = ", ".join(
            f"{other} {count}" for (here, other), count in sorted(arrows.items()) if here == name and other in ROOMS
        )
        print(f"{name:14s} {len(inside):3d} modules {lines:6d} lines   imports {reads or 'nothing'}")
    print(
        f"{len(arrows)} arrows between {len({*ROOMS, *LOOSE})} boxes,"
        f" {sum(len(HOUSE.own(module)) for module in HOUSE.modules)} between modules"
    )


if __name__ == "__main__":
    main()

"""Installing as README says leaves the user's torch alone; only `make` and the public workflow pin a version of it."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.support.paths import ROOT

CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
THEIRS = ("2.10.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.0+rocm7.2")
"""Builds of torch that a user may have."""


def of_torch(requirements: list[Requirement]) -> list[SpecifierSet]:
    return [each.specifier for each in requirements if each.name == "torch"]


def dependencies() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(each) for each in project["dependencies"]]


def installs(text: str) -> list[str]:
    """The `pip install` commands in a text, without their remarks."""
    return [found.split("#")[0].strip() for found in re.findall(r"pip install ([^`&|\n]+)", text)]


def test_what_readme_installs_is_satisfied_by_the_torch_that_is_there() -> None:
    commands = installs((ROOT / "README.md").read_text())
    assert "-c constraints.txt -e ." in commands
    for command in commands:
        words = command.replace("'", "").split()
        assert not {"-U", "--upgrade", "--force-reinstall", "-I"} & set(words)
        named = [Requirement(word) for word in words if word not in ("-c", "constraints.txt", "-e", ".")]
        asked = [*of_torch(CONSTRAINTS), *of_torch(dependencies()), *of_torch(named)]
        assert asked, "pyproject.toml says which versions of torch will do"
        assert all(specifier.contains(version) for specifier in asked for version in THEIRS)


def test_make_and_the_workflow_pin_one_version_that_the_project_allows() -> None:
    makefile, workflow = ((ROOT / name).read_text() for name in ("Makefile", ".github/workflows/ci.yml"))
    [pinned] = re.findall(r"^TORCH := (.+)$", makefile, flags=re.M)
    [exactly] = Requirement(pinned).specifier
    assert exactly.operator == "==" and all(each.contains(exactly.version) for each in of_torch(dependencies()))
    recipe = makefile.split("$(STAMP):")[1].split("clean:")[0]
    assert all("$(TORCH)" in command for command in recipe.splitlines() if "pip install" in command)
    assert [command.split() for command in re.findall(r"pip install (.+)", workflow)] == [
        ["--constraint", "constraints.txt", pinned, "dist/*.whl"]
    ]

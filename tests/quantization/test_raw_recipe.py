"""A raw llm-compressor recipe named by its path: found from the recipe's folder, checked by llm-compressor before
anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from reapkit.core.errors import RecipeError
from reapkit.pipeline.run import apply
from reapkit.recipe.loading import load

RECIPE = """version: 1
name: t
model: {source: 'builtin:demo'}
calibration: {samples: 4, score: all, mix: [{name: d, source: 'builtin:prose'}]}
prune: {ratio: 0.5}
quantize:
  recipe: raw/mine.yaml
"""
RAW = "a_stage:\n  a_modifiers:\n    %s: {targets: [Linear], scheme: W4A16}\n"


def written(folder: Path, modifier: str) -> Path:
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "mine.yaml").write_text(RAW % modifier)
    (folder / "recipe.yaml").write_text(
        RECIPE + f"output: {{directory: '{folder / 'run'}'}}\nruntime: {{store: '{folder / 'store'}'}}\n"
    )
    return folder / "recipe.yaml"


def test_the_path_starts_from_the_recipe_and_its_text_counts(tmp_path: Path) -> None:
    recipe = written(tmp_path / "here", "GPTQModifier")
    assert load(recipe).quantize.recipe == RAW % "GPTQModifier"
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "recipe.yaml").write_text("extends: ../here/recipe.yaml\nname: u\n")
    assert load(tmp_path / "child" / "recipe.yaml").quantize.recipe == RAW % "GPTQModifier"
    (tmp_path / "here" / "raw" / "mine.yaml").unlink()
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:7:11 quantize.recipe: found 'raw/mine.yaml', but this file cannot be read"
    ):
        load(recipe)


def test_a_modifier_that_llmcompressor_refuses_stops_the_run_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:7:11 quantize.recipe: llm-compressor refuses the recipe: .*GPTQModifierr"
    ):
        apply(written(tmp_path / "here", "GPTQModifierr"))
    assert not [path for path in (tmp_path / "here").glob("store/*-*") if path.is_dir()]

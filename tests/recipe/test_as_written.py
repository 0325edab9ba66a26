"""Values are read as people write them, and the recipe's own spelling is what enters keys and records."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from reapkit.core.errors import RecipeError
from reapkit.pipeline.planned import load_and_plan
from reapkit.recipe.loading import LoadedRecipe, load
from tests.support.paths import ROOT

CANONICAL = """
version: 1
name: t
model: {source: "builtin:demo"}
calibration:
  samples: 64
  packing: concat
  mix:
    - {name: code, source: "builtin:code", weight: 0.515}
    - {name: prose, source: "builtin:prose", weight: 0.485}
saliency: {criterion: eaft-reap, reduction: sum, mix: {code: 0.7, prose: 0.3}}
prune: {ratio: 0.25, caps: [{layers: [0], max_ratio: 0.25}]}
evaluate: {gates: near-lossless, controls: [weighted-frequency], on_reject: warn}
quantize: {scheme: W3A16, method: gptq, group_size: 64}
output: {max_shard_bytes: 5_000_000_000, keep: [pruned]}
"""
AS_PEOPLE_WRITE = """
version: 1
name: t
model: builtin:demo
calibration:
  samples: 64
  packing: Concat
  mix:
    - &code {name: code, source: "builtin:code", weight: 51.5%}
    - {<<: *code, name: prose, source: "builtin:prose", weight: "48.5 %"}
saliency: {criterion: EAFT_REAP, reduction: SUM, mix: {code: 70%, prose: 30%}}
prune: {ratio: 25%, caps: [{layers: [0], max_ratio: 25.0%}]}
evaluate: {gates: Near_Lossless, controls: [Weighted-Frequency], on_reject: Warn}
quantize: {scheme: w3a16, method: GPTQ, group_size: 64}
output: {max_shard_bytes: 5 GB, keep: [Pruned]}
"""


def loaded(text: str, folder: Path, *overrides: str) -> LoadedRecipe:
    (folder / "recipe.yaml").write_text(text)
    return load(folder / "recipe.yaml", overrides)


def test_both_spellings_are_one_recipe_with_one_set_of_keys(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    canonical, written = loaded(CANONICAL, tmp_path / "a"), loaded(AS_PEOPLE_WRITE, tmp_path / "b")
    assert written == canonical
    keys = [
        {stage.name: stage.key for stage in load_and_plan(str(tmp_path / folder / "recipe.yaml")).stages}
        for folder in ("a", "b")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("33.3%", "0.333"), ("5 %", "0.05"), (".5%", "0.005"), ("0%", "0"), ("99.99%", "0.9999"), ("07%", "0.07")],
)
def test_percentages_are_exact_decimals(written: str, meant: str, tmp_path: Path) -> None:
    assert loaded(CANONICAL, tmp_path, f"prune.ratio={written}").prune.ratio == Decimal(meant)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5 GB", 5 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("2 tb", 2 * 10**12),
        ("5000000 B", 5_000_000),
        ("70 MiB", 70 * 2**20),
    ],
)
def test_sizes(written: str, meant: int, tmp_path: Path) -> None:
    assert loaded(CANONICAL, tmp_path, f"output.max_shard_bytes={written}").output.max_shard_bytes == meant


@pytest.mark.parametrize(
    "override",
    ["prune.ratio=101%", "prune.ratio=-5%", "prune.ratio=5%%", "output.max_shard_bytes=5 XB", "calibration.seed=5%"],
)
def test_what_could_mean_something_else_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        loaded(CANONICAL, tmp_path, override)


def test_free_text_is_never_respelled(tmp_path: Path) -> None:
    recipe = loaded(CANONICAL, tmp_path, "name=Warn", "description=50%", "saliency.criterion=My_Module:Fn")
    assert (recipe.name, recipe.description, recipe.saliency.criterion) == ("Warn", "50%", "My_Module:Fn")


def test_a_named_model_meets_parents_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(CANONICAL)
    child = 'extends: base.yaml\nmodel: "builtin:demo"\n'
    assert loaded(child, tmp_path, "model.trust_remote_code=true").model.trust_remote_code
    assert loaded(CANONICAL, tmp_path, "model=other/name").model.source == "other/name"


def test_merge_keys_of_several_mappings_the_first_wins_and_written_keys_win_over_all(tmp_path: Path) -> None:
    text = CANONICAL.replace(
        "prune: {ratio: 0.25, caps: [{layers: [0], max_ratio: 0.25}]}",
        "prune:\n  protect: &p {core_per_layer: 1, super_experts: false}\n  ratio: 0.25",
    ).replace("evaluate: {", "evaluate: {packs: &q {samples: 8, lengths: [64]}, ")
    text += "observe: {<<: [{eaft: false, entropy_top_k: 7}, {eaft: true, reroute_tokens: 3}], entropy_top_k: 9}\n"
    observe = loaded(text, tmp_path).observe
    assert (observe.eaft, observe.entropy_top_k, observe.reroute_tokens) == (False, 9, 3)
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:17 observe.bogus: unknown key"):
        loaded(text.replace("{eaft: false,", "{bogus: 1, eaft: false,"), tmp_path)


def test_a_recipe_from_a_pipe(tmp_path: Path) -> None:
    """`-`, `/dev/stdin` and a shell's `<(…)`; relative paths start where the command was given."""
    text = CANONICAL.replace('"builtin:prose"', "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("-", "/dev/stdin"):
        done = subprocess.run(
            [sys.executable, "-m", "reapkit", "plan", name, "--json"],
            cwd=tmp_path, input=text, text=True, capture_output=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and '"name": "t"' in done.stdout, done.stderr
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m reapkit validate <(cat)"],
        cwd=tmp_path, input=text.replace("ratio: 0.25", "ratio: 25"), text=True, capture_output=True,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "prune.ratio: found 25, must be below 1. For 25 % write 0.25." in done.stderr

"""The card says what the run measured, and nothing else."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from reapkit.report.card import model_card
from tests.support import synthetic_report as synthetic
from tests.support.paths import ROOT


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def facts():
    return synthetic.facts()


def test_front_matter_is_what_the_hub_reads(facts):
    assert front_matter(model_card(facts, "quantized")) == {
        "base_model": "some-lab/Small-MoE",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["theblackcat102/evol-codealpaca-v1", "Salesforce/xlam-function-calling-60k"],
        "tags": ["moe", "mixture-of-experts", "pruning", "reap", "reapkit", "qwen3_moe", "compressed-tensors", "w3a16"],
    }
    assert "base_model_relation" not in front_matter(model_card(facts, "pruned"))


def test_a_local_base_of_unknown_license_gets_neither_link_nor_license(facts):
    local = dataclasses.replace(
        facts, model=dataclasses.replace(facts.model, source="/models/mine", hub=False, license=None), hub_datasets=()
    )
    card = model_card(local, "pruned")
    assert (
        not {"base_model", "license", "datasets"} & set(front_matter(card))
        and "huggingface.co" not in card
        and "License" not in card
    )


def test_tables_hold_the_mix_and_the_measured_numbers(facts):
    card = model_card(facts, "quantized")
    assert "| 100 | 22 % | 2,000 | 22 % | code generation |" in card
    assert (
        "| quantized | 1.9 MB | 6.300 | 1.050 | 0.0350 | 94.5 % |" in card
        and "| prose | 1.070 (1.052 to 1.088) |" in card
    )
    assert "| Routed experts per layer | 8 (base: 16) |" in card and "3.250 bits per quantized weight" in card
    assert "| pruned | 4.25 MB" in model_card(facts, "pruned")


def test_what_was_not_measured_is_not_claimed(facts):
    unmeasured = model_card(dataclasses.replace(facts, verification={}, evaluation={}), "pruned")
    assert "measured nothing" in unmeasured and "Proved" not in unmeasured and "gates for" not in unmeasured
    as_mask = model_card(dataclasses.replace(facts, verification={}), "quantized")
    assert "The written directory itself was not measured" in as_mask and "before quantization" in as_mask
    proved = model_card(facts, "pruned")
    assert "- pruned, tensors: 96 tensors equal" in proved and "no memory" not in proved and "3e-6" not in proved
    limits = model_card(facts, "quantized")
    assert (
        "No task benchmark was run." in limits and "Free generation" in limits and "started no serving engine" in limits
    )


def test_serving_follows_scheme_and_layout(facts):
    assert "humming" in model_card(facts, "quantized") and "4 and 8 bits only" in model_card(facts, "quantized")
    assert "any version that serves the base model" in model_card(facts, "pruned")
    ragged = dataclasses.replace(facts.pruned, experts={0: 8, 1: 6})
    assert "vllm serve" not in model_card(dataclasses.replace(facts, pruned=ragged), "pruned")
    unread = dataclasses.replace(facts, quantization={**facts.quantization, "experts_reload_in_transformers": False})
    assert "AutoModelForCausalLM" not in model_card(unread, "quantized")


def test_memory_to_serve_is_the_exact_bytes_and_says_what_it_leaves_out(facts):
    said = model_card(facts, "quantized")
    assert "Memory to serve: 0.0019 GB of weights (1,900,000 bytes); the cache of keys and values comes on top." in said
    large = dataclasses.replace(facts.pruned, nbytes=15_312_345_678)
    known = dataclasses.replace(facts, pruned=large, model=dataclasses.replace(facts.model, cache_bytes=98_304))
    assert (
        "15.31 GB of weights (15,312,345,678 bytes), and 0.0983 GB of keys and values for every 1,000 tokens"
        in model_card(known, "pruned")
    )


@pytest.mark.parametrize("prompts", ["chat", "text", "tokens"])
@pytest.mark.parametrize("target", [None, "me/mine"])
def test_the_example_loads_what_the_card_is_about_and_generates(facts, prompts, target):
    output = facts.recipe.output.model_copy(update={"push_to_hub": target})
    given = dataclasses.replace(
        facts,
        model=dataclasses.replace(facts.model, prompts=prompts),
        recipe=facts.recipe.model_copy(update={"output": output}),
    )
    card = model_card(given, "pruned")
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    compile(code, "card", "exec")
    assert f'path = "{target or "."}"' in code and "model.generate(" in code
    assert f"vllm serve {target or '.'}" in card
    assert ("apply_chat_template" in code, "AutoTokenizer" in code) == (prompts == "chat", prompts != "tokens")


def test_the_card_links_to_what_made_it(facts):
    [homepage] = re.findall(r'Homepage = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert f"Made with [reapkit]({homepage}) 0.1.0, torch 2.13.0, transformers 5.17.0." in model_card(facts, "pruned")


def test_eaft_is_cited_only_where_it_was_used(facts):
    assert "2601.02151" not in model_card(facts, "pruned") and "2510.13999" in model_card(facts, "pruned")
    chosen = {
        name: dataclasses.replace(selection, criterion="eaft-reap") for name, selection in facts.selections.items()
    }
    assert "2601.02151" in model_card(dataclasses.replace(facts, selections=chosen), "pruned")
    counted = {
        name: dataclasses.replace(selection, criterion="frequency") for name, selection in facts.selections.items()
    }
    assert "## Citation" not in model_card(dataclasses.replace(facts, selections=counted), "pruned")


def test_a_model_that_was_not_written_has_no_card():
    with pytest.raises(ValueError, match="wrote no pruned model"):
        model_card(synthetic.facts(rejected=True), "pruned")


HOSTILE = "</summary><img src=x onerror=alert(1)>\n```\n<script>alert(2)</script>\n~~~\n<b>"


def outside_code(card: str) -> str:
    """The card as a Markdown reader sees it, without its blocks of code."""
    kept, fence = [], ""
    for line in card.split("---\n", 2)[2].splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            closes = mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not mark[2].strip()
            fence = "" if closes else fence
        elif mark and not (mark[1][0] == "`" and "`" in mark[2]):
            fence = mark[1]
        else:
            kept.append(line)
    assert not fence
    return "\n".join(kept)


@pytest.mark.parametrize("which", ["pruned", "quantized"])
def test_nothing_that_a_user_wrote_is_raw_html_in_the_body(facts, which):
    model = dataclasses.replace(facts.model, source=HOSTILE, revision=HOSTILE, license=HOSTILE, model_type=HOSTILE)
    mix = tuple(entry.model_copy(update={"name": HOSTILE}) for entry in facts.recipe.calibration.mix)
    recipe = facts.recipe.model_copy(
        update={
            "description": HOSTILE,
            "calibration": facts.recipe.calibration.model_copy(update={"mix": mix}),
            "output": facts.recipe.output.model_copy(update={"push_to_hub": HOSTILE}),
        }
    )
    calibration = {**facts.calibration, "sources": [{**s, "source": HOSTILE} for s in facts.calibration["sources"]]}
    hostile = dataclasses.replace(
        facts,
        model=model,
        recipe=recipe,
        calibration=calibration,
        command=HOSTILE,
        recipe_yaml=HOSTILE,
        versions={"transformers": HOSTILE},
    )
    card = model_card(hostile, which)
    tags = re.findall(r"<[^>]*>?", outside_code(card))
    assert tags == ["<details>", "<summary>", "</summary>", "</details>"]
    assert "&lt;script>" in outside_code(card) and "alert" in outside_code(card)

"""The language's two descriptions, for editors and for people, say what the types say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from reapkit.quantization.schemes import SCHEMES
from reapkit.recipe.json_schema import recipe_schema
from reapkit.recipe.loading import load, load_recipe
from reapkit.recipe.reference_page import language_page
from reapkit.report.facts import recipe_yaml
from reapkit.selection.criteria.registry import vocabulary
from tests.support.paths import ROOT

NAMES = {"criterion": vocabulary(), "scheme": {name: scheme.meaning for name, scheme in SCHEMES.items()}}


PERCENT = {"type": "string", "pattern": r"^\s*\d+(\.\d*)?\s*%\s*$"}
NULL = {"type": "null"}


def test_the_committed_schema_is_current() -> None:
    assert json.loads((ROOT / "recipe.schema.json").read_text()) == recipe_schema(NAMES), (
        "run: reapkit schema > recipe.schema.json"
    )


def test_the_page_in_the_readme_is_current() -> None:
    readme = (ROOT / "README.md").read_text()
    page = readme.split("<!-- made by `reapkit schema --markdown` -->\n")[1].split(
        "\n<!-- end of the recipe language -->"
    )[0]
    assert page == language_page(NAMES).strip(), (
        "put the output of `reapkit schema --markdown` between the markers of README.md"
    )


def test_every_field_is_described() -> None:
    def missing(schema: dict) -> list[str]:
        return [name for name, field in schema.get("properties", {}).items() if not field.get("description")]

    schema = recipe_schema(NAMES)
    assert {
        name: found for name, model in {"recipe": schema, **schema["$defs"]}.items() if (found := missing(model))
    } == {}


def test_a_resolved_recipe_loads_again_as_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/demo.yaml")
    again = tmp_path / "again.yaml"
    again.write_text(recipe_yaml(recipe))
    assert load_recipe(again) == recipe != load_recipe(ROOT / "recipes/demo.yaml", ["prune.ratio=0.25"])


def test_numbers_are_read_as_written() -> None:
    recipe = load(
        ROOT / "recipes/demo.yaml",
        ["prune.ratio=1e-1", "observe.trace_bytes=20_000_000", "name=no", "model.revision='0123'"],
    )
    assert str(recipe.prune.ratio) == "0.1" and recipe.observe.trace_bytes == 20_000_000
    assert recipe.name == "no" and recipe.model.revision == "0123"  # YAML 1.1 would have made them false and 83


def test_children_merge_over_their_parent(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((ROOT / "recipes/demo.yaml").read_text())
    (tmp_path / "child.yaml").write_text(
        yaml.safe_dump(
            {
                "extends": "base.yaml",
                "name": "child",
                "prune": {"ratio": None, "keep_experts": 8},
                "quantize": {"group_size": None, "scheme": None},
                "calibration": {
                    "mix": [
                        {"name": "tools", "weight": 0.9},
                        {"name": "prose", "source": None},
                        {"name": "own", "source": "own.jsonl"},
                    ]
                },
            }
        )
    )
    recipe = load_recipe(tmp_path / "child.yaml")
    assert (
        recipe.quantize.group_size == 128 and recipe.quantize.scheme is None
    )  # back to the default; null is a value of its own
    assert recipe.prune.ratio is None and recipe.prune.keep_experts == 8
    assert [(entry.name, str(entry.weight)) for entry in recipe.calibration.mix] == [
        ("code", "0.3"),
        ("tools", "0.9"),
        ("math", "0.2"),
        ("own", "1"),
    ]


def test_a_parents_paths_start_from_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base" / "data").mkdir(parents=True)
    (tmp_path / "base" / "data" / "own.jsonl").write_text("{}")
    (tmp_path / "base" / "template.jinja").write_text("")
    base = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    base["calibration"] |= {"chat_template": "template.jinja"}
    base["calibration"]["mix"] += [{"name": "own", "source": "data/*.jsonl"}]
    (tmp_path / "base" / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "child.yaml").write_text("extends: base/base.yaml\nname: child\n")
    calibration = load_recipe(tmp_path / "child.yaml").calibration
    assert calibration.chat_template == "base/template.jinja" and calibration.mix[-1].source == "base/data/*.jsonl"
    assert calibration.mix[0].source == "builtin:code"


@pytest.mark.parametrize(
    ("field", "types"),
    [
        ("model.trust_remote_code", {"type": "boolean", "default": False}),
        ("calibration.samples", {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None}),
        ("calibration.packing", {"type": "string", "enum": ["none", "concat", "isolated"], "default": "concat"}),
        ("calibration.mix", {"type": "array", "items": {"$ref": "#/$defs/MixEntry"}, "minItems": 1}),
        ("calibration.mix.weight", {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, PERCENT], "default": 1}),
        (
            "prune.ratio",
            {"anyOf": [{"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, PERCENT]}, NULL]},
        ),
        ("evaluate.packs.confirm", {"default": 0.5}),
        ("prune.keep_experts", {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None}),
        ("prune.mtp", {"type": "string", "enum": ["auto", "observe", "drop"], "default": "auto"}),
        (
            "evaluate.gates",
            {
                "oneOf": [
                    {"type": "string", "enum": ["near-lossless", "strict", "size-first"]},
                    {"$ref": "#/$defs/GatesSpec"},
                ],
                "default": "near-lossless",
            },
        ),
    ],
)
def test_editors_get_types(field: str, types: dict) -> None:
    found = described(field)
    assert {key: found.get(key) for key in types} == types


def described(field: str) -> dict:
    """The committed schema's entry of a dotted field; of a list, of its entries."""
    schema = json.loads((ROOT / "recipe.schema.json").read_text())
    found = schema
    for name in field.split("."):
        reference = found.get("items", found).get("$ref", "").removeprefix("#/$defs/")
        found = (schema["$defs"][reference] if reference else found)["properties"][name]
    return found


def test_editors_refuse_unknown_fields() -> None:
    schema = recipe_schema(NAMES)
    assert schema["additionalProperties"] is False
    models = {name: model for name, model in schema["$defs"].items() if name not in NAMES}
    assert [name for name, model in models.items() if model.get("additionalProperties") is not False] == []

"""A checkpoint's own JSON is edited in place: what changes changes, every other byte stays."""

from __future__ import annotations

import json

import pytest

from reapkit.core.errors import UnusableError
from reapkit.pruning.config_edits import Counts, config_edits, edit_json, expert_renamer, renamed

HALF = Counts((8, 4), (2, 2))


def keep_name(name: str) -> str:
    return name


def edited(config: dict, counts: Counts = HALF) -> dict:
    return json.loads(edit_json(json.dumps(config), config_edits(config, counts, keep_name)))


def test_only_the_changed_value_is_rewritten():
    text = '{\n    "rms_norm_eps": 1e-06,\n    "num_experts" :8,\n  "x": [ 1,2 ],   "é": "\\u00e9"\n}\n\n'
    assert edit_json(text, {("num_experts",): 4}) == text.replace(":8", ":4")


def test_a_missing_key_is_added_in_the_manner_of_its_neighbours():
    assert edit_json('{\n  "a": 1\n}\n', {("b",): [2, 0]}) == '{\n  "a": 1,\n  "b": [2, 0]\n}\n'
    assert edit_json('{"a": {}}', {("a", "b"): 2}) == '{"a": {"b": 2}}'


def test_a_list_over_lines_stays_over_lines():
    text = '{\n  "q": {\n    "ignore": [\n      "a",\n      "b"\n    ]\n  }\n}'
    assert edit_json(text, {("q", "ignore"): ["a", "c"]}) == text.replace('"b"', '"c"')


@pytest.mark.parametrize("text", ["{}", "[]", '{"a": [1, {"b": null}], "c": "}]\\""}', ' {"a" : NaN } '])
def test_any_json_survives_an_empty_edit(text):
    assert edit_json(text, {}) == text


@pytest.mark.parametrize(
    "key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"]
)
def test_every_name_of_the_expert_count_is_edited_wherever_nested(key):
    config = {key: 8, "text_config": {key: 8, "n_shared_experts": 8, "hidden_size": 8}, "vision_config": {key: 8}}
    assert edited(config) == {
        key: 4,
        "text_config": {key: 4, "n_shared_experts": 8, "hidden_size": 8},
        "vision_config": {key: 8},
    }


def test_numbers_per_layer_change_where_they_counted_the_experts():
    assert edited({"num_experts": [1, 8, 8], "moe_topk": [1, 2, 2]}, Counts((8, 4), (2, 1))) == {
        "num_experts": [1, 4, 4],
        "moe_topk": [1, 1, 1],
    }


def test_top_k_changes_only_where_it_is_asked():
    config = {"num_experts": 8, "num_experts_per_tok": 2, "experts_per_group": 4}
    assert edited(config, Counts((8, 4), (2, 1), n_group=2)) == {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "experts_per_group": 2,
    }


def test_multi_token_prediction_is_switched_off():
    config = {
        "num_experts": 8,
        "num_nextn_predict_layers": 1,
        "use_mtp": True,
        "mtp_num_hidden_layers": 2,
        "mtp_layer_types": ["moe"],
        "mtp_loss_scaling": 0.1,
        "text_config": {"mtp_transformer_layers": 1},
        "mtp_config": {"num_layers": 2, "norm": True},
    }
    assert edited(config, Counts((8, 4), (2, 2), drop_mtp=True)) == {
        "num_experts": 4,
        "num_nextn_predict_layers": 0,
        "use_mtp": False,
        "mtp_num_hidden_layers": 0,
        "mtp_layer_types": ["moe"],
        "mtp_loss_scaling": 0.1,
        "text_config": {"mtp_transformer_layers": 0},
        "mtp_config": {"num_layers": 0, "norm": True},
    }
    assert edited(config) == {**config, "num_experts": 4}


def test_a_config_that_counts_no_experts_is_refused():
    with pytest.raises(UnusableError, match="no field with the value 8 counts the experts"):
        config_edits({"experts_in_disguise": 8}, HALF, keep_name)


PLACES = {3: {1: 0, 5: 1}}


def rename(name: str) -> str | None:
    return expert_renamer(
        lambda name, layer, expert: PLACES[layer].get(expert), lambda name: name.startswith("mtp."), "here"
    )(name)


def test_lists_that_name_experts_are_renumbered():
    section = {
        "ignore": [
            "lm_head",
            "model.layers.3.mlp.experts.5.up_proj",
            "model.layers.3.mlp.experts.2.up_proj",
            "mtp.fc",
            "re:.*mlp.experts.*",
        ],
        "bits": 4,
    }
    assert renamed(section, rename) == {
        ("ignore",): ["lm_head", "model.layers.3.mlp.experts.1.up_proj", "re:.*mlp.experts.*"]
    }


def test_mappings_by_module_are_renumbered_too():
    section = {
        "quantized_layers": {"model.layers.3.mlp.experts.1": {"bits": 8}, "model.layers.3.mlp.experts.4": {"bits": 4}}
    }
    assert renamed(section, rename) == {("quantized_layers",): {"model.layers.3.mlp.experts.0": {"bits": 8}}}


@pytest.mark.parametrize(
    "pattern", ["re:.*experts\\.3\\..*", "experts.3.up_proj", "model.layers.*.mlp.experts.3.up_proj"]
)
def test_a_pattern_with_expert_numbers_is_refused(pattern):
    with pytest.raises(UnusableError, match="names experts by number"):
        rename(pattern)

"""What a config says and what its shards hold agree, or the plan says where they do not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import ReapkitError, UnusableError
from reapkit.pipeline.planned import make_plan
from reapkit.recipe.loading import load
from tests.support import published_models
from tests.support.paths import ROOT
from tests.support.tiny import build, save_hub_layout


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL_DIRECTORY, tmp_path / "model"))


def say(model: Path, **fields: object) -> None:
    """Writes other fields into config.json; values of type str that begin with `=` stand there as they are."""
    config = json.loads((model / "config.json").read_text()) | fields
    text = json.dumps(config)
    for value in fields.values():
        if isinstance(value, str) and value.startswith("="):
            text = text.replace(json.dumps(value), value[1:])
    (model / "config.json").write_text(text)


def plan(model: Path, *overrides: str) -> None:
    """The plan with all its costs."""
    made = make_plan(load(ROOT / "recipes/demo.yaml", [f"model.source={model}", *overrides]))
    assert made.estimates and made.base and made.notes is not None


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("num_hidden_layers", 3, r"says num_hidden_layers 3, but there are tensors of layer 3, which is no"),
        ("num_hidden_layers", 5, "says num_hidden_layers 5, but no tensor of layer 4 is there"),
        ("num_hidden_layers", 10**9, "but no tensor of layer 4 is there"),
        ("num_experts", 31, "holds 32 experts where config.json says 31"),
        ("num_experts", 10**9, "holds 32 experts where config.json says 1000000000"),
        ("num_experts_per_tok", 33, "each token is routed to 33 of 32 experts"),
        ("num_experts_per_tok", 0, "each token is routed to 0 of 32 experts"),
        ("hidden_size", 64, r"says hidden_size 64, but tensor model.embed_tokens.weight has shape \[2048, 128\]"),
        ("moe_intermediate_size", 32, r"says moe_intermediate_size 32, but tensor .*down_proj.* has shape"),
        ("vocab_size", 2000, r"says vocab_size 2000, but tensor model.embed_tokens.weight has shape \[2048, 128\]"),
    ],
)
def test_a_config_that_contradicts_its_headers_is_refused_in_the_plan(model, field, value, found):
    say(model, **{field: value})
    begin = time.process_time()
    with pytest.raises(UnusableError, match=found) as raised:
        plan(model)
    assert raised.value.exit_code == 3 and time.process_time() - begin < 5


@pytest.mark.parametrize("name", published_models.NAMES)
def test_published_configs_agree_with_their_headers(name, tmp_path):
    assert Checkpoint.open(published_models.write(name, tmp_path / name)).layout.layers


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_vl_moe"])
@pytest.mark.parametrize("layers", [-1, 1])
def test_every_way_of_naming_layers_is_counted(model_type, layers, tmp_path):
    path = save_hub_layout(build(model_type), tmp_path / "model")
    assert Checkpoint.open(path).layout.layers
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = len(text.get("layers_block_type") or "...") + layers
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnusableError, match=r"says num_hidden_layers .*, but (there are|no) tensors? of layer"):
        _ = Checkpoint.open(path).layout


def test_as_many_prediction_blocks_as_declared_lie_behind_the_decoder(tmp_path):
    path = save_hub_layout(build("deepseek_v3"), tmp_path / "model", mtp=1)
    assert list(Checkpoint.open(path).layout.mtp) == [3]
    say(path, num_hidden_layers=2)
    with pytest.raises(UnusableError, match="num_hidden_layers 2, but there are tensors of layer 2, which is no"):
        _ = Checkpoint.open(path).layout
    say(path, num_hidden_layers=4)
    with pytest.raises(UnusableError, match="layer 3 is a multi-token-prediction block"):
        _ = Checkpoint.open(path).layout


ABSURD = [
    "=NaN",
    "=Infinity",
    "=-Infinity",
    f"={'9' * 5000}",
    f"={'9' * 30}",
    "=1e999",
    -1,
    2**40,
    1.5,
    "4",
    True,
    [],
    [-1],
    ["x"],
    {},
    {"a": 1},
    None,
]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ((), 0),
        *(
            pytest.param(overrides, part, marks=pytest.mark.long)
            for overrides, part in (((), 1), ((), 2), *((("quantize.scheme=W4A16",), part) for part in range(3)))
        ),
    ],
)
def test_absurd_values_of_any_field_of_a_config_are_refused_or_harmless(model, overrides, part):
    """Whatever stands in a field, the plan is made or says what is wrong with the file; it never ends in a defect."""
    original, refused = (model / "config.json").read_text(), 0
    fields = [
        *json.loads(original),
        "n_group",
        "topk_group",
        "num_nextn_predict_layers",
        "quantization_config",
        "text_config",
    ]
    for field, value in [(field, value) for field in fields for value in ABSURD][part::3]:
        (model / "config.json").write_text(original)
        say(model, **{field: value})
        begin = time.process_time()
        try:
            plan(model, *overrides)
        except ReapkitError as error:
            assert error.exit_code in (2, 3)
            refused += 1
        assert time.process_time() - begin < 5, (field, value)
    assert refused > 20


def test_infinity_may_stand_where_models_are_published_with_it(model):
    say(model, time_step_limit=[0.0, "=Infinity"])
    (model / "config.json").write_text((model / "config.json").read_text().replace('"=Infinity"', "Infinity"))
    plan(model)

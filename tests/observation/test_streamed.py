"""Streaming against resident: equal bit for bit, killed or not, in waves or spooled to disk."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reapkit.core.errors import UnusableError
from reapkit.core.progress import Progress
from reapkit.model.loading import load_model
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.killed_observations import KILLED_STREAMED
from tests.support.observations import assert_equal
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

pytestmark = pytest.mark.usefixtures("layer_blocks")


def prepared(model_type: str, tmp_path: Path):
    with tiny.quiet():
        path = tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model")
        resident = load_model(path)
    tokens = tiny_tokens(tmp_path / "calibration")
    return path, tokens, observe(resident, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident")


@pytest.mark.parametrize("model_type", list(tiny.ARCHITECTURES))
def test_streaming_equals_resident_bit_for_bit(model_type: str, tmp_path: Path):
    path, tokens, expected = prepared(model_type, tmp_path)
    got = observe_streaming(
        path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "streaming", checkpoint_minutes=0
    )
    assert_equal(got, expected)
    assert not list((tmp_path / "streaming").rglob("*inputs*")), "hidden states are gone when they are no longer needed"


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_quantized_checkpoints_are_dequantized_layer_by_layer(scheme: str, tmp_path: Path):
    with tiny.quiet():
        if scheme == "fp8":
            model = tiny.build("deepseek_v3", hidden_size=256, moe_intermediate_size=128)
            path = tiny.as_block_fp8(tiny.save_hub_layout(model, tmp_path / "model"))
        else:
            model = tiny.build("gpt_oss", intermediate_size=64)
            path = tiny.as_mxfp4(tiny.save_hub_layout(model, tmp_path / "model"))
        resident = load_model(path)
    tokens = tiny_tokens(tmp_path / "calibration")
    expected = observe(resident, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident")
    got = observe_streaming(path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "streaming")
    assert expected.statistics["gate_norm_sum"].sum() > 0
    assert_equal(got, expected)


def test_layers_that_leave_more_behind_than_their_output_start_again(tmp_path: Path):
    """gemma's last layers read keys and values of earlier ones: a checkpoint of hidden states is not enough, and that
    is noticed.
    """
    kinds = ["sliding_attention", "full_attention"] * 2
    with tiny.quiet():
        path = tiny.save_hub_layout(
            tiny.build("gemma4_text", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds),
            tmp_path / "model",
        )
        resident = load_model(path)
    tokens = tiny_tokens(tmp_path / "calibration")
    expected = observe(resident, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident")
    script = KILLED_STREAMED.format(
        root=str(ROOT),
        layers=3,
        minutes=0,
        calibration=str(tmp_path / "calibration"),
        work=str(tmp_path / "work"),
        model=str(path),
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    layers = []
    got = observe_streaming(
        path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", progress=Noting(layers)
    )
    assert layers[0] == "layer 0"
    assert_equal(got, expected)


@pytest.mark.parametrize("budget", ["waves", "disk"])
def test_hidden_states_beyond_the_budget(budget: str, tmp_path: Path):
    path, tokens, expected = prepared("qwen3_moe", tmp_path)
    spool = {"hidden_bytes": 2 * 48 * 64 * 4, "offload_directory": tmp_path / "spool" if budget == "disk" else None}
    got = observe_streaming(
        path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "streaming", **spool
    )
    assert_equal(got, expected)
    if budget == "waves":
        assert len(list((tmp_path / "streaming").rglob("wave-*/done"))) > 1
    else:
        assert not list((tmp_path / "spool").iterdir())


@pytest.mark.parametrize(
    ("model_type", "minutes"),
    [
        ("qwen3_moe", 0),
        ("qwen3_moe", 10),
        ("glm4_moe", 0),
        *(pytest.param(name, 0, marks=pytest.mark.long) for name in ("qwen3_next", "nemotron_h")),
    ],
)
def test_killed_between_layers_it_continues_to_the_same_observation(model_type: str, minutes: int, tmp_path: Path):
    path, tokens, expected = prepared(model_type, tmp_path)
    script = KILLED_STREAMED.format(
        root=str(ROOT),
        layers=2,
        minutes=minutes,
        calibration=str(tmp_path / "calibration"),
        work=str(tmp_path / "work"),
        model=str(path),
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert len(list((tmp_path / "work").rglob("wave-*/inputs-*/facts.json"))) == (minutes == 0)
    layers = []
    got = observe_streaming(
        path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", progress=Noting(layers)
    )
    assert_equal(got, expected)
    assert layers[0] == ("layer 2" if minutes == 0 else "layer 0")


class Noting(Progress):
    """Keeps the names of the layers that are computed."""

    def __init__(self, notes: list[str]):
        self.notes = notes

    @contextlib.contextmanager
    def task(self, *args, **kwargs):
        yield self

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, units: float = 1) -> None:
        pass


def test_a_missing_tensor_is_named(tmp_path: Path):
    path, tokens, _ = prepared("qwen3_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.gate.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnusableError,
        match=r"1 tensors that Qwen3MoeForCausalLM needs are missing, such as model\.layers\.1\.mlp\.gate\.weight",
    ):
        observe_streaming(path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work")

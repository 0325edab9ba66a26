"""On a CUDA device: the same sums as a naive loop, the same bytes twice, and the same however the model is placed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import kernels_on, observed_forward
from reapkit.model.loading import load_model
from reapkit.model.routed_experts import find_experts
from reapkit.observation.observation import MAXIMA, SUMS, Observation
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.killed_observations import KILLED_RESIDENT
from tests.support.naive_statistics import DISPATCHED, QUICK, naive
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def saved(observation: Observation, path: Path) -> bytes:
    observation.save(path)
    return b"".join(file.read_bytes() for file in sorted(path.iterdir()))


def checkpoint(model_type: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    with tiny.quiet():
        return tiny.save_hub_layout(tiny.build(model_type, dtype=dtype), path)


def assert_close(found: Observation, expected: Observation, rtol: float) -> None:
    assert np.array_equal(found.statistics["count"], expected.statistics["count"])
    assert np.array_equal(found.coactivation, expected.coactivation)
    for name in SUMS:
        assert np.allclose(found.statistics[name], expected.statistics[name], rtol=rtol), name


@pytest.mark.parametrize("model_type", DISPATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sums_equal_a_naive_double_loop(model_type: str, dtype: torch.dtype, tmp_path: Path):
    """The loop calls each expert alone: its kernels add in another order than the grouped ones, which bfloat16 shows in
    its last bits."""
    model = tiny.build(model_type, dtype=dtype).cuda()
    tokens = tiny_tokens(tmp_path / "calibration", **QUICK)
    observation = observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=24, work_directory=tmp_path / "work")
    sums, maxima, coactivation = naive(model, tokens, 24)
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    assert np.array_equal(observation.statistics["count"], sums["count"])
    assert np.array_equal(observation.coactivation, coactivation)
    for name in SUMS:
        assert np.allclose(observation.statistics[name], sums[name], rtol=rtol, atol=1e-6), name
    for name in MAXIMA:
        assert np.allclose(observation.maxima[name], maxima[name], rtol=rtol, atol=1e-6), name


@pytest.mark.parametrize("model_type", DISPATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_watching_does_not_change_the_model(model_type: str, dtype: torch.dtype):
    model, ids = tiny.build(model_type, dtype=dtype).cuda(), torch.randint(3, 250, (2, 19)).cuda()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with intercepted(
            find_experts(model),
            lambda site, hidden, index, gates, inner: observed_forward(site, hidden, index, gates)[0],
        ):
            watched = model(ids, use_cache=False).logits
    assert kernels_on(model.device) == "grouped_mm"
    assert (watched - before).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_give_the_same_bytes(dtype: torch.dtype, tmp_path: Path):
    """Thousands of pairs per expert, so that anything that adds in the order of arrival would show."""
    model = tiny.build("qwen3_moe", dtype=dtype).cuda()
    tokens = tiny_tokens(tmp_path / "calibration", lengths=(900, 3000, 50, 2000), groups=2)
    first, second = (
        saved(
            observe(model, tokens, ObserveSpec(), batch_tokens=4000, work_directory=tmp_path / name),
            tmp_path / f"{name}-saved",
        )
        for name in ("first", "second")
    )
    assert first == second


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text"])
def test_streaming_equals_resident(model_type: str, tmp_path: Path):
    path, tokens = checkpoint(model_type, tmp_path / "model"), tiny_tokens(tmp_path / "calibration")
    resident = observe(
        load_model(path, device="cuda"), tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident"
    )
    streaming = observe_streaming(
        path,
        tokens,
        ObserveSpec(),
        batch_tokens=48,
        work_directory=tmp_path / "streaming",
        device="cuda",
        checkpoint_minutes=0,
    )
    assert_close(streaming, resident, rtol=1e-5)


def test_gpu_and_cpu_see_the_same_routing(tmp_path: Path):
    path, tokens = checkpoint("qwen3_moe", tmp_path / "model"), tiny_tokens(tmp_path / "calibration")
    gpu, cpu = (
        observe(
            load_model(path, device=device), tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / device
        )
        for device in ("cuda", "cpu")
    )
    assert_close(gpu, cpu, rtol=1e-3)
    assert np.allclose(gpu.eaft.p, cpu.eaft.p, rtol=1e-3)


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path):
    tokens = tiny_tokens(tmp_path / "calibration")
    script = KILLED_RESIDENT.replace('tiny.build("qwen3_moe")', 'tiny.build("qwen3_moe").cuda()').format(
        root=str(ROOT), steps=5, calibration=str(tmp_path / "calibration"), work=str(tmp_path / "killed")
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert list((tmp_path / "killed").rglob("group-*.safetensors"))
    tokens, model = CalibrationTokens.load(tmp_path / "calibration"), tiny.build("qwen3_moe").cuda()
    killed, undisturbed = (
        saved(
            observe(model, tokens, ObserveSpec(), batch_tokens=24, work_directory=tmp_path / name),
            tmp_path / f"{name}-saved",
        )
        for name in ("killed", "undisturbed")
    )
    assert killed == undisturbed

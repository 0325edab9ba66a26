"""The statistics against a naive double loop over what the model handed to its experts."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from reapkit.core.errors import UnusableError
from reapkit.model.routed_experts import find_experts
from reapkit.observation.observation import MAXIMA, SUMS
from reapkit.observation.resident import observe
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.killed_observations import KILLED_RESIDENT
from tests.support.naive_statistics import DISPATCHED, QUICK, naive
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", DISPATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sums_equal_a_naive_double_loop(model_type: str, dtype: torch.dtype, tmp_path: Path):
    model = tiny.build(model_type, dtype=dtype)
    tokens = tiny_tokens(tmp_path / "calibration", **QUICK)
    model.set_experts_implementation("eager")
    sums, maxima, coactivation = naive(model, tokens, 24)
    observation = observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=24, work_directory=tmp_path / "work")
    for name in SUMS:  # what experts put out is added up in another order, which the layer's output shows in bfloat16
        rtol = 2e-3 if (name, dtype) == ("relative_sq_sum", torch.bfloat16) else 1e-6
        assert np.allclose(observation.statistics[name], sums[name], rtol=rtol, atol=1e-7), name
    for name in MAXIMA:
        assert np.allclose(observation.maxima[name], maxima[name], rtol=1e-6), name
    assert np.array_equal(observation.coactivation, coactivation)
    assert np.array_equal(observation.coactivation.diagonal(axis1=-2, axis2=-1), observation.statistics["count"])
    assert observation.tokens.tolist() == [13, 17]


def test_llama4_counts_what_each_pair_adds(tmp_path: Path):
    """Its gate scales the input, so gate times norm is the norm of f(g·x), which is what reaches the output."""
    model = tiny.build("llama4_text", num_experts_per_tok=2)
    tokens = tiny_tokens(tmp_path / "calibration", **QUICK, score="all")
    observation = observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=1, work_directory=tmp_path / "work")
    expected = torch.zeros(3, 2, 16, dtype=torch.float64)
    for row in range(tokens.num_rows):
        inputs = {}
        hooks = [
            layer.feed_forward.register_forward_pre_hook(
                lambda module, args, i=i, inputs=inputs: inputs.__setitem__(i, (module, args[0]))
            )
            for i, layer in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(tokens.row(row).input_ids[None], use_cache=False)
            for layer, (block, hidden) in inputs.items():
                scores, _ = block.router(hidden.reshape(-1, hidden.shape[-1]))
                for x, score in zip(hidden.reshape(-1, hidden.shape[-1]), scores, strict=True):
                    for e in score.nonzero()[:, 0].tolist():
                        gate, up = ((x * score[e]) @ block.experts.gate_up_proj[e]).chunk(2)
                        f = (up * torch.nn.functional.silu(gate)) @ block.experts.down_proj[e]
                        expected[layer, tokens.row_source[row], e] += f.double().norm()
        for hook in hooks:
            hook.remove()
    assert np.allclose(observation.statistics["gate_norm_sum"], expected, rtol=1e-5)
    assert observation.statistics["count"].sum((1, 2)).tolist() == [60, 60, 60]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gemma4_text", "granitemoe", "llama4_text"])
def test_trace_holds_every_signal_in_row_order(model_type: str, tmp_path: Path):
    model = tiny.build(model_type)
    tokens = tiny_tokens(tmp_path / "calibration")
    observation = observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work")
    trace, at = observation.eaft, 0
    sums = np.zeros_like(observation.statistics["gate_norm_sum"])
    for number in range(tokens.num_rows):
        row = tokens.row(number)
        with torch.no_grad():
            logits = model(row.input_ids[None], use_cache=False).logits[0].double()
        for t in row.signal.nonzero()[:, 0].tolist():
            probability = logits[t].softmax(0)[row.input_ids[t + 1]]
            top = logits[t].sort(descending=True).values[:20].softmax(0)
            assert trace.source[at] == tokens.row_source[number]
            assert float(trace.p[at]) == pytest.approx(float(probability), rel=1e-4)
            assert float(trace.h[at]) == pytest.approx(float(-(top * top.log()).sum() / math.log(20)), rel=1e-4)
            for layer, index in enumerate(observation.layers):
                expert, gate_norm = trace.routed(index)
                np.add.at(sums[layer, trace.source[at]], expert[at], gate_norm[at])
            at += 1
    assert at == len(trace)
    assert np.allclose(sums, observation.statistics["gate_norm_sum"], rtol=1e-6), (
        "here every scored position has a signal"
    )


def test_padding_and_batching_do_not_change_what_is_counted(tmp_path: Path):
    model = tiny.build("glm4_moe")
    tokens = tiny_tokens(tmp_path / "calibration", score="all")
    alone, together = (
        observe(model, tokens, ObserveSpec(), batch_tokens=size, work_directory=tmp_path / str(size))
        for size in (1, 96)
    )
    assert np.array_equal(alone.statistics["count"], together.statistics["count"])
    assert alone.statistics["count"].sum((1, 2)).tolist() == [4 * 130, 4 * 130]
    assert np.allclose(alone.statistics["gate_norm_sum"], together.statistics["gate_norm_sum"], rtol=1e-5)
    assert np.allclose(alone.eaft.p, together.eaft.p, rtol=1e-4)


def test_snapshots_are_the_sums_of_the_first_groups(tmp_path: Path):
    model = tiny.build("qwen3_moe")
    tokens = tiny_tokens(tmp_path / "calibration", groups=8)
    observation = observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=24, work_directory=tmp_path / "work")
    assert tokens.snapshots == (0, 1, 2, 4)
    tokens.groups = tokens.groups[:4]
    half = observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=24, work_directory=tmp_path / "half")
    for name in ("count", "gate_norm_sum"):
        assert np.array_equal(observation.snapshots[name][3], half.statistics[name])
        assert not observation.snapshots[name][0].any()


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path):
    model = tiny.build("qwen3_moe")
    tokens = tiny_tokens(tmp_path / "calibration")

    def run(work: str) -> bytes:
        observe(model, tokens, ObserveSpec(), batch_tokens=24, work_directory=tmp_path / work).save(
            tmp_path / f"{work}-saved"
        )
        return b"".join(file.read_bytes() for file in sorted((tmp_path / f"{work}-saved").iterdir()))

    script = KILLED_RESIDENT.format(
        root=str(ROOT), steps=5, calibration=str(tmp_path / "calibration"), work=str(tmp_path / "killed")
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    finished = list((tmp_path / "killed").rglob("group-*.safetensors"))
    assert 0 < len(finished) < len(tokens.groups)
    assert run("killed") == run("undisturbed")


def test_nan_names_layer_and_expert(tmp_path: Path):
    model = tiny.build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 0, 0] = torch.nan
    tokens = tiny_tokens(tmp_path / "calibration")
    with pytest.raises(
        UnusableError,
        match=(
            r"observe: found NaN or infinity in layer 1, expert 5 \(1 of 16 experts of this layer\), computed in"
            r" float32"
        ),
    ):
        observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work")


def test_nan_behind_sound_experts_names_the_layer(tmp_path: Path):
    model = tiny.build("glm4_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.shared_experts.down_proj.weight[0, 0] = torch.nan
    tokens = tiny_tokens(tmp_path / "calibration")
    with pytest.raises(UnusableError, match=r"found NaN or infinity in what layer 2 passes on, computed in float32"):
        observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=48, work_directory=tmp_path / "work")


def test_layers_that_do_not_run_as_modules_are_refused(tmp_path: Path):
    model = tiny.build("qwen3_moe")
    layer = model.model.layers[1]
    without_hooks = {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    layer.__class__ = type("Unhooked", (type(layer),), without_hooks)
    tokens = tiny_tokens(tmp_path / "calibration")
    with pytest.raises(UnusableError, match=r"layer 1 called its experts, but its own output was never seen"):
        observe(model, tokens, ObserveSpec(eaft=False), batch_tokens=48, work_directory=tmp_path / "work")


def test_a_model_without_observable_experts_is_refused():
    config = transformers.AutoConfig.for_model("llama", **tiny.COMMON)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnusableError, match=r"model_type 'llama' hides its experts .* Known to work: .*qwen3_moe"):
        find_experts(model)


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = tiny.build("qwen3_moe")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        observe(
            model,
            tiny_tokens(tmp_path / "calibration"),
            ObserveSpec(),
            batch_tokens=48,
            work_directory=tmp_path / "work",
        )
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert model.config._experts_implementation == "grouped_mm"

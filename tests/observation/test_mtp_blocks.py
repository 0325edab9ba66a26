"""Multi-token-prediction blocks: their sums against loops over what transformers' own blocks hand to their experts, row
by row."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.errors import UnusableError
from reapkit.model.loading import final_hidden, load_model
from reapkit.model.routed_experts import find_experts
from reapkit.model.streaming.layers import LayeredModel
from reapkit.observation.mtp_blocks import MtpBlocks, Slots
from reapkit.observation.observation import MAXIMA, SUMS, Observation
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.killed_observations import KILLED_STREAMED
from tests.support.naive_statistics import expert_outputs
from tests.support.observations import assert_equal
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

torch.set_num_threads(1)
DEPTH = 3  # decoder layers of the tiny models


def saved(model_type: str, tmp_path: Path, mtp: int = 1, **how) -> Path:
    with tiny.quiet():
        return tiny.save_hub_layout(tiny.build(model_type, **how), tmp_path / "model", mtp=mtp)


def transformers_blocks(model) -> MtpModel:
    """As transformers loads them, told the tiny checkpoint's layer numbers."""
    count = model.config.num_mtp_layers
    model._keys_to_ignore_on_load_unexpected = [rf"\.layers\.{DEPTH + number}\." for number in range(count)]
    with tiny.quiet():
        return MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()


@torch.no_grad()
def drafted(model, blocks: MtpModel, ids: torch.Tensor) -> list[tuple]:
    """(site, hidden, index, gates, norms of what the block's decoder layer puts out) of every block while transformers
    drafts behind one row [1, tokens]; a deeper block's last position reads a drafted token.
    """
    calls, sites, hooks = [], find_experts(blocks), []
    for site, block in zip(sites, blocks.layers, strict=True):

        def call(*args, site=site, forward=site.module.forward, **kwargs):
            calls.append((site, *args, *kwargs.values()))
            return forward(*args, **kwargs)

        def behind(layer, args, output):
            calls[-1] += ((output if isinstance(output, torch.Tensor) else output[0])[0].double().norm(dim=1),)

        site.module.forward = call
        hooks.append(block.mtp_block.register_forward_hook(behind))
    length = ids.shape[1]
    positions = torch.arange(1, length)[None]
    blocks(
        ids[:, 1:],
        final_hidden(model, ids)[:, :-1],
        torch.ones(1, length - 1),
        positions,
        MtpCache(config=model.config.get_mtp_config()),
    )
    for site, hook in zip(sites, hooks, strict=True):
        del site.module.forward
        hook.remove()
    return calls


@torch.no_grad()
def naive(
    model, tokens: CalibrationTokens
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor, list[dict]]:
    """Sums and maxima [blocks, S, E], coactivation [blocks, S, E, E], and by block {(row, position): (experts, g·n)},
    in plain loops."""
    blocks = transformers_blocks(model)
    count, experts = model.config.num_mtp_layers, model.config.n_routed_experts
    shape = (count, len(tokens.sources), experts)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in SUMS}
    maxima = {name: torch.zeros(shape, dtype=torch.float64) for name in MAXIMA}
    together = torch.zeros(*shape, experts, dtype=torch.int64)
    routed: list[dict] = [{} for _ in range(count)]
    for number in range(tokens.num_rows):
        row, s = tokens.row(number), int(tokens.row_source[number])
        if len(row.input_ids) < 2:
            continue
        for block, (site, hidden, index, gates, residual) in enumerate(drafted(model, blocks, row.input_ids[None])):
            outputs = expert_outputs(site, hidden, index)
            for slot in range(len(row.input_ids) - 1 - block):
                position, chosen = slot + 1 + block, index[slot].tolist()
                scored = bool(row.scored[position])
                norms = [math.sqrt(float((outputs[e][slot] ** 2).sum())) for e in chosen]
                routed[block][number, position] = (chosen, [float(gates[slot, i]) * n for i, n in enumerate(norms)])
                for i, e in enumerate(chosen):
                    g, n, peak = float(gates[slot, i]), norms[i], float(outputs[e][slot].abs().max())
                    for name, value in zip(MAXIMA[:3], (n, g * n, peak), strict=True):
                        for key in (name, name + "_scored") if scored else (name,):
                            maxima[key][block, s, e] = max(maxima[key][block, s, e], value)
                    if scored:
                        values = (1, g, n, g * n, (g * n) ** 2, (g * n / float(residual[slot])) ** 2)
                        for name, value in zip(SUMS, values, strict=True):
                            sums[name][block, s, e] += value
                        together[block, s, e, chosen] += 1
    return sums, maxima, together, routed


@pytest.mark.parametrize(
    ("model_type", "blocks", "score"),
    [("glm4_moe", 1, "completion"), ("deepseek_v3", 1, "all"), ("deepseek_v3", 2, "completion")],
)
def test_sums_equal_loops_over_what_transformers_blocks_call(model_type: str, blocks: int, score: str, tmp_path: Path):
    model = load_model(saved(model_type, tmp_path, blocks))
    tokens = tiny_tokens(tmp_path / "calibration", score=score)
    layers = tuple(range(DEPTH, DEPTH + blocks))
    got = observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", mtp=layers)
    sums, maxima, together, routed = naive(model, tokens)
    assert got.layers[-blocks:] == layers and sums["count"].sum() > 0
    for name in SUMS:
        assert np.allclose(got.statistics[name][-blocks:], sums[name], rtol=1e-5, atol=1e-9), name
    for name in MAXIMA:
        assert np.allclose(got.maxima[name][-blocks:], maxima[name], rtol=1e-5, atol=1e-9), name
    assert np.array_equal(got.coactivation[-blocks:], together)
    signals = [
        (number, at)
        for group in tokens.groups
        for number in group
        for at in tokens.row(number).signal.nonzero()[:, 0].tolist()
    ]
    for block, layer in enumerate(layers):
        expert, mass = got.eaft.routed(layer)
        assert len(expert) == len(signals) and (expert < 0).any()
        for line, where in enumerate(signals):
            chosen, masses = routed[block].get(where, ([-1] * expert.shape[1], [0.0] * expert.shape[1]))
            assert dict(zip(expert[line].tolist(), mass[line].tolist(), strict=True)) == pytest.approx(
                dict(zip(chosen, masses, strict=True)), rel=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "blocks"), [("glm4_moe", 1), ("deepseek_v3", 2)])
def test_streaming_equals_resident_and_the_decoder_does_not_notice(
    model_type: str, blocks: int, dtype: torch.dtype, tmp_path: Path
):
    path = saved(model_type, tmp_path, blocks, dtype=dtype)
    model, tokens = load_model(path), tiny_tokens(tmp_path / "calibration")
    layers, spec = tuple(range(DEPTH, DEPTH + blocks)), ObserveSpec(reroute_tokens=40)
    resident = observe(model, tokens, spec, batch_tokens=48, work_directory=tmp_path / "resident", mtp=layers)
    assert_equal(
        observe_streaming(path, tokens, spec, batch_tokens=48, work_directory=tmp_path / "streaming", mtp=layers),
        resident,
    )
    alone = observe(model, tokens, spec, batch_tokens=48, work_directory=tmp_path / "alone")
    assert resident.layers == (*alone.layers, *layers)
    assert all(np.array_equal(resident.statistics[name][:-blocks], alone.statistics[name]) for name in SUMS)
    assert np.array_equal(resident.reroute.order[:-blocks], alone.reroute.order)
    assert resident.reroute.measured.tolist() == [True] * len(alone.layers) + [False] * blocks
    assert model.__dict__["_keys_to_ignore_on_load_unexpected"] != [r"\.layers\.3\."], "the class is left as it was"


def test_block_fp8_is_dequantized_in_both_placements(tmp_path: Path):
    path = saved("deepseek_v3", tmp_path, hidden_size=256, moe_intermediate_size=128)
    (path / "model.safetensors.index.json").unlink()
    _joined(path)
    with tiny.quiet():
        model = load_model(tiny.as_block_fp8(path))
    tokens = tiny_tokens(tmp_path / "calibration")
    resident = observe(
        model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "resident", mtp=(DEPTH,)
    )
    assert resident.statistics["gate_norm_sum"][-1].sum() > 0
    stored, name = load_file(path / "model.safetensors"), f"model.layers.{DEPTH}.mlp.experts.3.down_proj.weight"
    plain = stored[name].float() * stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    block = MtpBlocks(model, (DEPTH,), model.device).model.layers[0].get_submodule("mtp_block")
    assert torch.equal(block.mlp.experts.down_proj[3], plain), "the block's scales are multiplied in"
    assert_equal(
        observe_streaming(
            path, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "streaming", mtp=(DEPTH,)
        ),
        resident,
    )


def _joined(path: Path) -> None:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_table_holds_what_the_trace_says_beside_positions_without_a_block(tmp_path: Path):
    path = saved("glm4_moe", tmp_path)
    model, tokens = load_model(path), tiny_tokens(tmp_path / "calibration", score="all")
    exact = observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "trace", mtp=(DEPTH,))
    spec = ObserveSpec(trace_bytes=0)
    table = observe(model, tokens, spec, batch_tokens=48, work_directory=tmp_path / "table", mtp=(DEPTH,)).eaft
    streamed = observe_streaming(
        path, tokens, spec, batch_tokens=48, work_directory=tmp_path / "streaming", mtp=(DEPTH,)
    ).eaft
    expert, mass = exact.eaft.routed(DEPTH)
    assert (
        np.array_equal(table.count[-1].sum((0, 1, 2)), np.bincount(expert[expert >= 0], minlength=16))
        and (expert < 0).any()
    )
    assert math.isclose(table.gate_norm_sum[-1].sum(), mass.astype(np.float64).sum(), rel_tol=1e-6)
    assert np.array_equal(streamed.count.sum((1, 2, 3)), table.count.sum((1, 2, 3)))


@torch.no_grad()
def test_isolated_samples_share_no_block_and_count_as_rows_of_their_own(tmp_path: Path):
    packed = tiny_tokens(tmp_path / "packed", score="all")
    packed.packing = "isolated"
    batch = next(iter(batches(packed, range(packed.num_rows), 10**6)))
    slots = Slots.of(batch, 1)
    filled = slots.positions.valid.view(slots.at.shape)
    assert (
        torch.equal(slots.position_ids[filled], batch.position_ids.gather(1, slots.at)[filled])
        and (slots.position_ids[filled] > 0).all()
    )
    starts = int((batch.valid & (batch.position_ids == 0)).sum())
    assert int(filled.sum()) == int(batch.valid.sum()) - starts and starts > len(batch.rows)
    model = load_model(saved("glm4_moe", tmp_path))
    got = observe(model, packed, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", mtp=(DEPTH,))
    solo = torch.zeros(2, 16, dtype=torch.float64)
    blocks = transformers_blocks(model)
    for number in range(packed.num_rows):
        row = packed.row(number)
        for sample in row.sample.unique().tolist():
            ids = row.input_ids[row.sample == sample][None]
            if ids.shape[1] > 1:
                ((site, hidden, index, gates, _),) = drafted(model, blocks, ids)
                outputs = expert_outputs(site, hidden, index)
                for slot in range(len(index)):
                    for i, e in enumerate(index[slot].tolist()):
                        solo[int(packed.row_source[number]), e] += float(gates[slot, i]) * math.sqrt(
                            float((outputs[e][slot] ** 2).sum())
                        )
    assert np.allclose(got.statistics["gate_norm_sum"][-1], solo, rtol=1e-5, atol=1e-9)


def test_rows_of_one_token_call_no_block(tmp_path: Path):
    model = load_model(saved("glm4_moe", tmp_path))
    tokens = tiny_tokens(tmp_path / "calibration", lengths=(1, 1, 1, 1), score="all")
    got = observe(model, tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", mtp=(DEPTH,))
    assert got.statistics["count"][:-1].sum() > 0 and got.statistics["count"][-1].sum() == 0


def bytes_of(observation: Observation, directory: Path) -> dict[str, bytes]:
    observation.save(directory)
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_resident_killed_and_run_again_gives_the_same_bytes(tmp_path: Path):
    path, tokens = saved("deepseek_v3", tmp_path), tiny_tokens(tmp_path / "calibration")
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.model.loading import load_model
from reapkit.observation.group_sums import Partials
from reapkit.observation.resident import observe
from reapkit.recipe.schema import ObserveSpec
write = Partials.write
def fatal(self, group, tensors):
    write(self, group, tensors)
    if group == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Partials.write = fatal
tokens = CalibrationTokens.load({str(tmp_path / "calibration")!r})
observe(load_model({str(path)!r}), tokens, ObserveSpec(), batch_tokens=48,
        work_directory=Path({str(tmp_path / "work")!r}), mtp=(3,))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert len(list((tmp_path / "work").rglob("group-*.safetensors"))) == 2
    whole = observe(
        load_model(path), tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "whole", mtp=(3,)
    )
    resumed = observe(
        load_model(path), tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", mtp=(3,)
    )
    assert bytes_of(resumed, tmp_path / "a") == bytes_of(whole, tmp_path / "b")


def test_streaming_killed_before_the_last_layer_gives_the_same_bytes(tmp_path: Path):
    path, tokens = saved("glm4_moe", tmp_path), tiny_tokens(tmp_path / "calibration")
    root = ROOT
    script = KILLED_STREAMED.format(
        tests=str(root / "tests"),
        root=str(root),
        layers=2,
        minutes=0,
        calibration=str(tmp_path / "calibration"),
        work=str(tmp_path / "work"),
        model=str(path),
    ).replace("progress=Fatal()", "progress=Fatal(), mtp=(3,)")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert list((tmp_path / "work").rglob("wave-*/inputs-*/facts.json"))
    how = {"batch_tokens": 48, "mtp": (3,)}
    resumed = observe_streaming(path, tokens, ObserveSpec(), work_directory=tmp_path / "work", **how)
    whole = observe_streaming(path, tokens, ObserveSpec(), work_directory=tmp_path / "whole", **how)
    assert bytes_of(resumed, tmp_path / "a") == bytes_of(whole, tmp_path / "b")


def test_what_the_model_keeps_in_float32_is_not_rounded_in_the_block(tmp_path: Path):
    path = saved("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    tensors = load_file(path / "model-mtp.safetensors")
    bias = tensors["model.layers.3.mlp.gate.e_score_correction_bias"] = 8 + 0.01 * torch.rand(
        16
    )  # bfloat16 would make them all alike
    save_file(tensors, path / "model-mtp.safetensors", metadata={"format": "pt"})
    model = load_model(path)
    for one in (MtpBlocks(model, (3,), model.device), MtpBlocks(LayeredModel(path).as_source(), (3,), model.device)):
        assert torch.equal(one.sites[0].block.gate.e_score_correction_bias, bias)
        assert one.sites[0].module.down_proj.dtype == torch.bfloat16


def test_a_block_that_is_not_whole_is_refused(tmp_path: Path):
    path = saved("glm4_moe", tmp_path)
    tensors = load_file(path / "model-mtp.safetensors")
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, path / "model-mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.eh_proj.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = tiny_tokens(tmp_path / "calibration")
    with pytest.raises(
        UnusableError, match=r"cannot load the multi-token-prediction layers 3: .*eh_proj.*Set prune.mtp: drop"
    ):
        observe(load_model(path), tokens, ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "work", mtp=(3,))


def test_two_observations_with_blocks_add_up(tmp_path: Path):
    model = load_model(saved("glm4_moe", tmp_path))
    one, other = (
        dataclasses.replace(
            observe(
                model,
                tiny_tokens(tmp_path / f"calibration{seed}", seed=seed),
                ObserveSpec(),
                batch_tokens=48,
                work_directory=tmp_path / f"work{seed}",
                mtp=(3,),
            )
        )
        for seed in (0, 1)
    )
    both = one + other
    assert (
        np.array_equal(both.statistics["count"], one.statistics["count"] + other.statistics["count"])
        and both.layers[-1] == 3
    )
    assert np.array_equal(both.eaft.routed(3)[0], np.concatenate([one.eaft.routed(3)[0], other.eaft.routed(3)[0]]))
    without = observe(
        model, tiny_tokens(tmp_path / "again"), ObserveSpec(), batch_tokens=48, work_directory=tmp_path / "again-work"
    )
    with pytest.raises(UnusableError, match=r"one observation has multi-token-prediction layers"):
        one + without

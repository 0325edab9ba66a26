"""The sample behind the reroute criterion: the same tokens and the same bytes however the model is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.model.loading import load_model
from reapkit.model.routed_experts import find_experts
from reapkit.observation import reroute_sample
from reapkit.observation.group_sums import Partials
from reapkit.observation.observation import Observation
from reapkit.observation.reroute_layer import measure_layer
from reapkit.observation.reroute_sample import sampled_positions
from reapkit.observation.resident import observe
from reapkit.observation.streamed import observe_streaming
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.tiny_tokens import tiny_tokens

pytestmark = pytest.mark.usefixtures("layer_blocks")

SPEC = ObserveSpec(eaft=False, reroute_tokens=40)


def prepared(model_type: str, tmp_path: Path) -> tuple[Path, CalibrationTokens]:
    with tiny.quiet():
        return tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model"), tiny_tokens(tmp_path / "calibration")


def resident(path: Path, tokens: CalibrationTokens, work: Path, batch_tokens: int = 48) -> Observation:
    return observe(load_model(path), tokens, SPEC, batch_tokens=batch_tokens, work_directory=work)


def saved(observation: Observation, directory: Path) -> bytes:
    observation.save(directory)
    return (directory / "observation.safetensors").read_bytes()


def test_sources_are_sampled_in_equal_numbers_as_far_as_they_go(tmp_path: Path) -> None:
    tokens = tiny_tokens(tmp_path, sources=("a", "b", "c"), lengths=(30, 12, 6, 30, 12, 6, 0 + 1), groups=3)
    scored = {row: tokens.row(row).scored for row in range(tokens.num_rows)}
    totals = [sum(int(scored[row].sum()) for row in scored if tokens.row_source[row] == source) for source in range(3)]
    chosen = sampled_positions(tokens, 20)
    assert chosen == sampled_positions(tokens, 20)
    assert all(scored[row][offset] for row, offsets in chosen.items() for offset in offsets)
    assert all(sorted(set(offsets)) == offsets for offsets in chosen.values())
    drawn = [
        sum(len(offsets) for row, offsets in chosen.items() if tokens.row_source[row] == source) for source in range(3)
    ]
    assert (
        drawn == [7, 7, 6] if min(totals) >= 6 else drawn[totals.index(min(totals))] == min(totals) and sum(drawn) == 20
    )
    everything = sampled_positions(tokens, 10_000)
    assert {row: len(offsets) for row, offsets in everything.items()} == {
        row: int(s.sum()) for row, s in scored.items() if s.any()
    }


@torch.no_grad()
def test_paths_are_those_of_what_the_layers_see_at_the_sampled_positions(tmp_path: Path) -> None:
    """One row at a time: what the block reads and the layer leaves at each sampled position, by hooks of the test's
    own."""
    path, tokens = prepared("glm4_moe", tmp_path)
    observation, model = resident(path, tokens, tmp_path / "work"), load_model(path)
    scored = torch.tensor(
        [
            sum(int(tokens.row(row).scored.sum()) for row in range(tokens.num_rows) if tokens.row_source[row] == source)
            for source in range(len(tokens.sources))
        ]
    )
    sampled = sampled_positions(tokens, 40)
    for number, site in enumerate(find_experts(model)):
        read, left, source, seen = [], [], [], {}
        handles = [
            site.block.register_forward_pre_hook(lambda block, args, seen=seen: seen.update(read=args[0][0])),
            model.model.layers[site.layer].register_forward_hook(
                lambda layer, args, output, seen=seen: seen.update(left=output[0])
            ),
        ]
        for row in (row for group in tokens.groups for row in group if row in sampled):
            model(tokens.row(row).input_ids[None])
            for offset in sampled[row]:
                read.append(seen["read"][offset])
                left.append(sum(float(value) ** 2 for value in seen["left"].reshape(-1, 64)[offset]))
                source.append(int(tokens.row_source[row]))
        for handle in handles:
            handle.remove()
        expected = measure_layer(model, site, torch.stack(read), torch.tensor(left), torch.tensor(source), scored)
        assert np.array_equal(observation.reroute.order[number], expected["order"])
        np.testing.assert_allclose(observation.reroute.error[number], expected["error"], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(observation.reroute.single[number], expected["single"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_streaming_and_waves_give_the_resident_bytes(model_type: str, tmp_path: Path) -> None:
    path, tokens = prepared(model_type, tmp_path)
    expected = resident(path, tokens, tmp_path / "resident")
    assert (
        int(expected.reroute.tokens.sum()) == 40
        and int((expected.reroute.order >= 0).sum()) == len(expected.layers) * 4 * 12
    )
    for number, budget in enumerate((None, 48 * 64 * 4)):
        got = observe_streaming(
            path, tokens, SPEC, batch_tokens=48, work_directory=tmp_path / f"streaming-{number}", hidden_bytes=budget
        )
        for name, tensor in vars(expected.reroute).items():
            assert np.array_equal(getattr(got.reroute, name), tensor), name
    assert len(list(tmp_path.glob("streaming-1/sums-*/wave-*/done"))) > 1
    assert not list(tmp_path.glob("*/sums-*/reroute-*-*.safetensors")), "inputs are dropped once their layer is done"


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = prepared("qwen3_moe", tmp_path)
    expected = saved(resident(path, tokens, tmp_path / "whole"), tmp_path / "a")
    write = Partials.write

    def killed(self: Partials, group: int, tensors: dict) -> None:
        if group == 2:
            raise KeyboardInterrupt
        write(self, group, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partials, "write", killed)
        resident(path, tokens, tmp_path / "killed")
    assert saved(resident(path, tokens, tmp_path / "killed"), tmp_path / "b") == expected


@pytest.mark.parametrize("placement", ["resident", "streaming"])
def test_interrupted_between_two_layers_paths_it_goes_on_with_the_second(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = prepared("qwen3_moe", tmp_path)
    expected = resident(path, tokens, tmp_path / "whole").reroute
    find, found = measure_layer, []

    def interrupted(model, site, *rest):
        if len(found) == 1:
            raise KeyboardInterrupt
        found.append(site.layer)
        return find(model, site, *rest)

    def observed() -> Observation:
        if placement == "resident":
            return resident(path, tokens, tmp_path / "stopped")
        return observe_streaming(
            path, tokens, SPEC, batch_tokens=48, work_directory=tmp_path / "stopped", checkpoint_minutes=0
        )

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reroute_sample, "measure_layer", interrupted)
        observed()
    again = []
    monkeypatch.setattr(
        reroute_sample, "measure_layer", lambda model, site, *rest: again.append(site.layer) or find(model, site, *rest)
    )
    result = observed()
    assert found == [0] and again == [1, 2], "a finished layer's paths are not found again"
    assert all(np.array_equal(getattr(result.reroute, name), values) for name, values in vars(expected).items())
    assert not list(tmp_path.glob("stopped/sums-*/reroute-*-*.safetensors"))


def test_a_sample_larger_than_the_calibration_is_all_of_it(tmp_path: Path) -> None:
    path, tokens = prepared("qwen3_moe", tmp_path)
    spec = ObserveSpec(eaft=False, reroute_tokens=100_000)
    observation = observe(load_model(path), tokens, spec, batch_tokens=48, work_directory=tmp_path / "work")
    assert np.array_equal(observation.reroute.tokens, observation.scored_tokens)


def test_an_observation_keeps_its_paths_and_a_sum_has_none(tmp_path: Path) -> None:
    path, tokens = prepared("qwen3_moe", tmp_path)
    observation = resident(path, tokens, tmp_path / "work")
    observation.save(tmp_path / "saved")
    loaded = Observation.load(tmp_path / "saved")
    assert all(
        np.array_equal(getattr(loaded.reroute, name), tensor) for name, tensor in vars(observation.reroute).items()
    )
    assert (loaded + observation).reroute is None


def test_what_cannot_be_rerouted_is_refused_before_it_runs(tmp_path: Path) -> None:
    for model_type, why in {
        "llama4_text": "the gate weight scales the expert's input",
        "gemma4_text": "the experts have no block of their own",
    }.items():
        with pytest.raises(UnusableError, match=f"layer 0 of model_type '{model_type}' cannot be re-routed: {why}"):
            observe(
                tiny.build(model_type),
                tiny_tokens(tmp_path / "c"),
                SPEC,
                batch_tokens=48,
                work_directory=tmp_path / "work",
            )


@pytest.mark.long
@pytest.mark.parametrize(
    "model_type", [name for name in tiny.ARCHITECTURES if name not in ("llama4_text", "gemma4_text")]
)
def test_every_other_architecture_is_rerouted_by_its_own_block(model_type: str, tmp_path: Path) -> None:
    observation = observe(
        tiny.build(model_type), tiny_tokens(tmp_path / "c"), SPEC, batch_tokens=48, work_directory=tmp_path / "work"
    )
    removed = (observation.reroute.order >= 0).sum(-1)
    least = {"mixtral": 2, "phimoe": 2, "deepseek_v2": 8, "deepseek_v3": 8, "deepseek_v32": 8}.get(model_type, 4)
    assert (removed == observation.num_experts - least).all() and (observation.reroute.error[:, -1, 0] >= 0).all()
    last = np.take_along_axis(observation.reroute.error[:, -1], removed[:, -1:] - 1, -1)
    assert (
        last > observation.reroute.error[:, -1, :1]
    ).all() or model_type == "ernie4_5_moe"  # whose tiny router sends all tokens the same way


def test_nothing_is_measured_where_a_table_routes(tmp_path: Path) -> None:
    path, tokens = prepared("deepseek_v4", tmp_path)
    found = resident(path, tokens, tmp_path / "work")
    assert found.reroute is not None and found.reroute.measured.tolist() == [False, True, True]
    assert np.isfinite(found.reroute.error).all() and (found.reroute.error[1:] > 0).any()
    streamed = observe_streaming(path, tokens, SPEC, batch_tokens=48, work_directory=tmp_path / "streamed")
    assert saved(found, tmp_path / "one") == saved(streamed, tmp_path / "other")

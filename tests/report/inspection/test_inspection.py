"""What `inspect` and `export` say is what the files say: numbers against the artifacts of a small real run."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from reapkit.calibration.prepare import prepare
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.architecture import Architecture
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.artifact_store import Store
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.observation.observation import Observation
from reapkit.pipeline.run import Run, apply
from reapkit.recipe.loading import load
from reapkit.recipe.schema import CalibrationSpec, EaftSpec
from reapkit.report.inspection.inspect import Inspection, inspect
from reapkit.report.inspection.render import EXCERPT, excerpt, highlighted, lines, table
from reapkit.selection.decide import select
from reapkit.selection.eaft import measure_regions, summarise
from reapkit.selection.saliency import saliency
from reapkit.selection.totals import source_alphas
from tests.support.command import command
from tests.support.observations import observe_routing, random_routing
from tests.support.paths import ROOT
from tests.support.specs import prune, saliency_spec
from tests.support.tiny_tokens import tiny_tokens

DEMO = ROOT / "recipes" / "demo.yaml"


def shown(found: Inspection, *, colour: bool = False) -> str:
    """What an 80-column terminal shows."""
    file = io.StringIO()
    console = Console(
        file=file, width=80, highlight=False, force_terminal=colour, color_system="standard" if colour else None
    )
    for block in found.blocks(colour=colour):
        console.print(block)
    text = file.getvalue()
    assert colour or max(map(len, text.splitlines())) <= 80
    return text


def row(text: str, title: str, name: str) -> list[str]:
    """The cells of the line that begins with `name` in the table under `title`."""
    after = text[text.index(title) :]
    return next(line.split() for line in after.splitlines() if line.split()[:1] == [name])


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("inspected")
    fields = (
        "calibration.samples=24",
        "calibration.max_length=256",
        "calibration.overflow=window",
        "evaluate.packs={samples: 16, lengths: [256, 512]}",
        "evaluate.generation=null",
        "evaluate.gates={kl_mean: {max: 5}}",
        "evaluate.controls=[random]",
        "saliency.criterion=eaft-reap",
        f"runtime.store={root / 'store'}",
        f"output.directory={root / 'run'}",
    )
    return apply(load(DEMO, fields), until="prune")


@pytest.fixture(scope="module")
def directory(run: Run) -> Path:
    return run.directory


class TestCalibration:
    def test_every_number_is_the_file_s(self, directory: Path) -> None:
        summary, found = read(directory / "calibration" / "calibration.json"), inspect(directory / "calibration")
        text = shown(found)
        tokens = CalibrationTokens.load(directory / "calibration")
        rows = [tokens.row(index) for index in range(tokens.num_rows)]
        for number, source in enumerate(summary["sources"]):
            mine = [one for index, one in enumerate(rows) if tokens.row_source[index] == number]
            scored, total = sum(int(one.scored.sum()) for one in mine), sum(len(one.input_ids) for one in mine)
            assert row(text, "What was obtained", source["name"]) == [
                source["name"],
                str(source["samples"]),
                str(len(mine)),
                f"{total:,}",
                f"{scored:,}",
                f"{scored / total:.1%}",
                source["sha256"][:12],
            ]
            lengths = source["lengths"]
            assert row(text, "Tokens per sample", source["name"])[1:7] == [
                f"{number:,}"
                for number in (
                    lengths["min"],
                    lengths["median"],
                    lengths["max"],
                    source["samples_cut"],
                    source["tokens_cut"],
                    0,
                )
            ]
        assert row(text, "What was obtained", "all")[1:5] == [
            f"{number:,}"
            for number in (24, tokens.num_rows, tokens.num_tokens, sum(int(one.scored.sum()) for one in rows))
        ]
        assert "two sources: none" in text and "warnings" not in text

    def test_shares_asked_and_real(self, directory: Path) -> None:
        found = inspect(directory / "calibration")
        shares = {source["name"]: source["shares"] for source in found.facts["sources"]}
        summary = read(directory / "calibration" / "calibration.json")
        assert [one["asked"] for one in shares.values()] == [0.3, 0.3, 0.2, 0.2]
        for unit in ("samples", "tokens", "scored_tokens"):
            assert sum(one[unit] for one in shares.values()) == pytest.approx(1)
            assert shares["tools"][unit] == summary["sources"][1][unit] / sum(
                source[unit] for source in summary["sources"]
            )
        tools = shares["tools"]
        assert row(shown(found), "Requested", "tools") == [
            "tools",
            "7",
            "samples",
            "30.0%",
            f"{tools['samples']:.1%}",
            f"{tools['tokens']:.1%}",
            f"{tools['scored_tokens']:.1%}",
        ]

    def test_the_sample_s_scored_tokens_are_highlighted(self, directory: Path) -> None:
        text = shown(inspect(directory / "calibration"))
        tokens, tokenizer = (
            CalibrationTokens.load(directory / "calibration"),
            AutoTokenizer.from_pretrained(MODEL_DIRECTORY),
        )
        first = next(
            index for index in range(tokens.num_rows) if tokens.row_source[index] == tokens.sources.index("math")
        )
        one = tokens.row(first)
        sample = one.sample == 0
        targets = [index + 1 for index in one.scored.nonzero().flatten().tolist() if sample[index]]
        runs = [[targets[0]]]
        for target in targets[1:]:
            runs[-1].append(target) if target == runs[-1][-1] + 1 else runs.append([target])
        between = [part.split("⟧")[0] for part in text[text.rindex("\nmath\n") :].split("⟦")[1:]]
        assert len(runs) > 1 and [" ".join(part.split()) for part in between] == [
            " ".join(tokenizer.decode(one.input_ids[part].tolist()).split()) for part in runs
        ]

    def test_colour_takes_the_place_of_brackets(self, directory: Path) -> None:
        text = shown(inspect(directory / "calibration"), colour=True)
        assert "⟦" not in text and "\x1b[30;42m" in text

    def test_duplicates_dropped_rows_and_warnings(self, tmp_path: Path) -> None:
        def write(name: str, rows: list[dict]) -> None:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

        shared = [{"text": f"the same text in both, number {number}"} for number in range(3)]
        write("one.jsonl", [*shared, shared[0], *({"text": f"only here {number}"} for number in range(3))])
        write("two.jsonl", shared)
        calibration = CalibrationSpec.model_validate_json(
            json.dumps(
                {
                    "samples": 9,
                    "max_length": 32,
                    "mix": [
                        {"name": "one", "source": "one.jsonl", "weight": 2},
                        {"name": "two", "source": "two.jsonl", "weight": 1},
                    ],
                }
            )
        )
        summary = prepare(calibration, MODEL_DIRECTORY, tmp_path, tmp_path / "out")
        assert summary["duplicates"] == {"one/two": 3}
        text = shown(inspect(tmp_path / "out"))
        ((reason, why),) = summary["sources"][0]["dropped"].items()
        assert "samples of equal content in two sources: one/two 3" in text
        assert f"one: {why['count']} {reason} (first: {why['first']})" in " ".join(text.split())

    def test_packs_of_every_length(self, directory: Path) -> None:
        found = inspect(directory / "packs")
        assert list(found.facts["lengths"]) == ["256", "512"]
        for length, pack in found.facts["lengths"].items():
            summary = read(directory / "packs" / length / "calibration.json")
            assert (pack["rows"], pack["scored_tokens"], pack["parts"]) == (
                summary["rows"],
                summary["scored_tokens"],
                summary["parts"],
            )
            assert inspect(directory / "packs" / length).facts == pack
        assert "confirm" in shown(found)

    def test_large_numbers_fit(self, directory: Path, tmp_path: Path) -> None:
        summary = read(directory / "calibration" / "calibration.json")
        for source in summary["sources"]:
            source |= {
                "name": f"{source['name']}-of-a-long-name",
                "samples": 12_000,
                "rows": 24_576,
                "tokens": 402_653_184,
                "scored_tokens": 302_653_184,
                "tokens_cut": 10_000_000,
            }
        (tmp_path / "calibration.json").write_text(
            json.dumps(summary | {"tokens": 1_610_612_736, "scored_tokens": 1_210_612_736})
        )
        text = shown(inspect(tmp_path))
        assert text.count("402,653,184") == 4 and "1,210,612,736" in text


class TestRun:
    def test_stages_and_no_leak(self, run: Run, directory: Path) -> None:
        found = inspect(directory)
        told, text = read(directory / "run.json"), shown(found)
        assert (
            list(found.facts["stages"])
            == ["calibrate", "packs", "observe", "select", "evaluate", "prune"]
            == run.executed
        )
        for name, stage in told["stages"].items():
            assert row(text, "Stages", name)[1:5] == ["ran", f"{stage['seconds']:.1f}", "s", stage["artifact"]]
        assert (found.facts["held_out"], found.facts["leaked"]) == ({"256": 16, "512": 16}, {})
        assert (
            "held-out samples (16 of 256 tokens, 16 of 512 tokens) that are also in the calibration: none"
            in " ".join(text.split())
        )

    def test_warnings_hits_and_a_missing_calibration(self, directory: Path, tmp_path: Path) -> None:
        told = read(directory / "run.json")
        told["stages"]["observe"]["executed"] = False
        (tmp_path / "run.json").write_text(json.dumps(told | {"warnings": ["the first thing", "the second thing"]}))
        found = inspect(tmp_path / "run.json")
        text = shown(found)
        assert "in the store" in text and "the first thing" in text and "the second thing" in text
        assert found.facts["leaked"] is None and "cannot be compared" in " ".join(text.split())

    def test_held_out_samples_that_were_calibrated_on(self, directory: Path, tmp_path: Path) -> None:
        shutil.copy(directory / "run.json", tmp_path)
        for name, origin in (("calibration", "calibration"), ("packs/256", "packs/256"), ("packs/512", "calibration")):
            (tmp_path / name).mkdir(parents=True)
            shutil.copy(directory / origin / "calibration.json", tmp_path / name)
        found = inspect(tmp_path)
        assert found.facts["leaked"] == {"512/code": 7, "512/tools": 7, "512/prose": 5, "512/math": 5}
        assert "512/code 7, 512/tools 7" in " ".join(shown(found).split())


class TestObservation:
    @pytest.fixture(scope="class")
    def observation(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observation]:
        path = tmp_path_factory.mktemp("observation")
        observation = observe_routing(
            random_routing(3, experts=12, dead=(3, 7), tokens=400), experts=12, layers=(1, 2, 5)
        )
        observation.save(path)
        return path, observation

    def test_numbers_against_naive_sums(self, observation: tuple[Path, Observation]) -> None:
        path, held = observation
        found = inspect(path)
        text, facts = shown(found), found.facts
        mass, count = held.statistics["gate_norm_sum"].sum(1), held.statistics["count"].sum(1)
        values = saliency(held, saliency_spec())
        assert facts["never_routed"] == {"1": [3, 7], "2": [3, 7], "5": [3, 7]}
        for index, layer in enumerate(held.layers):
            ordered = sorted(mass[index].tolist(), reverse=True)
            for size in (4, 8):
                assert facts["concentration"][str(size)][index] == pytest.approx(sum(ordered[:size]) / sum(ordered))
            assert facts["ranking"][str(layer)] == sorted(range(12), key=lambda e: (-values[index, e].item(), e))
            assert facts["balance_cv"][index] == pytest.approx(float(count[index].std() / count[index].mean()))
            cells = row(text, "Share of", str(layer))
            assert cells[1] == f"{facts['concentration']['4'][index]:.1%}" and cells[4:] == [
                str(e) for e in facts["ranking"][str(layer)][:6]
            ]
        for index, name in enumerate(held.sources):
            tokens, scored = int(held.tokens[index]), int(held.scored_tokens[index])
            never = int((held.statistics["count"][:, index] == 0).sum())
            assert row(text, "Tokens, and experts", name) == [
                name,
                f"{tokens:,}",
                f"{scored:,}",
                f"{scored / int(held.scored_tokens.sum()):.1%}",
                str(never),
            ]
        assert row(text, "Tokens, and experts", "all")[-1] == "6"

    def test_region_shares_are_those_of_the_whole_measurement(self, observation: tuple[Path, Observation]) -> None:
        path, held = observation
        alphas = source_alphas(held, None)
        assert inspect(path).facts["eaft"] == summarise(measure_regions(held, EaftSpec(), alphas), held.sources, alphas)

    def test_without_a_trace(self, tmp_path: Path) -> None:
        observe_routing(random_routing(0), trace=False).save(tmp_path)
        found = inspect(tmp_path / "observation.json")
        assert found.facts["eaft"] is None and "no EAFT trace" in shown(found)

    def test_the_run_s_own(self, directory: Path) -> None:
        told = read(directory / "observation" / "observation.json")
        facts = inspect(directory / "observation").facts
        assert [(one["name"], one["tokens"], one["scored_tokens"]) for one in facts["sources"]] == list(
            zip(told["sources"], told["tokens"], told["scored_tokens"], strict=True)
        )


class TestSelection:
    def test_reasons_are_counted(self, tmp_path: Path) -> None:
        observation = observe_routing(random_routing(1, dead=(3,)))
        asked = prune(ratio=0.5, protect={"super_experts": False, "experts": {1: [0, 3]}})
        select(observation, saliency_spec("eaft-reap"), asked, Architecture("toy_moe", 3, 8, 2)).save(tmp_path)
        data, found = read(tmp_path / "selection.json"), inspect(tmp_path)
        text = shown(found)
        for layer, entry in data["layers"].items():
            facts = found.facts["layers"][layer]
            for side, experts in (("kept", entry["keep"]), ("dropped", entry["drop"])):
                assert facts[side] == len(experts) and facts[f"{side}_reasons"] == Counter(
                    entry["reasons"][str(e)] for e in experts
                )
            known = [entry["saliency"][e] for e in entry["drop"] if entry["saliency"][e] is not None]
            assert facts["highest_dropped"] == max(known) and facts["lowest_kept"] == min(
                entry["saliency"][e] for e in entry["keep"] if entry["saliency"][e] is not None
            )
        assert found.facts["layers"]["1"]["kept_reasons"]["protected by hand"] == 2
        assert found.facts["removed"] == data["details"]["removed"] == 12
        assert "protected by hand, layer 1: 0 3" in text and "layer 0: 3" in text
        assert f"changed {data['details']['eaft']['changed_by_conflict']} kept experts" in text
        assert inspect(tmp_path / "selection.json").facts == found.facts

    def test_near_ties_and_imported_selections(self, tmp_path: Path) -> None:
        ties = [{"layer": 0, "kept": 1, "dropped": 0, "relative_gap": 2e-5}] * 20
        (tmp_path / "selection.json").write_text(
            json.dumps(
                {"criterion": "theirs", "details": {"near_ties": ties}, "layers": {"0": {"keep": [1], "drop": [0]}}}
            )
        )
        text = shown(inspect(tmp_path))
        assert (
            "layer 0: kept 1, dropped 0, 2.0e-05 apart" in text
            and "and 9 more" in text
            and "1 of 2 experts removed" in text
        )

    def test_several_candidates(self, directory: Path, tmp_path: Path) -> None:
        shutil.copytree(directory / "selection", tmp_path / "selection")
        (tmp_path / "selection" / "selection.json").unlink()
        found = inspect(tmp_path / "selection")
        assert {name: one["role"] for name, one in found.facts["several"].items()} == {
            "eaft-reap-r0.5": "candidate",
            "random-beside-eaft-reap-r0.5": "control",
        } and "candidates/NAME" in shown(found)


class TestEvaluation:
    def test_rows_gates_and_advice(self, directory: Path) -> None:
        evaluation, found = read(directory / "evaluation" / "evaluation.json"), inspect(directory / "evaluation")
        text = shown(found)
        candidate = evaluation["candidates"][0]
        assert (found.facts["chosen"], found.facts["verdict"]) == (candidate["name"], "pass")
        assert (
            found.facts["gates"] == candidate["gates"]
            and found.facts["confirm_gates"] == evaluation["confirm"]["gates"]
        )
        for length, groups in candidate["metrics"].items():
            for name in ("code", "tools", "prose", "math"):
                line = next(
                    one
                    for one in found.facts["by_source"][name]
                    if one["length"] == length and one["role"] == "candidate"
                )
                assert line["kl_mean"] == groups[name]["kl_mean"]["value"] and f"{line['kl_mean']:.4f}" in text
        for gate in candidate["gates"]:
            assert f"{gate['value']:.4f}" in text
        assert evaluation["advice"].splitlines()[0] in text

    def test_verification(self, tmp_path: Path) -> None:
        proof = {
            "name": "tensors",
            "passed": False,
            "detail": "one tensor differs",
            "value": 1.0,
            "measured": True,
            "directory": "pruned",
        }
        line = {
            "name": "base",
            "experts": "32",
            "bytes": 7_244_544,
            "perplexity": 2.4721,
            "kl_mean": 0.0,
            "top1_agreement": 1.0,
        }
        told = {
            "rows": [line],
            "metrics": {},
            "proofs": [proof],
            "gates": [],
            "verdict": "reject",
            "advice": "Prune less.",
        }
        (tmp_path / "verify.json").write_text(json.dumps(told))
        text = shown(inspect(tmp_path / "verify.json"))
        assert row(text, "Measured", "base")[1:] == ["32", "7.24", "MB", "2.472", "0.0000", "100.0%"]
        assert row(text, "Proofs", "pruned") == ["pruned", "tensors", "NO", "one", "tensor", "differs"]
        assert "verdict: reject" in text and "Prune less." in text


class TestCheckpoint:
    def test_the_packaged_model(self) -> None:
        found = inspect(MODEL_DIRECTORY)
        headers: dict[str, Any] = {}
        for shard in MODEL_DIRECTORY.glob("*.safetensors"):
            content = shard.read_bytes()
            headers |= json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        headers.pop("__metadata__", None)
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in headers.items()}
        assert found.facts["bytes"] == sum(sizes.values()) == sum(found.facts["bytes_by_dtype"].values())
        assert found.facts["expert_bytes"] == sum(
            size for name, size in sizes.items() if ".experts." in name or ".mlp.gate." in name
        )
        assert found.facts["experts"] == {str(layer): 32 for layer in range(4)} and found.facts["quantization"] is None
        text = shown(found)
        assert (
            f"{len(sizes)} tensors" in text
            and "top-2 of 32 experts" in text
            and "quantization: none" in text
            and "per expert" in text
        )

    def test_pruned_and_quantized(self, directory: Path, tmp_path: Path) -> None:
        found = inspect(directory / "pruned")
        assert set(found.facts["experts"].values()) == {16} and found.facts["pruned"]["complete"]
        assert "pruned by reapkit from" in shown(found)
        shutil.copytree(directory / "pruned", tmp_path / "packed")
        config = read(directory / "pruned" / "config.json")
        groups = {
            "group_0": {
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "channel",
                    "group_size": None,
                    "symmetric": True,
                }
            }
        }
        (tmp_path / "packed" / "config.json").unlink()
        (tmp_path / "packed" / "config.json").write_text(
            json.dumps(
                config
                | {
                    "quantization_config": {
                        "quant_method": "compressed-tensors",
                        "format": "float-quantized",
                        "config_groups": groups,
                        "ignore": ["lm_head"],
                    }
                }
            )
        )
        assert "quantization: compressed-tensors, float-quantized: 8 bits float; 1 left out" in shown(
            inspect(tmp_path / "packed")
        )

    def test_a_dense_model_is_refused(self, tmp_path: Path) -> None:
        shutil.copytree(MODEL_DIRECTORY, tmp_path / "dense")
        (tmp_path / "dense" / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
        with pytest.raises(UnusableError, match="is not a Mixture-of-Experts checkpoint"):
            inspect(tmp_path / "dense")


class TestRecipe:
    def test_values_in_force(self, tmp_path: Path) -> None:
        child = tmp_path / "child.yaml"
        child.write_text(f"extends: {DEMO}\nname: child\nprune: {{ratio: 0.25}}\nobserve: {{trace_bytes: 5_000_000}}\n")
        found = inspect(child)
        fields = {field["path"]: (field["value"], field["default"]) for field in found.facts["fields"]}
        assert fields["prune.ratio"] == (0.25, False) and fields["observe.trace_bytes"] == (5_000_000, False)
        assert fields["calibration.max_length"] == (512, False) and fields["calibration.seed"] == (42, True)
        assert fields["calibration.mix[0]"] == ({"name": "code", "source": "builtin:code", "weight": 0.3}, False)
        assert found.facts["mix"][0] == {
            "name": "code",
            "source": "builtin:code",
            "weight": "0.3",
            "share": 0.3,
            "samples": 96,
        }
        assert found.facts["recipe"]["prune"]["ratio"] == 0.25
        text = shown(found)
        assert row(text, "Values", "prune.ratio") == ["prune.ratio", "0.25"]
        assert row(text, "Values", "calibration.seed") == ["calibration.seed", "42", "default"] and "5_000_000" in text

    def test_shipped_ones_by_name(self) -> None:
        assert inspect("demo").facts["recipe"] == inspect(DEMO).facts["recipe"]

    def test_its_problems_travel(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("version: 1\nname: x\nprune: {ratoi: 0.5}\n")
        with pytest.raises(RecipeError, match="ratoi"):
            inspect(tmp_path / "bad.yaml")


class TestStore:
    def test_artifacts_with_how_they_were_made(self, run: Run) -> None:
        for stage, artifact in run.artifacts.items():
            found = inspect(artifact.directory)
            assert (
                found.to_json()["artifact"]["key"] == artifact.key
                and found.to_json()["artifact"]["seconds"] == artifact.manifest["seconds"]
            )
            assert found.facts == inspect(artifact.payload).facts == inspect(artifact.directory / "manifest.json").facts
            assert shown(found).startswith(f"{stage} {artifact.key[:12]}: made {artifact.manifest['finished']}")

    def test_dropped_and_unfinished(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        (store.begin("prune", "a" * 64, resume=False) / "config.json").write_text("{}")
        with pytest.raises(
            UnusableError,
            match=(
                r"the artifact is unfinished \(it has no manifest\)\. Run its"
                r" recipe again"
            ),
        ):
            inspect(store.directory("prune", "a" * 64))
        made = store.finish(
            "prune",
            "a" * 64,
            {"summary": {"bytes": 1}, "seconds": 2.5, "finished": "2026-01-01T00:00:00Z", "warnings": ["mind this"]},
        )
        made.drop_payload()
        found = inspect(made.directory)
        assert found.found.kind is None and "files deleted" in shown(found) and "warning: mind this" in shown(found)
        with pytest.raises(
            UnusableError, match=r"a store of 1 artifacts\. Inspect one of them, such as .*prune-aaaaaaaaaaaa"
        ):
            inspect(tmp_path)


class TestRefusals:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            RecipeError, match=r"no such file or directory\. Give a recipe .*calibration\.json"
        ) as error:
            inspect(tmp_path / "demmo")
        assert "Shipped recipes:" in str(error.value)

    @pytest.mark.parametrize("name", ["lock.json", "report.html"])
    def test_other_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("{}")
        with pytest.raises(UnusableError, match=r"unknown kind of file\. Known are a recipe"):
            inspect(tmp_path / name)
        with pytest.raises(UnusableError, match=rf"unknown kind of directory \(it holds {name}\)\. Known are a recipe"):
            inspect(tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("calibration.json", "{", "cannot be read as JSON"),
            ("evaluation.json", "[]", "found a JSON list"),
            ("verify.json", "{}", "the keys rows, proofs"),
            ("run.json", '{"name": 1}', "the keys recipe"),
            (
                "run.json",
                '{"name": 1, "recipe": 1, "model": 1, "stages": 7, "warnings": [], "versions": {}}',
                "damaged or of another version",
            ),
            ("observation.json", '{"format": 1}', "damaged or of another version"),
            ("selection.json", "{}", "the selection cannot be read"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(UnusableError, match=message):
            inspect(tmp_path)

    def test_a_calibration_without_its_account(self, tmp_path: Path) -> None:
        tiny_tokens(tmp_path)
        with pytest.raises(UnusableError, match=r"calibration\.json: the keys kind, asked"):
            inspect(tmp_path)


class TestText:
    def test_files_cannot_command_the_terminal(self) -> None:
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=True, color_system="standard")
        hostile = "\x1b]0;owned\x07[red]plain[/red]\r\u202e"
        for block in (
            lines(hostile),
            table(hostile, (hostile,), [(hostile,)]),
            highlighted([(hostile, True)], colour=False),
        ):
            console.print(block)
        text = file.getvalue()
        assert "\x1b]" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
        assert text.count("\\x1b]0;owned\\x07") == 5 and text.count("[red]plain[/red]") >= 2

    def test_excerpts_begin_shortly_before_what_is_scored(self) -> None:
        cut = excerpt([["a" * 5000, False], ["b" * 10, True], ["c" * 5000, False], ["d", True]])
        assert [len(text) for text, _ in cut][:2] == [241, 10] and [mark for _, mark in cut] == [False, True, False]
        assert (
            cut[0][0].startswith("…") and cut[-1][0].endswith("…") and sum(len(text) for text, _ in cut) <= EXCERPT + 2
        )


class TestCommands:
    def test_json_is_the_facts(self, directory: Path) -> None:
        for name in (
            "",
            "calibration",
            "packs",
            "observation",
            "selection",
            "evaluation",
            "pruned",
            "recipe.resolved.yaml",
        ):
            done = command("inspect", directory / name, "--json")
            assert done.code == 0
            printed = done.json()
            assert printed == json.loads(json.dumps(inspect(directory / name).to_json())) and printed["kind"]

    def test_exit_codes(self, tmp_path: Path) -> None:
        assert command("inspect", tmp_path / "nothing").code == 2
        assert command("inspect", tmp_path).code == 3
        done = command("export", tmp_path, tmp_path / "out")
        assert done.code == 3 and "holds nothing" in done.stderr

    def test_export_knows_what_lies_around_the_observation(self, run: Run, directory: Path, tmp_path: Path) -> None:
        places = {
            "run": directory,
            "observation": directory / "observation",
            "store": run.artifacts["observe"].directory,
        }
        for name, place in places.items():
            done = command("export", place, tmp_path / name, "--json")
            assert done.code == 0
            files = done.json()["files"]
            assert [Path(file).name for file in files] == ["saliency.parquet", "ranking_by_layer.json", "profile.md"]
            assert pq.read_table(files[0]).num_rows == 4 * 32 * 5
            profile = Path(files[2]).read_text()
            assert "Source `code` = `builtin:code`" in profile and "Forward throughput" in profile
            assert ("builtin:demo" in profile) == (name != "store")
            assert "## Reproduce" not in profile  # the run differs from the recipe by --set

    def test_export_says_the_command_where_it_is_known(self, directory: Path, tmp_path: Path) -> None:
        shutil.copytree(directory / "observation", tmp_path / "observation")
        shutil.copy(directory / "recipe.resolved.yaml", tmp_path)
        recipe = str(tmp_path / "recipe.resolved.yaml")
        (tmp_path / "run.json").write_text(json.dumps(read(directory / "run.json") | {"recipe": recipe}))
        assert command("export", tmp_path, tmp_path / "out").code == 0
        assert f"reapkit observe {recipe}" in (tmp_path / "out" / "profile.md").read_text()

    @pytest.mark.parametrize(
        "name", ["", "calibration", "packs", "observation", "selection", "evaluation", "pruned", "recipe.resolved.yaml"]
    )
    def test_nothing_takes_torch(self, directory: Path, name: str) -> None:
        code = (
            "import sys; from reapkit.report.inspection.inspect import inspect;"
            " inspect(sys.argv[1]).blocks(colour=False); sys.exit(bool({'torch', 'transformers', 'datasets'} &"
            " set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code, str(directory / name)]).returncode == 0


def test_large_models_fit(tmp_path: Path) -> None:
    routing = random_routing(0, layers=2, experts=300, top_k=8, tokens=60)
    observe_routing(
        routing, experts=300, sources=("a-source-of-a-long-name", "b"), layers=(59, 60), coactivation=False
    ).save(tmp_path)
    found = inspect(tmp_path)
    assert found.facts["num_experts"] == 300
    assert "top-8 of 300 experts" in shown(found)

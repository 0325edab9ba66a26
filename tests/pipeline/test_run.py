"""The main job on the packaged model, small: one recipe to a pruned, 3-bit, proven model; and everything that can go
wrong on the way."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reapkit.api import Observation
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import RejectedByGates, StageFailed, UnusableError
from reapkit.core.progress import Progress
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.run import Run, apply
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.recipe.loading import LoadedRecipe, load
from tests.support.broken_machines import MEASUREMENTS
from tests.support.browser import assert_readable, browser_or_skip
from tests.support.command import command
from tests.support.paths import ROOT

DEMO = ROOT / "recipes" / "demo.yaml"
SMALL = (
    "calibration.samples=48",
    "calibration.max_length=256",
    "evaluate.packs={samples: 24, lengths: [256]}",
    "evaluate.generation=null",
    "evaluate.throughput=null",
    "evaluate.gates={kl_mean: {max: 5}}",
    "evaluate.controls=[random]",
    "quantize.method=rtn",
)


def recipe(root: Path, *overrides: str) -> LoadedRecipe:
    return load(DEMO, (*SMALL, f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}", *overrides))


def fingerprint(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@contextmanager
def two_threads() -> Iterator[None]:
    """Float sums depend on how many threads share them; other tests of the same worker compare bits of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(root: Path) -> Run:
    with two_threads():
        return apply(recipe(root))


def test_every_stage_ran_and_left_its_files(finished: Run) -> None:
    assert finished.executed == [stage.name for stage in finished.plan.stages]
    names = {path.name for path in finished.directory.iterdir()}
    assert {
        "calibration",
        "observation",
        "selection",
        "evaluation",
        "pruned",
        "quantized",
        "verify.json",
        "report.html",
        "run.json",
        "recipe.resolved.yaml",
    } <= names


@pytest.mark.parametrize("name", ["pruned", "quantized"])
def test_the_results_load_in_plain_transformers_and_generate(finished: Run, name: str) -> None:
    directory = finished.directory / name
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=8, min_new_tokens=8).shape[1] == prompt["input_ids"].shape[1] + 8
    assert json.loads((directory / "config.json").read_text())["num_experts"] == 16
    assert (directory / "README.md").read_text().startswith("---\n")


def test_the_final_numbers_are_in_order(finished: Run) -> None:
    rows = {row["name"]: row for row in finished.summary("verify")["rows"]}
    assert list(rows) == ["base", "pruned", "quantized"]
    assert rows["base"]["kl_mean"] == 0 and rows["base"]["perplexity"] < rows["pruned"]["perplexity"]
    assert 0 < rows["pruned"]["kl_mean"] < rows["quantized"]["kl_mean"]
    proofs = json.loads((finished.directory / "verify.json").read_text())["proofs"]
    assert {proof["directory"] for proof in proofs} == {"pruned", "quantized"} and all(
        proof["passed"] for proof in proofs
    )


def test_the_plan_foretold_the_bytes(finished: Run) -> None:
    candidate = finished.plan.candidates[0]
    assert Checkpoint.open(finished.directory / "pruned").nbytes == finished.plan.pruned(candidate).nbytes
    assert Checkpoint.open(finished.directory / "quantized").nbytes == finished.plan.quantized_nbytes(candidate)


@pytest.mark.long
def test_its_reports_can_be_read_in_a_browser(finished: Run, root: Path) -> None:
    with pytest.raises(RejectedByGates):
        apply(recipe(root, "evaluate.gates={kl_mean: {max: 0.000001}}", f"output.directory={root / 'rejected'}"))
    with browser_or_skip() as chromium:
        for directory in (finished.directory, root / "rejected"):
            assert_readable(chromium, directory / "report.html")


@pytest.mark.long
def test_the_demos_own_reports_can_be_read_in_a_browser(tmp_path: Path) -> None:
    places = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'demo'}")
    apply(load(DEMO, places))
    with pytest.raises(RejectedByGates):
        apply(load(DEMO, (*places, "evaluate.gates=strict", f"output.directory={tmp_path / 'rejected'}")))
    with browser_or_skip() as chromium:
        for directory in ("demo", "rejected"):
            assert_readable(chromium, tmp_path / directory / "report.html")


def test_a_second_run_executes_nothing(finished: Run, root: Path) -> None:
    before = fingerprint(root / "store")
    again = apply(recipe(root))
    assert again.executed == [] and fingerprint(root / "store") == before


def test_runtime_changes_execute_nothing(finished: Run, root: Path) -> None:
    assert apply(recipe(root, "runtime.batch_tokens=512", "runtime.checkpoint_minutes=1")).executed == []


def test_cached_samples_give_the_same_bytes_as_fresh_ones(finished: Run, root: Path, tmp_path: Path) -> None:
    smaller = ("calibration.samples=32",)
    cached = apply(recipe(root, *smaller, f"output.directory={root / 'smaller'}"), until="packs")
    fresh = apply(recipe(tmp_path, *smaller), until="packs")
    for name in ("calibration", "packs"):
        assert fingerprint(cached.directory / name) == fingerprint(fresh.directory / name)


def test_another_criterion_reuses_the_observation(finished: Run, root: Path) -> None:
    assert apply(
        recipe(root, "saliency.criterion=frequency", f"output.directory={root / 'other'}"), until="select"
    ).executed == ["select"]


def test_a_rejected_candidate_writes_no_model_and_says_what_would_pass(finished: Run, root: Path) -> None:
    limit = finished.summary("verify")["rows"][1]["kl_mean"] / 4
    strict = recipe(root, f"evaluate.gates={{kl_mean: {{max: {limit}}}}}", f"output.directory={root / 'rejected'}")
    with pytest.raises(
        RejectedByGates, match=r"kl_mean(.|\n)*No weight was written\. All numbers: .*report\.html"
    ) as rejected:
        apply(strict)
    assert not (root / "rejected" / "pruned").exists()
    for _ in range(2):  # evaluating alone comes to the same verdict, from the store too
        with pytest.raises(RejectedByGates) as again:
            apply(strict, until="evaluate")
        assert str(again.value) == str(rejected.value) and again.value.facts["verdict"] == "reject"
    [advised] = [
        line.split("--set ")[1].strip("'") for line in str(rejected.value).splitlines() if "prune.ratio=" in line
    ]
    again = (
        advised,
        f"evaluate.gates={{kl_mean: {{max: {limit}}}}}",
        "evaluate.on_undecided=warn",
        f"output.directory={root / 'advised'}",
    )
    [name] = [
        candidate.name for candidate in make_plan(recipe(root, *again)).candidates
    ]  # what it says to type is a recipe
    searched = json.loads((root / "rejected" / "evaluation" / "evaluation.json").read_text())["search"]
    assert f"Nearest candidate that passes: {name} " in str(rejected.value)
    found = apply(recipe(root, *again), until="evaluate")  # and does what it says
    assert found.executed == ["select", "evaluate"]
    assert "Passed its gates" in (found.directory / "report.html").read_text()
    evaluation = json.loads((found.directory / "evaluation" / "evaluation.json").read_text())
    assert evaluation["candidates"][0]["verdict"] == "pass"
    assert [evaluation["candidates"][0]["metrics"]] == [entry["metrics"] for entry in searched if entry["name"] == name]
    page = (root / "rejected" / "report.html").read_text()
    assert "The first of these, to paste" in page and page.count(f"--set {advised}") >= 1
    assert name in page and "tried after the rejection" in page


@pytest.mark.parametrize("which", ["pruned", "quantized"])
def test_the_code_on_the_card_runs_as_it_stands(
    finished: Run, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.directory / which)
    [code] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.S)
    named: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), named)  # what a reader would do
    written = named["output"].shape[1] - named["inputs"]["input_ids"].shape[1]
    assert 0 < written <= 64 and capsys.readouterr().out.strip()


def test_a_rejection_may_be_a_warning(finished: Run, root: Path) -> None:
    lenient = recipe(
        root,
        "evaluate.gates={kl_mean: {max: 0.000001}}",
        "evaluate.on_reject=warn",
        f"output.directory={root / 'lenient'}",
    )
    run = apply(lenient, until="prune")
    assert run.warnings and (root / "lenient" / "pruned" / "model.safetensors").is_file()


def test_a_rejected_quantization_is_not_published_and_names_the_next_scheme(finished: Run, root: Path) -> None:
    metrics = json.loads((root / "run" / "verify.json").read_text())["metrics"]
    kl = {name: metrics[name]["256"]["all"]["kl_mean"] for name in ("pruned", "quantized")}
    limit = (kl["pruned"]["value"] + kl["quantized"]["interval"][0]) / 2  # the pruned model alone is inside
    strict = recipe(
        root, f"evaluate.gates_quantized={{kl_mean: {{max: {limit}}}}}", f"output.directory={root / 'unpublished'}"
    )
    with pytest.raises(
        RejectedByGates,
        match=r"(?s)lost by quantizing.*method=gptq.*--set quantize.scheme=W4A16.*rejected and was not uploaded",
    ):
        apply(strict)
    assert (root / "unpublished" / "quantized.rejected").is_dir() and not (root / "unpublished" / "quantized").exists()
    assert (root / "unpublished" / "report.html").is_file()


@pytest.mark.long
def test_where_the_pruning_alone_is_too_much_no_scheme_is_advised(finished: Run, root: Path) -> None:
    strict = recipe(
        root, "evaluate.gates_quantized={kl_mean: {max: 0.000001}}", f"output.directory={root / 'hopeless'}"
    )
    with pytest.raises(
        RejectedByGates, match=r"(?s)The pruned model alone breaks them too.*--set prune.ratio=0.25\n"
    ) as rejected:
        apply(strict)
    assert "quantize.scheme" not in str(rejected.value)


def test_an_undecided_quantization_ends_with_5_and_says_how_many_samples_it_takes(finished: Run, root: Path) -> None:
    low, high = json.loads((root / "run" / "verify.json").read_text())["metrics"]["quantized"]["256"]["all"]["kl_mean"][
        "interval"
    ]
    doubtful = (
        f"evaluate.gates_quantized={{kl_mean: {{max: {low + 0.6 * (high - low)}}}}}",
        f"output.directory={root / 'doubtful'}",
    )
    with pytest.raises(
        RejectedByGates,
        match=r"undecided(.|\n)*--set evaluate.packs.samples=\d+(.|\n)*doubtful/quantized and was not uploaded",
    ):
        apply(recipe(root, *doubtful))
    assert (root / "doubtful" / "quantized").is_dir() and not (root / "doubtful" / "quantized.rejected").exists()
    assert apply(recipe(root, *doubtful, "evaluate.on_undecided=warn")).summary("verify")["verdict"] == "undecided"


def test_the_unpruned_model_at_about_the_same_bytes_stands_beside_the_result(finished: Run) -> None:
    found = json.loads((finished.directory / "verify.json").read_text())
    control, final = found["equal_bytes"], found["rows"][-1]
    assert control["target_bytes"] == final["bytes"] and control["scheme"] in control["note"]
    assert 1 / 1.5 <= control["bytes"] / final["bytes"] <= 1.5
    groups = control["metrics"]["256"]
    assert set(groups) == set(found["metrics"]["quantized"]["256"]) and groups["all"]["kl_mean"]["value"] > 0
    assert finished.summary("verify")["equal_bytes"]["kl_mean"] == groups["all"]["kl_mean"]["value"]
    assert "The same size by quantizing alone" in (finished.directory / "report.html").read_text()


def test_a_directory_whose_proof_fails_is_not_published(
    finished: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert's gate and up projections change places after quantizing: every name and shape is right, only the
    values are not."""

    def swapped(source: Path, out: Path, *args: object, **options: object) -> dict:
        facts = quantize_checkpoint(source, out, *args, **options)
        (file,) = out.glob("*.safetensors")
        tensors = load_file(file)
        up, gate = (
            next(name for name in tensors if name.endswith(f".{part}_proj.weight_packed") and ".experts." in name)
            for part in ("up", "gate")
        )
        for part in ("packed", "scale"):
            one, other = (name.replace("weight_packed", f"weight_{part}") for name in (up, gate))
            tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, file, metadata={"format": "pt"})
        return facts

    monkeypatch.setattr("reapkit.quantization.checkpoint.quantize_checkpoint", swapped)
    with pytest.raises(
        StageFailed, match=r"1 of 10 proofs failed. The first is dequantized of quantized: .*proj\.weight"
    ) as failure:
        apply(recipe(root, "quantize.group_size=32", f"output.directory={root / 'unproven'}"))
    assert failure.value.exit_code == 4
    assert not [
        path for path in (root / "unproven").glob("*") if path.name.startswith(("quantized", "pruned", "verify"))
    ]


def test_only_what_is_kept_stays_on_disk(finished: Run, root: Path) -> None:
    wanted = recipe(root, "output.keep=[quantized]", f"output.directory={root / 'lean'}")
    assert apply(wanted).executed == []
    assert not (root / "lean" / "pruned").exists() and (root / "lean" / "quantized" / "model.safetensors").is_file()
    assert apply(wanted).executed == []  # dropped files are no reason to run
    assert apply(recipe(root)).executed == ["prune"]  # unless they are wanted again


class Interrupting(Progress):
    """Ctrl-C after some units of the task whose title begins with `title`."""

    def __init__(self, title: str, units: float):
        self.title, self.left = title, units

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Interrupting]:
        self.active = title.startswith(self.title)
        yield self
        self.active = False

    def advance(self, units: float = 1) -> None:
        if self.active:
            self.left -= units
            if self.left < 0:
                raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass


def test_interrupted_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(
    finished: Run, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(tmp_path), until="observe", progress=Interrupting("observe", 2000))
    assert not (tmp_path / "run" / "observation").exists()
    resumed = apply(recipe(tmp_path), until="observe")
    assert resumed.executed == ["observe"]
    assert fingerprint(tmp_path / "run" / "observation") == fingerprint(root / "run" / "observation")


def test_interrupted_while_it_evaluates_it_keeps_what_was_measured(
    finished: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reapkit.evaluation import bench

    shutil.copytree(
        root / "store",
        tmp_path / "store",
        ignore=shutil.ignore_patterns(
            "evaluate-*", "prune-*", "quantize-*", "verify-*", *(f"{name}-*" for name in MEASUREMENTS)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(tmp_path), until="evaluate", progress=Interrupting("evaluate random", 100))
    assert not (tmp_path / "run" / "evaluation").exists()
    measured, real = [], bench.measure
    monkeypatch.setattr(
        bench, "measure", lambda *args, **kwargs: measured.append(kwargs["title"]) or real(*args, **kwargs)
    )
    assert apply(recipe(tmp_path), until="evaluate").executed == ["evaluate"]
    assert measured == ["evaluate random-beside-reap-r0.5"], "candidate and confirm rows had been measured"
    assert fingerprint(tmp_path / "run" / "evaluation") == fingerprint(root / "run" / "evaluation")


@pytest.mark.long
def test_streaming_gives_the_same_observation_and_the_same_numbers(finished: Run, root: Path, tmp_path: Path) -> None:
    with two_threads():  # as the resident run
        streamed = apply(recipe(tmp_path, "runtime.placement=streaming"), until="verify")
    assert fingerprint(streamed.directory / "selection") == fingerprint(root / "run" / "selection")
    observed = ("observation.safetensors", "trace.safetensors")
    assert [(streamed.directory / "observation" / name).read_bytes() for name in observed] == [
        (root / "run" / "observation" / name).read_bytes() for name in observed
    ]
    for row, expected in zip(streamed.summary("verify")["rows"], finished.summary("verify")["rows"], strict=True):
        assert row["name"] == expected["name"] and row["bytes"] == expected["bytes"]
        assert row["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-3, abs=1e-6)
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)


def test_a_missing_lm_eval_is_told_before_anything_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reapkit.evaluation.task_benchmarks.importlib.util.find_spec", lambda name: None)
    asked = recipe(tmp_path, "evaluate.lm_eval={tasks: [arc_easy]}")
    with pytest.raises(UnusableError, match=r"evaluate\.lm_eval needs the package lm-eval, which is not installed"):
        apply(asked)
    assert not list((tmp_path / "store").glob("calibrate-*"))
    assert apply(asked, until="calibrate").executed == ["calibrate"]  # which needs none


def test_another_content_of_a_task_file_is_another_verification(finished: Run, root: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(DEMO.read_text())
    keys = []
    for content in ("task: one", "task: two", "task: one"):
        (tmp_path / "mine.yaml").write_text(content)
        keys.append(
            make_plan(load(tmp_path / "recipe.yaml", (*SMALL, "evaluate.lm_eval={tasks: [mine.yaml]}")))
            .stage("verify")
            .key
        )
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.long
def test_layers_may_keep_different_numbers(finished: Run, root: Path) -> None:
    ragged = recipe(
        root,
        "prune.layout=ragged",
        "prune.allocation=global",
        "quantize.scheme=null",
        f"output.directory={root / 'ragged'}",
    )
    run = apply(ragged, until="verify")
    counts = run.summary("prune")["experts"].values()
    assert sum(counts) == 64 and len(set(counts)) > 1
    proofs = json.loads((root / "ragged" / "verify.json").read_text())["proofs"]
    assert proofs and all(proof["passed"] for proof in proofs)


def test_a_full_disk_fails_the_stage_and_can_be_resumed(
    finished: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device", "selection.json")

    changed = recipe(root, "saliency.prior_count=2", f"output.directory={root / 'full'}")
    with monkeypatch.context() as patched:
        patched.setattr("reapkit.pipeline.stages.select.select_all", full)
        with pytest.raises(
            StageFailed,
            match=r"select: selection\.json: No space left on device\. Free some space.*It resumes where it stopped",
        ):
            apply(changed, until="select")
    assert make_plan(changed).stage("select").artifact is None
    assert apply(changed, until="select").executed == ["select"]


def test_a_grid_takes_the_smallest_that_passes(finished: Run, root: Path) -> None:
    measured = finished.summary("verify")["rows"][1]["kl_mean"]
    grid = recipe(
        root,
        "prune={candidates: {ratio: [0.9375, 0.5]}}",
        f"evaluate.gates={{kl_mean: {{max: {measured * 3}}}}}",
        f"output.directory={root / 'grid'}",
    )
    run = apply(grid, until="prune")
    assert run.summary("evaluate")["chosen"] == "reap-r0.5" and run.summary("prune")["experts"] == {
        str(i): 16 for i in range(4)
    }


def test_the_command_line_ends_with_the_documented_codes(root: Path, finished: Run) -> None:
    where = [
        f"--set={text}" for text in (*SMALL, f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}")
    ]
    done = command("apply", DEMO, *where, "--json")
    assert done.code == 0 and done.json()["executed"] == []
    for override, code in (
        ("prune.ratio=2", 2),
        ("model.source=./nowhere", 3),
        ("evaluate.gates={kl_mean: {max: 0.000001}}", 5),
    ):
        done = command("apply", DEMO, *where, "--set", override)
        assert done.code == code and "Traceback" not in done.stderr


def test_observations_are_merged_and_drawn(finished: Run, root: Path, tmp_path: Path) -> None:
    observation = str(root / "run" / "observation")
    assert command("merge", observation, observation, "-o", tmp_path / "both").code == 0
    once, twice = Observation.load(Path(observation)), Observation.load(tmp_path / "both")
    assert np.array_equal(twice.statistics["gate_norm_sum"], 2 * once.statistics["gate_norm_sum"]) and len(
        twice.eaft
    ) == 2 * len(once.eaft)
    assert np.array_equal(twice.saliency("reap"), once.saliency("reap"))
    assert command("merge", observation, "-o", tmp_path / "both").code == 2
    selection = root / "run" / "selection"
    assert command("report", tmp_path / "both", "-o", tmp_path / "page.html", "--selection", selection).code == 0
    assert "<html" in (tmp_path / "page.html").read_text()[:500]


def test_plan_runs_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from reapkit.cli.main import main; "
        f"main(['plan', {str(DEMO)!r}, '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["experts"] == {str(layer): 32 for layer in range(4)}

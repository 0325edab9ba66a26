"""Each stage's output on a small recipe, against what was written down: other bytes need another version of the stage.

    python -m tests.pipeline.test_golden

writes the file anew, once the versions of the stages that changed were raised. On the machine and with the versions
that wrote it the files' sha256 are compared. Elsewhere other instructions round otherwise, a token near a tie takes
another expert, and text is continued with another word: there names, types, shapes and words are compared exactly, sums
of tensors to 2 % and measured numbers, of a few hundred positions, to a quarter.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reapkit.core.dtypes import DTYPES
from reapkit.core.safetensors_header import read_header
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.published_names import inner_names, is_planned
from reapkit.pipeline.run import Run, walk
from reapkit.recipe.loading import load
from tests.support.paths import TESTS

GOLDEN = TESTS / "pipeline" / "golden.json"
SMALL = (
    "calibration.samples=16",
    "calibration.max_length=512",
    "evaluate.packs={samples: 8, lengths: [512]}",
    "evaluate.generation={prompts: 2, max_new_tokens: 8}",
    "evaluate.throughput=null",
    "evaluate.gates={kl_mean: {max: 5}}",
    "evaluate.controls=[random]",
    "prune.repair=ridge",
    "quantize.method=rtn",
)
MEASURED = {"seconds", "tokens_per_second", "finished", "versions", "device", "placement", "examples"}
"""Keys of facts that differ from run to run, or hold generated text."""
OF_TENSORS, OF_MEASUREMENTS = (0.02, 1e-4), (0.25, 0.05)
"""Relative and absolute tolerances on another machine."""
LONG, MANY = 8, 64  # longer lists, and mappings of more entries, are summed up


def walked(directory: Path) -> Run:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        where = (f"runtime.store={directory / 'store'}", f"output.directory={directory / 'run'}", "runtime.device=cpu")
        return walk(make_plan(load("demo", (*SMALL, *where))))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------- what a file holds


def facts_of_file(path: Path) -> Any:
    """The file in short: names, types, shapes and words, and numbers to be compared as numbers."""
    if path.suffix == ".safetensors":
        tensors = {name: facts_of_tensor(path, info) for name, info in sorted(read_header(path).items())}
        return summary([*tensors.items()]) if len(tensors) > MANY else tensors
    if path.suffix == ".json":
        return without_measured(json.loads(path.read_text()))
    return words(path.read_text())


def facts_of_tensor(path: Path, info: Any) -> list[Any]:
    stored = DTYPES[info.dtype]
    raw = np.fromfile(path, np.uint8, info.nbytes, offset=info.begin)
    if info.dtype in ("F64", "F32"):
        values = raw.view(stored.numpy).astype(np.float64)
        values = values[np.isfinite(values)]
        return [info.dtype, list(info.shape), float(values.mean()) if values.size else 0.0, float(np.abs(values).sum())]
    whole = info.dtype.startswith(("I", "U", "BOOL"))
    return [info.dtype, list(info.shape), float(raw.view(stored.numpy).astype(np.float64).sum()) if whole else 0.0]


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in MEASURED}
        return summary([kept]) if len(kept) > MANY else {key: without_measured(inner) for key, inner in kept.items()}
    if isinstance(value, list):
        return summary(value) if len(value) > LONG else [without_measured(inner) for inner in value]
    return words(value) if isinstance(value, str) else value


def summary(values: list[Any]) -> list[Any]:
    """A long list in short: its length, the sum of its numbers, and the hash of everything else."""
    flat = list(flattened(values))
    numbers = [value for value in flat if is_number(value)]
    rest = [words(value) if isinstance(value, str) else value for value in flat if not is_number(value)]
    return [len(values), float(sum(map(abs, numbers))), hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16]]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict | tuple):
        for inner in [part for pair in value.items() for part in pair] if isinstance(value, dict) else value:
            yield from flattened(inner)
    else:
        yield value


def words(text: str) -> str:
    """Text without its paths and numbers, hashed where it is long."""
    masked = re.sub(r"[\d.,<>–−+-]+", "#", re.sub(r"(/[\w.-]+){2,}", "/", text))
    return masked if len(masked) < 200 else hashlib.sha256(masked.encode()).hexdigest()[:16]


def differences(expected: Any, found: Any, place: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from differences(expected.get(key), found.get(key), f"{place}.{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{place}[{index}]")
    elif is_number(expected) and is_number(found):
        relative, absolute = OF_TENSORS if ".safetensors" in place else OF_MEASUREMENTS
        if not math.isclose(expected, found, rel_tol=relative, abs_tol=absolute):
            yield f"{place}: {expected} became {found}"
    elif expected != found:
        yield f"{place}: {str(expected)[:80]} became {str(found)[:80]}"


# ---------------------------------------------------------------------------------------------- what a run left


def described(run: Run) -> dict[str, Any]:
    """Facts of every stage's payload; the pages hold times and are described by their words alone."""
    found = {}
    for stage in run.plan.stages:
        files = sorted(path for path in run.artifacts[stage.name].payload.rglob("*") if path.is_file())
        shown = [path for path in files if path.suffix != ".html"]
        payload = run.artifacts[stage.name].payload
        facts = {str(path.relative_to(payload)): facts_of_file(path) for path in shown}
        found[stage.name] = {"version": stage.definition.version, "files": facts}
    return found


def hashed(run: Run) -> dict[str, str]:
    """One sha256 per stage whose payload holds no times."""
    found = {}
    for name, artifact in run.artifacts.items():
        if name not in ("verify", "report"):
            sha = hashlib.sha256()
            for path in sorted(path for path in artifact.payload.rglob("*") if path.is_file()):
                sha.update(f"{path.relative_to(artifact.payload)}\n".encode() + path.read_bytes())
            found[name] = sha.hexdigest()
    return found


def this_machine() -> str:
    """What decides rounding: processor, instructions, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llmcompressor", "numpy"))
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {python}, {versions}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return walked(tmp_path_factory.mktemp("golden"))


def test_every_stage_gives_what_its_version_gave(run: Run) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = json.loads(json.dumps(described(run)))
    assert found.keys() == golden["stages"].keys(), "write golden.json anew: there are other stages"
    for name, expected in golden["stages"].items():
        version_now = found[name]["version"]
        assert version_now == expected["version"], f"{name} has version {version_now}: write golden.json anew"
        changed = list(differences(expected["files"], found[name]["files"], name))
        assert not changed, f"raise the version of stage {name}, then write golden.json anew: {changed[:5]}"


def test_the_bytes_are_those_of_this_machine(run: Run) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["sha256"].keys() == hashed(run).keys()
    if golden["machine"] != this_machine():
        pytest.skip(f"bytes are compared on the machine that wrote them: {golden['machine']}")
    changed = [name for name, sha in hashed(run).items() if sha != golden["sha256"][name]]
    assert not changed, f"raise the versions of {changed}, then write golden.json anew"


def test_a_difference_is_noticed() -> None:
    assert list(differences({"a": [1, 2.0]}, {"a": [1, 2.8]}, "x")) == ["x.a[1]: 2.0 became 2.8"]
    assert list(differences({"a": 1}, {"a": 2, "b": 3}, "x")) == ["x.a: 1 became 2", "x.b: None became 3"]
    assert list(differences([2.0], [2.1], "x.safetensors")) == ["x.safetensors[0]: 2.0 became 2.1"]
    assert not list(differences([2.0], [2.01], "x.safetensors"))
    assert words("KL 0.34 of 12 rows") == words("KL 0.35 of 13 rows") != words("KL 0.34 of 12 lines")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        made = walked(Path(directory))
        golden = {"machine": this_machine(), "sha256": hashed(made), "stages": described(made)}
    lines = [f"{json.dumps(name)}: {json.dumps(facts, sort_keys=True)}" for name, facts in golden.pop("stages").items()]
    head = json.dumps(golden, indent=1, sort_keys=True).removesuffix("\n}")
    GOLDEN.write_text(f'{head},\n "stages": {{\n  ' + ",\n  ".join(lines) + "\n }\n}\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()


def test_the_names_that_a_run_needs_are_those_that_it_writes(run: Run, tmp_path: Path) -> None:
    """Patterns of stages that have not run cover every file that they show."""
    where = (f"runtime.store={tmp_path / 'store'}", f"output.directory={tmp_path / 'run'}", "runtime.device=cpu")
    planned = inner_names(make_plan(load("demo", (*SMALL, *where))))
    shown = [file.relative_to(run.directory) for file in run.directory.rglob("*") if file.is_file()]
    inside = [(file.parts[0], "/".join(file.parts[1:])) for file in shown if len(file.parts) > 1]
    assert {name for name, _ in inside} >= {"calibration", "packs", "observation", "selection", "repair", "pruned"}
    assert not [each for each in inside if not is_planned(each[1], planned[each[0]])]

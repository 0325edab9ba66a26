"""A small finished run, and copies of it on which a machine can be broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from tests.support.command import Finished
from tests.support.forked import Forks

RECIPE = """
version: 1
name: small
model: {source: builtin:demo}
calibration: {samples: 8, max_length: 64, score: all, mix: [{name: code, source: "builtin:code"}]}
prune: {ratio: 0.5}
evaluate:
  packs: {samples: 8, lengths: [64]}
  gates: {kl_mean: {max: 99}}
  generation: null
  throughput: null
  equal_bytes: false
quantize: {scheme: W4A16, method: rtn, group_size: 64}
runtime: {device: cpu, batch_tokens: 256}
"""
STAGES = ("calibrate", "packs", "observe", "select", "evaluate", "prune", "quantize", "verify", "report")
TIMED = ("verify", "report")
"""Stages whose results hold times, so that no two are equal."""
MEASUREMENTS = ("hidden", "signals", "continuations", "proofs", "throughput", "benchmarks")
"""What `evaluate` and `verify` measured, which they would find again."""
NO_DEFECT = ("Traceback", "internal error", "Exception ignored", "lost sys.stderr", "Fatal Python error")


def finished_run(directory: Path, commands: Forks) -> Path:
    """A directory with the recipe, its store and its run."""
    (directory / "small.yaml").write_text(RECIPE)
    ended = commands.run("apply", "small.yaml", directory=directory)
    assert ended.code == 0, ended.stderr
    return directory


def copied(finished: Path, target: Path, *without: str, link: bool = False) -> Path:
    """The same at `target`, without the artifacts of these stages and without the run; `link`: sharing its bytes."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(finished / "small.yaml", target)
    gone = (*without, *(MEASUREMENTS if "verify" in without else ()))
    left_out = shutil.ignore_patterns("runs", "*.lock", *(f"{stage}-*" for stage in gone))
    shutil.copytree(
        finished / "runs/.store",
        target / "runs/.store",
        ignore=left_out,
        copy_function=os.link if link else shutil.copy,
    )
    return target


def from_stage(name: str) -> tuple[str, ...]:
    """The stage and those after it."""
    return STAGES[STAGES.index(name) :]


def artifacts(directory: Path) -> dict[str, str]:
    """The sha256 of every finished artifact's files, by its directory; not of those that hold times."""
    found = {}
    for manifest in sorted((directory / "runs/.store").glob("*/manifest.json")):
        payload = manifest.parent / "payload"
        if ".damaged" in manifest.parent.name:
            continue
        if json.loads(manifest.read_text())["stage"] in TIMED or not payload.is_dir():
            continue
        sha = hashlib.sha256()
        for file in sorted(path for path in payload.rglob("*") if path.is_file()):
            sha.update(f"{file.relative_to(payload)}\n".encode() + file.read_bytes())
        found[manifest.parent.name] = sha.hexdigest()
    return found


def assert_told(ended: Finished, *codes: int) -> str:
    """The command ended with one of the codes and a sentence, and blames nobody but the machine."""
    for words in NO_DEFECT:
        assert words not in ended.stderr, ended.stderr
    assert ended.code in codes, (ended.code, ended.stderr)
    if ended.code:
        last = ended.stderr.rstrip().splitlines()[-1]
        assert last.endswith("."), ended.stderr
    return ended.stderr

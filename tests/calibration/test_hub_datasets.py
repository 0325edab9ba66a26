"""A dataset on the hub: read online, then again without the hub, by its commit, and never another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from reapkit.calibration.tables import open_dataset
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import MixEntry
from tests.support.fake_hub import COMMIT, Repository, serve
from tests.support.paths import ROOT

OTHER = "ab" * 20
RECIPE = """
version: 1
name: t
model: builtin:demo
calibration: {samples: 8, max_length: 64, mix: [{name: d, source: org/data}]}
prune: {ratio: 0.5}
quantize: {group_size: 64}
evaluate: {packs: {samples: 4, lengths: [64]}}
"""
CARD = "---\nconfigs: [{config_name: default, data_files: [{split: train, path: data/train.jsonl}]}]\n---\n"


def test_a_cache_of_another_commit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes it offline, with a warning."""
    builder = SimpleNamespace(hash=COMMIT)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    entry = MixEntry.model_validate({"name": "d", "source": "org/data", "revision": OTHER})
    with pytest.raises(UnusableError, match=f"wanted at commit {OTHER}, but the local cache holds {COMMIT}"):
        open_dataset(entry, "org/data", seed=0)


@pytest.mark.long
def test_what_was_read_online_is_read_offline(tmp_path: Path) -> None:
    data = tmp_path / "hub"
    (data / "data").mkdir(parents=True)
    rows = [{"text": f"row number {number} of a text that is long enough"} for number in range(40)]
    (data / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "README.md").write_text(CARD)
    (tmp_path / "r.yaml").write_text(RECIPE)
    with serve() as hub:
        hub.repositories["datasets/org/data"] = Repository(data)
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}

        def apply(name: str, *more: str, offline: bool) -> subprocess.CompletedProcess[str]:
            where = ("--set", f"output.directory={name}", "--set", f"runtime.store={name}.store")
            command = [sys.executable, "-m", "reapkit", "apply", "r.yaml", "--until", "packs", *where, *more]
            env = environment | {"HF_HUB_OFFLINE": str(int(offline))}
            return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

        online, offline = apply("online", offline=False), apply("offline", offline=True)
        wrong = apply("wrong", "--set", f"calibration.mix.d.revision={OTHER}", offline=True)
    assert online.returncode == offline.returncode == 0, online.stderr + offline.stderr
    assert "cached" not in offline.stderr
    tokens = [(tmp_path / name / "calibration/tokens.safetensors").read_bytes() for name in ("online", "offline")]
    locks = [json.loads((tmp_path / name / "lock.json").read_text())["sources"] for name in ("online", "offline")]
    assert tokens[0] == tokens[1] and locks[0] == locks[1]
    assert locks[0]["calibration.mix.d"]["revision"] == COMMIT
    assert wrong.returncode == 3 and f"the local cache holds {COMMIT}" in wrong.stderr

"""Hub models that are not downloaded: planned from metadata, the same as once they are there, and refused in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from reapkit.calibration.identity import tokenizer_identity
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.hub import cached_snapshot, download_snapshot, hub_checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.safetensors_header import FIRST_READ_BYTES
from reapkit.pipeline.planned import make_plan
from reapkit.planning.lock import make_lock
from reapkit.planning.starting_recipe import starting_recipe
from reapkit.recipe.loading import load
from tests.support.fake_hub import COMMIT, Hub, Repository, reached, serve
from tests.support.paths import ROOT
from tests.support.published_models import write, write_checkpoint

TENSORS = [(f"model.layers.0.mlp.experts.{expert}.up_proj.weight", "BF16", (400, 200)) for expert in range(4)]
RECIPE = """
version: 1
name: t
model: {source: org/demo}
calibration: {samples: 4, mix: [{name: d, source: "builtin:code"}]}
prune: {ratio: 0.5}
quantize: {group_size: 64}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the packaged model as org/demo, an empty cache, and a recipe beside it."""
    with serve() as hub:
        reached(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "r.yaml").write_text(RECIPE)
        hub.repositories["org/demo"] = Repository(MODEL_DIRECTORY)
        yield hub
    close_session()


def keys(download: bool = False) -> dict[str, str | None]:
    return {stage.name: stage.key for stage in make_plan(load("r.yaml"), download=download).stages}


def test_a_plan_from_metadata_has_the_keys_of_the_downloaded_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")  # the fake refuses to see it where the hub redirects
    planned = keys()
    assert (
        hub.served["model.safetensors"]
        <= FIRST_READ_BYTES
        < 0.01 * hub.repositories["org/demo"].size("model.safetensors")
    )
    assert cached_snapshot("org/demo", None) is None
    assert keys(download=True) == planned
    served = hub.served.copy()
    assert served["model.safetensors"] >= hub.repositories["org/demo"].size("model.safetensors")
    assert keys() == planned and hub.served == served


@pytest.mark.parametrize(("num_shards", "is_indexed"), [(1, True), (2, True), (4, True), (1, False)])
@pytest.mark.parametrize("lfs", [True, False])
def test_the_identity_is_that_of_the_downloaded_model(
    hub: Hub, tmp_path: Path, num_shards: int, lfs: bool, is_indexed: bool
) -> None:
    model = write_checkpoint(tmp_path / "model", {"model_type": "x"}, iter(TENSORS), num_shards=num_shards)
    if not is_indexed:
        (model / "model.safetensors.index.json").unlink()
        (model / "model-00001-of-00001.safetensors").rename(model / "model.safetensors")
    for i, shard in enumerate(sorted(model.glob("*.safetensors"))):
        shard.write_bytes(shard.read_bytes()[:-1] + bytes([i]))
    hub.repositories["org/x"] = Repository(model, lfs)
    remote = hub_checkpoint("org/x", None)
    assert (cached_snapshot("org/x", COMMIT) is None) == lfs  # what git keeps is small, and fetched
    downloaded = Checkpoint.open(download_snapshot("org/x", None))
    assert remote.identity == downloaded.identity
    assert remote.tensors == downloaded.tensors and remote.nbytes == 4 * 400 * 200 * 2
    assert remote.path == downloaded.path and remote.path.name == COMMIT


def test_a_mirror_that_serves_whole_files_only_is_understood(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = hub_checkpoint("org/demo", COMMIT)
    hub.ranges = False
    assert hub_checkpoint("org/demo", "main").identity == planned.identity


def test_a_published_model_is_planned_from_its_headers(hub: Hub, tmp_path: Path) -> None:
    model = write("qwen3-30b-a3b", tmp_path / "model")
    (model / "tokenizer_config.json").write_text("{}")
    hub.repositories["org/demo"] = Repository(
        model, hashes={path.name: "ab" * 32 for path in model.glob("*.safetensors")}
    )
    plan = make_plan(load("r.yaml"))
    local = Checkpoint.open(model)
    assert plan.checkpoint.tensors == local.tensors and plan.base.nbytes == local.nbytes > 60e9
    assert plan.base.experts == dict.fromkeys(range(48), 128)
    headers = {
        shard: min(tensor.begin for tensor in local.tensors.values() if tensor.shard == shard) for shard in local.shards
    }
    assert {shard: hub.served[shard] for shard in headers} == {
        shard: max(size, FIRST_READ_BYTES) for shard, size in headers.items()
    }
    assert max(headers.values()) > FIRST_READ_BYTES and max(hub.requests[shard] for shard in headers) == 2


def test_contradictions_are_found_before_anything_is_downloaded(hub: Hub) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "reapkit", "apply", "r.yaml", "--set", "prune.ratio=0.97"],
        capture_output=True,
        text=True,
        env=environment
        | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": constants.HF_HUB_CACHE,
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == RecipeError.exit_code, done.stderr
    assert (
        done.stderr
        == "--set prune.ratio=0.97: 0.97 leaves 1 of 32 experts, but qwen3_moe routes each token to 2 experts"
        " (num_experts_per_tok), which needs 2. Choose at most 0.9375.\n"
    )
    assert 0 < hub.served_weights() <= FIRST_READ_BYTES


def test_a_lock_and_a_first_recipe_need_no_download(hub: Hub) -> None:
    lock = make_lock(load("r.yaml"))
    assert lock["model"]["revision"] == COMMIT
    assert lock["model"]["tokenizer"] == tokenizer_identity(MODEL_DIRECTORY)
    assert "model:\n  source: org/demo" in starting_recipe("org/demo", Path.cwd())[1]
    assert hub.served_weights() <= 2 * FIRST_READ_BYTES
    make_plan(load("r.yaml", ["model.revision=main"]), download=True)
    assert make_lock(load("r.yaml")) == lock


def test_a_commit_that_is_cached_under_another_name_is_not_read_again(hub: Hub) -> None:
    planned = {
        stage.name: stage.key for stage in make_plan(load("r.yaml", [f"model.revision={COMMIT}"]), download=True).stages
    }
    served = hub.served.copy()
    assert keys() == planned and hub.served == served


def test_a_cached_model_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = keys(download=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert keys() == planned == keys(download=True)
    snapshot = cached_snapshot("org/demo", None)
    (snapshot / "README.md").unlink()  # other tools fetch only what they need
    assert keys() == planned == keys(download=True)
    shutil.rmtree(snapshot.parents[1] / "trees")  # older versions of the hub's library keep no listing
    assert keys() == planned
    (snapshot / "model.safetensors").unlink()
    assert cached_snapshot("org/demo", None) is None


def refusal(download: bool = False, *overrides: str) -> str:
    with pytest.raises(UnusableError) as raised:
        make_plan(load("r.yaml", overrides), download=download)
    assert raised.value.exit_code == 3
    return str(raised.value)


@pytest.mark.parametrize("download", [False, True])
def test_what_the_hub_refuses_is_said_with_what_would_help(hub: Hub, download: bool) -> None:
    host = hub.endpoint.removeprefix("http://")
    assert (
        refusal(download, "model.source=org/nothing")
        == f"model.source: org/nothing is neither a directory, nor in the local hub cache, nor to be seen on {host}."
        " Check the name; if it is private, log in with `hf auth login`."
    )
    assert (
        refusal(download, "model.source=a/b/c")
        == "model.source: 'a/b/c' is neither a directory nor a hub id (org/name)."
    )
    assert (
        refusal(download, "model.revision=v2")
        == f"model.revision: org/demo has no revision 'v2' on {host}. Name one of its commits, tags or branches."
    )
    hub.repositories["org/demo"].gated = True
    assert (
        refusal(download)
        == f"model.source: org/demo is gated. Accept its terms at {host}/org/demo, log in with `hf auth login` and run"
        " again."
    )
    assert hub.served_weights() == 0


def test_without_a_hub_the_reason_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    keys()  # its small files are cached, its weights are not
    host = hub.endpoint.removeprefix("http://")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        refusal()
        == "model.source: org/demo is not in the local hub cache with all its safetensors, and HF_HUB_OFFLINE forbids"
        f" to ask {host}. Unset it, or give a local directory."
    )
    assert (
        refusal(True)
        == f"model.source: org/demo could not be downloaded, and HF_HUB_OFFLINE forbids to ask {host}. Unset it, or"
        " give a local directory."
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert (
        refusal()
        == "model.source: org/demo is not in the local hub cache with all its safetensors (127.0.0.1:1: ConnectError)."
        " Check the network and run again, or give a local directory."
    )


def test_a_repository_that_is_no_checkpoint_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    hub.repositories["org/demo"] = Repository(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    assert refusal() == "model.source: org/demo has no config.json on the hub. Give the id of a transformers model."
    (tmp_path / "model" / "config.json").write_text("{}")
    assert (
        refusal()
        == "model.source: org/demo has no safetensors weights on the hub. reapkit reads safetensors only; choose"
        " another "
        "repository, or convert its weights and give the local directory."
    )
    assert not hub.served


def test_a_shard_that_is_no_safetensors_file_is_named(hub: Hub, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"model_type": "x"}, iter(TENSORS), num_shards=2)
    (model / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    hub.repositories["org/demo"] = Repository(model)
    assert (
        refusal()
        == "model.source: model-00002-of-00002.safetensors of org/demo is not a safetensors file, or is cut short"
        " (43 bytes) on the hub. Choose another revision."
    )
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    hub.repositories["org/other"] = Repository(model)
    assert "the index names the shard '../a.safetensors', which is not a file of this directory" in refusal(
        False, "model.source=org/other"
    )

"""A link that leads out of a checkpoint is refused before anything behind it is read; the hub cache's own are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import UnusableError
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection

KEPT = LayerSelection(tuple(range(16)), tuple(range(16, 32)), ())
HALF = Selection("reap", dict.fromkeys(range(4), KEPT))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("token")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("key")
    return Path(shutil.copytree(MODEL_DIRECTORY, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("notes.txt", "../secret"),
        ("chat_template.jinja", "{root}/secret"),
        ("extra", "../private"),
        ("extra/deep.json", "../../secret"),
        (".hidden", "../secret"),
        ("chain", "within"),
        ("dangling", "../not there"),
        ("config.json", "../config.json"),
        ("model.safetensors", "../model.safetensors"),
        ("blob", "../blobs/abc"),
    ],
)
def test_a_link_that_leads_out_is_refused_whatever_it_is(model: Path, name: str, target: str) -> None:
    place = model / name
    if place.exists():
        shutil.move(place, model.parent / name)
    if name == "chain":
        (model / "within").symlink_to("../secret")
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target.format(root=model.parent))
    with pytest.raises(UnusableError, match=r"is a link that leads out of the directory.*cp -L") as raised:
        prune_checkpoint(Checkpoint.open(model), HALF, model.parent / "out")
    assert name in str(raised.value) and raised.value.exit_code == 3 and not (model.parent / "out").exists()


def test_a_link_that_circles_is_neither_followed_nor_copied(model: Path) -> None:
    (model / "one").symlink_to("two")
    (model / "two").symlink_to("one")
    prune_checkpoint(Checkpoint.open(model), HALF, model.parent / "out")
    assert not (model.parent / "out" / "one").exists()


def test_links_within_the_directory_are_what_they_stand_for(model: Path) -> None:
    (model / "kept").mkdir()
    (model / "kept" / "LICENSE").write_text("free")
    (model / "LICENSE").symlink_to("kept/LICENSE")
    prune_checkpoint(Checkpoint.open(model), HALF, model.parent / "out")
    assert (model.parent / "out" / "LICENSE").read_text() == "free"


@pytest.mark.parametrize("through", [False, True])
def test_the_hub_caches_own_links_are_followed(model: Path, through: bool) -> None:
    """Also where the snapshot itself, or the folder that holds the cache, is reached through a link."""
    repository = model.parent / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, repository / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    if through:
        (model.parent / "here").symlink_to(snapshot)
        snapshot = model.parent / "here"
    prune_checkpoint(Checkpoint.open(snapshot), HALF, model.parent / "out")
    assert (model.parent / "out" / "tokenizer.json").read_bytes() == (MODEL_DIRECTORY / "tokenizer.json").read_bytes()
    (snapshot / "notes").symlink_to(model.parent / "secret")
    with pytest.raises(UnusableError, match="leads out of the directory"):
        Checkpoint.open(snapshot)

"""Records of written directories with absurd values are refused or found wrong; none ends in a defect."""

from __future__ import annotations

import json
import random

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import ReapkitError
from reapkit.pruning.checkpoint import MANIFEST, prune_checkpoint
from reapkit.pruning.manifest import check_directory
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.hostile_json import absurd_texts


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "pruned"
    kept = LayerSelection(tuple(range(16)), tuple(range(16, 32)), ())
    prune_checkpoint(Checkpoint.open(MODEL_DIRECTORY), Selection("reap", dict.fromkeys(range(4), kept)), out)
    return out


@pytest.mark.parametrize("seed", range(2))
def test_a_record_is_refused_or_checked(pruned, seed):
    original, wrong = (pruned / MANIFEST).read_text(), 0
    record = {key: value for key, value in json.loads(original).items() if key not in ("key", "source")}
    try:
        for text in absurd_texts(record, random.Random(seed), 80):
            (pruned / MANIFEST).write_text(text)
            try:
                wrong += not all(finding.passed for finding in check_directory(pruned))
            except ReapkitError as error:
                assert error.exit_code in (2, 3)
                wrong += 1
    finally:
        (pruned / MANIFEST).write_text(original)
    assert wrong > 40 and all(finding.passed for finding in check_directory(pruned))

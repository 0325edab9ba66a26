"""Observations from elsewhere with absurd facts are refused; none ends in a defect."""

from __future__ import annotations

import json
import random

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.core.errors import ReapkitError
from reapkit.observation.external import ImportedObservation
from reapkit.observation.observation import Observation
from tests.support.hostile_json import absurd_texts
from tests.support.observations import observe_routing, random_routing


def test_facts_are_refused_or_can_be_compared_with_the_model(tmp_path):
    directory, checkpoint, refused = tmp_path / "observation", Checkpoint.open(MODEL_DIRECTORY), 0
    observe_routing(random_routing(0), trace=False).save(directory)
    facts = json.loads((directory / "observation.json").read_text())
    for text in absurd_texts(facts, random.Random(0), 200):
        (directory / "observation.json").write_text(text)
        try:
            imported = ImportedObservation.open(directory, tmp_path / "cache.json")
            assert imported.differences(["code"])
            Observation.load(directory)
            imported.check(checkpoint, checkpoint.layout)
        except ReapkitError as error:
            assert error.exit_code in (2, 3)
            refused += 1
    assert refused == 200  # it is of another model, if nothing else is wrong

"""Reads an observation that was made elsewhere, identifies it by content and checks that it fits the recipe's model.
Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout
from reapkit.core.artifact_store import READ_WHOLE
from reapkit.core.as_written import require_as_written
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest
from reapkit.core.payload_files import sha256_of
from reapkit.core.stat_record import StatRecord
from reapkit.observation.recorded_facts import read_facts

FILES = ("observation.json", "observation.safetensors", "trace.safetensors")


@dataclass(frozen=True)
class ImportedObservation:
    """A directory with an observation: `hashes` are its files' sha256 (hex) by name, `content` the one over all of
    them, which becomes its key; `facts` its JSON."""

    directory: Path
    hashes: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def content(self) -> str:
        return digest([[name, sha256] for name, sha256 in self.hashes.items()])

    @classmethod
    def open(cls, directory: Path, cache: Path) -> ImportedObservation:
        """Hashes the files; large ones that `cache` (a JSON file, kept up) knows by size, mtime and inode not again.

        Raises UnusableError where the directory holds no observation, or one that is not as it was written.
        """
        directory = directory.resolve()
        require_as_written(directory)
        try:
            facts = read_facts(directory)
            names = FILES if facts["eaft"] else FILES[:2]
            hashes = _hashes([directory / name for name in names], cache)
        except (OSError, ValueError) as error:
            raise UnusableError(
                f"--observation {directory}: the observation cannot be read ({type(error).__name__}: {error}). Give an"
                " observation's directory, or a run that has one."
            ) from None
        return cls(directory, hashes, facts)

    @property
    def files(self) -> list[Path]:
        """What has to be taken over."""
        return [self.directory / name for name in (FILES if self.facts["eaft"] else FILES[:2])]

    def check(self, checkpoint: Checkpoint, layout: Layout) -> None:
        """Raises UnusableError where it was not made of this model: another identity, other MoE layers, other numbers
        of experts."""
        theirs = self.facts["meta"].get("model")
        if theirs is not None and theirs != checkpoint.identity:
            raise UnusableError(
                f"--observation {self.directory}: the observation is of model {theirs[:12]}, but the recipe's model is"
                f" {checkpoint.identity[:12]} ({checkpoint.path}). Give the model that was observed. A copy of local"
                " files counts as the same model only if the copy keeps the file times (cp -p, rsync -t)."
            )
        held = {index: layer.num_experts for index, layer in layout.layers.items()}
        observed = dict.fromkeys(self.facts["layers"], self.facts["num_experts"])
        if {index: observed.get(index) for index in held} != held or set(observed) - set(held) - set(layout.mtp):
            raise UnusableError(
                f"--observation {self.directory}: the observation has {len(observed)} MoE layers of"
                f" {self.facts['num_experts']} experts, but the recipe's model has {len(held)} of"
                f" {' to '.join(map(str, sorted(set(held.values()))))}. Give an observation of this model."
            )

    def differences(self, mix: list[str]) -> str:
        """What must be said: that this recipe's calibration was not what was observed, and how its sources differ from
        `mix`."""
        tokens = sum(self.facts["scored_tokens"])
        other = "" if set(self.facts["sources"]) == set(mix) else f", while calibration.mix names {', '.join(mix)}"
        unknown = (
            ""
            if self.facts["meta"].get("model")
            else " The observation does not name its model, so only layers and experts were checked."
        )
        return (
            f"the observation was imported from {self.directory}: {tokens:,} scored tokens of"
            f" {', '.join(self.facts['sources'])}{other}. Held-out rows are disjoint from this recipe's own"
            f" calibration, but perhaps not from the data that was observed there.{unknown}"
        )


def _hashes(files: list[Path], cache: Path) -> dict[str, str]:
    """sha256 (hex) of each file by its name."""
    record, now = StatRecord.of(cache), {str(file): file.stat() for file in files}
    known = {name: record.sha256(name, facts) for name, facts in now.items() if facts.st_size > READ_WHOLE}
    doubtful = [Path(name) for name in now if not known.get(name)]
    taken = {str(file): sha256 for file, sha256 in sha256_of(doubtful)}
    if large := {name: (now[name], sha256) for name, sha256 in taken.items() if name in known}:
        record.update(large)
    return {Path(name).name: taken.get(name) or known[name] for name in now}

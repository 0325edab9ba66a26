"""torchrun's key-value store, which every rank of a run reads and writes. Torch-free until it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from reapkit.core.errors import StageFailed

PATIENCE = timedelta(seconds=120)  # of a rank that looks for the store


class LostContact(StageFailed):
    """torchrun's key-value store does not answer any more."""

    def __init__(self) -> None:
        super().__init__(
            "lost contact with torchrun's rendezvous (torchrun or the machine of rank 0 stopped), so the run ends."
            " Finished work is kept; run the same command again to resume."
        )


class Keys:
    """JSON values by key in a torch.distributed.Store. Every method raises LostContact where the store is gone."""

    def __init__(self, store: Any):
        self._store = store

    def put(self, key: str, value: Any) -> None:
        with _contact():
            self._store.set(key, json.dumps(value))

    def has(self, *keys: str) -> bool:
        """Whether all of them are there."""
        with _contact():
            return self._store.check(list(keys))

    def get(self, key: str) -> Any:
        """The value of a key that is there; waits for another."""
        with _contact():
            return json.loads(self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        """The sum of all that was added to `key` so far, by any rank."""
        with _contact():
            return self._store.add(key, amount)


def torchrun_keys() -> tuple[Keys, int, int]:
    """(keys, rank, number of ranks) of this process, as torchrun started it; the keys are those of this restart."""
    # public names, which torch's own __init__ does not list as such
    from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage,reportUnknownVariableType]

    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Keys(PrefixStore(f"reapkit/{restarts}", store)), rank, world


@contextmanager
def _contact() -> Generator[None, None, None]:
    """Raises LostContact for every error of the store's client."""
    try:
        yield
    except RuntimeError as error:
        raise LostContact from error

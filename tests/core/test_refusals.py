"""A refusal of the machine is found in whatever error tells of it; a defect is none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch

from reapkit.core.errors import StageFailed
from reapkit.core.refusals import WAYS_OUT, SystemRefusal, refusal_in
from tests.support.disks import filled, mounted


def error_of(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a disk without a free byte."""
    with mounted(tmp_path_factory.mktemp("disks") / "full", "size=64k") as disk, filled(disk):
        yield disk


def test_the_systems_own_errors_say_where_what_and_what_to_do(tmp_path: Path) -> None:
    found = refusal_in(error_of(lambda: (tmp_path / "missing" / "file").write_text("")))
    assert found == SystemRefusal(errno.ENOENT, "No such file or directory", (str(tmp_path / "missing/file"),))
    assert found.told() == (
        f"{tmp_path}/missing/file: No such file or directory. Check the path, and make the folder that it lies in, then"
        " run the same command again."
    )
    assert found.told("here", "Do that") == "here: No such file or directory. Do that, then run the same command again."


@pytest.mark.parametrize("number", sorted(number for number in WAYS_OUT if number > 0))
def test_every_number_is_found_behind_the_words_of_other_languages(number: int) -> None:
    for text in (f"Error: {os.strerror(number)} (os error {number})", f"[Errno {number}] {os.strerror(number)}: '/x'"):
        found = refusal_in(Exception(text))
        assert found is not None and (found.number, found.said) == (number, os.strerror(number))
        assert WAYS_OUT[number] in found.told()


def test_safetensors(full: Path, tmp_path: Path) -> None:
    tensors = {"a": np.zeros(100_000, np.float32)}
    error = error_of(lambda: safetensors.numpy.save_file(tensors, full / "file"))
    found = refusal_in(error)
    assert not isinstance(error, OSError) and found is not None and found.number == errno.ENOSPC, error
    (tmp_path / "damaged").write_bytes(b"\x10" + b"\0" * 7 + b"{" * 16)
    found = refusal_in(error_of(lambda: safetensors.numpy.load_file(tmp_path / "damaged")))
    assert found is not None and "header" in found.told() and "Check the disk and the path" in found.told()


def test_tokenizers(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    error = error_of(lambda: tokenizer.save(str(tmp_path / "missing" / "tokenizer.json")))
    found = refusal_in(error)
    assert type(error) is Exception and found is not None and found.number == errno.ENOENT


def test_torch_and_numpy(full: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    for write in (
        lambda: torch.save(tensors, str(full / "file")),  # it says nothing about the reason
        lambda: tensors["a"].numpy().tofile(full / "file"),
    ):
        found = refusal_in(error_of(write))
        assert found is not None and found.told() == (
            "a file could not be written as a whole. Free some space on its disk, then run the same command again."
        )
    found = refusal_in(error_of(lambda: torch.empty(1 << 56, dtype=torch.uint8)))
    assert found is not None and found.number == errno.ENOMEM


def test_arrow(full: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = refusal_in(error_of(lambda: pq.write_table(pa.table({"a": range(100_000)}), str(full / "file"))))
    assert found is not None and found.number == errno.ENOSPC


def test_datasets_wraps_what_the_disk_said() -> None:
    from datasets.exceptions import DatasetGenerationError

    def generate() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error

    found = refusal_in(error_of(generate))
    assert found is not None and found.number == errno.ENOSPC


def test_the_network_has_errors_of_its_own() -> None:
    found = refusal_in(httpx.ConnectError("All connection attempts failed"))
    assert found is not None and found.told() == (
        "ConnectError: All connection attempts failed. Check the network, then run the same command again."
    )


def test_memory_threads_and_packages() -> None:
    assert refusal_in(MemoryError()).told() == (
        "the machine's memory does not suffice. Free some memory, or lower runtime.batch_tokens, then run the same"
        " command again."
    )
    assert refusal_in(RuntimeError("can't start new thread")).number == errno.EAGAIN
    assert refusal_in(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")).number == errno.ENOMEM
    missing = ModuleNotFoundError("No module named 'compressed_tensors'", name="compressed_tensors")
    assert "Install reapkit and the packages it needs again" in refusal_in(missing).told()
    assert refusal_in(ModuleNotFoundError("No module named 'reapkit.gone'", name="reapkit.gone")) is None


def test_defects_and_our_own_errors_are_no_refusals() -> None:
    assert refusal_in(StageFailed("No space left on device")) is None
    assert refusal_in(KeyError("a")) is None and refusal_in(ValueError("wrong")) is None

    def defect() -> None:
        try:
            Path("/missing/reapkit").read_text()
        except OSError:
            raise KeyError("a defect in what deals with a file that is not there")  # noqa: B904

    assert refusal_in(error_of(defect)) is None


def test_a_full_disk_is_seen_behind_an_error_that_came_up_meanwhile() -> None:
    def cleaning_up() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
        except OSError:
            raise AttributeError("'Writer' object has no attribute 'file'")  # noqa: B904

    found = refusal_in(error_of(cleaning_up))
    assert found is not None and found.number == errno.ENOSPC and found.files == ("/somewhere",)

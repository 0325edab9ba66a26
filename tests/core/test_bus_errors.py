"""A page that the kernel cannot supply ends the process with a message and a code, in any thread and library."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from reapkit.core.bus_errors import mapped_file

READERS = {
    "numpy": "numpy.memmap(path, numpy.uint8, 'r')",
    "mmap": "mmap.mmap(os.open(path, os.O_RDWR), 0)",
    "torch": "torch.from_file(path, shared=False, size=SIZE, dtype=torch.uint8)",
    "torch, several threads": "torch.from_file(path, shared=False, size=SIZE, dtype=torch.uint8)",
    "safetensors": "safetensors.safe_open(path, 'pt').get_tensor('a')",
}
SCRIPT = """
import mmap, os, sys, threading
from reapkit.core import bus_errors
path, reader, in_thread, SIZE = sys.argv[1], sys.argv[2], sys.argv[3] == "True", 8_000_000
if "numpy" in reader:
    import numpy
elif "mmap.mmap" not in reader:
    import safetensors, torch
    torch.set_num_threads(int(sys.argv[4]))

def tell(work, file):
    print(f"{work}: {file}", flush=True)
    return 3

def work():
    with bus_errors.during("reading"):
        tensor = eval(reader)
        os.truncate(path, 1000)
        print(sum(tensor[at] for at in range(100, SIZE, 4096)) if "torch" not in reader else tensor.double().sum())

bus_errors.listen(tell)
if in_thread:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_cut_short_while_it_is_mapped(tmp_path: Path, reader: str, in_thread: bool) -> None:
    if sys.platform != "linux":
        pytest.skip("the process dies of it")
    file = tmp_path / "a file.safetensors"
    if reader == "safetensors":
        import torch
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(8_000_000, dtype=torch.uint8)}, file)
    else:
        file.write_bytes(b"x" * 8_000_000)
    threads = "2" if "several" in reader else "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, file, READERS[reader], str(in_thread), threads],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, f"reading: {file}\n", "")


def test_the_file_behind_an_address(tmp_path: Path) -> None:
    import ctypes

    path = tmp_path / "with spaces (deleted)"
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place = ctypes.c_char.from_buffer(mapped)
        assert mapped_file(ctypes.addressof(place) + 100) == str(path).removesuffix(" (deleted)")
        del place
    assert mapped_file(0) is None

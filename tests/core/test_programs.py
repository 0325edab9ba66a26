"""How another program ended is said in words."""

from __future__ import annotations

import sys

import pytest

from reapkit.core.programs import how_it_ended, run_program


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(3)", "ended with code 3"),
        (
            "import os; os.kill(os.getpid(), 7)",
            "was ended by SIGBUS (a file that it had mapped was cut short, or a disk is full)",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL (somebody, or the kernel for want of memory)"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
    ],
)
def test_the_end_of_a_program(code: str, expected: str) -> None:
    assert run_program([sys.executable, "-c", code]).how == expected


def test_an_unknown_signal() -> None:
    assert how_it_ended(-99) == "was ended by signal 99"


def test_output_is_read_in_any_encoding_and_input_is_closed() -> None:
    code = "import sys; sys.stdout.buffer.write(bytes([195, 188, 255])); sys.stderr.write(repr(sys.stdin.read()))"
    done = run_program(
        [sys.executable, "-c", code], environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    )
    assert (done.stdout, done.stderr, done.how) == ("ü\ufffd", "''", "ended with code 0")

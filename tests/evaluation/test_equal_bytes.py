"""The equal-bytes control is the nearest scheme of the unpruned model, or none; the next scheme is the cheapest larger
one."""

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.evaluation.equal_bytes import equal_bytes, next_scheme
from reapkit.quantization.sizes import quantized_bytes
from reapkit.recipe.schema import QuantizeSpec

SPEC = QuantizeSpec(group_size=64)
CHECKPOINT = Checkpoint.open(MODEL_DIRECTORY)


def nbytes(scheme):
    return quantized_bytes(CHECKPOINT, SPEC.model_copy(update={"scheme": scheme}))


def test_the_nearest_scheme_is_found_from_its_size():
    for scheme in ("W3A16", "W4A16", "W8A16"):
        found = equal_bytes(CHECKPOINT, SPEC, int(nbytes(scheme) * 1.01))
        assert found.scheme == found.spec.scheme == scheme and found.nbytes == nbytes(scheme)
        assert found.spec.group_size == 64 and found.spec.method == "rtn"
        assert (
            str(found)
            == f"The unpruned model in {scheme} (groups of 64, rounded to nearest) takes 99% of the result's bytes."
        )
        assert found.to_json()["bytes"] == nbytes(scheme)


def test_none_where_even_the_smallest_is_too_large():
    found = equal_bytes(CHECKPOINT, SPEC, nbytes("W2A16") // 2)
    assert found.spec is None and found.scheme == "W2A16" and found.to_json()["scheme"] is None
    assert (
        str(found)
        == "No equal-bytes control: the nearest scheme for the unpruned model, W2A16, takes 200% of the result's bytes."
    )


def test_none_where_no_scheme_fits():
    found = equal_bytes(CHECKPOINT, QuantizeSpec(group_size=48), 1000)
    assert found.scheme is None and "No scheme fits" in str(found)


def test_a_group_size_that_nobody_chose_is_the_largest_that_fits():
    assert equal_bytes(CHECKPOINT, QuantizeSpec(scheme=None), nbytes("W4A16")).spec.group_size == 64


@pytest.mark.parametrize(
    ("now", "next_one"), [("W3A16", "W4A16"), ("W4A16", "W8A16"), ("W2A16", "W3A16"), ("W5A16", "W8A16")]
)
def test_the_next_scheme_is_the_smallest_that_is_larger(now, next_one):
    assert next_scheme(CHECKPOINT, SPEC, nbytes(now)) == (next_one, nbytes(next_one) / nbytes(now))


def test_above_the_largest_there_is_none():
    assert next_scheme(CHECKPOINT, SPEC, nbytes("W8A16")) is None

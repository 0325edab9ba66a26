"""The equal-bytes control is the nearest scheme of the unpruned model, or none."""

from reapkit.builtin import MODEL_DIRECTORY
from reapkit.checkpoint import Checkpoint
from reapkit.evaluate.equal_bytes import equal_bytes
from reapkit.recipe.schema import QuantizeSpec
from reapkit.schemes import quantized_bytes

SPEC = QuantizeSpec(group_size=64)


def test_the_nearest_scheme_is_found_from_its_size():
    checkpoint = Checkpoint.open(MODEL_DIRECTORY)
    for scheme in ("W3A16", "W4A16", "W8A16"):
        target = quantized_bytes(checkpoint, SPEC.model_copy(update={"scheme": scheme}))
        found = equal_bytes(checkpoint, SPEC, int(target * 1.01))
        assert found.scheme == found.spec.scheme == scheme and found.nbytes == target
        assert found.spec.group_size == 64 and found.spec.method == "gptq"
        assert str(found) == f"the unpruned model in {scheme} takes 99% of the result's bytes"


def test_none_where_even_the_smallest_is_too_large():
    checkpoint = Checkpoint.open(MODEL_DIRECTORY)
    smallest = quantized_bytes(checkpoint, SPEC.model_copy(update={"scheme": "W2A16"}))
    found = equal_bytes(checkpoint, SPEC, smallest // 2)
    assert found.spec is None and found.scheme == "W2A16"
    assert str(found) == "no equal-bytes control: the nearest scheme, W2A16, takes 200% of the result's bytes"


def test_none_where_no_scheme_fits():
    found = equal_bytes(Checkpoint.open(MODEL_DIRECTORY), QuantizeSpec(group_size=48), 1000)
    assert found.scheme is None and "no scheme fits" in str(found)

"""docs/formats.md says what reapkit does with every format that checkpoints are published in, and every word of it ran.

    python -m tests.pipeline.test_formats_page

writes the page anew; the tests compare each of its rows with what really happens to a tiny checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.quantization_methods import METHODS
from reapkit.checkpoint.readable import require_readable, way_out
from reapkit.core.errors import UnusableError
from reapkit.evaluation.proofs.pruned import prove_pruned
from reapkit.evaluation.proofs.quantized import prove_quantized
from reapkit.observation.streamed import observe_streaming
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.quantization.sizes import quantized_bytes
from reapkit.recipe.schema import ObserveSpec, QuantizeSpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import quantized_sources, tiny
from tests.support.paths import ROOT
from tests.support.quantized_sources import FILE
from tests.support.tiny_tokens import tiny_tokens

PAGE = ROOT / "docs/formats.md"
LOWER = QuantizeSpec(scheme="W3A16", method="rtn", group_size=32)


def row(name: str, root: Path) -> str:
    """The page's row for a format, from what happens to a tiny checkpoint of it."""
    with tiny.quiet():
        source = quantized_sources.write(name, root / "source")
        checkpoint = Checkpoint.open(source)
        readable = _observed(checkpoint, root)
        cells = [name, readable, _cut(checkpoint, root / "pruned", readable == "yes"), "no"]
        if readable == "yes":
            cells[3] = _quantized(root / "pruned", root / "quantized")
    return f"| {' | '.join(cells)} |"


def _observed(checkpoint: Checkpoint, root: Path) -> str:
    try:
        require_readable(checkpoint)
    except UnusableError as error:
        assert str(error).endswith(way_out())
        return "refused by `plan`"
    tokens = tiny_tokens(root / "calibration")
    found = observe_streaming(
        checkpoint.path, tokens, ObserveSpec(eaft=False), batch_tokens=256, work_directory=root / "observing"
    )
    assert found is not None
    assert (found.statistics["gate_norm_sum"] > 0).any()
    return "yes"


def _cut(source: Checkpoint, out: Path, readable: bool) -> str:
    """Every second expert goes; what is left are the source's own bytes, and compute what the source computes without
    the others."""
    experts = source.architecture.num_experts
    keep, drop = tuple(range(0, experts, 2)), tuple(range(1, experts, 2))
    selection = Selection(
        "reap", {layer: LayerSelection(keep, drop, (0.0,) * experts) for layer in source.layout.layers}
    )
    try:
        prune_checkpoint(source, selection, out)
    except UnusableError:
        return "no"
    old, new = load_file(source.path / FILE), load_file(out / FILE)
    for name, tensor in new.items():
        if source.architecture.model_type == "gpt_oss":
            whole = old[name]
            kept = whole if tensor.shape == whole.shape else whole[list(keep)]
        else:
            layer, _, rest = name.partition(".mlp.experts.")
            number, _, part = rest.partition(".")
            kept = old[f"{layer}.mlp.experts.{keep[int(number)]}.{part}"] if rest else old[name]
            kept = kept[list(keep)] if name.endswith("mlp.gate.weight") else kept
        assert quantized_sources.same_bytes(kept, tensor), name
    assert len(new) < len(old) or source.architecture.model_type == "gpt_oss"
    if readable:
        proofs = prove_pruned(source.path, out, selection)
        assert [proof.name for proof in proofs] == ["tensors", "config", "loads", "logits", "generates"]
        assert not [proof for proof in proofs if not proof.passed or not proof.measured], proofs
    return "yes, its bytes"


def _quantized(source: Path, out: Path) -> str:
    facts = quantize_checkpoint(source, out, LOWER)
    assert facts["nbytes"] == quantized_bytes(Checkpoint.open(source), LOWER)
    failed = [proof for proof in prove_quantized(source, out, LOWER) if not proof.passed]
    assert not failed, failed
    return "yes"


INTRODUCTION = """\
# Formats of published checkpoints

What reapkit does with quantized weights. `python -m tests.pipeline.test_formats_page` makes this page, and every row of
the second table is what happened to a tiny checkpoint of that format.

- **observed**: the weights are dequantized one matrix at a time, resident and streamed alike, and the model is observed
  and evaluated with them; activations are not rounded.
- **cut as it is**: pruning keeps the format; kept experts have the bytes that they had.
- **quantized again**: `quantize.scheme` on the pruned checkpoint, from its dequantized weights.

What cannot be observed is refused by `plan` with exit code 3, before anything runs. The way out: observe the model's
unquantized release and quantize the result.
"""


def page(rows: list[str]) -> str:
    methods = (
        f"| `{method.name}` | {method.meaning} | {method.tool} | {_read(method.unread)} |"
        for method in METHODS.values()
    )
    tables = (
        ["| `quant_method` | weights | written by | read |", "|---|---|---|---|", *methods],
        ["| format | observed | cut as it is | quantized again |", "|---|---|---|---|", *rows],
    )
    return "\n".join([INTRODUCTION, *("\n".join(table) + "\n" for table in tables)])


def _read(unread: str | None) -> str:
    return "yes" if unread is None else f"no: {unread}"


def rows() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in quantized_sources.QUICK else pytest.mark.long)
        for name in quantized_sources.NAMES
    ],
)
def test_a_format_is_treated_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert row(name, tmp_path) in rows()


def test_the_page_has_a_row_for_every_format_and_a_word_for_every_method() -> None:
    told = [line for line in rows() if line.split(" | ")[0].removeprefix("| ") in quantized_sources.NAMES]
    assert [line.split(" | ")[0].removeprefix("| ") for line in told] == list(quantized_sources.NAMES)
    assert PAGE.read_text(encoding="utf-8") == page(told)


if __name__ == "__main__":
    made = []
    for each in quantized_sources.NAMES:
        with TemporaryDirectory() as scratch:
            made.append(row(each, Path(scratch)))
    PAGE.write_text(page(made), encoding="utf-8")

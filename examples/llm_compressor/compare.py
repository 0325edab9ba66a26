"""REAP and GPTQ in one llm-compressor recipe, and the same in one reapkit recipe: the two directories, tensor by
tensor.

    python examples/llm_compressor/compare.py [--directory runs/llm-compressor] [--set calibration.samples=32]

Both see the same calibration rows in the same order. Prints what differs; ends with 1 where anything does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from llmcompressor import oneshot
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import reapkit.llmcompressor  # registers REAPModifier
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.model.loading import load_model
from reapkit.pipeline.run import apply
from reapkit.quantization.oneshot import equal_batches
from reapkit.quantization.quiet import quiet
from reapkit.recipe.loading import load

HERE = Path(__file__).parent
BUILTIN = Path(reapkit.__file__).parent / "calibration/builtin/demo_model"


def with_reapkit(directory: Path, overrides: list[str]) -> Path:
    """The recipe's run directory."""
    apply(
        load(
            HERE / "recipe.yaml",
            (f"runtime.store={directory / 'store'}", f"output.directory={directory / 'reapkit'}", *overrides),
        )
    )
    return directory / "reapkit"


def with_llm_compressor(tokens: CalibrationTokens, out: Path) -> Path:
    """The same, from the model and the rows alone."""
    rows = list(equal_batches(tokens, batch_tokens=16384))
    with quiet():
        oneshot(
            model=load_model(BUILTIN),
            processor=AutoTokenizer.from_pretrained(BUILTIN),
            recipe=str(HERE / "llm_compressor.yaml"),
            dataset=DataLoader(rows, batch_size=None),
            num_calibration_samples=len(rows),
            moe_calibrate_all_experts=False,
            output_dir=str(out),
        )
    return out


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in Checkpoint.open(directory).shards:
        with safe_open(directory / shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal: names, shapes, dtypes, bits."""
    first, second = tensors(a), tensors(b)
    lines = [f"{name}: only in {a if name in first else b}" for name in sorted(set(first) ^ set(second))]
    for name in sorted(set(first) & set(second)):
        x, y = first[name], second[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            lines.append(f"{name}: {x.dtype} {list(x.shape)} here, {y.dtype} {list(y.shape)} there")
        elif not torch.equal(x, y):
            lines.append(f"{name}: {int((x != y).sum())} of {x.numel()} values differ")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/llm-compressor"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    arguments = parser.parse_args()
    ours = with_reapkit(arguments.directory, arguments.overrides)
    theirs = with_llm_compressor(CalibrationTokens.load(ours / "calibration"), arguments.directory / "llm-compressor")
    found = differences(ours / "quantized", theirs)
    print("\n".join(found) or f"{len(tensors(theirs))} tensors, all identical: {ours / 'quantized'} and {theirs}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())

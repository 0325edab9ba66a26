"""What quantization adds to pruning: KL against the base of RTN and GPTQ at 3 and 4 bits, on the packaged model at half
its experts.

    python benchmarks/quantized_kl.py [--directory runs/quantized-kl] [--out benchmarks/results/quantized_kl.json]
    [--set PATH=VALUE]

One recipe (recipes/demo.yaml) with other `quantize` settings; the runs share observation, selection and pruned model.
Numbers are the verify stage's, on held-out rows, with its 95 % bootstrap intervals over rows. Prints a Markdown table
as it comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reapkit.pipeline.run import apply
from reapkit.recipe.loading import load

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
SETTINGS = tuple((scheme, method) for scheme in ("W4A16", "W3A16") for method in ("rtn", "gptq"))
WHOLE = ("kl_mean", "top1_agreement", "perplexity_ratio")


def measured(directory: Path, scheme: str, method: str, overrides: list[str]) -> dict[str, Any]:
    """verify's metrics of the pruned and of the quantized model: name -> metric -> {value, interval}."""
    own = (
        f"quantize.scheme={scheme}",
        f"quantize.method={method}",
        "evaluate.gates={kl_mean: {max: 100}}",
        "evaluate.controls=[]",
        "evaluate.generation=null",
        f"runtime.store={directory / 'store'}",
        f"output.directory={directory / f'{scheme}-{method}'}",
    )
    apply(load(RECIPE, (*own, *overrides)))
    metrics = json.loads((directory / f"{scheme}-{method}" / "verify.json").read_text())["metrics"]
    return {
        name: {metric: by_length[length]["all"][metric] for metric in WHOLE}
        for name, by_length in metrics.items()
        if name in ("pruned", "quantized")
        for length in list(by_length)[:1]
    }


def row(name: str, metrics: dict[str, Any]) -> str:
    cells = [
        f"{metrics[metric]['value']:.4f} ({metrics[metric]['interval'][0]:.4f} to {metrics[metric]['interval'][1]:.4f})"
        for metric in WHOLE
    ]
    return f"| {name} | {' | '.join(cells)} |"


def machine() -> str:
    """Cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, {memory / 2**30:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/quantized-kl"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for scheme, method in SETTINGS:
        found = measured(arguments.directory, scheme, method, arguments.overrides)
        results |= {"pruned, bf16": found["pruned"], f"{scheme} {method}": found["quantized"]}
    print("| model | KL against the base | top-1 agreement | perplexity ratio |", "|---|---|---|---|", sep="\n")
    print(*(row(name, metrics) for name, metrics in results.items()), sep="\n")
    if arguments.out is not None:
        facts = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "settings": arguments.overrides,
            "versions": {
                name: version(name) for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")
            },
            "results": results,
        }
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

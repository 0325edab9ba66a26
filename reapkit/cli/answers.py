"""The command that lets the base model answer prompts: traces."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from reapkit.cli.app import Json, Overrides, RecipeArgument, app, quiet_libraries
from reapkit.core.formatting import plural
from reapkit.pipeline.planned import load_and_plan


@app.command()
def traces(
    recipe: RecipeArgument,
    overrides: Overrides,
    source: Annotated[
        str | None, typer.Option("--source", metavar="NAME", help="The mix's source whose prompts are answered.")
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Prompts at most.")] = 256,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Tokens after which an answer is cut off, and not kept; default: half of calibration.max_length.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, help="0: greedy; above: sampled.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", min=0, max=1, help="Share of the probability that is sampled from.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of sampling.")] = 0,
    server: Annotated[
        str | None,
        typer.Option(
            "--server", metavar="URL", help="Ask this server (vLLM, SGLang) instead of loading the model here."
        ),
    ] = None,
    served_as: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The model's name there; default: the first served.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File to write; default: traces/SOURCE.jsonl beside the recipe."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let the base model answer the prompts of a source, and keep the answers that it ended by itself, as a source for
    the mix. Interrupted, it goes on where it stopped.

    Example: reapkit traces my-recipe.yaml --source tools --server http://127.0.0.1:8000
    """
    made = load_and_plan(recipe, overrides)
    quiet_libraries()
    from reapkit.cli.progress_bars import make_progress
    from reapkit.evaluation.answering import Sampling
    from reapkit.pipeline.traces import Asked, make_traces, record_path

    name = source or made.recipe.calibration.mix[0].name
    output = output or made.loaded.directory / "traces" / f"{name}.jsonl"
    longest = max_new_tokens or max(1, made.recipe.calibration.max_length // 2)
    sampling = Sampling(longest, temperature, top_p if temperature else 1.0, seed)
    record = make_traces(made, Asked(sampling, prompts, output, source, server, served_as), make_progress())
    if as_json:
        print(json.dumps({"path": str(output), "record": str(record_path(output)), **record}))
        return
    counts = record["counts"]
    skipped = ", ".join(f"{number} {reason}" for reason, number in record["skipped"].items())
    print(
        f"{output}: {plural(counts['kept'], 'conversation')} of {plural(counts['asked'], 'prompt')};"
        f" {counts['not_ended']} did not end, {counts['empty']} were empty."
        + (f" Rows without a prompt: {skipped}." if skipped else "")
        + " To calibrate on it:"
    )
    place = os.path.relpath(output.resolve(), made.loaded.directory.resolve())
    print(
        f"calibration:\n  mix:\n    - {{name: {name}-traces, source: {json.dumps(place)}, format: messages}}"
        f"  # sha256 {record['file']['sha256'][:12]}, which `reapkit lock` pins"
    )

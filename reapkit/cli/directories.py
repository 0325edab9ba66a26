"""Commands on finished directories: merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reapkit.cli.app import Json, app
from reapkit.errors import RecipeError


@app.command()
def merge(observations: Annotated[list[str], typer.Argument(metavar="OBSERVATION...", help="Observations of one model, from any machines.")],
          output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the sum goes.")], as_json: Json = False) -> None:
    """Add observations of the same model: other data, other machines, one decision.

    Example: reapkit merge monday/observation tuesday/observation -o both
    """
    from functools import reduce
    from operator import add

    from reapkit.observation import Observation

    if output.exists():
        raise RecipeError(f"{output}: is there already. Choose another directory with -o.")
    merged = reduce(add, (Observation.load(Path(directory)) for directory in observations))
    merged.save(output)
    facts = {"directory": str(output), "tokens": int(merged.tokens.sum()), "sources": list(merged.sources)}
    print(json.dumps(facts) if as_json else f"{output}: {len(observations)} observations, {facts['tokens']:,} tokens of {', '.join(merged.sources)}")

"""The typer application that all commands register with, and the arguments that they share."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from reapkit.cli.global_flags import given

app = typer.Typer(
    name="reapkit",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress Mixture-of-Experts language models from one YAML recipe.\n\nExample: reapkit apply demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a field of the recipe: --set prune.ratio=0.25",
        default_factory=list,
        show_default=False,
    ),
]
Elsewhere = Annotated[
    str | None,
    typer.Option(
        "--observation",
        metavar="DIR",
        help=("Use this observation of the same model, made elsewhere, instead of observing."),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


def out() -> Console:
    return Console(highlight=False)


def quiet_libraries() -> None:
    """The libraries' own bars and advice would break ours; must happen before they are imported.
    --verbose wants them."""
    if given().verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")

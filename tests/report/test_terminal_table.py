"""Tables keep every word and number whole at 80, 60 and 40 columns: columns go, or rows are stacked."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from reapkit.report.inspection.render import table
from reapkit.report.tables import result_table
from reapkit.report.terminal_table import TerminalColumn, TerminalTable
from tests.support import synthetic_report as synthetic

LONG = "evaluate.packs.samples: 64 → 128; evaluate.generation.prompts: 8 → 16; reads another select and evaluate"


def at(width: int, shown) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(shown)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def stages() -> TerminalTable:
    made = TerminalTable(
        "demo: stages",
        [
            TerminalColumn("stage", wraps=True),
            TerminalColumn("state", wraps=True),
            TerminalColumn("key", extra=True),
            TerminalColumn("why", wraps=True),
        ],
    )
    made.add_row("calibrate", "will run", "76203ce8d857", LONG)
    made.add_row("observe", "in the store", "83c5237a51c3", "")
    return made


def measured() -> TerminalTable:
    rows = synthetic.facts().verification["rows"]
    return result_table({"rows": [*rows, {**rows[-1], "name": "unpruned, W2A16", "perplexity": 12345.678}]})


def numbered() -> TerminalTable:
    made = TerminalTable("", [TerminalColumn(name, wraps=True) for name in ("layer", "", "top 4")])
    made.add_row("3", "in the store", "47.3% and more")
    return made


def inspected() -> TerminalTable:
    rows = [("perplexity_ratio", "agentic", 512, "1.401 (1.37 to 1.43)", "≤ 1.01", 0.391), ("kl_mean", "all", 512)]
    rows[1] = (*rows[1], "0.3388 (0.319 to 0.36)", "≤ 0.01", None)
    return table("Gates", ("gate", "source", "row length", "measured", "limit", "beyond by"), rows, left=("source",))


@pytest.mark.parametrize("width", [100, 80, 60, 40, 24])
@pytest.mark.parametrize("made", [stages, measured, inspected], ids=lambda each: each.__name__)
def test_no_word_and_no_number_breaks_and_nothing_is_cut(made, width) -> None:
    shown = made()
    lines = at(width, shown)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    said = " ".join(lines).split()
    cells = [cell for place, column in enumerate(shown.columns) for row in shown.rows for cell in [row[place]]]
    dropped = {row[place] for place, column in enumerate(shown.columns) if column.extra for row in shown.rows}
    words = [word for cell in cells if cell not in dropped for word in cell.split() if len(word) <= width - 4]
    assert words and not [word for word in words if word not in said]


def test_the_key_goes_before_rows_are_stacked() -> None:
    wide, narrow, narrowest = ("\n".join(at(width, stages())) for width in (80, 64, 40))
    assert "76203ce8d857" in wide and "why" in wide.splitlines()[2]
    assert "76203ce8d857" not in narrow and "─" in narrow
    assert "─" not in narrowest and "\n  key    76203ce8d857\n" in narrowest
    assert at(24, numbered())[2:] == ["layer 3", "  in the store", "  top 4  47.3% and more", ""]
    assert "\n  why" not in narrowest.split("observe")[1]  # an empty cell says nothing


def test_a_table_that_fits_is_drawn_as_columns() -> None:
    lines = at(80, measured())
    assert lines[2].split()[:2] == ["experts", "size"] and "─" in lines[3]
    assert [line.split()[0] for line in lines[4:-1]] == ["base", "pruned", "quantized", "unpruned,"]


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 cells for 4 columns"):
        stages().add_row("observe", "hit")

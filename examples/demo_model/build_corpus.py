"""Build the demo model's corpus from what every machine with Python and reapkit has.

Code: the standard library's sources and `builtin:code`. Prose: the standard library's docstrings, their lines joined
again, and `builtin:prose`. Tools and math: the generators alone. All generated rows come from the reserved training
seed.

Writes one `<domain>.jsonl` per domain, its rows in a shuffled but fixed order.
"""

import argparse
import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from reapkit.calibration.builtin.generators import TRAINING_SEED, generate

GENERATED_ROWS = {"code": 4500, "prose": 4500, "tools": 4500, "math": 9000}
STDLIB_CHARACTERS = {"code": 2_000_000, "prose": 800_000}
"""How much of the standard library joins in, so that the generated share stays the larger one."""

SKIPPED_FOLDERS = {
    "__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
CHUNK_CHARACTERS = 2000


def build_corpus(folder: Path) -> None:
    """Write `<domain>.jsonl` for all domains into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(stdlib_sources())
    texts = {"code": code_chunks(sources), "prose": docstring_paragraphs(sources)}
    for domain, count in GENERATED_ROWS.items():
        rows = list(islice(generate(domain, seed=TRAINING_SEED, training=True), count))
        rows += [{"text": text} for text in _at_most(texts.get(domain, []), STDLIB_CHARACTERS.get(domain, 0))]
        Random(domain).shuffle(rows)
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


def stdlib_sources() -> Iterator[str]:
    """The standard library's ASCII modules, in the order of their paths, without its tests and data tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            source = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
            if source.isascii() and len(source) > 400:
                yield source


def code_chunks(sources: list[str]) -> list[str]:
    """The sources cut before definitions at the top level, and gathered to pieces of about `CHUNK_CHARACTERS`."""
    chunks = []
    for source in sources:
        chunk = ""
        for part in re.split(r"(?<=\n)(?=(?:def |class |@|async def ))", source):
            if chunk and len(chunk) + len(part) > CHUNK_CHARACTERS:
                chunks.append(chunk)
                chunk = ""
            chunk += part[: 2 * CHUNK_CHARACTERS]
        chunks.append(chunk)
    return [chunk for chunk in chunks if len(chunk) > 200]


def docstring_paragraphs(sources: list[str]) -> list[str]:
    """Docstrings that read like English, the paragraphs of one module gathered to pieces of `CHUNK_CHARACTERS`."""
    pieces, seen = [], set()
    for source in sources:
        piece = ""
        for paragraph in _paragraphs(source):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
            if len(piece) > CHUNK_CHARACTERS:
                pieces.append(piece + "\n")
                piece = ""
        if len(piece) > 200:
            pieces.append(piece + "\n")
    return pieces


def _paragraphs(source: str) -> Iterator[str]:
    """The paragraphs of a module's docstrings that are running English, each on one line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(paragraph.split())
                if len(text) > 80 and _is_english(text):
                    yield text


def _is_english(text: str) -> bool:
    plain = sum(character.isalpha() or character in " ,.'" for character in text) / len(text)
    return plain > 0.93 and re.search(r"\b(the|of|to|is|and)\b", text) is not None


def _at_most(texts: list[str], characters: int) -> Iterator[str]:
    """Texts in a fixed random order until `characters` are reached."""
    taken = 0
    for text in Random("stdlib").sample(texts, len(texts)):
        if taken >= characters:
            return
        taken += len(text)
        yield text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    build_corpus(parser.parse_args().folder)

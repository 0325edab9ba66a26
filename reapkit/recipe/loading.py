"""Loads recipe files into one checked Recipe: merges parents, applies overrides, reports all problems at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from reapkit.core.errors import Problem, RecipeError
from reapkit.recipe.as_written import as_recipe_values, spelled_out
from reapkit.recipe.error_messages import closest, may_be_null, problems_of
from reapkit.recipe.schema import Recipe
from reapkit.recipe.yaml_tree import STANDARD_INPUT, Node, json_text, parse_document, read_document, walk

SHIPPED = tuple(
    folder
    for folder in (Path(__file__).parents[1] / "_recipes", Path(__file__).parents[2] / "recipes")
    if folder.is_dir()
)


class LoadedRecipe(Recipe):
    """A checked recipe that knows the folder its relative paths start from, and where each of its values was written.

    `directory`: that folder. `shown`: the recipe's file as messages call it. `document`: the merged text as a tree. A
    copy with other values (`model_copy`) keeps them.
    """

    _directory: Path = PrivateAttr()
    _shown: str = PrivateAttr()
    _document: Node = PrivateAttr()

    @classmethod
    def of(cls, recipe: Recipe, directory: Path, shown: str, document: Node) -> LoadedRecipe:
        """`recipe`, with the place it comes from."""
        loaded = cls.model_construct(recipe.model_fields_set, **dict(recipe))
        loaded._directory, loaded._shown, loaded._document = directory, shown, document
        return loaded

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def shown(self) -> str:
        return self._shown

    @property
    def document(self) -> Node:
        return self._document

    def problem(self, path: str, message: str) -> Problem:
        """A problem at a recipe path such as `prune.caps[0].layers`, with the position of its closest written
        ancestor."""
        nodes = dict(walk(self.document))
        place = path
        while place and place not in nodes:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        return nodes.get(place, self.document).problem(path, message, at_key=place != path)

    def located(self, error: RecipeError) -> RecipeError:
        """The same problems with positions, for those that know only their path."""
        return RecipeError([p if p.file else self.problem(p.path, p.message) for p in error.problems])


def find_recipe(name: str) -> Path:
    """The file of a path or of a shipped recipe's name; `-`, pipes and `/dev/stdin` stay as they are. Raises
    RecipeError listing near names."""
    path = Path(name)
    if path.is_file() or name == STANDARD_INPUT or (path.exists() and not path.is_dir()):
        return path
    for folder in SHIPPED:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    if path.is_dir():
        raise RecipeError(f"{name}: is a folder. Give the recipe's file, or the name of a shipped recipe.")
    known = sorted(
        {str(file.relative_to(folder).with_suffix("")) for folder in SHIPPED for file in folder.rglob("*.yaml")}
    )
    raise RecipeError(
        f"{name}: the recipe file does not exist.{closest(name, known)} Shipped recipes: {', '.join(known) or 'none'}."
    )


def load(name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe at a path or of a shipped name, `overrides` being `key.path=YAML value` strings.

    Raises RecipeError carrying every problem of the recipe and its parents.
    """
    path = find_recipe(str(name))
    problems: list[Problem] = []
    document = _read_with_parents(path, (), problems)
    for override in overrides:
        _override(document, override, problems)
    document = spelled_out(document)
    recipe, found, stand_ins = _validate(document)
    loaded = LoadedRecipe.of(recipe, _folder(path), _named(name), document) if recipe else None
    if any(problem.path == "extends" for problem in problems):
        found = [problem for problem in found if not problem.message.startswith("is missing")]  # the parent may hold it
    found = [problem for problem in found if problem.path not in {known.path for known in problems}]
    if problems or found or loaded is None:
        error = RecipeError(in_file_order(problems + found))
        error.partial, error.stand_ins = loaded, stand_ins
        raise error
    return loaded


def _named(name: str | Path) -> str:
    return "<stdin>" if str(name) == STANDARD_INPUT else str(name)


def _folder(path: Path) -> Path:
    """Where a recipe's relative paths start: its own folder; for a pipe, where the command was given."""
    return path.resolve().parent if path.is_file() else Path.cwd()


def in_file_order(problems: Sequence[Problem]) -> list[Problem]:
    """Without repetitions, as they stand in the file."""
    return sorted(dict.fromkeys(problems), key=lambda p: (p.file or "", p.line or 0, p.column or 0))


_STAND_INS: dict[str, Any] = {
    "version": 1,
    "name": "stand-in",
    "model": {"source": "builtin:demo"},
    "calibration": {"samples": 1, "mix": [{"name": "stand-in", "source": "builtin:code"}]},
    "prune": {"ratio": 0.5},
}
"""What takes the place of a required section that is missing or too broken to mend: the others are checked without
it."""


def _validate(document: Node) -> tuple[Recipe | None, list[Problem], frozenset[str]]:
    """The recipe, every problem, and the sections that stand-ins fill; with problems it is what remains without the
    broken values."""
    plain, written = as_recipe_values(document)
    problems: list[Problem] = []
    stand_ins: set[str] = set()
    for _ in range(4):  # dropping a broken value can leave its section incomplete, then the section goes too
        try:
            return Recipe.model_validate_json(json_text(plain)), written + problems, frozenset(stand_ins)
        except ValidationError as error:
            problems = problems or problems_of(error.errors(), document)
            for place in sorted((_place(plain, e["loc"]) for e in error.errors()), key=len, reverse=True):
                _drop(plain, place)
            lost = [name for name in _STAND_INS if name not in plain]
            stand_ins.update(lost)
            plain |= copy.deepcopy({name: _STAND_INS[name] for name in lost})
            if "calibration" in lost:
                _drop(plain, ("saliency", "mix"))
    return None, written + problems, frozenset(stand_ins)


def _place(plain: Any, loc: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a validation location that exists in the data: union tags and missing keys fall away."""
    place: list[Any] = []
    for part in loc:
        if (isinstance(plain, dict) and part in plain) or (
            isinstance(plain, list) and isinstance(part, int) and part < len(plain)
        ):
            place.append(part)
            plain = plain[part]
    return tuple(place)


def _drop(plain: Any, place: Sequence[Any]) -> None:
    for part in place[:-1]:
        if not ((isinstance(plain, dict) and part in plain) or (isinstance(plain, list) and part < len(plain))):
            return
        plain = plain[part]
    if place and (
        (isinstance(plain, list) and place[-1] < len(plain)) or (isinstance(plain, dict) and place[-1] in plain)
    ):
        del plain[place[-1]]


def _read_with_parents(path: Path, chain: tuple[Path, ...], problems: list[Problem]) -> Node:
    """The document at `path` merged over what it extends; `chain` is how we got here."""
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise RecipeError([Problem("extends", f"is circular: {names}. Remove one of them.", str(path))])
    document = spelled_out(_with_raw_recipe(read_document(path, _shown(path), problems), path, problems))
    parent = document.value.pop("extends", None)
    if parent is None or parent.value is None:
        return document
    if not isinstance(parent.value, str):
        problems.append(parent.problem("extends", "must be the path of another recipe, relative to this one."))
        return document
    parent_path = path.parent / parent.value
    if not parent_path.is_file():
        near = [str(file.relative_to(path.parent)) for file in path.parent.rglob("*.yaml") if file != path]
        problems.append(
            parent.problem(
                "extends", f"found '{parent.value}', but this file does not exist.{closest(parent.value, near)}"
            )
        )
        return document
    inherited = _read_with_parents(parent_path, (*chain, resolved), problems)
    return _merge(_rebased(inherited, parent_path.parent, path.parent), document)


def _with_raw_recipe(document: Node, path: Path, problems: list[Problem]) -> Node:
    """`quantize.recipe` as the text of the file it names, which is found from the recipe's own folder: what it says is
    what counts."""
    section = document.value.get("quantize")
    node = section.value.get("recipe") if section is not None and isinstance(section.value, dict) else None
    if (
        section is None
        or node is None
        or not isinstance(node.value, str)
        or "\n" in node.value
        or not node.value.endswith((".yaml", ".yml"))
    ):
        return document
    file = path.parent / node.value
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        problems.append(
            node.problem(
                "quantize.recipe",
                f"found '{node.value}', but this file cannot be read. The path is relative to the recipe's directory.",
            )
        )
        return document
    return replace(
        document,
        value={
            **document.value,
            "quantize": replace(section, value={**section.value, "recipe": replace(node, value=text)}),
        },
    )


def _shown(path: Path) -> str:
    if str(path) == STANDARD_INPUT:
        return "<stdin>"
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _merge(parent: Node, child: Node, path: str = "") -> Node:
    """Deep merge, the child wins; lists of named items merge by name; null goes back to the default.

    A null stays where the field may be null (`quantize.scheme: null` means none); an item whose `source` is null is
    removed. A mapping that names another kind (`format: {prompt: ...}` over `{text: ...}`) replaces: formats do not
    blend.
    """
    if isinstance(parent.value, dict) and isinstance(child.value, dict):
        merged = dict(parent.value)
        for key, node in child.value.items():
            place = f"{path}.{key}" if path else key
            if node.value is None and key in merged and not may_be_null(place):
                del merged[key]
            elif key in merged and key not in ("format", "filter"):
                merged[key] = _merge(merged[key], node, place)
            else:
                merged[key] = node
        return replace(child, value=merged)
    if _is_named_list(parent) and _is_named_list(child):
        items = {_name(item): item for item in parent.value}
        for item in child.value:
            name = _name(item)
            if name in items and "source" in item.value and item.value["source"].value is None:
                del items[name]
            else:
                items[name] = _merge(items[name], item, f"{path}[0]") if name in items else item
        return replace(child, value=list(items.values()))
    return child


def _rebased(document: Node, here: Path, there: Path) -> Node:
    """A parent's relative paths, which start from its own folder `here`, as seen from the child's folder `there`."""
    if here.resolve() == there.resolve() or not isinstance(document.value.get("calibration", document).value, dict):
        return document

    def moved(node: Node) -> Node:
        path = node.value
        if not isinstance(path, str) or Path(path).is_absolute() or not (any(here.glob(path)) if path else False):
            return node
        return replace(node, value=os.path.relpath(here.resolve() / path, there.resolve()))

    calibration = dict(document.value["calibration"].value) if "calibration" in document.value else {}
    if "chat_template" in calibration:
        calibration["chat_template"] = moved(calibration["chat_template"])
    if "mix" in calibration and isinstance(calibration["mix"].value, list):
        items = [
            replace(item, value={**item.value, "source": moved(item.value["source"])})
            if isinstance(item.value, dict) and "source" in item.value
            else item
            for item in calibration["mix"].value
        ]
        calibration["mix"] = replace(calibration["mix"], value=items)
    if not calibration:
        return document
    return replace(
        document, value={**document.value, "calibration": replace(document.value["calibration"], value=calibration)}
    )


def _is_named_list(node: Node) -> bool:
    return isinstance(node.value, list) and bool(node.value) and all(_name(item) is not None for item in node.value)


def _name(item: Node) -> Any:
    name = item.value.get("name") if isinstance(item.value, dict) else None
    return name.value if name is not None and isinstance(name.value, str) else None


def _override(document: Node, text: str, problems: list[Problem]) -> None:
    """Set one `key.path=value` in place; list items by index or by name."""
    path, equals, value_text = text.partition("=")
    shown = f"--set {text}"
    if not equals or not path.strip():
        problems.append(Problem("", "write it as key.path=value.", shown))
        return
    found: list[Problem] = []
    value = parse_document(f"value: {value_text}", shown, found).value["value"]
    problems += [replace(problem, path=path + problem.path.removeprefix("value")) for problem in found]
    node, parts = document, path.strip().replace("[", ".").replace("]", "").split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node.value, list):
            index = _index(node, part)
            if index is None:
                names = [str(_name(item)) for item in node.value if _name(item)]
                where = ".".join(parts[:i])
                problems.append(
                    Problem(
                        path,
                        f"{where} has no item '{part}'.{closest(part, names)} Give 0 to {len(node.value) - 1}"
                        + (f" or one of {', '.join(names)}." if names else "."),
                        shown,
                    )
                )
                return
            if last:
                node.value[index] = value
            node = node.value[index]
        else:
            if not isinstance(node.value, dict):
                problems.append(
                    Problem(path, f"{'.'.join(parts[:i])} is not a mapping, so nothing can be set inside it.", shown)
                )
                return
            if last:
                node.value[part] = replace(value, key_line=value.line, key_column=1)
            elif part not in node.value or node.value[part].value is None:
                node.value[part] = Node({}, shown, 1, 1)
            node = node.value[part]


def _index(node: Node, part: str) -> int | None:
    if part.lstrip("-").isdigit() and -len(node.value) <= int(part) < len(node.value):
        return int(part)
    return next((i for i, item in enumerate(node.value) if _name(item) == part), None)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe at `path`, or of a shipped name; `overrides` as `load` takes them.

    Raises RecipeError with every problem at once.
    """
    return load(path, overrides)


def as_loaded(recipe: Recipe | LoadedRecipe | str | Path) -> LoadedRecipe:
    """What the public functions accept: a path, a shipped name, or a recipe (one built in Python: paths start from
    here)."""
    if isinstance(recipe, LoadedRecipe):
        return recipe
    if isinstance(recipe, Recipe):
        return LoadedRecipe.of(recipe, Path.cwd(), "recipe", Node({}, "recipe", 1, 1))
    return load(recipe)

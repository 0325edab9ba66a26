"""Edits a checkpoint's JSON files in place: only the changed values are rewritten, all other bytes stay. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reapkit.checkpoint.architecture import EXPERT_COUNT_KEYS, TEXT_CONFIG_KEYS, TOP_K_KEYS
from reapkit.checkpoint.projection_names import expert_modules
from reapkit.core.errors import UnusableError

Path = tuple[str | int, ...]
Renumber = Callable[[str], str | None]

COUNT_KEY = re.compile(r"^(?:moe_)?(?:num|n)_(?:moe_|routed_|local_)?experts$")
GROUP_SIZE_KEY = re.compile(r"^(?:num_|n_)?experts_per_group$")
MTP_KEY = re.compile(r"(?:^|_)(?:mtp|nextn)(?:_|$)")
OTHER_TOWERS = re.compile(r"vision|visual|image|video|audio|speech|talker|code2wav|token2wav")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DECODER = json.JSONDecoder()


# ---------------------------------------------------------------------------------------------- what changes


@dataclass(frozen=True)
class Counts:
    """Numbers before and after: experts per layer, top-k, and what becomes of multi-token prediction."""

    experts: tuple[int, int]
    experts_per_token: tuple[int, int]
    n_group: int = 1
    drop_mtp: bool = False


def config_edits(config: Mapping[str, Any], counts: Counts, rename: Renumber) -> dict[Path, Any]:
    """New values by path: every count of routed experts wherever nested, top-k, multi-token prediction, names of
    experts.

    `rename` maps a module or tensor name to its new one, to itself, or to None where the module is gone. Other towers
    (vision, audio, ...) are left alone. Raises UnusableError where no field that counts experts is found.
    """
    edits: dict[Path, Any] = {}

    def walk(section: Mapping[str, Any], path: Path) -> None:
        for key, value in section.items():
            here = (*path, key)
            if key in QUANTIZATION_KEYS:
                edits.update({(*here, *at): new for at, new in renamed(value, rename).items()})
            elif (new := _edited(key, value, counts)) is not None:
                if new != value:
                    edits[here] = new
            elif isinstance(value, Mapping) and not OTHER_TOWERS.search(key):
                walk(value, here)

    walk(config, ())
    before, after = counts.experts
    if before != after and not any(COUNT_KEY.match(str(path[-1])) for path in edits):
        raise UnusableError(
            f"config.json: no field with the value {before} counts the experts (looked for "
            f"{', '.join(EXPERT_COUNT_KEYS)}, nested ones too), so the pruned number cannot be declared."
        )
    return edits


def text_section(config: Mapping[str, Any]) -> Path:
    """Where the language model's own fields lie."""
    return next(((key,) for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), Mapping)), ())


def _edited(key: str, value: Any, counts: Counts) -> Any | None:
    """The field's new value, its old one if it is understood and stays, None if it says nothing that pruning
    touches."""
    if key in EXPERT_COUNT_KEYS or COUNT_KEY.match(key):
        return _replaced(value, *counts.experts)
    if key in TOP_K_KEYS:
        return _replaced(value, *counts.experts_per_token)
    if GROUP_SIZE_KEY.match(key):
        return _replaced(value, *(number // counts.n_group for number in counts.experts))
    if counts.drop_mtp and MTP_KEY.search(key):
        return _without_mtp(key, value)
    return None


def _replaced(value: Any, before: int, after: int) -> Any:
    if isinstance(value, list):  # a number per layer: layers without experts keep theirs
        return [after if item == before and not isinstance(item, bool) else item for item in value]
    return after if value == before and not isinstance(value, bool) else value


def _without_mtp(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return False if key.startswith(("use_", "enable_")) else value
    if isinstance(value, int):
        return 0 if re.search(r"num|layers|modules|depth", key) else value
    if isinstance(value, Mapping):
        return {inner: _without_mtp(inner, item) if isinstance(item, int) else item for inner, item in value.items()}
    return value  # lists that describe blocks describe none where the count is 0


def renamed(section: Any, rename: Renumber) -> dict[Path, Any]:
    """New values by path for every list and mapping in `section` that names modules which move or vanish."""
    edits: dict[Path, Any] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, Mapping):
            keys = {key: rename(key) for key in value}
            if any(new != key for key, new in keys.items()):
                edits[path] = {new: value[key] for key, new in keys.items() if new is not None}
                return
            for key, inner in value.items():
                walk(inner, (*path, key))
        elif isinstance(value, list):
            strings = {item: rename(item) for item in value if isinstance(item, str)}
            if any(new != item for item, new in strings.items()):
                edits[path] = [
                    strings.get(item, item) if isinstance(item, str) else item
                    for item in value
                    if not isinstance(item, str) or strings[item] is not None
                ]
                return
            for number, inner in enumerate(value):
                walk(inner, (*path, number))

    walk(section, ())
    return edits


# ---------------------------------------------------------------------------------------------- how it is written


@dataclass(frozen=True)
class _JsonNode:
    """A JSON value's place in the text, and its members'."""

    begin: int
    end: int
    members: Mapping[str | int, _JsonNode]


def edit_json(text: str, edits: Mapping[Path, Any]) -> str:
    """`text` with the values at the given paths replaced, keys that are missing added at the end of their object.

    Every other character stays as it is, white space and number spelling included. Raises KeyError for a path whose
    parent is missing.
    """
    root = _locate(text, _past_space(text, 0))
    changes: list[tuple[int, int, str]] = []
    for path, value in edits.items():
        node = root
        for step in path[:-1]:
            node = node.members[step]
        if not path or path[-1] in node.members:
            target = node.members[path[-1]] if path else root
            changes.append((target.begin, target.end, _dump(value, text, target)))
        else:
            changes.append(_inserted(text, node, str(path[-1]), value))
    for begin, end, new in sorted(changes, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def _locate(text: str, at: int) -> _JsonNode:
    opening = text[at]
    if opening not in "{[":
        return _JsonNode(at, _DECODER.raw_decode(text, at)[1], {})
    members: dict[str | int, _JsonNode] = {}
    position = _past_space(text, at + 1)
    while text[position] not in "}]":
        if text[position] == ",":
            position = _past_space(text, position + 1)
        key: str | int = len(members)
        if opening == "{":
            key, position = _DECODER.raw_decode(text, position)
            position = _past_space(text, text.index(":", position) + 1)
        members[key] = _locate(text, position)
        position = _past_space(text, members[key].end)
    return _JsonNode(at, position + 1, members)


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line_indent(text: str, at: int) -> str:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip())]


def _dump(value: Any, text: str, old: _JsonNode) -> str:
    """`value` in the manner of the value it replaces: on one line if that was, else indented alike."""
    if "\n" not in text[old.begin : old.end] or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = _line_indent(text, old.begin)
    step = _step(text, old, indent)
    return json.dumps(value, indent=step, ensure_ascii=False).replace("\n", f"\n{indent}")


def _step(text: str, node: _JsonNode, indent: str) -> str:
    first = next(iter(node.members.values()), None)
    return (_line_indent(text, first.begin)[len(indent) :] if first else "") or "  "


def _inserted(text: str, parent: _JsonNode, key: str, value: Any) -> tuple[int, int, str]:
    entry = f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
    if not parent.members:
        return parent.begin, parent.end, "{" + entry + "}"
    last = max(parent.members.values(), key=lambda node: node.end)
    if "\n" not in text[parent.begin : parent.end]:
        return last.end, last.end, f", {entry}"
    return last.end, last.end, f",\n{_line_indent(text, last.begin)}{entry}"


# ---------------------------------------------------------------------------------------------- names of experts


def expert_renamer(
    renumber: Callable[[str, int, int], int | None], gone: Callable[[str], bool], whose: str
) -> Renumber:
    """Maps names such as `model.layers.3.mlp.experts.17.up_proj`: `renumber(name, 3, 17)` is the new expert or None;
    `gone` names vanish.

    Raises UnusableError for a pattern that names expert numbers, which cannot be renumbered layer by layer.
    """
    modules = "|".join(map(re.escape, expert_modules()))
    numbered = re.compile(
        rf"(?P<head>(?:^|.*?\.)(?P<layer>[0-9]+)\.(?:.*\.)?(?:{modules})\.)(?P<expert>[0-9]+)(?P<tail>(?:\..*)?)$"
    )

    def rename(name: str) -> str | None:
        if re.search(rf"(?:{modules})[\\\[\]().]*\d", name):
            match = numbered.match(name)
            if name.startswith("re:") or not match or re.search(r"[*\\\[\]()|^$+?]", name):
                raise UnusableError(
                    f"{whose}: the pattern {name!r} names experts by number, which pruning renumbers layer by "
                    "layer. Replace it by the full module names."
                )
            if gone(name):
                return None
            new = renumber(name, int(match["layer"]), int(match["expert"]))
            return None if new is None else f"{match['head']}{new}{match['tail']}"
        return None if gone(name) else name

    return rename

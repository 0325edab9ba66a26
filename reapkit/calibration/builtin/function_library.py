"""The functions that `function_calls` offers: their schemas, the users' requests, the results and the answers."""

from collections.abc import Callable
from dataclasses import dataclass

from reapkit.calibration.builtin.draw import Draw, sentence
from reapkit.calibration.builtin.tables import table

WORDS: dict[str, list[str]] = table("functions")["words"]
OPTIONAL: dict[str, str] = table("functions")["optional"]
"""How a user mentions an optional argument; booleans appear only when true."""

Call = tuple[Callable[[Draw], dict], Callable[[Draw, dict], dict]]
"""Draws the arguments of a call, and its result from them."""


@dataclass(frozen=True)
class Tool:
    """A function: arguments to call it with, its result, its schema, the request that asks for it, the answer."""

    name: str
    arguments: Callable[[Draw], dict]
    result: Callable[[Draw, dict], dict]
    description: str
    parameters: dict
    requests: list[str]
    answers: list[str]

    def ask(self, draw: Draw, arguments: dict) -> str:
        """What a user says who wants these arguments, the optional ones included."""
        words = _words(arguments)
        text = draw.pick(self.requests).format(**words)
        extras = [
            OPTIONAL[name].format(**words)
            for name in arguments
            if name not in self.parameters["required"] and name in OPTIONAL
        ]
        return " ".join([text, *extras])

    def answer(self, draw: Draw, arguments: dict, result: dict) -> str:
        """What the assistant says once the result is there."""
        return sentence(draw.pick(self.answers).format(**(_words(arguments) | _words(result))))


def _words(values: dict) -> dict[str, str]:
    """Arguments or results as a sentence says them; the members of nested objects under their own names."""
    words = {}
    for name, value in values.items():
        if isinstance(value, dict):
            words.update(_words(value))
        elif isinstance(value, list):
            words[name] = ", ".join(_item_words(item) for item in value)
        else:
            words[name] = str(value)
    return words


def _item_words(item: str | int | dict) -> str:
    return " x ".join(str(value) for value in item.values()) if isinstance(item, dict) else str(item)


def _with_optional(draw: Draw, arguments: dict, **optional: object) -> dict:
    """The arguments, with each optional one in about two of five cases."""
    return arguments | {name: value for name, value in optional.items() if draw.chance(0.4)}


def _email(draw: Draw) -> str:
    return f"{draw.pick(WORDS['people'])}@{draw.pick(WORDS['domains'])}"


def _date(draw: Draw) -> str:
    return f"{draw.integer(2024, 2031)}-{draw.integer(1, 12):02d}-{draw.integer(1, 28):02d}"


def _time(draw: Draw) -> str:
    return f"{draw.integer(7, 21):02d}:{draw.pick((0, 15, 30, 45)):02d}"


def _code(draw: Draw) -> str:
    return f"{draw.pick('ABCDEFGHKLMNPRSTUVXZ')}{draw.pick('ABCDEFGHKLMNPRSTUVXZ')}{draw.integer(1000, 99999)}"


def _two_cities(draw: Draw) -> list[str]:
    return draw.sample(WORDS["cities"], 2)


def _flight(draw: Draw) -> dict:
    origin, destination = _two_cities(draw)
    return _with_optional(
        draw,
        {"origin": origin, "destination": destination, "date": _date(draw)},
        cabin=draw.pick(("economy", "business", "first")),
    )


def _route(draw: Draw) -> dict:
    origin, destination = _two_cities(draw)
    arguments = {
        "origin": origin,
        "destination": destination,
        "mode": draw.pick(("car", "train", "bicycle", "walking")),
    }
    return _with_optional(draw, arguments, avoid_tolls=True) if arguments["mode"] == "car" else arguments


def _conversion(draw: Draw) -> dict:
    source, target = draw.sample(WORDS["currencies"], 2)
    return _with_optional(
        draw, {"amount": draw.integer(5, 9000), "source": source, "target": target}, digits=draw.integer(0, 4)
    )


def _query(draw: Draw) -> dict:
    condition = {
        "column": draw.pick(WORDS["columns"]),
        "operator": draw.pick(("=", "<", ">")),
        "value": draw.integer(1, 900),
    }
    return _with_optional(
        draw,
        {"table": draw.pick(WORDS["tables"]), "filter": condition},
        order_by=draw.pick(WORDS["columns"]),
        limit=draw.integer(5, 100),
    )


def _order_lines(draw: Draw) -> dict:
    lines = [
        {"quantity": draw.integer(1, 9), "product": product}
        for product in draw.sample(WORDS["products"], draw.integer(1, 3))
    ]
    return {
        "lines": lines,
        "address": {
            "street": f"{draw.pick(WORDS['streets'])} {draw.integer(1, 180)}",
            "city": draw.pick(WORDS["cities"]),
        },
    }


CALLS: dict[str, Call] = {
    "get_weather": (
        lambda draw: _with_optional(
            draw,
            {"city": draw.pick(WORDS["cities"])},
            unit=draw.pick(("celsius", "fahrenheit")),
            days_ahead=draw.integer(1, 9),
        ),
        lambda draw, given: {
            "temperature": draw.integer(-15, 39),
            "sky": draw.pick(("clear", "cloudy", "foggy", "rainy", "snowy", "stormy")),
        },
    ),
    "send_email": (
        lambda draw: _with_optional(
            draw,
            {"to": _email(draw), "subject": draw.pick(WORDS["topics"])},
            cc=_email(draw),
            priority=draw.pick(("low", "normal", "high")),
        ),
        lambda draw, given: {"status": draw.pick(("sent", "queued")), "id": draw.integer(1000, 99999)},
    ),
    "book_flight": (_flight, lambda draw, given: {"booking": _code(draw), "price": draw.integer(60, 1900)}),
    "search_products": (
        lambda draw: _with_optional(
            draw, {"query": draw.pick(WORDS["products"])}, max_price=draw.integer(10, 900), in_stock=True
        ),
        lambda draw, given: {
            "count": draw.integer(1, 60),
            "cheapest": draw.integer(5, 300),
            "brand": draw.pick(("Arlo", "Bento", "Corva", "Delft", "Nimbo")),
        },
    ),
    "set_timer": (
        lambda draw: _with_optional(
            draw,
            {"minutes": draw.integer(1, 180)},
            label=draw.pick(("tea", "pasta", "laundry", "bread", "nap", "workout")),
        ),
        lambda draw, given: {"timer_id": draw.integer(1, 99), "ends_at": _time(draw)},
    ),
    "translate_text": (
        lambda draw: _with_optional(
            draw, {"text": draw.pick(WORDS["phrases"]), "language": draw.pick(WORDS["languages"])}, formal=True
        ),
        lambda draw, given: {"done": True, "characters": draw.integer(12, 60)},
    ),
    "create_event": (
        lambda draw: {
            "title": draw.pick(("team lunch", "code review", "piano lesson", "budget talk", "site visit", "haircut")),
            "start": {"date": _date(draw), "time": _time(draw)},
        },
        lambda draw, given: {"event_id": _code(draw), "conflicts": draw.integer(0, 2)},
    ),
    "invite_people": (
        lambda draw: {"event_id": _code(draw), "emails": [_email(draw) for _ in range(draw.integer(1, 3))]},
        lambda draw, given: {"invited": len(given["emails"]), "accepted": draw.integer(0, len(given["emails"]))},
    ),
    "get_stock_price": (
        lambda draw: {"symbol": "".join(draw.pick("ABCDEFGHKLMNPRSTUVXZ") for _ in range(draw.integer(3, 4)))},
        lambda draw, given: {"price": draw.integer(3, 900), "change": draw.integer(-40, 40)},
    ),
    "play_music": (
        lambda draw: _with_optional(
            draw,
            {"genre": draw.pick(("jazz", "folk", "rock", "classical")), "room": draw.pick(WORDS["rooms"])},
            volume=draw.integer(1, 100),
        ),
        lambda draw, given: {"playing": True, "tracks": draw.integer(5, 90)},
    ),
    "track_order": (
        lambda draw: {"order_id": _code(draw)},
        lambda draw, given: {
            "status": draw.pick(("packed", "shipped", "delayed", "delivered")),
            "days": draw.integer(1, 14),
        },
    ),
    "place_order": (_order_lines, lambda draw, given: {"order_id": _code(draw), "total": draw.integer(15, 2500)}),
    "search_web": (
        lambda draw: _with_optional(draw, {"query": draw.pick(WORDS["topics"])}, limit=draw.integer(2, 20)),
        lambda draw, given: {
            "hits": draw.integer(100, 99999),
            "best": f"https://www.example.org/{draw.integer(10, 999)}",
        },
    ),
    "convert_currency": (
        _conversion,
        lambda draw, given: {"converted": draw.integer(4, 20000), "rate_date": _date(draw)},
    ),
    "add_task": (
        lambda draw: _with_optional(
            draw, {"task": draw.pick(WORDS["errands"])}, due=_date(draw), priority=draw.pick(("low", "normal", "high"))
        ),
        lambda draw, given: {"task_id": draw.integer(1, 900), "open_tasks": draw.integer(1, 40)},
    ),
    "find_route": (
        _route,
        lambda draw, given: {"kilometres": draw.integer(3, 1800), "minutes": draw.integer(10, 1400)},
    ),
    "query_database": (_query, lambda draw, given: {"rows": draw.integer(0, 5000), "seconds": draw.integer(1, 30)}),
    "reserve_table": (
        lambda draw: _with_optional(
            draw,
            {"city": draw.pick(WORDS["cities"]), "guests": draw.integer(1, 12), "time": _time(draw)},
            table_outside=True,
        ),
        lambda draw, given: {
            "restaurant": f"{draw.pick(WORDS['restaurant_colors'])} {draw.pick(WORDS['restaurant_signs'])}",
            "confirmed": True,
        },
    ),
    "get_recipe": (
        lambda draw: _with_optional(draw, {"dish": draw.pick(WORDS["dishes"])}, servings=draw.integer(2, 12)),
        lambda draw, given: {
            "minutes": draw.integer(15, 150),
            "ingredients": draw.integer(4, 14),
            "recipe_id": draw.integer(100, 9999),
        },
    ),
    "switch_light": (
        lambda draw: _with_optional(
            draw,
            {"room": draw.pick(WORDS["rooms"]), "state": draw.pick(("on", "off"))},
            brightness=draw.integer(5, 100),
        ),
        lambda draw, given: {"ok": True, "watts": draw.integer(0, 60)},
    ),
    "write_file": (
        lambda draw: _with_optional(
            draw,
            {
                "path": f"{draw.pick(WORDS['files'])}_{draw.integer(1, 99)}.{draw.pick(('txt', 'md', 'csv'))}",
                "content": draw.pick(WORDS["phrases"]),
            },
            overwrite=True,
        ),
        lambda draw, given: {"bytes": len(given["content"]), "path": given["path"]},
    ),
    "read_logs": (
        lambda draw: _with_optional(
            draw,
            {"service": draw.pick(WORDS["services"]), "level": draw.pick(("debug", "info", "warning", "error"))},
            since_minutes=draw.integer(5, 240),
        ),
        lambda draw, given: {
            "lines": draw.integer(0, 900),
            "last": draw.pick(("connection reset", "disk full", "retrying", "started", "timeout")),
        },
    ),
    "restart_service": (
        lambda draw: {"service": draw.pick(WORDS["services"]), "region": draw.pick(("east", "west", "north"))},
        lambda draw, given: {"state": draw.pick(("running", "starting", "failed")), "seconds": draw.integer(2, 120)},
    ),
    "calculate": (
        lambda draw: {"expression": f"{draw.integer(2, 900)} {draw.pick('+-*')} {draw.integer(2, 90)}"},
        lambda draw, given: {"value": _value(given["expression"])},
    ),
    "plot_chart": (
        lambda draw: {
            "kind": draw.pick(("bar", "line", "pie")),
            "values": [draw.integer(1, 99) for _ in range(draw.integer(3, 5))],
            "title": draw.pick(WORDS["topics"]),
        },
        lambda draw, given: {"image": f"chart_{draw.integer(1, 999)}.png", "points": len(given["values"])},
    ),
}

TOOLS = [Tool(name, *CALLS[name], **told) for name, told in table("functions")["functions"].items()]


def _value(expression: str) -> int:
    left, operator, right = expression.split()
    first, second = int(left), int(right)
    return {"+": first + second, "-": first - second, "*": first * second}[operator]

"""Generates conversations in which an assistant calls functions that are described by JSON schemas."""

import json

from reapkit.calibration.builtin.draw import Draw
from reapkit.calibration.builtin.function_library import TOOLS, WORDS, Tool
from reapkit.calibration.builtin.tables import table


def tools_row(draw: Draw) -> dict:
    """One to three turns with two to four functions at hand; some turns need none, some need two calls at once."""
    offered = draw.sample(TOOLS, draw.integer(2, 4))
    messages = [_system(draw)] if draw.chance(0.6) else []
    if draw.chance(0.1):
        messages += _small_talk(draw)
    for _ in range(draw.pick((1, 1, 2, 2, 3))):
        messages += draw.pick(TURNS)(draw, offered)
    if draw.chance(0.15):
        messages += _small_talk(draw)
    return {"messages": messages, "tools": [_schema(tool) for tool in offered]}


def single_call(draw: Draw, offered: list[Tool]) -> list[dict]:
    """Request, call, result, answer."""
    tool = draw.pick(offered)
    request, arguments = _request(draw, tool)
    result = tool.result(draw, arguments)
    return [_user(request), _calls((tool, arguments)), _result(result), _says(tool.answer(draw, arguments, result))]


def two_calls(draw: Draw, offered: list[Tool]) -> list[dict]:
    """Two requests in one message, called at once."""
    first, second = draw.sample(offered, 2)
    (ask, arguments), (ask_more, more_arguments) = _request(draw, first), _request(draw, second)
    result, more_result = first.result(draw, arguments), second.result(draw, more_arguments)
    joint = draw.pick(("Then", "Also", "After that", "One more thing"))
    return [
        _user(f"{ask} {joint}: {ask_more}"),
        _calls((first, arguments), (second, more_arguments)),
        _result(result),
        _result(more_result),
        _says(f"{first.answer(draw, arguments, result)} {second.answer(draw, more_arguments, more_result)}"),
    ]


def failed_call(draw: Draw, offered: list[Tool]) -> list[dict]:
    """A call that returns an error, which the assistant reports."""
    tool = draw.pick(offered)
    request, arguments = _request(draw, tool)
    error = draw.pick(WORDS["errors"])
    excuse = draw.pick(
        (
            f"Sorry, {tool.name} failed: {error}.",
            f"That did not work. The function answered: {error}.",
            f"I could not do that ({error}).",
        )
    )
    return [_user(request), _calls((tool, arguments)), _result({"error": error}), _says(excuse)]


def unavailable(draw: Draw, offered: list[Tool]) -> list[dict]:
    """A request that none of the offered functions can serve."""
    names = {tool.name for tool in offered}
    request, _ = _request(draw, draw.pick([tool for tool in TOOLS if tool.name not in names]))
    listed = " and ".join(tool.name for tool in offered[:2])
    refusal = draw.pick(
        (
            "I have no function for that.",
            f"I cannot do that; I can only use {listed}.",
            "Sorry, none of my functions can do that.",
        )
    )
    return [_user(request), _says(refusal)]


def asking_back(draw: Draw, offered: list[Tool]) -> list[dict]:
    """The assistant asks for what is missing, then calls."""
    tool = draw.pick(offered)
    request, arguments = _request(draw, tool)
    missing = draw.pick(tool.parameters["required"]).replace("_", " ")
    result = tool.result(draw, arguments)
    opening = draw.pick(("I need help with something.", f"Can you use {tool.name}?", "I have a request."))
    return [
        _user(opening),
        _says(draw.pick((f"Sure. Please tell me the {missing}.", f"Yes. Which {missing} should I use?"))),
        _user(request),
        _calls((tool, arguments)),
        _result(result),
        _says(tool.answer(draw, arguments, result)),
    ]


TURNS = (single_call,) * 12 + (two_calls, two_calls, failed_call, unavailable, asking_back, asking_back)


def _request(draw: Draw, tool: Tool) -> tuple[str, dict]:
    """What the user says and the arguments that follow from it; the text is made from the arguments."""
    arguments = tool.arguments(draw)
    text = tool.ask(draw, arguments)
    if draw.chance(0.2):
        text = draw.pick(
            ("Hello! {}", "Hi. {}", "{} Thanks.", "{} It is urgent.", "Next: {}", "{} Tell me when it is done.")
        ).format(text)
    return text, arguments


def _system(draw: Draw) -> dict:
    date = f"{draw.integer(1, 28)} {draw.pick(WORDS['months'])} {draw.integer(2019, 2034)}"
    name = f"{draw.pick('ABCDEFGHJKLMNPRSTW')}. {draw.pick(WORDS['surnames'])}"
    return {
        "role": "system",
        "content": draw.pick(WORDS["systems"]).format(name=name, date=date, number=draw.integer(1000, 99999)),
    }


def _small_talk(draw: Draw) -> list[dict]:
    question, answer = draw.pick(table("functions")["greetings"])
    return [_user(question), _says(answer)]


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _says(content: str) -> dict:
    return {"role": "assistant", "content": content}


def _calls(*calls: tuple[Tool, dict]) -> dict:
    listed = [
        {"type": "function", "function": {"name": tool.name, "arguments": arguments}} for tool, arguments in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": listed}


def _result(result: dict) -> dict:
    return {"role": "tool", "content": json.dumps(result)}


def _schema(tool: Tool) -> dict:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": described}

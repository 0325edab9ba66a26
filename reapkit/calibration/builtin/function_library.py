"""The functions that `function_calls` offers: schemas, what users ask, what comes back, how it is told."""

from collections.abc import Callable
from dataclasses import dataclass

from reapkit.calibration.builtin.draw import Draw, sentence

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
CITIES = (
    "Accra", "Athens", "Bergen", "Berlin", "Bogota", "Boston", "Cairo", "Chicago", "Delhi", "Denver", "Dublin",
    "Geneva", "Hamburg", "Helsinki", "Krakow", "Lima", "Lisbon", "London", "Lyon", "Madrid", "Montreal", "Nairobi",
    "Naples", "Osaka", "Oslo", "Paris", "Perth", "Porto", "Prague", "Quito", "Rome", "Seoul", "Sydney", "Tokyo",
    "Turin", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
PEOPLE = (
    "alice", "boris", "carmen", "david", "elena", "farid", "greta", "hugo", "irene", "jonas", "karim", "lucia",
    "milan", "nora", "oscar", "paula", "rafael", "selma", "tomas", "ursula", "victor", "wanda", "yara", "zoltan",
)  # fmt: skip
DOMAINS = ("example.com", "example.org", "mail.example", "office.example")
TOPICS = (
    "bird migration", "bread baking", "chess openings", "coral reefs", "desert plants", "early maps",
    "electric trains", "folk songs", "glass making", "heat pumps", "jazz pianos", "lighthouses", "mountain huts",
    "old bridges", "paper folding", "roman roads", "sea currents", "solar panels", "stone walls", "tea gardens",
    "tide tables", "urban gardens", "volcanoes", "water mills", "wild bees", "wooden boats",
)  # fmt: skip
PRODUCTS = (
    "backpack", "bicycle", "blender", "bookcase", "camera", "desk", "drill", "guitar", "headset", "helmet", "jacket",
    "kettle", "keyboard", "lamp", "mattress", "monitor", "notebook", "printer", "raincoat", "scarf", "speaker", "tent",
    "toaster", "tripod", "wallet", "watch",
)  # fmt: skip
LANGUAGES = (
    "Arabic",
    "Czech",
    "Danish",
    "Dutch",
    "Finnish",
    "French",
    "German",
    "Greek",
    "Italian",
    "Korean",
    "Polish",
    "Spanish",
)
PHRASES = (
    "good evening", "where is the harbor", "thank you for the letter", "the shop is closed", "see you on Sunday",
    "I would like some soup", "the bus is late", "how old is this tower", "please open the window", "my room is cold",
    "we need two tickets", "the road is wet", "this is my sister", "the bill is wrong",
)  # fmt: skip
CURRENCIES = ("AUD", "BRL", "CAD", "CHF", "EUR", "GBP", "INR", "JPY", "NOK", "PLN", "SEK", "USD")
ROOMS = ("attic", "bathroom", "bedroom", "garage", "hall", "kitchen", "living room", "office")
DISHES = (
    "bean soup",
    "carrot cake",
    "fish curry",
    "lentil stew",
    "mushroom risotto",
    "onion tart",
    "plum pie",
    "potato salad",
)
ERRANDS = (
    "call the plumber", "water the plants", "pay the rent", "renew the passport", "feed the cat", "buy stamps",
    "book the dentist", "return the books", "clean the filter", "charge the car",
)  # fmt: skip
TABLES = ("customers", "invoices", "orders", "shipments", "suppliers", "visits")
COLUMNS = ("amount", "city", "created", "id", "name", "status", "weight")
FILES = ("notes", "report", "budget", "agenda", "minutes", "plan", "readme", "survey")
RESTAURANT_COLORS = ("Blue", "Golden", "Old", "Quiet", "Red")
RESTAURANT_SIGNS = ("Anchor", "Garden", "Lantern", "Oven", "Table")
SERVICES = ("billing", "cache", "gateway", "mailer", "search", "storage")

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


@dataclass(frozen=True)
class Tool:
    """A function: its schema, arguments to call it with, the request that asks for them, its result, the answer."""

    name: str
    description: str
    parameters: dict
    arguments: Callable[[Draw], dict]
    requests: tuple[str, ...]
    result: Callable[[Draw, dict], dict]
    answers: tuple[str, ...]

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


OPTIONAL = {
    "unit": "Use {unit}.",
    "days_ahead": "I mean {days_ahead} days from now.",
    "cc": "Put {cc} in copy.",
    "priority": "The priority is {priority}.",
    "cabin": "The cabin should be {cabin}.",
    "max_price": "At most {max_price} dollars.",
    "in_stock": "Only if it is in stock.",
    "label": "Call it {label}.",
    "formal": "Make it formal.",
    "volume": "Set the volume to {volume}.",
    "limit": "Give me {limit} of them.",
    "due": "It is due on {due}.",
    "avoid_tolls": "Avoid toll roads.",
    "order_by": "Sort by {order_by}.",
    "table_outside": "A table outside, please.",
    "servings": "It is for {servings} people.",
    "brightness": "Brightness {brightness} percent.",
    "overwrite": "Overwrite it if it exists.",
    "since_minutes": "Only the last {since_minutes} minutes.",
    "digits": "Round to {digits} digits.",
}
"""How a user mentions an optional argument; booleans appear only when true."""


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


def _object(properties: dict, *optional: str) -> dict:
    """A JSON schema of an object whose properties are all required, apart from the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _enum(*values: str) -> dict:
    return {"type": "string", "enum": list(values)}


def _array(items: dict) -> dict:
    return {"type": "array", "items": items}


def _with_optional(draw: Draw, arguments: dict, **optional: object) -> dict:
    """The arguments, with each optional one in about two of five cases."""
    return arguments | {name: value for name, value in optional.items() if draw.chance(0.4)}


def _email(draw: Draw) -> str:
    return f"{draw.pick(PEOPLE)}@{draw.pick(DOMAINS)}"


def _date(draw: Draw) -> str:
    return f"{draw.integer(2024, 2031)}-{draw.integer(1, 12):02d}-{draw.integer(1, 28):02d}"


def _time(draw: Draw) -> str:
    return f"{draw.integer(7, 21):02d}:{draw.pick((0, 15, 30, 45)):02d}"


def _code(draw: Draw) -> str:
    return f"{draw.pick('ABCDEFGHKLMNPRSTUVXZ')}{draw.pick('ABCDEFGHKLMNPRSTUVXZ')}{draw.integer(1000, 99999)}"


def _two_cities(draw: Draw) -> list[str]:
    return draw.sample(CITIES, 2)


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
    source, target = draw.sample(CURRENCIES, 2)
    return _with_optional(
        draw, {"amount": draw.integer(5, 9000), "source": source, "target": target}, digits=draw.integer(0, 4)
    )


def _query(draw: Draw) -> dict:
    condition = {"column": draw.pick(COLUMNS), "operator": draw.pick(("=", "<", ">")), "value": draw.integer(1, 900)}
    return _with_optional(
        draw, {"table": draw.pick(TABLES), "filter": condition}, order_by=draw.pick(COLUMNS), limit=draw.integer(5, 100)
    )


def _order_lines(draw: Draw) -> dict:
    lines = [
        {"quantity": draw.integer(1, 9), "product": product} for product in draw.sample(PRODUCTS, draw.integer(1, 3))
    ]
    return {
        "lines": lines,
        "address": {"street": f"{draw.pick(STREETS)} {draw.integer(1, 180)}", "city": draw.pick(CITIES)},
    }


STREETS = (
    "Bridge Street",
    "Castle Road",
    "Elm Lane",
    "Garden Road",
    "Harbor Street",
    "Hill Lane",
    "Mill Street",
    "Park Road",
)

TOOLS = (
    Tool(
        "get_weather",
        "Weather report for a city",
        _object({"city": STRING, "unit": _enum("celsius", "fahrenheit"), "days_ahead": INTEGER}, "unit", "days_ahead"),
        lambda draw: _with_optional(
            draw, {"city": draw.pick(CITIES)}, unit=draw.pick(("celsius", "fahrenheit")), days_ahead=draw.integer(1, 9)
        ),
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Tell me the weather for {city}.",
            "Will it rain in {city}?",
        ),
        lambda draw, given: {
            "temperature": draw.integer(-15, 39),
            "sky": draw.pick(("clear", "cloudy", "foggy", "rainy", "snowy", "stormy")),
        },
        (
            "In {city} it is {sky} at {temperature} degrees.",
            "{city}: {sky}, {temperature} degrees.",
            "Expect {sky} weather and {temperature} degrees in {city}.",
        ),
    ),
    Tool(
        "send_email",
        "Send an email",
        _object(
            {"to": STRING, "subject": STRING, "cc": STRING, "priority": _enum("low", "normal", "high")},
            "cc",
            "priority",
        ),
        lambda draw: _with_optional(
            draw,
            {"to": _email(draw), "subject": draw.pick(TOPICS)},
            cc=_email(draw),
            priority=draw.pick(("low", "normal", "high")),
        ),
        (
            "Send an email to {to} about {subject}.",
            "Write to {to} with the subject {subject}.",
            "Email {to} regarding {subject}.",
        ),
        lambda draw, given: {"status": draw.pick(("sent", "queued")), "id": draw.integer(1000, 99999)},
        ("The email to {to} about {subject} is {status}.", "Done: message {id} to {to} is {status}."),
    ),
    Tool(
        "book_flight",
        "Book a flight between two cities",
        _object(
            {"origin": STRING, "destination": STRING, "date": STRING, "cabin": _enum("economy", "business", "first")},
            "cabin",
        ),
        _flight,
        (
            "Book a flight from {origin} to {destination} on {date}.",
            "I need to fly from {origin} to {destination} on {date}.",
            "Get me a plane ticket to {destination} from {origin} for {date}.",
        ),
        lambda draw, given: {"booking": _code(draw), "price": draw.integer(60, 1900)},
        (
            "Your flight to {destination} on {date} is booked as {booking} for {price} dollars.",
            "Booked: {origin} to {destination}, code {booking}, {price} dollars.",
        ),
    ),
    Tool(
        "search_products",
        "Search the shop",
        _object({"query": STRING, "max_price": NUMBER, "in_stock": BOOLEAN}, "max_price", "in_stock"),
        lambda draw: _with_optional(
            draw, {"query": draw.pick(PRODUCTS)}, max_price=draw.integer(10, 900), in_stock=True
        ),
        (
            "Search for a {query}.",
            "I want to buy a {query}.",
            "Show me what the shop has for {query}.",
            "Find a {query} for me.",
        ),
        lambda draw, given: {
            "count": draw.integer(1, 60),
            "cheapest": draw.integer(5, 300),
            "brand": draw.pick(("Arlo", "Bento", "Corva", "Delft", "Nimbo")),
        },
        (
            "I found {count} results for {query}; the cheapest is from {brand} at {cheapest} dollars.",
            "{count} hits. {brand} sells a {query} for {cheapest} dollars.",
        ),
    ),
    Tool(
        "set_timer",
        "Start a countdown",
        _object({"minutes": INTEGER, "label": STRING}, "label"),
        lambda draw: _with_optional(
            draw,
            {"minutes": draw.integer(1, 180)},
            label=draw.pick(("tea", "pasta", "laundry", "bread", "nap", "workout")),
        ),
        (
            "Set a timer for {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Remind me in {minutes} minutes.",
            "Count down {minutes} minutes.",
        ),
        lambda draw, given: {"timer_id": draw.integer(1, 99), "ends_at": _time(draw)},
        (
            "Timer {timer_id} runs for {minutes} minutes and ends at {ends_at}.",
            "Your {minutes} minutes are up at {ends_at}.",
        ),
    ),
    Tool(
        "translate_text",
        "Translate a short text",
        _object({"text": STRING, "language": STRING, "formal": BOOLEAN}, "formal"),
        lambda draw: _with_optional(draw, {"text": draw.pick(PHRASES), "language": draw.pick(LANGUAGES)}, formal=True),
        ("Translate '{text}' to {language}.", "How do you say '{text}' in {language}?", "Say '{text}' in {language}."),
        lambda draw, given: {"done": True, "characters": draw.integer(12, 60)},
        (
            "I translated '{text}' to {language}; it has {characters} characters.",
            "The {language} text has {characters} characters.",
        ),
    ),
    Tool(
        "create_event",
        "Create a calendar event",
        _object({"title": STRING, "start": _object({"date": STRING, "time": STRING})}),
        lambda draw: {
            "title": draw.pick(("team lunch", "code review", "piano lesson", "budget talk", "site visit", "haircut")),
            "start": {"date": _date(draw), "time": _time(draw)},
        },
        (
            "Schedule a {title} on {date} at {time}.",
            "Put a {title} in my calendar for {date}, {time}.",
            "Add a {title} at {time} on {date}.",
        ),
        lambda draw, given: {"event_id": _code(draw), "conflicts": draw.integer(0, 2)},
        (
            "The {title} is set for {date} at {time} with {conflicts} conflicts.",
            "Added as {event_id}: {title}, {date}, {time}.",
        ),
    ),
    Tool(
        "invite_people",
        "Invite people to an event",
        _object({"event_id": STRING, "emails": _array(STRING)}),
        lambda draw: {"event_id": _code(draw), "emails": [_email(draw) for _ in range(draw.integer(1, 3))]},
        ("Invite {emails} to event {event_id}.", "Add {emails} to {event_id}.", "Ask {emails} to come to {event_id}."),
        lambda draw, given: {"invited": len(given["emails"]), "accepted": draw.integer(0, len(given["emails"]))},
        (
            "{invited} invited to {event_id}, {accepted} accepted so far.",
            "Invitations sent: {invited}. Accepted: {accepted}.",
        ),
    ),
    Tool(
        "get_stock_price",
        "Last price of a stock",
        _object({"symbol": STRING}),
        lambda draw: {"symbol": "".join(draw.pick("ABCDEFGHKLMNPRSTUVXZ") for _ in range(draw.integer(3, 4)))},
        ("What is the stock price of {symbol}?", "How much is {symbol} trading at?", "Quote {symbol} please."),
        lambda draw, given: {"price": draw.integer(3, 900), "change": draw.integer(-40, 40)},
        (
            "{symbol} is at {price} dollars, a change of {change}.",
            "{symbol} trades at {price}, {change} since yesterday.",
        ),
    ),
    Tool(
        "play_music",
        "Play music in a room",
        _object({"genre": _enum("jazz", "folk", "rock", "classical"), "room": STRING, "volume": INTEGER}, "volume"),
        lambda draw: _with_optional(
            draw,
            {"genre": draw.pick(("jazz", "folk", "rock", "classical")), "room": draw.pick(ROOMS)},
            volume=draw.integer(1, 100),
        ),
        (
            "Play some {genre} in the {room}.",
            "Put on {genre} music in the {room}.",
            "I want to hear {genre} in the {room}.",
        ),
        lambda draw, given: {"playing": True, "tracks": draw.integer(5, 90)},
        ("Playing {tracks} {genre} tracks in the {room}.", "Now there is {genre} in the {room}."),
    ),
    Tool(
        "track_order",
        "Status of an order",
        _object({"order_id": STRING}),
        lambda draw: {"order_id": _code(draw)},
        (
            "Where is my order {order_id}?",
            "Check order {order_id}.",
            "What is the status of order {order_id}?",
            "Has {order_id} been shipped?",
        ),
        lambda draw, given: {
            "status": draw.pick(("packed", "shipped", "delayed", "delivered")),
            "days": draw.integer(1, 14),
        },
        ("Order {order_id} is {status}; allow {days} days.", "{order_id}: {status}, {days} days left."),
    ),
    Tool(
        "place_order",
        "Order products",
        _object(
            {
                "lines": _array(_object({"quantity": INTEGER, "product": STRING})),
                "address": _object({"street": STRING, "city": STRING}),
            }
        ),
        _order_lines,
        (
            "Order {lines} to {street}, {city}.",
            "I would like {lines}, delivered to {street} in {city}.",
            "Send {lines} to {street}, {city}.",
        ),
        lambda draw, given: {"order_id": _code(draw), "total": draw.integer(15, 2500)},
        ("Order {order_id} goes to {city} and costs {total} dollars.", "Ordered as {order_id} for {total} dollars."),
    ),
    Tool(
        "search_web",
        "Search the web",
        _object({"query": STRING, "limit": INTEGER}, "limit"),
        lambda draw: _with_optional(draw, {"query": draw.pick(TOPICS)}, limit=draw.integer(2, 20)),
        (
            "Search the web for {query}.",
            "Find pages about {query}.",
            "Look up {query}.",
            "What is written about {query}?",
        ),
        lambda draw, given: {
            "hits": draw.integer(100, 99999),
            "best": f"https://www.example.org/{draw.integer(10, 999)}",
        },
        ("There are {hits} pages about {query}; the best is {best}.", "I found {hits} pages. Start with {best}."),
    ),
    Tool(
        "convert_currency",
        "Convert money",
        _object({"amount": NUMBER, "source": STRING, "target": STRING, "digits": INTEGER}, "digits"),
        _conversion,
        (
            "Convert {amount} {source} to {target}.",
            "How much is {amount} {source} in {target}?",
            "What are {amount} {source} worth in {target}?",
        ),
        lambda draw, given: {"converted": draw.integer(4, 20000), "rate_date": _date(draw)},
        ("{amount} {source} are {converted} {target}.", "That is {converted} {target}, at the rate of {rate_date}."),
    ),
    Tool(
        "add_task",
        "Add a task to the list",
        _object({"task": STRING, "due": STRING, "priority": _enum("low", "normal", "high")}, "due", "priority"),
        lambda draw: _with_optional(
            draw, {"task": draw.pick(ERRANDS)}, due=_date(draw), priority=draw.pick(("low", "normal", "high"))
        ),
        ("I have to {task}.", "Add a task: {task}.", "Put '{task}' on my list.", "Do not let me forget to {task}."),
        lambda draw, given: {"task_id": draw.integer(1, 900), "open_tasks": draw.integer(1, 40)},
        ("Task {task_id} is on your list, with {open_tasks} open.", "Noted: {task}. You have {open_tasks} open tasks."),
    ),
    Tool(
        "find_route",
        "Directions between two places",
        _object(
            {
                "origin": STRING,
                "destination": STRING,
                "mode": _enum("car", "train", "bicycle", "walking"),
                "avoid_tolls": BOOLEAN,
            },
            "avoid_tolls",
        ),
        _route,
        (
            "How do I get from {origin} to {destination} by {mode}?",
            "Find a {mode} route from {origin} to {destination}.",
            "Directions to {destination} from {origin} by {mode}.",
        ),
        lambda draw, given: {"kilometres": draw.integer(3, 1800), "minutes": draw.integer(10, 1400)},
        (
            "It is {kilometres} kilometres and takes {minutes} minutes.",
            "From {origin} to {destination}: {kilometres} kilometres, {minutes} minutes.",
        ),
    ),
    Tool(
        "query_database",
        "Read rows of a table",
        _object(
            {
                "table": _enum(*TABLES),
                "filter": _object({"column": STRING, "operator": _enum("=", "<", ">"), "value": NUMBER}),
                "order_by": STRING,
                "limit": INTEGER,
            },
            "order_by",
            "limit",
        ),
        _query,
        (
            "Show {table} where {column} {operator} {value}.",
            "Which {table} have {column} {operator} {value}?",
            "List the {table} with {column} {operator} {value}.",
        ),
        lambda draw, given: {"rows": draw.integer(0, 5000), "seconds": draw.integer(1, 30)},
        ("{rows} {table} match.", "The query returned {rows} rows in {seconds} seconds."),
    ),
    Tool(
        "reserve_table",
        "Reserve a table in a restaurant",
        _object({"city": STRING, "guests": INTEGER, "time": STRING, "table_outside": BOOLEAN}, "table_outside"),
        lambda draw: _with_optional(
            draw, {"city": draw.pick(CITIES), "guests": draw.integer(1, 12), "time": _time(draw)}, table_outside=True
        ),
        (
            "Reserve a table for {guests} in {city} at {time}.",
            "We are {guests} and want to eat in {city} at {time}.",
            "Find dinner for {guests} in {city}, {time}.",
        ),
        lambda draw, given: {
            "restaurant": f"{draw.pick(RESTAURANT_COLORS)} {draw.pick(RESTAURANT_SIGNS)}",
            "confirmed": True,
        },
        (
            "A table for {guests} is reserved at {restaurant} for {time}.",
            "{restaurant} in {city} expects you at {time}.",
        ),
    ),
    Tool(
        "get_recipe",
        "Find a recipe",
        _object({"dish": STRING, "servings": INTEGER}, "servings"),
        lambda draw: _with_optional(draw, {"dish": draw.pick(DISHES)}, servings=draw.integer(2, 12)),
        ("How do I make {dish}?", "Give me a recipe for {dish}.", "I want to cook {dish}."),
        lambda draw, given: {
            "minutes": draw.integer(15, 150),
            "ingredients": draw.integer(4, 14),
            "recipe_id": draw.integer(100, 9999),
        },
        (
            "Recipe {recipe_id} for {dish} needs {ingredients} ingredients and {minutes} minutes.",
            "{dish} takes {minutes} minutes and {ingredients} ingredients.",
        ),
    ),
    Tool(
        "switch_light",
        "Switch a light on or off",
        _object({"room": STRING, "state": _enum("on", "off"), "brightness": INTEGER}, "brightness"),
        lambda draw: _with_optional(
            draw, {"room": draw.pick(ROOMS), "state": draw.pick(("on", "off"))}, brightness=draw.integer(5, 100)
        ),
        (
            "Switch {state} the light in the {room}.",
            "Turn the {room} light {state}.",
            "Light {state} in the {room}, please.",
        ),
        lambda draw, given: {"ok": True, "watts": draw.integer(0, 60)},
        ("The light in the {room} is {state}.", "{room} light: {state}, {watts} watts."),
    ),
    Tool(
        "write_file",
        "Write text to a file",
        _object({"path": STRING, "content": STRING, "overwrite": BOOLEAN}, "overwrite"),
        lambda draw: _with_optional(
            draw,
            {
                "path": f"{draw.pick(FILES)}_{draw.integer(1, 99)}.{draw.pick(('txt', 'md', 'csv'))}",
                "content": draw.pick(PHRASES),
            },
            overwrite=True,
        ),
        ("Write '{content}' to {path}.", "Save '{content}' in {path}.", "Create the file {path} with '{content}'."),
        lambda draw, given: {"bytes": len(given["content"]), "path": given["path"]},
        ("{bytes} bytes are written.", "The file is saved with {bytes} bytes."),
    ),
    Tool(
        "read_logs",
        "Read the log of a service",
        _object(
            {
                "service": _enum(*SERVICES),
                "level": _enum("debug", "info", "warning", "error"),
                "since_minutes": INTEGER,
            },
            "since_minutes",
        ),
        lambda draw: _with_optional(
            draw,
            {"service": draw.pick(SERVICES), "level": draw.pick(("debug", "info", "warning", "error"))},
            since_minutes=draw.integer(5, 240),
        ),
        (
            "Show {level} messages of the {service} service.",
            "What does the {service} log say at level {level}?",
            "Read the {level} log of {service}.",
        ),
        lambda draw, given: {
            "lines": draw.integer(0, 900),
            "last": draw.pick(("connection reset", "disk full", "retrying", "started", "timeout")),
        },
        ("{service} logged {lines} lines; the last says {last}.", "{lines} {level} lines, the last one: {last}."),
    ),
    Tool(
        "restart_service",
        "Restart a service",
        _object({"service": _enum(*SERVICES), "region": _enum("east", "west", "north")}),
        lambda draw: {"service": draw.pick(SERVICES), "region": draw.pick(("east", "west", "north"))},
        (
            "Restart {service} in {region}.",
            "The {service} service in {region} hangs, restart it.",
            "Please bring {service} in {region} up again.",
        ),
        lambda draw, given: {"state": draw.pick(("running", "starting", "failed")), "seconds": draw.integer(2, 120)},
        ("{service} in {region} is {state} after {seconds} seconds.", "State of {service}: {state}."),
    ),
    Tool(
        "calculate",
        "Compute an arithmetic expression",
        _object({"expression": STRING}),
        lambda draw: {"expression": f"{draw.integer(2, 900)} {draw.pick('+-*')} {draw.integer(2, 90)}"},
        ("What is {expression}?", "Compute {expression}.", "Calculate {expression} for me."),
        lambda draw, given: {"value": _value(given["expression"])},
        ("{expression} is {value}.", "The result is {value}."),
    ),
    Tool(
        "plot_chart",
        "Draw a chart of numbers",
        _object({"kind": _enum("bar", "line", "pie"), "values": _array(NUMBER), "title": STRING}),
        lambda draw: {
            "kind": draw.pick(("bar", "line", "pie")),
            "values": [draw.integer(1, 99) for _ in range(draw.integer(3, 5))],
            "title": draw.pick(TOPICS),
        },
        (
            "Draw a {kind} chart of {values} about {title}.",
            "Plot {values} as a {kind} chart titled {title}.",
            "Make a {kind} chart, {title}: {values}.",
        ),
        lambda draw, given: {"image": f"chart_{draw.integer(1, 999)}.png", "points": len(given["values"])},
        ("The {kind} chart with {points} points is in {image}.", "Done, see {image}."),
    ),
)


def _value(expression: str) -> int:
    left, operator, right = expression.split()
    first, second = int(left), int(right)
    return {"+": first + second, "-": first - second, "*": first * second}[operator]

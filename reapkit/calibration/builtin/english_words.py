"""The grammar of `english_prose`: genres made of sentence templates, and the rules their `{slots}` expand by.

Verbs stand in the past tense or behind "to", so that subjects of either number fit them; where the number shows, the
rule's name says which it is (`{thing}`, `{things}`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Genre:
    """Sentence templates of one kind of text; `closes_apart` gives the last sentence a paragraph of its own."""

    titles: tuple[str, ...]
    openings: tuple[str, ...]
    middles: tuple[str, ...]
    closings: tuple[str, ...]
    closes_apart: bool = False


RULES = {
    # Time and weather
    "season": ("spring", "summer", "autumn", "winter"),
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "daytime": (
        "at dawn", "in the morning", "around noon", "in the afternoon", "at dusk", "after dark", "before breakfast",
        "late in the evening",
    ),
    "when": (
        "that {season}", "one {weekday}", "in early {month}", "late in {month}", "on the {ordinal} day",
        "a week later", "the next morning", "soon afterwards", "by the end of {month}", "some days before",
    ),
    "ordinal": ("first", "second", "third", "fourth", "fifth", "last"),
    "duration": (
        "an hour", "half a day", "a week", "most of the night", "the whole {season}", "two days", "nearly a month",
        "a few minutes",
    ),
    "weather": ("rain", "snow", "fog", "hail", "wind", "thunder", "sunshine", "frost", "drizzle", "sleet", "mist"),
    "sky": ("grey", "clear", "pale", "dark", "cloudless", "heavy with rain", "the color of slate", "almost white"),
    # Describing words
    "adjective": (
        "old", "small", "narrow", "wide", "quiet", "bright", "heavy", "broken", "wooden", "stone", "plain", "painted",
        "empty", "crowded", "low", "tall", "smooth", "rough", "cold", "warm", "dusty", "clean", "strange", "simple",
        "famous", "forgotten",
    ),
    "trait": (
        "young", "old", "tall", "kind", "stubborn", "silent", "clever", "cheerful", "careless", "retired",
        "well known", "patient",
    ),
    "color": ("yellow", "red", "brown", "silver", "dark green", "black", "golden", "pale"),
    "feeling": (
        "tired", "glad", "uneasy", "proud", "curious", "angry", "calm", "hopeful", "ashamed", "relieved", "lonely",
        "grateful",
    ),
    "manner": (
        "slowly", "carefully", "without a word", "in silence", "with some effort", "quickly", "again and again",
        "one by one", "with great patience", "almost by accident",
    ),
    "degree": ("a little", "much", "slightly", "far", "somewhat"),
    "maybe": ("perhaps", "as a rule", "more often than not", "in most years", "it seems", "of course", "to be fair"),
    # Things and places
    "building": (
        "church", "mill", "inn", "school", "lighthouse", "town hall", "chapel", "station", "granary", "library",
        "market hall", "brewery", "forge", "harbor office",
    ),
    "room": (
        "kitchen", "cellar", "attic", "hall", "workshop", "garden", "courtyard", "reading room", "stable", "pantry",
    ),
    "path": ("road", "track", "path", "lane", "stairway", "bridge", "footpath", "pass"),
    "water": ("river", "lake", "stream", "canal", "bay", "pond", "marsh", "harbor"),
    "height": ("hill", "ridge", "cliff", "mountain", "tower", "slope", "headland"),
    "thing": (
        "lamp", "map", "letter", "clock", "basket", "bell", "key", "ladder", "rope", "notebook", "coat", "chair",
        "drum", "mirror", "plough", "net", "kettle", "telescope", "cart", "saddle",
    ),
    "things": (
        "lamps", "maps", "letters", "clocks", "baskets", "bells", "keys", "ladders", "ropes", "notebooks", "coats",
        "chairs", "nets", "barrels", "tools", "boats", "carts", "candles",
    ),
    "material": ("oak", "iron", "clay", "wool", "glass", "copper", "linen", "slate", "leather", "straw"),
    "food": (
        "bread", "cheese", "soup", "smoked fish", "apple cake", "barley porridge", "roasted chestnuts", "dark beer",
        "pea stew", "honey",
    ),
    "trader": (
        "baker", "carpenter", "ferryman", "farmer", "weaver", "miller", "teacher", "doctor", "clerk", "smith",
        "shepherd", "fisherman", "printer", "gardener",
    ),
    "traders": (
        "bakers", "carpenters", "farmers", "weavers", "millers", "teachers", "clerks", "smiths", "shepherds",
        "fishermen", "printers", "sailors", "children", "neighbors",
    ),
    "animal": (
        "fox", "heron", "otter", "hare", "owl", "badger", "stag", "falcon", "swallow", "hedgehog", "raven", "salmon",
        "lynx", "toad",
    ),
    "animals": (
        "foxes", "herons", "otters", "hares", "owls", "badgers", "deer", "falcons", "swallows", "bees", "ravens",
        "salmon", "frogs", "geese", "bats",
    ),
    "plant": (
        "oak", "willow", "fern", "birch", "thistle", "hazel", "rowan", "nettle", "juniper", "ash tree", "foxglove",
        "heather",
    ),
    "plants": (
        "oaks", "willows", "ferns", "birches", "thistles", "hazels", "reeds", "nettles", "mosses", "orchids",
        "mushrooms", "brambles",
    ),
    "spot": (
        "by the {water}", "behind the {building}", "near the {height}", "at the end of the {path}",
        "under the {plants}", "in the {room}", "across the {water}", "outside {place}",
        "on the {path} to {other_place}", "beside {a adjective} {building}",
    ),
    "direction": (
        "towards the {water}", "up the {height}", "down to the {water}", "past the {building}", "along the {path}",
        "into the {room}", "back to {place}", "over the {height}",
    ),
    # Parts of sentences
    "someone": ("the {trader}", "{stranger}", "{person}", "{friend}", "one of the {traders}", "the {trait} {trader}"),
    "stranger": (
        "{a trait} {trader}", "{a trader} from {other_place}", "{a trader} called {other_family}", "a stranger",
        "{a trait} stranger",
    ),
    "people": (
        "the {traders}", "the people of {place}", "most {traders}", "{person} and {friend}", "several {traders}",
        "the {traders} of {other_place}", "our neighbors",
    ),
    "object": (
        "the {thing}", "{a adjective} {thing}", "the {things}", "some {adjective} {things}",
        "{a thing} made of {material}", "{number} {things}", "a piece of {material}",
    ),
    "did": (
        "carried {object} {direction}", "waited {spot} for {duration}", "found {object} {spot}",
        "repaired {object} {manner}", "sold {object} to {someone}", "left {object} {spot}", "talked about {topic}",
        "looked for {object}", "walked {direction}", "stopped {spot}", "asked about {topic}", "painted {object}",
        "hid {object} {spot}", "forgot {object}", "promised to return {when}",
    ),
    "to_do": (
        "repair {object}", "walk {direction}", "wait {spot}", "sell {object}", "look for {object}",
        "talk about {topic}", "cross the {water}", "leave {place}", "visit {other_place}", "learn about {topic}",
        "write to {someone}",
    ),
    "topic": (
        "the {season}", "the price of {material}", "the {path} to {other_place}", "the {weather}",
        "the old {building}", "work and money", "{food}", "the {family} family", "the health of {someone}",
        "the new {building}", "the {animals} {spot}",
    ),
    "happened": (
        "{weather} came over the {height}", "the {water} rose {manner}", "the {building} stood empty",
        "{someone} {did}", "{people} {did}", "the {path} was closed", "nothing moved {spot}",
        "the {animals} came back", "{a thing} fell {direction}", "the bells of {place} rang",
        "the {plants} began to flower",
    ),
    "link": ("because", "although", "until", "while", "as soon as", "before", "after", "just when"),
    "reason": (
        "to {to_do}", "in order to {to_do}", "without hope", "out of habit", "for the sake of {someone}",
        "in spite of the {weather}", "instead of helping {someone}",
    ),
    "aside": (
        "which surprised {people}", "as {someone} had expected", "to the relief of {people}", "or so {someone} said",
        "though nobody wrote it down", "much to the regret of {someone}",
    ),
    "lead": (
        "even so, ", "later, ", "in fact, ", "of course, ", "still, ", "at first, ", "to my mind, ", "this time, ",
        "as always, ", "here too, ", "in the end, ", "after all, ",
    ),
    "event": (
        "{happened}", "{happened} {link} {happened}", "{when} {happened}", "{happened}, {aside}",
        "{happened}, and {someone} {did}", "{link} {happened}, {someone} {did}", "{someone} {did} {reason}",
        "{people} {did}, {aside}", "{someone} who {did} {when} now {did}", "neither {someone} nor {stranger} {did}",
        "{someone}, {feeling} and {feeling}, {did}", "{daytime} {someone} {did}, and {happened}",
        "there lay {object} {spot}, and {someone} wanted to {to_do}",
    ),
    "saying": (
        "The {thing} is older than the {building}", "Nobody crosses the {water} twice",
        "Wait for {weather}, then begin", "We have {food}, so we can stay", "I have never seen so many {animals}",
        "This {path} leads nowhere", "You should have come {daytime}",
    ),
    # Instructions
    "part": ("handle", "lid", "frame", "hinge", "blade", "rim", "spring", "base", "cord", "pin"),
    "tool": (
        "a sharp knife", "a soft brush", "a damp cloth", "a small hammer", "a pair of pliers", "fine sandpaper",
        "a ruler", "a wooden spoon", "a needle and thread", "warm water",
    ),
    "project": (
        "a bird box", "a wooden {thing}", "a loaf of rye bread", "{a adjective} {thing}", "a garden bench",
        "a compost heap", "a kite", "a stone path", "a jar of plum jam", "a rope ladder", "a wool hat", "a herb bed",
    ),
    "step_verb": ("clean", "measure", "check", "loosen", "dry", "oil", "weigh", "mark", "fold", "press", "cover"),
    "amount": (
        "two spoons of flour", "a cup of water", "a handful of seeds", "a slice of lemon", "half a metre of cord",
        "a pinch of salt", "three short nails", "a thin layer of wax",
    ),
    "length": ("two fingers", "a hand's width", "one metre", "three steps", "the thickness of a coin", "half a foot"),
    # Reports
    "measure": (
        "the number of visitors", "the cost of repairs", "the use of water", "the price of {material}",
        "the number of {animals}", "the harvest", "the traffic on the {path}", "the time lost to {weather}",
        "the stock of {things}",
    ),
    "change": (
        "rose by {percent} percent", "fell by {percent} percent", "stayed about the same",
        "doubled within {number} months", "was lower than planned", "reached {count} for the first time",
        "grew {degree} faster than before", "returned to the level of last {season}",
    ),
    "cause": (
        "the long {season}", "the closed {path}", "a lack of {material}", "new rules for {traders}",
        "the repairs to the {building}", "higher prices for {food}", "the {weather} in {month}",
        "a mistake in the plan",
    ),
    "measure_taken": (
        "hire {number} more {traders}", "close the {path} in {month}", "replace the {things}",
        "build a second {building}", "ask {people} for advice", "count the {animals} again",
        "delay the work on the {building}", "buy more {material}", "publish the figures each {season}",
    ),
}  # fmt: skip

TRAVEL = Genre(
    titles=(
        "Notes from {place}",
        "A week in {place}",
        "The {path} to {other_place}",
        "{place} in {season}",
        "Walking near {place}",
    ),
    openings=(
        "we reached {place} {daytime}, when the sky was {sky}.",
        "the {path} to {place} runs along the {water} for {number} miles.",
        "I came to {place} in {month} with nothing but {a thing} and a bag of {food}.",
        "nobody had told us that {place} lies {spot}.",
        "{person} and I took the early boat from {other_place} and arrived {daytime}.",
        "from the {height} one sees all of {place}: the {building}, the {water} and {number} {adjective} houses.",
    ),
    middles=(
        "the {building} is {adjective} and smells of {material}.",
        "{someone} showed us the {room}, where {object} had been kept since {year}.",
        "for supper there was {food}, and after it {food}.",
        "{daytime} we walked {direction}, and {happened}.",
        "the {path} was {degree} steeper than our map had promised.",
        "a sign {spot} warned of {weather}, but the sky stayed {sky}.",
        "{event}.",
        "{event}.",
        "{event}.",
        "{event}.",
        "the {adjective} {path} led {direction}, and {event}.",
        "{number} {traders} sat {spot} and talked about {topic}.",
        "I had hoped to {to_do}, but {event}.",
        "beyond the {water} there is {a adjective} {building} with {a adjective} {room}.",
        "we met {stranger} who {did}.",
        "I bought {object} from {someone} and paid too much.",
        "there are {count} steps to the top, and I was {feeling} before the {ordinal} landing.",
        "on {weekday} the market fills with {traders} selling {material} and {food}.",
        "{person} wanted to {to_do}, while I preferred to {to_do}.",
        "it is said that {happened} in {year}.",
        "{maybe}, {people} are proud of the {building}.",
        "the {water} was so still that the {height} could be seen in it.",
        "we slept above the {building} and heard the {animals} all night.",
        '"{saying}," said {someone} when we asked for the way.',
        "from there it takes {duration} to {to_do}.",
        "I wrote {number} pages about {topic} and tore them up again.",
        "the last boat leaves {daytime}, and {people} {did} to catch it.",
    ),
    closings=(
        "tomorrow we go on to {other_place}.",
        "I would come back for the {food} alone.",
        "we left {place} {feeling}, and with wet shoes.",
        "if you go, go in {season}, and take {a thing} with you.",
        "the {water} is what I remember best.",
    ),
)

REPORT = Genre(
    titles=(
        "Report on {measure}",
        "{place}: results for {month}",
        "Summary for the council of {place}",
        "{season} report, {place}",
    ),
    openings=(
        "this report describes {measure} in {place} between {month} and {month}.",
        "the council of {place} asked for an account of {measure}.",
        "in the past {season}, {measure} {change}.",
        "the following notes were collected from {count} {traders} near {place}.",
    ),
    middles=(
        "{measure} {change}, mainly because of {cause}.",
        "compared with {other_place}, {measure} {change}.",
        "of the {count} {things} that were tested, {number} had to be replaced.",
        "{people} named {cause} as the most important reason.",
        "we expected that {measure} would fall, but it {change}.",
        "in {month}, {measure} {change}; in {month} it {change}.",
        "the figures for the {building} are missing, since {happened}.",
        "about {percent} percent of {people} said that they were {feeling}.",
        "in {month} {event}.",
        "it was noted that {event}.",
        "according to {someone}, {event}.",
        "{people} were asked to {to_do} {daytime}, and {percent} percent agreed.",
        "the work on the {path} lasted {duration} and cost {count} crowns.",
        "two problems remain: {cause} and {cause}.",
        "it was agreed to {measure_taken}.",
        "a proposal to {measure_taken} was rejected by {number} votes.",
        "the repairs cost {count} crowns, which is {degree} more than planned.",
        "{someone} measured the depth of the {water} every {weekday}.",
        "no accident was reported, apart from one {spot}.",
        "if {cause} continues, the plan should be reviewed in {month}.",
        "the results do not show whether {cause} played a part.",
        "three of the {number} stations near the {water} sent no data.",
        "after {duration} of work the {building} was opened again.",
    ),
    closings=(
        "we recommend to {measure_taken} and to {measure_taken}.",
        "the next report will follow in {month}.",
        "in short, {measure} {change}.",
        "the committee will meet again {when} to discuss {topic}.",
        "all figures are rounded.",
    ),
    closes_apart=True,
)

LETTER = Genre(
    titles=("Dear {friend},", "My dear {friend},", "Dear Mr. {family},", "Dear Mrs. {family},", "Dear neighbors,"),
    openings=(
        "thank you for your letter, which reached me {daytime} on {weekday}.",
        "I am sorry that I have not written since {month}.",
        "you asked me about {topic}, so here is what I know.",
        "I hope that the {weather} has not kept you from your work.",
        "by the time you read this I shall be in {other_place}.",
    ),
    middles=(
        "{event}.",
        "{event}.",
        "{event}.",
        "{event}.",
        "have you heard that {event}?",
        "tell {someone} that {event}.",
        "it is not true that {happened}, whatever {someone} may say about {topic}.",
        "your {thing} arrived safely, although the {part} was bent.",
        "the {room} is finished at last, and I am {feeling} about it.",
        "{someone} asks to be remembered to you.",
        "do you still want to {to_do}?",
        "I have tried to {to_do}, but {happened}.",
        "we had {weather} for {duration}, and the {path} is {adjective} again.",
        "please send me {object} when you can.",
        "it would help me if you could {to_do} before {month}.",
        "do not worry about {topic}; it will wait.",
        "I often think of the day when {happened}.",
        "the children have grown, and they talk of nothing but {animals}.",
        "there is {food} on the table and {a adjective} {thing} beside me as I write.",
        "last {weekday} {someone} {did}, {aside}.",
        "as for the money, I can pay {count} crowns in {month} and the rest in {month}.",
        "you were right about the {building}: it is {adjective} and far too {adjective}.",
        "I was {feeling} to hear that {happened}.",
        "if you come in {season}, we can {to_do} together.",
        "my brother bought {a building} near {other_place}, which made everybody {feeling}.",
    ),
    closings=(
        "With kind regards, {person}",
        "Yours sincerely, {person} {other_family}",
        "Write soon. Your {person}",
        "With love to all of you, {person}",
        "Yours, {person} {other_family}, {place}",
    ),
    closes_apart=True,
)

INSTRUCTIONS = Genre(
    titles=("How to make {project}", "Making {project}", "{project}, step by step", "A guide to repairing {a thing}"),
    openings=(
        "making {project} takes {duration} and needs little more than {tool}.",
        "before you begin, put {tool} and {tool} within reach.",
        "anyone can learn to make {project}, but it takes some patience.",
        "this is how {people} make {project} in {place}.",
    ),
    middles=(
        "first, {step_verb} the {part} with {tool}.",
        "then {step_verb} it again, this time with {tool}.",
        "{step_verb} the {part} and the {part} until both are {adjective}.",
        "add {amount} and wait for {duration}.",
        "if the {part} is {adjective}, {step_verb} it before you go on.",
        "use {tool} rather than {tool}, which would leave marks.",
        "do not hurry: the {material} needs {duration} to settle.",
        "hold the {part} with one hand and {step_verb} the {part} with the other.",
        "a good {trader} would {step_verb} the {material} twice.",
        "next, {step_verb} {number} pieces of {material} and lay them {spot}.",
        "you will need {amount}, {amount} and {tool}.",
        "when the {part} no longer moves, it is time to {step_verb} the {part}.",
        "{a trait} {trader} once told me to {step_verb} the {part} {daytime}, {maybe}.",
        "put the {part} {spot} and cover it with {material}.",
        "for {a adjective} result, {step_verb} the {part} {manner} and let it rest for {duration}.",
        "in {season} it helps to {step_verb} the {material} {daytime}.",
        "ask {stranger} to hold the {part} while you {step_verb} the {part}.",
        "mistakes at this point are easy to correct with {tool}.",
        "keep it away from {weather} for {duration}.",
        "should the {part} break, replace it by one made of {material}.",
        "never {step_verb} the {part} while it is {adjective}.",
        "{step_verb} everything {manner}, beginning with the {part}.",
        "leave a gap of {length} between the {part} and the {part}.",
        "some people prefer {material}, which is {degree} lighter.",
    ),
    closings=(
        "it will last for many years if you {step_verb} it each {season}.",
        "now it is ready to use.",
        "store it {spot}, where it stays dry.",
        "the second one will turn out better than the first.",
        "clean {tool} at once, or the {material} will stick to it.",
    ),
)

NATURE = Genre(
    titles=("The {water} in {season}", "The {animal}", "{season} notes", "Where the {animals} go", "Life {spot}"),
    openings=(
        "in {season} the {water} near {place} belongs to the {animals}.",
        "the {animal} is seldom seen {daytime}, but its tracks are everywhere.",
        "few places hold as many {animals} as the {height} above {place}.",
        "the first {plants} appeared {spot} {when}.",
        "between the {water} and the {height} lies a strip of land where {plants} grow.",
    ),
    middles=(
        "the {animals} feed on {plants} and sleep {spot}.",
        "{daytime} the {animals} move {direction}.",
        "last {season} {happened}, and the {animals} moved {direction}.",
        "{people} say that the {animal} {spot} is {degree} older than the {building}.",
        "one can hear the {animals} {spot}, {maybe}, when {weather} is near.",
        "a path of {color} {plants} leads {direction}.",
        "{daytime} {stranger} saw {number} {animals} {spot}.",
        "{a animal} sat {spot} and did not move for {duration}.",
        "under the {plants} the ground is {adjective} and full of life.",
        "after {weather} the {plants} turn {color}, and the {animals} fall silent.",
        "{someone} once counted {count} {animals} in {duration}.",
        "no {plant} grows taller than the ones {spot}.",
        "the young leave the nest in {month}, {maybe}.",
        "where the {water} is deep, {animals} hunt; where it is shallow, {animals} hide.",
        "the {plant} flowers in {month} and is visited by {animals}.",
        "a single {plant} can feed {number} {animals} through the {season}.",
        "the {animal} builds its nest from {material} and dry {plants}.",
        "when {weather} comes, the {animals} gather {spot}.",
        "in dry years the {water} shrinks, and the {animals} move to {other_place}.",
        "its call is {degree} lower than that of the {animal}.",
        "old {plants} lean over the {path}, and {plants} cover the stones.",
        "{people} used to gather {plants} here until {year}.",
        "frost kills the {plants} first and the {plants} last.",
        "it can smell {a animal} from across the {water}.",
        "by {month} the {animals} have gone, and only the {animals} remain.",
    ),
    closings=(
        "then the {season} ends, and the {water} is quiet again.",
        "whoever waits long enough {spot} will see {a animal}.",
        "nobody knows why the {animals} come back to the same {plant}.",
        "the {plants} will still be there in {season}.",
    ),
)

HISTORY = Genre(
    titles=(
        "The {building} of {place}",
        "How {place} lost its {building}",
        "The {family} family",
        "A short history of {place}",
        "{person} {family}",
    ),
    openings=(
        "{person} {family} was born in {place} in {year}, {spot}.",
        "the {building} of {place} was built in {year} by {someone}.",
        "in {year}, {place} was a village of {count} people.",
        "the {family} family came to {place} from {other_place} in the {season} of {year}.",
        "until {year} nobody in {place} had ever seen {a thing} made of {material}.",
        "long before the {path} reached {place}, {people} {did}.",
    ),
    middles=(
        "{event}.",
        "{event}.",
        "{event}.",
        "{event}.",
        "{event}, and in {later_year} {happened}.",
        "according to {someone}, {event}.",
        "{she} meant to {to_do}, but {event}.",
        "{when} {person} {did}, {aside}.",
        "{she} learned the trade of {a trader} and worked {spot}.",
        "in {later_year} a fire destroyed the {building}, and {people} {did}.",
        "{person} married {friend} {other_family}, whose father owned the {building} of {other_place}.",
        "the price of {material} rose, and {people} began to {to_do}.",
        "a letter from {later_year} says that {happened}.",
        "{she} was {feeling} when {happened}, but {she} did not {to_do}.",
        "{friend} never forgave {her} for it.",
        "for {number} years {place} and {other_place} argued about the {water}.",
        "the duke sent {number} men to {to_do}, yet {happened}.",
        "{people} called {her} the {trader} of {other_place}.",
        "{hers} {thing} can still be seen in the {building}.",
        "the old {path} was given up, and the {building} fell into ruin.",
        "war came in {later_year}; {place} lost its {things} and half of its {traders}.",
        '"{saying}," {she} is said to have answered.',
        "of {hers} {number} children, only one wanted to {to_do}.",
        "the {building} then passed to {someone}, who {did}.",
        "trade in {material} made {place} rich, and trade in {food} made it {adjective}.",
        "in the {season} of {later_year} the {water} froze for {duration}.",
        "{a trader} named {other_family} wrote down what {people} had told him.",
    ),
    closings=(
        "today only the name of the {path} recalls the {family} family.",
        "{person} died in {later_year}, and {people} {did}.",
        "the {building} stands to this day.",
        "what became of the {thing} is not known.",
        "so {place} kept its {building}, and {other_place} kept the {water}.",
    ),
)

GENRES = (TRAVEL, REPORT, LETTER, INSTRUCTIONS, NATURE, HISTORY)

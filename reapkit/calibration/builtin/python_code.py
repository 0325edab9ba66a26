"""Generates Python modules from a grammar: always valid syntax, 400 to 2,000 characters, no two equal."""

import re
from dataclasses import dataclass
from textwrap import indent

from reapkit.calibration.builtin.draw import Draw, sentence, with_article
from reapkit.calibration.builtin.tables import table

SHORTEST, LONGEST = 400, 2000

TABLE = table("python")
NOUNS, WORDS, VERBS, ERRORS = (TABLE[name] for name in ("nouns", "words", "verbs", "errors"))
FIELDS = tuple(TABLE["fields"].items())

_SLOT = re.compile(r"\$(\w+)")
_DEFINITION = re.compile(r"((?:@[^\n]*\n)*(?:async )?(?:def|class) [^\n]*\n)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Subject:
    """What a module is about, and the style it is written in."""

    noun: str
    plural: str
    type_name: str
    fields: tuple[tuple[str, str], ...]
    subscripts: bool
    hints: bool
    documented: bool

    def access(self, variable: str, field: str) -> str:
        """The expression that reads a field of a variable."""
        return f'{variable}["{field}"]' if self.subscripts else f"{variable}.{field}"

    def hint(self, text: str) -> str:
        """`: text` in a module with type hints, else nothing."""
        return f": {text}" if self.hints else ""

    def returns(self, text: str) -> str:
        """` -> text` in a module with type hints, else nothing."""
        return f" -> {text}" if self.hints else ""

    def fields_of(self, *kinds: str) -> list[tuple[str, str]]:
        """The fields with one of the given types."""
        return [field for field in self.fields if field[1] in kinds]

    @property
    def item_type(self) -> str:
        """The type of one item as an annotation writes it."""
        return "dict" if self.subscripts else self.type_name


@dataclass(frozen=True)
class Definition:
    """A definition at the top level of a module, and the imports it needs."""

    text: str
    imports: tuple[str, ...] = ()


def code_row(draw: Draw) -> dict:
    """One module: imports, perhaps constants and a class, functions about one subject, perhaps tests or a script."""
    subject = _subject(draw)
    opening = _module_docstring(draw, subject)
    pieces = [_constants(draw, subject)] if draw.chance(0.35) else []
    if not subject.subscripts and draw.chance(0.6):
        pieces.append(draw.pick((data_class, data_class, plain_class))(draw, subject))
    wanted = draw.integer(SHORTEST + 50, LONGEST - 500)
    text = _module(opening, pieces)
    while len(text) < wanted:
        piece = draw.pick(BUILDERS)(draw, subject)
        longer = _module(opening, [*pieces, piece])
        if len(longer) <= LONGEST and _defined(piece.text) not in {_defined(other.text) for other in pieces}:
            pieces.append(piece)
            text = longer
    return {"text": text}


def _subject(draw: Draw) -> Subject:
    noun = draw.pick(NOUNS)
    return Subject(
        noun=noun,
        plural=_plural(noun),
        type_name="".join(part.title() for part in noun.split("_")),
        fields=_mixed_fields(draw),
        subscripts=draw.chance(0.35),
        hints=draw.chance(0.6),
        documented=draw.chance(0.7),
    )


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "sx" else "s")


def _mixed_fields(draw: Draw) -> tuple[tuple[str, str], ...]:
    """Three to six fields, among them at least one string and one number."""
    strings = [field for field in FIELDS if field[1] == "str"]
    numbers = [field for field in FIELDS if field[1] in ("int", "float")]
    others = [field for field in FIELDS if field[1] in ("bool", "list[str]", "list[int]")]
    chosen = draw.sample(strings, draw.integer(1, 2)) + draw.sample(numbers, draw.integer(1, 2))
    return tuple(chosen + draw.sample(others, draw.integer(1, 2)))


def _module(opening: str, pieces: list[Definition]) -> str:
    """The module's text: docstring, sorted imports, definitions two lines apart, what runs as a script last."""
    pieces = sorted(pieces, key=lambda piece: "__main__" in piece.text)
    imports = sorted(
        {line for piece in pieces for line in piece.imports}, key=lambda line: (line.startswith("from"), line)
    )
    blocks = [opening] if opening else []
    if imports:
        blocks.append("\n".join(imports))
    head = "\n\n".join(blocks)
    body = "\n\n\n".join(piece.text.strip("\n") for piece in pieces)
    separator = "\n\n\n" if head and body else ""
    return f"{head}{separator}{body}\n"


def _defined(text: str) -> str:
    """The name a piece defines first; two pieces of one module never define the same."""
    match = re.search(r"^(?:async )?(?:def|class) (\w+)", text, re.MULTILINE)
    return match.group(1) if match else text


def _fill(template: str, **names: str) -> str:
    """The template with every `$name` replaced."""
    return _SLOT.sub(lambda match: names[match.group(1)], template)


def _block(*statements: str) -> str:
    """Statements one level deeper."""
    return indent("\n".join(statement for statement in statements if statement), "    ")


def _docstring(subject: Subject, text: str) -> str:
    return f'"""{text}"""' if subject.documented else ""


def _function(subject: Subject, signature: str, docstring: str, *body: str) -> str:
    return f"def {signature}:\n{_block(_docstring(subject, docstring), *body)}"


def _module_docstring(draw: Draw, subject: Subject) -> str:
    if not draw.chance(0.6):
        return ""
    verb = draw.pick(VERBS)
    return draw.pick(
        (
            f'"""{sentence(verb)} {subject.plural} read from {with_article(draw.pick(WORDS))} source."""',
            f'"""Helpers that {verb} {subject.plural}."""',
            f'"""Tools for {subject.plural} with {_listing(subject)}."""',
            f'"""Everything that deals with {subject.plural}.\n\nEach {subject.noun} has {_listing(subject)}.\n"""',
        )
    )


def _listing(subject: Subject) -> str:
    names = [_listed(name, kind) for name, kind in subject.fields]
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def _listed(name: str, kind: str) -> str:
    if kind.startswith("list"):
        return name
    return with_article(f"{name} flag" if kind == "bool" else name)


def _literal(draw: Draw, kind: str) -> str:
    """A literal of the given type."""
    if kind == "int":
        return str(draw.pick((0, 1, 2, 3, 5, 8, 10, 12, 16, 20, 24, 32, 50, 60, 64, 100, 128, 255, 365, 500, 1000)))
    if kind == "float":
        return f"{draw.integer(0, 99)}.{draw.pick((0, 5, 25, 75, 1, 9))}"
    if kind == "bool":
        return draw.pick(("True", "False"))
    if kind == "str":
        return f'"{draw.pick(WORDS)}"'
    element = kind.removeprefix("list[").removesuffix("]")
    return f"[{', '.join(_literal(draw, element) for _ in range(draw.integer(1, 3)))}]"


def _condition(draw: Draw, expression: str, kind: str) -> str:
    """A test of an expression that makes sense for its type."""
    value = _literal(draw, kind)
    if kind in ("int", "float"):
        operator = draw.pick((">", "<", ">=", "<=", "==", "!="))
        return draw.pick(
            (f"{expression} {operator} {value}", f"{expression} {operator} {value}", f"0 < {expression} <= {value}")
        )
    if kind == "bool":
        return draw.pick((expression, f"not {expression}"))
    if kind == "str":
        return draw.pick(
            (
                f"{expression} == {value}",
                f"{expression} != {value}",
                f"{expression}.startswith({value})",
                f"{expression}.lower() == {value}",
                f"{value} in {expression}",
                f"{expression} in ({value}, {_literal(draw, kind)})",
                f"not {expression}.strip()",
            )
        )
    element = _literal(draw, kind.removeprefix("list[").removesuffix("]"))
    return draw.pick((f"{element} in {expression}", f"len({expression}) > {draw.integer(1, 9)}", f"not {expression}"))


def _any_condition(draw: Draw, subject: Subject, variable: str) -> str:
    """A test of one or two fields of a variable."""
    tests = [
        _condition(draw, subject.access(variable, name), kind)
        for name, kind in draw.sample(subject.fields, 2 if draw.chance(0.25) else 1)
    ]
    return draw.pick((" and ", " or ")).join(tests)


def _constants(draw: Draw, subject: Subject) -> Definition:
    lines = []
    for name, kind in draw.sample(subject.fields, draw.integer(1, 3)):
        prefix = draw.pick(("DEFAULT", "MAX", "MIN", "BASE")) if kind in ("int", "float") else "DEFAULT"
        lines.append(f"{prefix}_{name.upper()} = {_literal(draw, kind)}")
    if draw.chance(0.4):
        words = draw.sample(WORDS, draw.integer(2, 4))
        lines.append(f"{draw.pick(('KINDS', 'STATES', 'ALLOWED', 'NAMES'))} = ({', '.join(map(_quoted, words))})")
    return Definition("\n".join(lines))


def _quoted(word: str) -> str:
    return f'"{word}"'


def data_class(draw: Draw, subject: Subject) -> Definition:
    """A dataclass with a method or two."""
    lines = [f"    {name}: {kind}" for name, kind in subject.fields]
    imports = ["from dataclasses import dataclass"]
    if subject.fields[-1][1].startswith("list") and draw.chance(0.5):
        lines[-1] += " = field(default_factory=list)"
        imports = ["from dataclasses import dataclass, field"]
    decorator = draw.pick(("@dataclass", "@dataclass(frozen=True)", "@dataclass(order=True)"))
    doc = [f'    """One {subject.noun} and its {subject.fields[0][0]}."""', ""] if subject.documented else []
    methods = [_method(draw, subject) for _ in range(draw.integer(0, 2))]
    body = "\n".join(doc + lines) + "".join(f"\n\n{method}" for method in dict.fromkeys(methods))
    return Definition(f"{decorator}\nclass {subject.type_name}:\n{body}", tuple(imports))


def plain_class(draw: Draw, subject: Subject) -> Definition:
    """A class with an explicit constructor and a few methods."""
    fields = subject.fields[:3]
    parameters = ", ".join(f"{name}{subject.hint(kind)}" for name, kind in fields)
    doc = (
        [f'    """{sentence(with_article(subject.noun))} that knows its {fields[0][0]}."""', ""]
        if subject.documented
        else []
    )
    constructor = [f"    def __init__(self, {parameters}){subject.returns('None')}:"]
    constructor += [f"        self.{name} = {name}" for name, _ in fields]
    fewer = Subject(**{**vars(subject), "fields": fields})
    methods = [_method(draw, fewer), _representation(fewer)]
    body = "\n".join(doc + constructor) + "".join(f"\n\n{method}" for method in draw.shuffled(methods))
    return Definition(f"class {subject.type_name}:\n{body}")


def _representation(subject: Subject) -> str:
    shown = ", ".join(f"{name}={{self.{name}!r}}" for name, _ in subject.fields[:2])
    return f'    def __repr__(self){subject.returns("str")}:\n        return f"{subject.type_name}({shown})"'


def _method(draw: Draw, subject: Subject) -> str:
    """A method or property that tests or prints one field."""
    name, kind = draw.pick(subject.fields)
    if kind in ("int", "float") and draw.chance(0.5):
        verb, operator = draw.pick((("raise", "+"), ("lower", "-"), ("scale", "*")))
        body = f"return self.{name} {operator} by"
        return f"    def {verb}_{name}(self, by{subject.hint(kind)}){subject.returns(kind)}:\n        {body}"
    if kind == "str" and draw.chance(0.5):
        call = draw.pick(("upper()", "title()", "strip()", 'replace("_", " ")', "casefold()"))
        return f"    @property\n    def shown_{name}(self){subject.returns('str')}:\n        return self.{name}.{call}"
    test = _condition(draw, f"self.{name}", kind)
    return f"    def has_{draw.pick(WORDS)}_{name}(self){subject.returns('bool')}:\n        return {test}"


def filtering(draw: Draw, subject: Subject) -> Definition:
    """Select the items that pass a test, by comprehension, loop or generator."""
    item, items = _variable(draw, subject), subject.plural
    test, word = _any_condition(draw, subject, item), draw.pick(WORDS)
    name = f"{draw.pick(('select', 'find', 'keep', 'drop', 'pick'))}_{word}_{items}"
    style = draw.pick(("comprehension", "loop", "generator"))
    result, doc = ("Iterator", "Yield") if style == "generator" else ("list", draw.pick(("Return", "List", "Select")))
    given = f"{items}{subject.hint(f'list[{subject.item_type}]')}"
    signature = f"{name}({given}){subject.returns(f'{result}[{subject.item_type}]')}"
    if style == "comprehension":
        body = [f"return [{item} for {item} in {items} if {test}]"]
    elif style == "generator":
        body = [f"for {item} in {items}:\n    if {test}:\n        yield {item}"]
    else:
        kept = draw.pick(("kept", "found", "result", "chosen"))
        body = [f"{kept} = []\nfor {item} in {items}:\n    if {test}:\n        {kept}.append({item})\nreturn {kept}"]
    imports = ("from collections.abc import Iterator",) if style == "generator" and subject.hints else ()
    return Definition(_function(subject, signature, f"{doc} the {word} {items}.", *body), imports)


def totalling(draw: Draw, subject: Subject) -> Definition:
    """Add up, average, or take the extreme of a numeric field."""
    name, kind = draw.pick(subject.fields_of("int", "float"))
    item, items = _variable(draw, subject), subject.plural
    value = subject.access(item, name)
    how = draw.pick(("total", "average", "largest", "smallest"))
    given = subject.hint(f"list[{subject.item_type}]")
    if how == "total" and draw.chance(0.5):
        test = _any_condition(draw, subject, item)
        body = (
            f"total = 0\nfor {item} in {items}:\n    if {test}:\n        continue\n    total += {value}\nreturn total"
        )
    elif how == "total":
        body = f"return sum({value} for {item} in {items})"
    elif how == "average":
        fallback = draw.pick(("return 0.0", f'raise ValueError("no {items} given")'))
        body = f"if not {items}:\n    {fallback}\nreturn sum({value} for {item} in {items}) / len({items})"
    else:
        function = "max" if how == "largest" else "min"
        body = f"return {function}(({value} for {item} in {items}), default={_literal(draw, kind)})"
    signature = f"{how}_{name}({items}{given}){subject.returns('float')}"
    return Definition(_function(subject, signature, f"Return the {how} {name} of all {items}.", body))


def grouping(draw: Draw, subject: Subject) -> Definition:
    """Group or count items by a field."""
    name, kind = draw.pick(subject.fields_of("str", "int"))
    item, items = _variable(draw, subject), subject.plural
    key = subject.access(item, name)
    given = subject.hint(f"list[{subject.item_type}]")
    style = draw.pick(("setdefault", "defaultdict", "counter", "index"))
    if style == "counter":
        signature = f"count_by_{name}({items}{given}){subject.returns('Counter')}"
        doc = f"Count {items} by their {name}."
        return Definition(
            _function(subject, signature, doc, f"return Counter({key} for {item} in {items})"),
            ("from collections import Counter",),
        )
    if style == "index":
        signature = f"index_by_{name}({items}{given}){subject.returns(f'dict[{kind}, {subject.item_type}]')}"
        return Definition(
            _function(
                subject,
                signature,
                f"Map each {name} to its {subject.noun}.",
                f"return {{{key}: {item} for {item} in {items}}}",
            )
        )
    signature = f"group_by_{name}({items}{given}){subject.returns(f'dict[{kind}, list[{subject.item_type}]]')}"
    groups = draw.pick(("groups", "found", "by_" + name))
    if style == "setdefault":
        body, imports = (
            (
                f"{groups} = {{}}\n"
                f"for {item} in {items}:\n"
                f"    {groups}.setdefault({key}, []).append({item})\n"
                f"return {groups}"
            ),
            (),
        )
    else:
        imports = ("from collections import defaultdict",)
        body = (
            f"{groups} = defaultdict(list)\n"
            f"for {item} in {items}:\n"
            f"    {groups}[{key}].append({item})\n"
            f"return dict({groups})"
        )
    return Definition(_function(subject, signature, f"Group {items} by their {name}.", body), imports)


def ordering(draw: Draw, subject: Subject) -> Definition:
    """Sort items by one or two fields."""
    chosen = draw.sample(subject.fields_of("str", "int", "float"), draw.integer(1, 2))
    item, items = _variable(draw, subject), subject.plural
    keys = ", ".join(subject.access(item, name) for name, _ in chosen)
    key = f"({keys})" if len(chosen) > 1 else keys
    reverse = draw.pick(("", ", reverse=True"))
    limit = draw.integer(3, 20)
    call = f"sorted({items}, key=lambda {item}: {key}{reverse})"
    if draw.chance(0.4):
        signature = (
            f"top_{items}({items}{subject.hint('list')}, limit{subject.hint('int')}={limit}){subject.returns('list')}"
        )
        return Definition(
            _function(
                subject,
                signature,
                f"Return at most `limit` {items}, sorted by {chosen[0][0]}.",
                f"return {call}[:limit]",
            )
        )
    signature = f"sort_{items}_by_{chosen[0][0]}({items}{subject.hint('list')}){subject.returns('list')}"
    return Definition(
        _function(subject, signature, f"Sort {items} by {' and '.join(name for name, _ in chosen)}.", f"return {call}")
    )


def lookup(draw: Draw, subject: Subject) -> Definition:
    """Find one item, or raise or return None."""
    name, kind = draw.pick(subject.fields_of("str", "int", "float"))
    item, items = _variable(draw, subject), subject.plural
    missing = draw.pick(
        ("return None", f"raise KeyError({name})", f'raise LookupError(f"no {subject.noun} with {name} {{{name}}}")')
    )
    loop = f"for {item} in {items}:\n    if {subject.access(item, name)} == {name}:\n        return {item}\n{missing}"
    maybe = f"{subject.item_type} | None" if missing == "return None" else subject.item_type
    signature = (
        f"find_{subject.noun}({items}{subject.hint('list')}, {name}{subject.hint(kind)}){subject.returns(maybe)}"
    )
    return Definition(_function(subject, signature, f"Return the first {subject.noun} with this {name}.", loop))


def validation(draw: Draw, subject: Subject) -> Definition:
    """Check an item's fields one after another."""
    variable, error = _variable(draw, subject), draw.pick(ERRORS)
    checks = []
    for name, kind in draw.sample(subject.fields, draw.integer(2, 3)):
        value = subject.access(variable, name)
        if draw.chance(0.6):
            problem = draw.pick(
                (f'"{name} is not allowed"', f'"bad {name}"', f'f"{name} of {subject.noun} is {{{name}!r}}"')
            )
            problem = (
                problem.replace(f"{{{name}!r}}", f"{{{value}!r}}") if '["' not in value else f'"unexpected {name}"'
            )
        else:
            problem = f'"{name} must be {draw.pick(("set", "given", "positive", "known", "in range"))}"'
        checks.append(f"if {_condition(draw, value, kind)}:\n    raise {error}({problem})")
    ending = draw.pick((f"return {variable}", "return True", ""))
    signature = (
        f"{draw.pick(('validate', 'check', 'verify'))}_{subject.noun}({variable}{subject.hint(subject.item_type)})"
    )
    return Definition(
        _function(subject, signature, f"Raise {error} when the {subject.noun} is not usable.", *checks, ending)
    )


def classifying(draw: Draw, subject: Subject) -> Definition:
    """An if / elif / else chain that returns a word."""
    variable = _variable(draw, subject)
    name, kind = draw.pick(subject.fields)
    value = subject.access(variable, name)
    words = draw.sample(WORDS, 4)
    branches = [f'if {_condition(draw, value, kind)}:\n    return "{words[0]}"']
    branches += [
        f'elif {_any_condition(draw, subject, variable)}:\n    return "{word}"'
        for word in words[1 : draw.integer(2, 3)]
    ]
    ending = draw.pick((f'else:\n    return "{words[3]}"', f'return "{words[3]}"'))
    name = f"{draw.pick(('classify', 'grade', 'label', 'describe'))}_{subject.noun}"
    signature = f"{name}({variable}{subject.hint(subject.item_type)}){subject.returns('str')}"
    return Definition(
        _function(subject, signature, f"Say in one word what kind of {subject.noun} this is.", *branches, ending)
    )


def parsing(draw: Draw, subject: Subject) -> Definition:
    """Split a line of text into typed fields."""
    fields = [field for field in subject.fields if not field[1].startswith("list")][:3]
    separator = draw.pick((",", ";", ":", "|", "\\t"))
    names = ", ".join(name for name, _ in fields)
    converted = [f"{name} = {_converted(name, kind)}" for name, kind in fields if kind != "str"]
    split = f'{names}{"," if len(fields) == 1 else ""} = line.strip().split("{separator}")'
    if subject.subscripts:
        result = "{" + ", ".join(f'"{name}": {name}' for name, _ in fields) + "}"
    else:
        result = f"({names}{',' if len(fields) == 1 else ''})"
    if draw.chance(0.5):
        statements = indent("\n".join([split, *converted]), "    ")
        body = (
            "try:\n"
            f"{statements}\n"
            "except ValueError as error:\n"
            f'    raise {draw.pick(ERRORS)}(f"bad line {{line!r}}") from error\n'
            f"return {result}"
        )
    else:
        body = "\n".join([split, *converted, f"return {result}"])
    signature = (
        f"parse_{subject.noun}(line{subject.hint('str')}){subject.returns('dict' if subject.subscripts else 'tuple')}"
    )
    return Definition(_function(subject, signature, f"Read one {subject.noun} from a line of text.", body))


def _converted(name: str, kind: str) -> str:
    return f'{name} == "{"yes"}"' if kind == "bool" else f"{kind}({name})"


def formatting(draw: Draw, subject: Subject) -> Definition:
    """Turn an item into a line of text."""
    variable = _variable(draw, subject)
    fields = draw.sample(subject.fields, 2)
    names = [name for name, _ in fields]
    values = [subject.access(variable, name).replace('"', "'") for name in names]
    joined = draw.pick((", ", " / ", ": ", " - ")).join(f"{{{value}}}" for value in values)
    labelled = ", ".join(f"{name}={{{value}!r}}" for name, value in zip(names, values, strict=True))
    body = draw.pick(
        (
            f'return f"{joined}"',
            f'return f"{subject.noun}: {labelled}"',
            f'text = f"{joined}"\nreturn text.{draw.pick(("strip", "title", "rstrip"))}()',
        )
    )
    signature = f"format_{subject.noun}({variable}{subject.hint(subject.item_type)}){subject.returns('str')}"
    return Definition(_function(subject, signature, f"Show {with_article(subject.noun)} as text.", body))


def testing(draw: Draw, subject: Subject) -> Definition:
    """A test function with plain asserts."""
    item, items = subject.noun, subject.plural
    name, kind = draw.pick(subject.fields)
    made = _made(draw, subject)
    checks = [f"assert {_condition(draw, subject.access(item, name), kind)}"]
    if draw.chance(0.5):
        checks.append(f"assert {_condition(draw, *_accessed(draw, subject, item))}")
    if draw.chance(0.4):
        checks += [f"{items} = [{item}] * {draw.integer(2, 9)}", f"assert len({items}) > 1"]
    doc = _docstring(subject, f"{sentence(with_article(item))} keeps its {name}.") if draw.chance(0.3) else ""
    lines = _block(doc, f"{item} = {made}", *checks)
    return Definition(f"def test_{item}_{draw.pick(('keeps', 'has', 'shows', 'changes'))}_{name}():\n{lines}")


def _accessed(draw: Draw, subject: Subject, variable: str) -> tuple[str, str]:
    name, kind = draw.pick(subject.fields)
    return subject.access(variable, name), kind


def _made(draw: Draw, subject: Subject) -> str:
    """An expression that builds an item."""
    if subject.subscripts:
        return "{" + ", ".join(f'"{name}": {_literal(draw, kind)}' for name, kind in subject.fields) + "}"
    return f"{subject.type_name}(" + ", ".join(f"{name}={_literal(draw, kind)}" for name, kind in subject.fields) + ")"


def raising_test(draw: Draw, subject: Subject) -> Definition:
    """A test that expects an error."""
    error = draw.pick(ERRORS)
    function = draw.pick(("parse", "validate", "load", "check"))
    argument = draw.pick((_literal(draw, "str"), _literal(draw, "int"), "None", "[]", '""'))
    name = f"test_{function}_{draw.pick(('rejects', 'refuses'))}_{draw.pick(WORDS)}_{subject.noun}"
    return Definition(
        f"def {name}():\n    with pytest.raises({error}):\n        {function}_{subject.noun}({argument})",
        ("import pytest",),
    )


def collection_class(draw: Draw, subject: Subject) -> Definition:
    """A container of items with a few of its usual methods."""
    item, items = subject.noun, subject.plural
    name = f"{subject.type_name}{draw.pick(('List', 'Store', 'Queue', 'Registry', 'Box'))}"
    storage = draw.pick((f"self.{items}", f"self._{items}"))
    key, _ = draw.pick(subject.fields_of("str", "int", "float"))
    methods = draw.sample(
        (
            f"    def add(self, {item}){subject.returns('None')}:\n        {storage}.append({item})",
            f"    def __len__(self){subject.returns('int')}:\n        return len({storage})",
            f"    def __iter__(self):\n        return iter({storage})",
            f"    def __contains__(self, {item}){subject.returns('bool')}:\n        return {item} in {storage}",
            f"    def clear(self){subject.returns('None')}:\n        {storage} = []",
            (
                f"    def remove(self, {item}){subject.returns('None')}:\n"
                f"        if {item} not in {storage}:\n"
                f"            raise {draw.pick(ERRORS)}({item})\n"
                f"        {storage}.remove({item})"
            ),
            f"    def {key}s(self){subject.returns('list')}:\n        return [{item}.{key} for {item} in {storage}]",
            f"    def last(self):\n        return {storage}[-1] if {storage} else None",
        ),
        draw.integer(2, 3),
    )
    doc = f'    """Holds {items} in the order they were added."""\n\n' if subject.documented else ""
    constructor = f"    def __init__(self){subject.returns('None')}:\n        {storage} = []"
    return Definition(f"class {name}:\n{doc}" + "\n\n".join([constructor, *methods]))


def loading(draw: Draw, subject: Subject) -> Definition:
    """Read items from a JSON, CSV or text file."""
    items, item = subject.plural, _variable(draw, subject)
    signature = f"{draw.pick(('load', 'read'))}_{items}(path{subject.hint('str')}){subject.returns('list')}"
    handle = draw.pick(("file", "stream", "source"))
    style = draw.pick(("json", "csv", "text"))
    if style == "json":
        result = draw.pick((f"return json.load({handle})", f'data = json.load({handle})\nreturn data["{items}"]'))
        body, imports = f'with open(path, encoding="utf-8") as {handle}:\n{indent(result, "    ")}', ("import json",)
    elif style == "csv":
        body, imports = (
            f'with open(path, newline="") as {handle}:\n    return list(csv.DictReader({handle}))',
            ("import csv",),
        )
    else:
        imports = ()
        test = draw.pick((f'{item}.startswith("#")', f"not {item}.strip()"))
        body = (
            f"{items} = []\n"
            f"with open(path) as {handle}:\n"
            f"    for {item} in {handle}:\n"
            f"        if {test}:\n"
            "            continue\n"
            f"        {items}.append({item}.strip())\n"
            f"return {items}"
        )
    if draw.chance(0.35):
        body = (
            "try:\n"
            f"{indent(body, '    ')}\n"
            f"except {draw.pick(('FileNotFoundError', 'OSError'))}:\n"
            f"    {draw.pick(('return []', 'raise', 'print(path, file=sys.stderr)'))}"
        )
        imports += ("import sys",) if "sys." in body else ()
    return Definition(_function(subject, signature, f"Read all {items} from a {style} file.", body), imports)


def saving(draw: Draw, subject: Subject) -> Definition:
    """Write items to a file."""
    items, item = subject.plural, _variable(draw, subject)
    name = f"{draw.pick(('save', 'write', 'store'))}_{items}"
    signature = f"{name}({items}{subject.hint('list')}, path{subject.hint('Path')}){subject.returns('None')}"
    style = draw.pick(("json", "lines", "text"))
    if style == "json":
        body, imports = f"path.write_text(json.dumps({items}, indent={draw.pick((2, 4))}))", ("import json",)
    elif style == "lines":
        body, imports = (
            f'with path.open("w") as target:\n    for {item} in {items}:\n        target.write(f"{{{item}}}\\n")',
            (),
        )
    else:
        body, imports = (
            f'path.parent.mkdir(parents=True, exist_ok=True)\npath.write_text("\\n".join(map(str, {items})))',
            (),
        )
    if subject.hints:
        imports += ("from pathlib import Path",)
    return Definition(_function(subject, signature, f"Write {items} to a {style} file.", body), imports)


def processing(draw: Draw, subject: Subject) -> Definition:
    """A loop with nested tests, counters and early exits."""
    item, items, verb = _variable(draw, subject), subject.plural, draw.pick(VERBS)
    counter = draw.pick(("count", "skipped", "changed", "errors", "total"))
    inner = draw.pick(("continue", "break", f"{counter} += 1", f"result.append({item})"))
    action = draw.pick(
        (f"result.append({item})", f"result.append({subject.access(item, subject.fields[0][0])})", f"{counter} += 1")
    )
    step = draw.pick(
        (f"for {item} in {items}:", f"for index, {item} in enumerate({items}):", f"for {item} in reversed({items}):")
    )
    loop = (
        f"{step}\n"
        f"    if {_any_condition(draw, subject, item)}:\n"
        f"        {inner}\n"
        f"    elif {_any_condition(draw, subject, item)}:\n"
        f"        {counter} += {draw.integer(1, 5)}\n"
        "    else:\n"
        f"        {action}"
    )
    if draw.chance(0.3):
        loop = (
            f"{step}\n"
            "    try:\n"
            f"        {verb}_{subject.noun}({item})\n"
            f"    except {draw.pick(ERRORS)}:\n"
            f"        {counter} += 1\n"
            f"        {draw.pick(('continue', 'break', 'pass'))}\n"
            f"    result.append({item})"
        )
    ending = draw.pick((f"return result, {counter}", "return result", f"return {counter}"))
    signature = f"{verb}_{items}({items}{subject.hint('list')})"
    return Definition(
        _function(subject, signature, f"{sentence(verb)} all {items}.", f"result = []\n{counter} = 0", loop, ending)
    )


def script(draw: Draw, subject: Subject) -> Definition:
    """A command line with argparse."""
    items, verb = subject.plural, draw.pick(VERBS)
    options = []
    for name, kind in draw.sample(
        subject.fields_of("str", "int", "float", "bool"), min(2, len(subject.fields_of("str", "int", "float", "bool")))
    ):
        if kind == "bool":
            options.append(f'parser.add_argument("--{name}", action="store_true")')
        elif kind == "str":
            options.append(f'parser.add_argument("--{name}", default={_literal(draw, kind)})')
        else:
            options.append(f'parser.add_argument("--{name}", type={kind}, default={_literal(draw, kind)})')
    head = [
        f'parser = argparse.ArgumentParser(description="{sentence(verb)} {items}.")',
        f'parser.add_argument("{draw.pick(("path", "source", "folder"))}")',
    ]
    ending = draw.pick(
        (
            "print(arguments)",
            f"print({verb}_{items}(arguments))",
            "for name in vars(arguments):\n    print(name)",
            f"return {verb}_{items}(vars(arguments))",
        )
    )
    body = [*head, *options, "arguments = parser.parse_args()", ending]
    text = _function(
        subject, f"main(){subject.returns('None')}", f"{sentence(verb)} {items} from the command line.", *body
    )
    return Definition(f'{text}\n\n\nif __name__ == "__main__":\n    main()', ("import argparse",))


def enumeration(draw: Draw, subject: Subject) -> Definition:
    """An Enum with a few members."""
    words = draw.sample(WORDS, draw.integer(3, 5))
    name = f"{subject.type_name}{draw.pick(('Kind', 'State', 'Mode', 'Level'))}"
    if draw.chance(0.5):
        members = "\n".join(f'    {word.upper()} = "{word}"' for word in words)
    else:
        members = "\n".join(f"    {word.upper()} = {number}" for number, word in enumerate(words, 1))
    doc = f'    """What {with_article(subject.noun)} can be."""\n\n' if subject.documented else ""
    return Definition(f"class {name}(Enum):\n{doc}{members}", ("from enum import Enum",))


def exception_class(draw: Draw, subject: Subject) -> Definition:
    """An exception of the module's own."""
    name = f"{draw.pick(WORDS).title()}{subject.type_name}Error"
    body = (
        f'"""Raised when {with_article(subject.noun)} cannot be {draw.pick(("read", "found", "changed", "saved"))}."""'
    )
    if draw.chance(0.5):
        field = subject.fields[0][0]
        body += (
            "\n"
            "\n"
            f"def __init__(self, {field}):\n"
            f'    super().__init__(f"{subject.noun}: {{{field}}}")\n'
            f"    self.{field} = {field}"
        )
    return Definition(f"class {name}({draw.pick(('Exception', *ERRORS))}):\n{indent(body, '    ')}")


def algorithm(draw: Draw, subject: Subject) -> Definition:
    """A well known small algorithm, its variables renamed."""
    return _from_template(draw, subject, draw.pick(TABLE["algorithms"]))


def helper(draw: Draw, subject: Subject) -> Definition:
    """A small utility: a decorator, a context manager, a retry loop, ...."""
    return _from_template(draw, subject, draw.pick(TABLE["helpers"]))


def _from_template(draw: Draw, subject: Subject, snippet: dict) -> Definition:
    """A snippet with names drawn for its slots; its type hints and docstring go where the module has none."""
    numbers = {f"n{index}": str(draw.integer(2, 60)) for index in range(3)}
    names = {
        "items": draw.pick(("items", "values", "numbers", "data", "sequence")),
        "item": draw.pick(("item", "value", "number", "entry", "element")),
        "result": draw.pick(("result", "output", "answer", "found")),
        "first": draw.pick(("left", "first", "a", "low", "start")),
        "second": draw.pick(("right", "second", "b", "high", "end")),
        "index": draw.pick(("index", "position", "i", "place")),
        "text": draw.pick(("text", "string", "line", "word")),
        "noun": subject.noun,
        "nouns": subject.plural,
        "error": draw.pick(ERRORS),
        "word": draw.pick(WORDS),
    }
    text = _fill(snippet["code"].strip("\n"), **names, **numbers)
    text = re.sub(r"~(.*?)~", r"\1" if subject.hints else "", text)
    if subject.documented:
        definition = _DEFINITION.match(text)
        assert definition is not None, f"a documented snippet begins with its definition, not with {text[:40]!r}"
        head, body = definition.groups()
        text = f'{head}    """{_fill(snippet["docstring"], **names, **numbers)}"""\n{body}'
    return Definition(text, tuple(snippet.get("imports", ())))


def _variable(draw: Draw, subject: Subject) -> str:
    """A name for one item in a loop."""
    return draw.pick((subject.noun, subject.noun, subject.noun, "item", "entry", subject.noun[0]))


BUILDERS = (
    filtering, totalling, grouping, ordering, lookup, validation, classifying, parsing, formatting, testing,
    raising_test, collection_class, loading, saving, processing, processing, script, enumeration, exception_class,
    algorithm, algorithm, algorithm, helper, helper,
)  # fmt: skip

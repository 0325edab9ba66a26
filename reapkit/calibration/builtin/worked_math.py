"""Generates conversations about arithmetic and word problems, answered in small steps."""

from math import gcd

from reapkit.calibration.builtin.draw import Draw
from reapkit.calibration.builtin.tables import table

NAMES, THINGS, BOXES, VEHICLES, UNITS = (
    table("math")[name] for name in ("names", "things", "boxes", "vehicles", "units")
)

Problem = tuple[str, str, str]
"""Question, worked steps, and the answer as text."""


def math_row(draw: Draw) -> dict:
    """A conversation of two to four unrelated problems; every answer ends in "The answer is ...."."""
    messages = []
    for _ in range(draw.integer(2, 4)):
        question, steps, answer = draw.pick(PROBLEMS)(draw)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{steps} The answer is {answer}."})
    return {"messages": messages}


def addition(draw: Draw) -> Problem:
    first, second = draw.integer(12, 9999), draw.integer(12, 9999)
    question = draw.pick(
        (
            "What is {} + {}?",
            "Compute {} + {}.",
            "Add {} and {}.",
            "Find the sum of {} and {}.",
            "How much is {} plus {}?",
        )
    ).format(first, second)
    steps, carry = [], 0
    for column in range(max(len(str(first)), len(str(second)))):
        left, right = _digit(first, column), _digit(second, column)
        total = left + right + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        steps.append(f"{left} + {right}{carried} = {total}" + (", carry 1" if carry else ""))
    return question, f"From the right: {'; '.join(steps)}.", str(first + second)


def subtraction(draw: Draw) -> Problem:
    second = draw.integer(12, 4999)
    first = second + draw.integer(3, 4999)
    question = draw.pick(
        ("What is {0} - {1}?", "Compute {0} - {1}.", "Subtract {1} from {0}.", "Take {1} away from {0}.")
    ).format(first, second)
    hundreds, rest = second // 100 * 100, second % 100
    if not hundreds or not rest:
        return question, f"{first} - {second} = {first - second}.", str(first - second)
    steps = (
        f"{second} = {hundreds} + {rest}. {first} - {hundreds} = {first - hundreds}."
        f" {first - hundreds} - {rest} = {first - second}."
    )
    return question, steps, str(first - second)


def multiplication(draw: Draw) -> Problem:
    first, second = draw.integer(11, 989), draw.integer(3, 29)
    question = draw.pick(
        ("What is {} * {}?", "Compute {} * {}.", "Multiply {} by {}.", "Find the product of {} and {}.")
    ).format(first, second)
    parts = [_digit(first, column) * 10**column for column in range(len(str(first)) - 1, -1, -1)]
    parts = [part for part in parts if part]
    products = [part * second for part in parts]
    steps = " ".join(f"{part} * {second} = {product}." for part, product in zip(parts, products, strict=True))
    if len(parts) > 1:
        split, summed = " + ".join(map(str, parts)), " + ".join(map(str, products))
        steps = f"{first} = {split}. {steps} {summed} = {first * second}."
    return question, steps, str(first * second)


def division(draw: Draw) -> Problem:
    divisor, quotient = draw.integer(3, 25), draw.integer(4, 99)
    remainder = draw.integer(0, divisor - 1)
    number = divisor * quotient + remainder
    question = draw.pick(
        (
            "Divide {} by {} and give the remainder.",
            "What is {} divided by {}, with remainder?",
            "How often does {1} go into {0}?",
        )
    ).format(number, divisor)
    steps = f"{divisor} * {quotient} = {number - remainder}. {number} - {number - remainder} = {remainder}."
    return question, steps, f"{quotient} remainder {remainder}"


def percentage(draw: Draw) -> Problem:
    percent, whole = draw.integer(1, 19) * 5, draw.integer(2, 90) * 20
    question = draw.pick(
        ("What is {}% of {}?", "Find {} percent of {}.", "A shop takes {}% off a price of {}. How much is taken off?")
    ).format(percent, whole)
    steps = (
        f"1% of {whole} is {whole} / 100. {whole} * {percent} = {whole * percent}."
        f" {whole * percent} / 100 = {whole * percent // 100}."
    )
    return question, steps, str(whole * percent // 100)


def linear_equation(draw: Draw) -> Problem:
    unknown, factor, value = draw.pick("abkmnpxyz"), draw.integer(2, 15), draw.integer(1, 40)
    minus = draw.chance(0.4)
    constant = draw.integer(1, min(99, factor * value - 1) if minus else 99)
    right = factor * value + (-constant if minus else constant)
    sign, undo, verb = ("-", "+", "Add") if minus else ("+", "-", "Subtract")
    question = draw.pick(("Solve {} for {}.", "If {}, what is {}?", "Given {}, find {}.")).format(
        f"{factor}{unknown} {sign} {constant} = {right}", unknown
    )
    steps = (
        f"{verb} {constant}: {factor}{unknown} = {right} {undo} {constant} = {factor * value}."
        f" Divide by {factor}: {unknown} = {factor * value} / {factor} = {value}."
    )
    return question, steps, str(value)


def collecting(draw: Draw) -> Problem:
    (person, friend), things = draw.sample(NAMES, 2), draw.pick(THINGS)
    start, more, fewer = draw.integer(8, 250), draw.integer(3, 120), draw.integer(1, 10)
    gain = draw.pick(("buys", "finds", "is given", "makes", "collects"))
    loss = draw.pick((f"gives {fewer} to {friend}", f"loses {fewer}", f"sells {fewer} to {friend}", f"breaks {fewer}"))
    question = (
        f"{person} has {start} {things}, {gain} {more} more and {loss}. How many {things} does {person} have now?"
    )
    steps = f"Start with {start}. {start} + {more} = {start + more}. {start + more} - {fewer} = {start + more - fewer}."
    return question, steps, f"{start + more - fewer} {things}"


def packing(draw: Draw) -> Problem:
    things, boxes, person = draw.pick(THINGS), draw.pick(BOXES), draw.pick(NAMES)
    count, each, extra = draw.integer(3, 40), draw.integer(4, 60), draw.integer(1, 30)
    question = draw.pick(
        (
            (
                f"There are {count} {boxes} with {each} {things} in each, and {extra} {things} on the table."
                f" How many {things} are there?"
            ),
            (
                f"{person} fills {count} {boxes} with {each} {things} each and has {extra} {things} left."
                f" How many {things} did {person} have?"
            ),
        )
    )
    steps = (
        f"{count} {boxes} hold {count} * {each} = {count * each}. {count * each} + {extra} = {count * each + extra}."
    )
    return question, steps, f"{count * each + extra} {things}"


def shopping(draw: Draw) -> Problem:
    person, (first, second) = draw.pick(NAMES), draw.sample(THINGS, 2)
    count, price, other_count, other_price = (draw.integer(2, 12) for _ in range(4))
    total = count * price + other_count * other_price
    paid = (total // 50 + 1) * 50
    question = (
        f"{person} buys {count} {first} at {price} dollars each and {other_count} {second} at {other_price} dollars"
        f" each, and pays with {paid} dollars. How much change does {person} get?"
    )
    steps = (
        f"The {first} cost {count} * {price} = {count * price}. The {second} cost {other_count} * {other_price} ="
        f" {other_count * other_price}. Together {count * price} + {other_count * other_price} = {total}."
        f" {paid} - {total} = {paid - total}."
    )
    return question, steps, f"{paid - total} dollars"


def travelling(draw: Draw) -> Problem:
    vehicle, speed, hours = draw.pick(VEHICLES), draw.integer(8, 140), draw.integer(2, 15)
    distance = speed * hours
    if draw.chance(0.5):
        question = f"A {vehicle} goes {speed} kilometres an hour for {hours} hours. How far does it get?"
        return question, f"Distance is speed times time: {speed} * {hours} = {distance}.", f"{distance} kilometres"
    question = f"A {vehicle} covers {distance} kilometres in {hours} hours. How fast is it?"
    return question, f"Speed is distance over time: {distance} / {hours} = {speed}.", f"{speed} kilometres an hour"


def rectangle(draw: Draw) -> Problem:
    place = draw.pick(("field", "garden", "hall", "kitchen floor", "poster", "roof", "yard", "wall"))
    length, width = draw.integer(3, 120), draw.integer(2, 60)
    question = f"A {place} is {length} metres long and {width} metres wide. "
    if draw.chance(0.5):
        steps = f"Area is length times width: {length} * {width} = {length * width}."
        return f"{question}What is its area?", steps, f"{length * width} square metres"
    around = 2 * (length + width)
    steps = f"{length} + {width} = {length + width}. Both sides count twice: 2 * {length + width} = {around}."
    return f"{question}How long is the fence around it?", steps, f"{around} metres"


def average(draw: Draw) -> Problem:
    count, mean = draw.integer(3, 6), draw.integer(10, 80)
    numbers = [mean + draw.integer(-9, 9) for _ in range(count - 1)]
    numbers.append(mean * count - sum(numbers))
    listed = ", ".join(map(str, numbers))
    question = draw.pick(("What is the average of {}?", "Find the mean of {}.")).format(listed)
    summed = " + ".join(map(str, numbers))
    return (
        question,
        f"{summed} = {mean * count}. There are {count} numbers: {mean * count} / {count} = {mean}.",
        str(mean),
    )


def sorting(draw: Draw) -> Problem:
    numbers = draw.sample(range(1, 200), draw.integer(4, 7))
    ascending = draw.chance(0.6)
    order = "ascending" if ascending else "descending"
    question = draw.pick(("Sort these numbers in {} order: {}.", "Put in {} order: {}.")).format(
        order, ", ".join(map(str, numbers))
    )
    steps = f"The smallest is {min(numbers)} and the largest is {max(numbers)}."
    return question, steps, ", ".join(map(str, sorted(numbers, reverse=not ascending)))


def sequence(draw: Draw) -> Problem:
    first, step, count = draw.integer(1, 150), draw.integer(2, 30), draw.integer(4, 6)
    terms = [first + step * index for index in range(count)]
    question = draw.pick(("What comes next: {}?", "Continue the sequence {}.", "Find the next term of {}.")).format(
        ", ".join(map(str, terms))
    )
    steps = f"{terms[1]} - {terms[0]} = {step}, so each term adds {step}. {terms[-1]} + {step} = {terms[-1] + step}."
    return question, steps, str(terms[-1] + step)


def conversion(draw: Draw) -> Problem:
    large, small, factor = draw.pick(UNITS)
    amount, extra = draw.integer(2, 60), draw.integer(1, factor - 1)
    question = f"How many {small} are {amount} {large} and {extra} {small}?"
    steps = (
        f"There are {factor} {small} in one of the {large}. {amount} * {factor} = {amount * factor}."
        f" {amount * factor} + {extra} = {amount * factor + extra}."
    )
    return question, steps, f"{amount * factor + extra} {small}"


def fraction_sum(draw: Draw) -> Problem:
    bottoms = draw.integer(2, 12), draw.integer(2, 12)
    tops = [draw.integer(1, bottom - 1) for bottom in bottoms]
    common = bottoms[0] * bottoms[1] // gcd(*bottoms)
    scaled = [top * (common // bottom) for top, bottom in zip(tops, bottoms, strict=True)]
    top = sum(scaled)
    shared = gcd(top, common)
    question = draw.pick(("What is {} + {}?", "Add {} and {}.")).format(
        f"{tops[0]}/{bottoms[0]}", f"{tops[1]}/{bottoms[1]}"
    )
    steps = (
        f"The common denominator of {bottoms[0]} and {bottoms[1]} is {common}."
        f" {tops[0]}/{bottoms[0]} = {scaled[0]}/{common}"
        f" and {tops[1]}/{bottoms[1]} = {scaled[1]}/{common}. {scaled[0]} + {scaled[1]} = {top}."
    )
    if shared > 1:
        steps += f" Divide {top} and {common} by {shared}."
    bottom = common // shared
    return question, steps, str(top // shared) if bottom == 1 else f"{top // shared}/{bottom}"


def common_divisor(draw: Draw) -> Problem:
    shared = draw.integer(2, 30)
    larger, smaller = shared * draw.integer(8, 30), shared * draw.integer(2, 25)
    question = draw.pick(("Find the greatest common divisor of {} and {}.", "What is gcd({}, {})?")).format(
        larger, smaller
    )
    steps = []
    left, right = larger, smaller
    while right:
        steps.append(f"{left} = {left // right} * {right} + {left % right}.")
        left, right = right, left % right
    return question, " ".join(steps), str(left)


def expression(draw: Draw) -> Problem:
    first, second, third, fourth = (draw.integer(2, 30) for _ in range(4))
    product, total = second * third, first + second * third - fourth
    if draw.chance(0.5):
        question = f"Evaluate {first} + {second} * {third} - {fourth}."
        steps = (
            f"Multiply first: {second} * {third} = {product}. {first} + {product} = {first + product}."
            f" {first + product} - {fourth} = {total}."
        )
        return question, steps, str(total)
    total = (first + second) * third - fourth
    question = f"Evaluate ({first} + {second}) * {third} - {fourth}."
    steps = (
        f"Inside the brackets: {first} + {second} = {first + second}."
        f" {first + second} * {third} = {(first + second) * third}."
        f" {(first + second) * third} - {fourth} = {total}."
    )
    return question, steps, str(total)


def ages(draw: Draw) -> Problem:
    younger, older = draw.sample(NAMES, 2)
    gap, age, later = draw.integer(2, 40), draw.integer(3, 45), draw.integer(2, 25)
    question = f"{older} is {gap} years older than {younger}, who is {age}. How old will {older} be in {later} years?"
    steps = f"{older} is {age} + {gap} = {age + gap} now. {age + gap} + {later} = {age + gap + later}."
    return question, steps, f"{age + gap + later} years"


def sharing(draw: Draw) -> Problem:
    people, things = draw.integer(3, 24), draw.pick(THINGS)
    each, left = draw.integer(3, 60), draw.integer(0, people - 1)
    total = people * each + left
    question = (
        f"{total} {things} are shared equally among {people} children. How many does each child get,"
        " and how many are left?"
    )
    steps = (
        f"{total} / {people} is {each}, because {people} * {each} = {people * each}."
        f" {total} - {people * each} = {left}."
    )
    return question, steps, f"{each} each and {left} left"


def _digit(number: int, column: int) -> int:
    return number // 10**column % 10


PROBLEMS = (
    addition, subtraction, multiplication, division, percentage, linear_equation, collecting, packing, shopping,
    travelling, rectangle, average, sorting, sequence, conversion, fraction_sum, common_divisor, expression, ages,
    sharing,
)  # fmt: skip

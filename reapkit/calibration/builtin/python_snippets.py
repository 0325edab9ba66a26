"""Small algorithms and helpers for `python_code`.

Each is (imports, docstring, template). `$names` are drawn; `~...~` encloses type hints, which a module without hints
drops.
"""

ALGORITHMS = (
    ("", "Search sorted $items by halving.", """
def binary_search($items~: list[int]~, target~: int~)~ -> int~:
    $first, $second = 0, len($items) - 1
    while $first <= $second:
        middle = ($first + $second) // 2
        if $items[middle] == target:
            return middle
        if $items[middle] < target:
            $first = middle + 1
        else:
            $second = middle - 1
    return -1
"""),
    ("", "Return the greatest common divisor.", """
def common_divisor($first~: int~, $second~: int~)~ -> int~:
    while $second:
        $first, $second = $second, $first % $second
    return abs($first)
"""),
    ("", "Return all primes up to the limit.", """
def primes_up_to(limit~: int~)~ -> list[int]~:
    sieve = [True] * (limit + 1)
    for $item in range(2, int(limit ** 0.5) + 1):
        if sieve[$item]:
            for multiple in range($item * $item, limit + 1, $item):
                sieve[multiple] = False
    return [$item for $item in range(2, limit + 1) if sieve[$item]]
"""),
    ("", "Yield the first Fibonacci numbers.", """
def fibonacci(count~: int~):
    $first, $second = 0, 1
    for _ in range(count):
        yield $first
        $first, $second = $second, $first + $second
"""),
    ("", "Sort $items by insertion, in place.", """
def insertion_sort($items~: list~)~ -> list~:
    for $index in range(1, len($items)):
        $item = $items[$index]
        before = $index - 1
        while before >= 0 and $items[before] > $item:
            $items[before + 1] = $items[before]
            before -= 1
        $items[before + 1] = $item
    return $items
"""),
    ("", "Merge two sorted lists into one.", """
def merge_sorted($first~: list~, $second~: list~)~ -> list~:
    $result = []
    while $first and $second:
        source = $first if $first[0] <= $second[0] else $second
        $result.append(source.pop(0))
    return $result + $first + $second
"""),
    ("", "Sort by splitting around a pivot.", """
def quick_sort($items~: list~)~ -> list~:
    if len($items) < 2:
        return $items
    pivot, *rest = $items
    smaller = [$item for $item in rest if $item < pivot]
    larger = [$item for $item in rest if $item >= pivot]
    return quick_sort(smaller) + [pivot] + quick_sort(larger)
"""),
    ("", "Flatten nested lists.", """
def flatten($items~: list~)~ -> list~:
    $result = []
    for $item in $items:
        if isinstance($item, list):
            $result.extend(flatten($item))
        else:
            $result.append($item)
    return $result
"""),
    ("", "Split $items into chunks of at most `size`.", """
def chunks($items~: list~, size~: int~=$n0):
    if size < 1:
        raise $error("size must be positive")
    for $index in range(0, len($items), size):
        yield $items[$index:$index + size]
"""),
    ("from collections import deque", "Average the last `window` values.", """
def moving_average($items, window~: int~=$n0)~ -> list[float]~:
    recent = deque(maxlen=window)
    $result = []
    for $item in $items:
        recent.append($item)
        $result.append(sum(recent) / len(recent))
    return $result
"""),
    ("", "Count how often each word occurs.", """
def word_counts($text~: str~)~ -> dict[str, int]~:
    counts = {}
    for word in $text.lower().split():
        word = word.strip(".,;:!?")
        counts[word] = counts.get(word, 0) + 1
    return counts
"""),
    ("", "Tell whether the text reads the same backwards.", """
def is_palindrome($text~: str~)~ -> bool~:
    letters = [letter.lower() for letter in $text if letter.isalnum()]
    return letters == letters[::-1]
"""),
    ("", "Swap rows and columns.", """
def transpose(matrix~: list[list]~)~ -> list[list]~:
    return [list(column) for column in zip(*matrix)]
"""),
    ("", "Multiply two matrices given as lists of rows.", """
def matrix_product($first, $second):
    columns = list(zip(*$second))
    return [[sum(x * y for x, y in zip(row, column)) for column in columns] for row in $first]
"""),
    ("from collections import deque", "Visit a graph in breadth first order.", """
def breadth_first(graph~: dict~, start~: str~)~ -> list[str]~:
    seen, queue = {start}, deque([start])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for neighbor in graph.get(node, ()):
            if neighbor not in seen:
                seen.add(neighbor)
                queue.append(neighbor)
    return order
"""),
    ("", "Visit a graph in depth first order.", """
def depth_first(graph~: dict~, node~: str~, seen=None)~ -> set~:
    seen = set() if seen is None else seen
    seen.add(node)
    for neighbor in graph[node]:
        if neighbor not in seen:
            depth_first(graph, neighbor, seen)
    return seen
"""),
    ("import heapq", "Return the shortest distance from the start to every node.", """
def shortest_paths(graph~: dict~, start~: str~)~ -> dict~:
    distances = {start: 0}
    heap = [(0, start)]
    while heap:
        distance, node = heapq.heappop(heap)
        for neighbor, weight in graph[node].items():
            candidate = distance + weight
            if candidate < distances.get(neighbor, float("inf")):
                distances[neighbor] = candidate
                heapq.heappush(heap, (candidate, neighbor))
    return distances
"""),
    ("from functools import lru_cache", "Count the ways to climb the steps.", """
@lru_cache(maxsize=None)
def climb(steps~: int~)~ -> int~:
    if steps < 2:
        return 1
    return climb(steps - 1) + climb(steps - 2)
"""),
    ("", "Shift letters by a fixed distance.", """
def caesar($text~: str~, shift~: int~=$n0)~ -> str~:
    $result = []
    for letter in $text:
        if letter.isalpha():
            base = ord("A") if letter.isupper() else ord("a")
            letter = chr((ord(letter) - base + shift) % 26 + base)
        $result.append(letter)
    return "".join($result)
"""),
    ("", "Shorten runs of equal letters.", """
def run_lengths($text~: str~)~ -> list[tuple[str, int]]~:
    runs = []
    for letter in $text:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return runs
"""),
    ("", "Return the middle value.", """
def median($items~: list[float]~)~ -> float~:
    ordered = sorted($items)
    middle, odd = divmod(len(ordered), 2)
    if odd:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
"""),
    ("import math", "Return the standard deviation.", """
def deviation($items~: list[float]~)~ -> float~:
    mean = sum($items) / len($items)
    return math.sqrt(sum(($item - mean) ** 2 for $item in $items) / len($items))
"""),
    ("", "Count single letter edits between two words.", """
def edit_distance($first~: str~, $second~: str~)~ -> int~:
    row = list(range(len($second) + 1))
    for i, x in enumerate($first, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate($second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
"""),
    ("", "Write a number in another base.", """
def to_base(number~: int~, base~: int~=$n0)~ -> str~:
    if number == 0:
        return "0"
    digits = []
    while number:
        number, digit = divmod(number, base)
        digits.append(str(digit))
    return "".join(reversed(digits))
"""),
    ("", "Add up the digits of a number.", """
def digit_sum(number~: int~)~ -> int~:
    return sum(int(digit) for digit in str(abs(number)))
"""),
    ("", "Keep a value between two limits.", """
def clamp($item~: float~, lowest~: float~=0, highest~: float~=$n0)~ -> float~:
    if lowest > highest:
        raise ValueError("limits are swapped")
    return max(lowest, min($item, highest))
"""),
    ("", "Remove repeated $items but keep their order.", """
def unique($items)~ -> list~:
    seen = set()
    $result = []
    for $item in $items:
        if $item in seen:
            continue
        seen.add($item)
        $result.append($item)
    return $result
"""),
    ("", "Merge two dictionaries, level by level.", """
def deep_merge($first~: dict~, $second~: dict~)~ -> dict~:
    merged = dict($first)
    for key, value in $second.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged
"""),
    ("", "Find two $items with the given sum.", """
def pair_with_sum($items~: list[int]~, target~: int~):
    seen = {}
    for $index, $item in enumerate($items):
        if target - $item in seen:
            return seen[target - $item], $index
        seen[$item] = $index
    return None
"""),
    ("", "Count the steps until the number reaches one.", """
def collatz_steps(number~: int~)~ -> int~:
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps
"""),
    ("", "Return True when all brackets are closed in order.", """
def balanced($text~: str~)~ -> bool~:
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for letter in $text:
        if letter in pairs.values():
            stack.append(letter)
        elif letter in pairs:
            if not stack or stack.pop() != pairs[letter]:
                return False
    return not stack
"""),
)  # fmt: skip

HELPERS = (
    ("import time", "Call a function again until it works.", """
def retry(function, attempts~: int~=$n0, delay~: float~=0.5):
    for attempt in range(attempts):
        try:
            return function()
        except $error:
            if attempt == attempts - 1:
                raise
            time.sleep(delay * 2 ** attempt)
"""),
    ("import functools; import time", "Print how long each call takes.", """
def timed(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            elapsed = time.perf_counter() - start
            print(f"{function.__name__} took {elapsed:.3f} s")
    return wrapper
"""),
    ("import os; from contextlib import contextmanager", "Work in another folder for a while.", """
@contextmanager
def working_in(folder~: str~):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
"""),
    ("import logging", "Set up logging for $nouns.", """
def configure_logging(verbose~: bool~=False)~ -> None~:
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("$nouns").setLevel(level)
"""),
    ("import hashlib; from pathlib import Path", "Return the digest of a file.", """
def file_digest(path~: Path~, size~: int~=4096)~ -> str~:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(size):
            digest.update(block)
    return digest.hexdigest()
"""),
    ("from pathlib import Path", "Yield every $word file below a folder.", """
def walk_files(folder~: Path~, suffix~: str~=".$word"):
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.suffix == suffix:
            yield path
"""),
    ("import os", "Read a setting from the environment.", """
def setting(name~: str~, default~: int~=$n0)~ -> int~:
    value = os.environ.get(name.upper())
    if value is None:
        return default
    return int(value)
"""),
    ("from datetime import date, timedelta", "List the days from one date to another.", """
def days_between(start~: date~, end~: date~)~ -> list[date]~:
    if end < start:
        raise $error("end lies before start")
    return [start + timedelta(days=day) for day in range((end - start).days + 1)]
"""),
    ("import re", "Turn a title into a short name.", """
def slug(title~: str~, length~: int~=$n0)~ -> str~:
    words = re.findall(r"[a-z0-9]+", title.lower())
    return "-".join(words)[:length]
"""),
    ("import random", "Draw a few $nouns at random.", """
def draw_$nouns($nouns~: list~, count~: int~=$n0, seed~: int~=$n1)~ -> list~:
    generator = random.Random(seed)
    if count > len($nouns):
        raise $error("not enough $nouns")
    return generator.sample($nouns, count)
"""),
    ("import threading", "A counter that several threads may share.", """
class Counter:
    def __init__(self, start~: int~=$n0):
        self._value = start
        self._lock = threading.Lock()

    def increment(self, by~: int~=1)~ -> int~:
        with self._lock:
            self._value += by
            return self._value
"""),
    ("import sqlite3", "Store $nouns in a database.", """
def insert_$nouns(path~: str~, rows~: list[tuple]~)~ -> int~:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS $nouns (id INTEGER, name TEXT)")
        cursor = connection.executemany("INSERT INTO $nouns VALUES (?, ?)", rows)
        return cursor.rowcount
"""),
    ("import subprocess", "Run a command and return what it printed.", """
def run(command~: list[str]~, timeout~: int~=$n0)~ -> str~:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout
"""),
    ("", "A stack of at most $n0 $nouns.", """
class Stack:
    def __init__(self, limit~: int~=$n0):
        self.limit = limit
        self._$nouns = []

    def push(self, $noun):
        if len(self._$nouns) >= self.limit:
            raise OverflowError("stack is full")
        self._$nouns.append($noun)

    def pop(self):
        return self._$nouns.pop()
"""),
    ("import asyncio", "Fetch all $nouns at the same time.", """
async def gather_$nouns(fetch, $nouns~: list~, limit~: int~=$n0):
    semaphore = asyncio.Semaphore(limit)

    async def one($noun):
        async with semaphore:
            return await fetch($noun)

    return await asyncio.gather(*(one($noun) for $noun in $nouns))
"""),
    ("from functools import partial", "Build a function that scales by a factor.", """
def scaler(factor~: float~=$n0):
    def scale(value, by):
        return value * by

    return partial(scale, by=factor)
"""),
)  # fmt: skip

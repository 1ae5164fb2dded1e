"""Coding rows: short Python functions. Every one comes with a check, and the tests run both."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Program:
    """A task, the code that does it, and an expression over that code that must be true."""

    question: str
    code: str
    check: str


# {n} and {m} are small numbers, {c} is a letter, {name} is the function's name.
_TASKS = (
    ("adds {n} to a number", "return x + {n}", "x", "{name}(5) == 5 + {n}"),
    ("subtracts {n} from a number", "return x - {n}", "x", "{name}(50) == 50 - {n}"),
    ("multiplies a number by {n}", "return x * {n}", "x", "{name}(6) == 6 * {n}"),
    ("tells whether a number is divisible by {n}", "return x % {n} == 0", "x", "{name}(3 * {n})"),
    ("tells whether a number is greater than {n}", "return x > {n}", "x", "not {name}({n})"),
    ("raises a number to the power of {n}", "return x ** {n}", "x", "{name}(2) == 1 << {n}"),
    (
        "rounds a number down to a multiple of {n}",
        "return x - x % {n}",
        "x",
        "{name}({n} * 4 + 1) == {n} * 4",
    ),
    ("limits a number to at most {n}", "return min(x, {n})", "x", "{name}({n} + 7) == {n}"),
    ("limits a number to at least {n}", "return max(x, {n})", "x", "{name}({n} - 7) == {n}"),
    (
        "keeps the numbers of a list that are greater than {n}",
        "return [x for x in numbers if x > {n}]",
        "numbers",
        "{name}([{n}, {n} + 1, {n} - 1]) == [{n} + 1]",
    ),
    (
        "keeps the numbers of a list that are smaller than {n}",
        "return [x for x in numbers if x < {n}]",
        "numbers",
        "{name}([{n}, {n} + 1, {n} - 1]) == [{n} - 1]",
    ),
    (
        "keeps the numbers of a list that are divisible by {n}",
        "return [x for x in numbers if x % {n} == 0]",
        "numbers",
        "{name}([{n}, {n} * 2, {n} * 2 + 1]) == [{n}, {n} * 2]",
    ),
    (
        "adds {n} to every number of a list",
        "return [x + {n} for x in numbers]",
        "numbers",
        "{name}([1, 2]) == [1 + {n}, 2 + {n}]",
    ),
    (
        "multiplies every number of a list by {n}",
        "return [x * {n} for x in numbers]",
        "numbers",
        "{name}([1, 2]) == [{n}, 2 * {n}]",
    ),
    (
        "counts how often {n} occurs in a list",
        "return numbers.count({n})",
        "numbers",
        "{name}([{n}, {n} + 1, {n}]) == 2",
    ),
    (
        "returns the first {n} items of a list",
        "return items[:{n}]",
        "items",
        "{name}(list(range(99))) == list(range({n}))",
    ),
    (
        "returns the last {n} items of a list",
        "return items[-{n}:]",
        "items",
        "len({name}(list(range(99)))) == {n}",
    ),
    (
        "returns every item of a list but the first {n}",
        "return items[{n}:]",
        "items",
        "{name}(list(range(99)))[0] == {n}",
    ),
    (
        "returns the items of a list whose index is a multiple of {n}",
        "return items[::{n}]",
        "items",
        "{name}(list(range(99)))[1] == {n}",
    ),
    (
        "splits a list into chunks of {n} items",
        "return [items[i : i + {n}] for i in range(0, len(items), {n})]",
        "items",
        "{name}(list(range({n} + 1))) == [list(range({n})), [{n}]]",
    ),
    ("repeats a text {n} times", "return text * {n}", "text", "len({name}('ab')) == 2 * {n}"),
    ("cuts a text to at most {n} characters", "return text[:{n}]", "text", "len({name}('x' * 99)) == {n}"),
    (
        "returns the words of a text longer than {n} letters",
        "return [w for w in text.split() if len(w) > {n}]",
        "text",
        "{name}('a ' + 'b' * ({n} + 1)) == ['b' * ({n} + 1)]",
    ),
    ("counts the letter {c} in a text", "return text.count('{c}')", "text", "{name}('{c}-{c}') == 2"),
    (
        "removes the letter {c} from a text",
        "return text.replace('{c}', '')",
        "text",
        "{name}('-{c}-') == '--'",
    ),
    (
        "tells whether a text starts with the letter {c}",
        "return text.startswith('{c}')",
        "text",
        "{name}('{c}-')",
    ),
    (
        "tells whether a text ends with the letter {c}",
        "return text.endswith('{c}')",
        "text",
        "{name}('-{c}')",
    ),
    ("splits a text at the letter {c}", "return text.split('{c}')", "text", "{name}('1{c}2') == ['1', '2']"),
    (
        "finds the first place of the letter {c} in a text",
        "return text.find('{c}')",
        "text",
        "{name}('--{c}') == 2",
    ),
    (
        "sums the numbers from 1 to {n}",
        "return sum(range(1, {n} + 1))",
        "",
        "{name}() == {n} * ({n} + 1) // 2",
    ),
    (
        "returns the first {n} square numbers",
        "return [i * i for i in range(1, {n} + 1)]",
        "",
        "{name}()[-1] == {n} ** 2",
    ),
    (
        "returns the first {n} even numbers",
        "return [2 * i for i in range(1, {n} + 1)]",
        "",
        "{name}()[-1] == 2 * {n}",
    ),
    ("returns the numbers from {n} down to 1", "return list(range({n}, 0, -1))", "", "{name}()[0] == {n}"),
    (
        "returns the divisors of {n}",
        "return [d for d in range(1, {n} + 1) if {n} % d == 0]",
        "",
        "{name}()[-1] == {n}",
    ),
    ("returns the sum of a list", "return sum(numbers)", "numbers", "{name}([1, 2, 3]) == 6"),
    ("returns the largest number of a list", "return max(numbers)", "numbers", "{name}([1, 3, 2]) == 3"),
    ("returns the smallest number of a list", "return min(numbers)", "numbers", "{name}([2, 1, 3]) == 1"),
    ("returns the mean of a list", "return sum(numbers) / len(numbers)", "numbers", "{name}([1, 2, 3]) == 2"),
    ("sorts a list", "return sorted(items)", "items", "{name}([2, 3, 1]) == [1, 2, 3]"),
    (
        "sorts a list from large to small",
        "return sorted(items, reverse=True)",
        "items",
        "{name}([2, 3]) == [3, 2]",
    ),
    ("reverses a list", "return items[::-1]", "items", "{name}([1, 2, 3]) == [3, 2, 1]"),
    (
        "removes duplicates from a list",
        "return list(dict.fromkeys(items))",
        "items",
        "{name}([1, 2, 1]) == [1, 2]",
    ),
    ("reverses a text", "return text[::-1]", "text", "{name}('abc') == 'cba'"),
    ("counts the words of a text", "return len(text.split())", "text", "{name}('a b c') == 3"),
    ("turns a text into upper case", "return text.upper()", "text", "{name}('aB') == 'AB'"),
    ("tells whether a text is a palindrome", "return text == text[::-1]", "text", "{name}('abba')"),
    (
        "counts the vowels of a text",
        "return sum(c in 'aeiou' for c in text)",
        "text",
        "{name}('banana') == 3",
    ),
    (
        "returns the longest word of a text",
        "return max(text.split(), key=len)",
        "text",
        "{name}('a bcd ef') == 'bcd'",
    ),
    (
        "swaps the keys and values of a dictionary",
        "return {{v: k for k, v in d.items()}}",
        "d",
        "{name}({{1: 2}}) == {{2: 1}}",
    ),
    (
        "merges two dictionaries",
        "return {{**a, **b}}",
        "a, b",
        "{name}({{1: 1}}, {{2: 2}}) == {{1: 1, 2: 2}}",
    ),
    ("tells whether a number is even", "return x % 2 == 0", "x", "{name}(4) and not {name}(5)"),
    ("tells whether a number is odd", "return x % 2 == 1", "x", "{name}(5) and not {name}(4)"),
    ("returns the absolute value of a number", "return x if x >= 0 else -x", "x", "{name}(-3) == 3"),
    (
        "returns the factorial of a number",
        "return 1 if x < 2 else x * {name}(x - 1)",
        "x",
        "{name}(5) == 120",
    ),
    ("sums the digits of a number", "return sum(int(c) for c in str(x))", "x", "{name}(123) == 6"),
    ("converts Celsius to Fahrenheit", "return c * 9 / 5 + 32", "c", "{name}(100) == 212"),
)
_ASK = (
    "Write a Python function {name} that {task}.",
    "In Python, define a function {name} that {task}.",
    "Show me Python code for a function called {name} that {task}.",
    "I need a Python function named {name}. It {task}.",
)
_NAMES = ("solve", "compute", "apply", "run", "work", "process", "helper", "answer", "result", "func")


def program(rng: random.Random) -> Program:
    """One task with its code and its check."""
    task, body, arguments, check = rng.choice(_TASKS)
    filling = {
        "n": rng.randint(2, 30),
        "c": rng.choice("abcdefghijklmnopqrstuvwxyz"),
        "name": rng.choice(_NAMES),
    }
    code = f"def {filling['name']}({arguments}):\n    {body.format(**filling)}"
    question = rng.choice(_ASK).format(name=filling["name"], task=task.format(**filling))
    return Program(question, code, check.format(**filling))


def pair(rng: random.Random) -> tuple[str, str]:
    """One (question, answer): a task in words and the Python function that does it."""
    drawn = program(rng)
    return drawn.question, drawn.code

"""Mathematics rows: every answer is computed, none is looked up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

_NAMES = ("Amina", "Ben", "Chidi", "Dana", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kaya", "Lin")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    question = rng.choice(("What is {a} plus {b}?", "Calculate {a} + {b}.", "Find the sum of {a} and {b}."))
    return question.format(a=a, b=b), f"{a} + {b} = {a + b}."


def _subtract(rng: random.Random) -> tuple[str, str]:
    b, a = sorted((rng.randint(10, 999), rng.randint(10, 999)))
    question = rng.choice(("What is {a} minus {b}?", "Calculate {a} - {b}.", "Subtract {b} from {a}."))
    return question.format(a=a, b=b), f"{a} - {b} = {a - b}."


def _multiply(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 25), rng.randint(2, 25)
    question = rng.choice(("What is {a} times {b}?", "Multiply {a} by {b}.", "Find the product of {a} and {b}."))
    return question.format(a=a, b=b), f"{a} × {b} = {a * b}."


def _divide(rng: random.Random) -> tuple[str, str]:
    b, quotient = rng.randint(2, 20), rng.randint(2, 40)
    question = rng.choice(("What is {a} divided by {b}?", "Calculate {a} / {b}."))
    return question.format(a=b * quotient, b=b), f"{b * quotient} / {b} = {quotient}."


def _remainder(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(20, 300), rng.randint(3, 19)
    answer = f"{a} = {a // b} × {b} + {a % b}, so the remainder is {a % b}."
    return f"What is the remainder when {a} is divided by {b}?", answer


def _percent(rng: random.Random) -> tuple[str, str]:
    p, whole = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), 20 * rng.randint(2, 60)
    value = Fraction(p * whole, 100)
    return f"What is {p}% of {whole}?", f"{p}% of {whole} is {p} / 100 × {whole} = {value}."


def _linear(rng: random.Random) -> tuple[str, str]:
    a, x, b = rng.randint(2, 12), rng.randint(-9, 15), rng.randint(1, 30)
    c = a * x + b
    return f"Solve {a}x + {b} = {c} for x.", f"{a}x = {c} - {b} = {c - b}, so x = {x}."


def _rectangle(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    if rng.random() < 0.5:
        question = f"What is the area of a rectangle that is {a} cm long and {b} cm wide?"
        return question, f"The area is {a} × {b} = {a * b} square centimetres."
    question = f"What is the perimeter of a rectangle that is {a} cm long and {b} cm wide?"
    return question, f"The perimeter is 2 × ({a} + {b}) = {2 * (a + b)} centimetres."


def _triangle(rng: random.Random) -> tuple[str, str]:
    base, height = rng.randint(2, 30), 2 * rng.randint(1, 15)
    question = f"A triangle has a base of {base} cm and a height of {height} cm. What is its area?"
    return question, f"The area is {base} × {height} / 2 = {base * height // 2} square centimetres."


def _angle(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(20, 80), rng.randint(20, 80)
    question = f"Two angles of a triangle measure {a} and {b} degrees. What is the third angle?"
    return (
        question,
        f"The angles sum to 180 degrees, so the third is 180 - {a} - {b} = {180 - a - b} degrees.",
    )


def _mean(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 40)
    c += -(a + b + c) % 3
    total = a + b + c
    return (
        f"What is the mean of {a}, {b} and {c}?",
        f"The sum is {total}, so the mean is {total} / 3 = {total // 3}.",
    )


def _divisors(rng: random.Random) -> tuple[str, str]:
    common = rng.randint(2, 12)
    a, b = common * rng.randint(2, 12), common * rng.randint(2, 12)
    if rng.random() < 0.5:
        question = f"What is the greatest common divisor of {a} and {b}?"
        return question, f"The greatest common divisor of {a} and {b} is {math.gcd(a, b)}."
    question = f"What is the least common multiple of {a} and {b}?"
    return question, f"The least common multiple of {a} and {b} is {math.lcm(a, b)}."


def _prime(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(2, 400)
    factor = next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), None)
    if factor is None:
        return f"Is {n} a prime number?", f"Yes, {n} is prime: only 1 and {n} divide it."
    return f"Is {n} a prime number?", f"No, {n} is not prime: {n} = {factor} × {n // factor}."


def _sequence(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(1, 40), rng.randint(2, 15)
    terms = [start + i * step for i in range(4)]
    question = f"What comes next in the sequence {', '.join(map(str, terms))}?"
    return question, f"Each term is {step} more than the one before, so the next is {terms[-1] + step}."


def _fraction(rng: random.Random) -> tuple[str, str]:
    a, b = Fraction(rng.randint(1, 7), rng.randint(2, 9)), Fraction(rng.randint(1, 7), rng.randint(2, 9))
    return f"What is {a} plus {b}?", f"{a} + {b} = {a + b}."


def _power(rng: random.Random) -> tuple[str, str]:
    base, exponent = rng.randint(2, 15), rng.randint(2, 4)
    return f"What is {base} to the power of {exponent}?", f"{base}^{exponent} = {base**exponent}."


def _root(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(2, 60)
    return (
        f"What is the square root of {n * n}?",
        f"The square root of {n * n} is {n}, since {n} × {n} = {n * n}.",
    )


def _travel(rng: random.Random) -> tuple[str, str]:
    speed, hours = rng.randint(20, 120), rng.randint(2, 9)
    question = f"A train travels at {speed} kilometres per hour for {hours} hours. How far does it go?"
    return question, f"The distance is {speed} × {hours} = {speed * hours} kilometres."


def _story(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    start, more = rng.randint(20, 90), rng.randint(2, 40)
    less = rng.randint(2, 19)
    question = f"{name} has {start} {thing}, finds {more} more and gives {less} away. How many are left?"
    return (
        question,
        f"{start} + {more} - {less} = {start + more - less}, so {name} has {start + more - less} {thing}.",
    )


_TEMPLATES: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    *(_add, _subtract, _multiply, _divide, _remainder, _percent, _linear, _rectangle, _triangle, _angle),
    *(_mean, _divisors, _prime, _sequence, _fraction, _power, _root, _travel, _story),
)


def pair(rng: random.Random) -> tuple[str, str]:
    """One (question, answer) of school mathematics, with the arithmetic computed."""
    return rng.choice(_TEMPLATES)(rng)

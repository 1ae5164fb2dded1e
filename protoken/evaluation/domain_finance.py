"""Finance rows: definitions, the sentiment of made-up company news, and quantities that are computed."""

from __future__ import annotations

import random
from collections.abc import Callable

# term -> what it is; every answer reads "<Term> is <definition>."
_TERMS = {
    "an annuity": "a series of equal payments made at regular intervals",
    "an asset": "something of value that a person or company owns",
    "an audit": "an independent examination of a company's financial records",
    "a balance sheet": "a statement of what a company owns and owes on a given date",
    "a bear market": "a period in which prices fall by 20 percent or more",
    "a bond": "a loan to a company or government that pays interest and is repaid on a fixed date",
    "a broker": "a person or firm that buys and sells securities for clients",
    "a budget": "a plan of expected income and spending over a period",
    "a bull market": "a period in which prices rise and are expected to keep rising",
    "a call option": "the right, but not the duty, to buy an asset at a fixed price until a fixed date",
    "a capital gain": "the profit from selling an asset for more than it cost",
    "cash flow": "the money that moves into and out of a business",
    "collateral": "property that a borrower pledges to secure a loan",
    "compound interest": "interest that is earned on the principal and on earlier interest",
    "a credit score": "a number that tells lenders how likely a borrower is to repay",
    "a currency": "the money that is used in a country",
    "a default": "the failure to pay back a debt as agreed",
    "deflation": "a general fall of prices over time",
    "depreciation": "the loss of value of an asset over its useful life",
    "a dividend": "a share of the profit that a company pays to its shareholders",
    "equity": "the value of an owner's share in a company after all debts are subtracted",
    "an exchange rate": "the price of one currency in units of another",
    "a fixed cost": "a cost that does not change with the amount produced",
    "goodwill": "the amount paid for a company above the fair value of its net assets",
    "gross domestic product": "the value of all goods and services that a country produces in a period",
    "gross margin": "the share of revenue that is left after the cost of goods sold",
    "hedging": "taking a position that offsets the risk of another one",
    "an index fund": "a fund that holds the same securities as a market index",
    "inflation": "a general rise of prices that lowers what money can buy",
    "insolvency": "the state of being unable to pay debts when they fall due",
    "an interest rate": "the price of borrowing money, as a percentage of the loan per year",
    "leverage": "the use of borrowed money to increase a possible return, and with it the risk",
    "a liability": "a debt or duty that a person or company owes",
    "liquidity": "the ease with which an asset can be turned into cash without losing value",
    "market capitalization": "the share price of a company times its number of shares",
    "a merger": "the joining of two companies into one",
    "a mortgage": "a loan for buying property, secured by that property",
    "a mutual fund": "a pool of money from many investors that is invested by professionals",
    "net income": "what is left of revenue after all costs, interest and taxes",
    "an operating expense": "a cost of the daily running of a business",
    "opportunity cost": "the value of the best alternative that one gives up",
    "a pension": "a regular income paid to a person after retirement",
    "a portfolio": "the collection of investments that a person or institution holds",
    "a put option": "the right, but not the duty, to sell an asset at a fixed price until a fixed date",
    "a recession": "a significant decline of economic activity that lasts for months",
    "revenue": "the money that a company earns from its sales before costs are subtracted",
    "short selling": "selling a borrowed asset in the hope of buying it back at a lower price",
    "a stock": "a share of the ownership of a company",
    "a subsidiary": "a company that is controlled by another company",
    "a tariff": "a tax on imported goods",
    "a variable cost": "a cost that changes with the amount produced",
    "volatility": "a measure of how strongly a price moves up and down",
    "working capital": "current assets minus current liabilities",
    "a yield": "the income from an investment as a percentage of its price",
}
_ASK_TERM = (
    "What is {}?",
    "Define {}.",
    "Explain briefly what {} is.",
    "In finance, what is {}?",
    "Give a short definition of {}.",
    "A student of economics asks: what is {}?",
)
_FIRST = ("Alder", "Birch", "Cobalt", "Delta", "Ember", "Fjord", "Granite", "Harbour", "Iris", "Juniper")
_SECOND = (
    "Steel",
    "Foods",
    "Energy",
    "Textiles",
    "Motors",
    "Software",
    "Paper",
    "Shipping",
    "Pharma",
    "Bank",
)
_ASK_SENTIMENT = (
    "What is the sentiment of this news, positive, negative or neutral? {}",
    "Classify the sentiment of this headline as positive, negative or neutral: {}",
)
_MEASURES = ("net sales", "operating profit", "revenue", "net income", "order intake")
_NEUTRAL = (
    "{company} will publish its quarterly report on day {a} of the month.",
    "{company} has {a} offices and employs {b} people.",
    "{company} moves its head office to building {a} of the business park.",
    "The annual meeting of {company} will be held in room {a}.",
)


def _definition(rng: random.Random) -> tuple[str, str]:
    term, meaning = rng.choice(list(_TERMS.items()))
    return rng.choice(_ASK_TERM).format(term), f"{term[0].upper()}{term[1:]} is {meaning}."


def _which_term(rng: random.Random) -> tuple[str, str]:
    term, meaning = rng.choice(list(_TERMS.items()))
    return (
        f"Which financial term means {meaning}?",
        f"The term is {term.removeprefix('a ').removeprefix('an ')}.",
    )


def _sentiment(rng: random.Random) -> tuple[str, str]:
    company = f"{rng.choice(_FIRST)} {rng.choice(_SECOND)}"
    a, b = sorted(rng.sample(range(11, 980), 2))
    ask, kind = rng.choice(_ASK_SENTIMENT), rng.choice(("positive", "negative", "neutral"))
    if kind == "neutral":
        news, why = rng.choice(_NEUTRAL).format(company=company, a=a % 28 + 1, b=b), "it reports a plain fact"
    else:
        measure = rng.choice(_MEASURES)
        verb, new, old = ("rose", b, a) if kind == "positive" else ("fell", a, b)
        news = f"The {measure} of {company} {verb} to {new} million from {old} million."
        why = f"the {measure} {verb}"
    return ask.format(news), f"The sentiment is {kind}: {why}."


def _simple_interest(rng: random.Random) -> tuple[str, str]:
    principal, rate, years = 100 * rng.randint(2, 90), rng.randint(2, 9), rng.randint(2, 8)
    interest = principal * rate * years // 100
    question = f"What is the simple interest on {principal} dollars at {rate}% a year for {years} years?"
    return question, f"The interest is {principal} × {rate}% × {years} = {interest} dollars."


def _compound_interest(rng: random.Random) -> tuple[str, str]:
    principal, rate = 100 * rng.randint(2, 90), rng.choice((2, 4, 5, 10))
    value = principal * (100 + rate) ** 2 / 10_000
    question = f"What do {principal} dollars grow to in 2 years at {rate}% interest, compounded yearly?"
    return question, f"They grow to {principal} × {1 + rate / 100:.2f}² = {value:.2f} dollars."


def _margin(rng: random.Random) -> tuple[str, str]:
    revenue, percent = 100 * rng.randint(2, 90), rng.randint(2, 60)
    profit = revenue * percent // 100
    question = f"A company has a revenue of {revenue} and a profit of {profit} dollars. What is its profit margin?"
    return question, f"The profit margin is {profit} / {revenue} = {percent}%."


def _change(rng: random.Random) -> tuple[str, str]:
    old, percent = 20 * rng.randint(2, 40), rng.choice((5, 10, 15, 20, 25, 30, 40, 50))
    up = rng.random() < 0.5
    new = old + old * percent // 100 * (1 if up else -1)
    question = f"A share price moves from {old} to {new} dollars. By how many percent does it change?"
    direction = "rises" if up else "falls"
    return question, f"It {direction} by {abs(new - old)} / {old} = {percent}%."


def _price_earnings(rng: random.Random) -> tuple[str, str]:
    earnings, ratio = rng.randint(2, 20), rng.randint(5, 40)
    price = earnings * ratio
    question = f"A share costs {price} dollars and earns {earnings} dollars a year. What is its P/E ratio?"
    return question, f"The price-to-earnings ratio is {price} / {earnings} = {ratio}."


def _break_even(rng: random.Random) -> tuple[str, str]:
    unit, units, variable = rng.randint(2, 25), rng.randint(20, 400), rng.randint(2, 30)
    fixed, price = unit * units, unit + variable
    question = (
        f"Fixed costs are {fixed} dollars, the price is {price} and the variable cost {variable} dollars "
        "a unit. How many units does it take to break even?"
    )
    return question, f"It takes {fixed} / ({price} - {variable}) = {units} units."


_TEMPLATES: tuple[tuple[Callable[[random.Random], tuple[str, str]], int], ...] = (
    (_definition, 9),
    (_which_term, 2),
    (_sentiment, 4),
    (_simple_interest, 1),
    (_compound_interest, 1),
    (_margin, 1),
    (_change, 1),
    (_price_earnings, 1),
    (_break_even, 1),
)


def pair(rng: random.Random) -> tuple[str, str]:
    """One (question, answer) of finance: definitions, news sentiment, computed quantities."""
    template = rng.choices([t for t, _ in _TEMPLATES], [weight for _, weight in _TEMPLATES])[0]
    return template(rng)

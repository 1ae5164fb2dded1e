"""Text from strangers (prompts, tokens, client names), made harmless and visible.

Terminal escapes could rewrite the screen, bidirectional controls reorder what an auditor reads, and
zero-width characters make two names look alike. None of them reaches a report: each is drawn instead as its
code point ("\\x1b" as "⟨U+001B⟩"), which every font has. Line breaks and tabs stay, or become ↵ and ⇥.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

LONGEST_NAME = 256
_JOINERS = "\u200c\u200d"  # needed to write Persian or Hindi and to compose emoji
_UNSEEN = "\u115f\u1160\u3164\uffa0\u2800\u00ad\u034f\u180b\u180c\u180d\u180e\u180f\u17b4\u17b5"
_STACK = 4  # marks on one character: Hebrew and Vietnamese need three, and a pile of them covers the lines around it
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKS = {"Mn", "Me"}


def visible(text: str, *, lines: bool = True) -> str:
    """``text`` without control, format, private or unassigned characters; ``lines`` keeps "\\n" and "\\t"."""
    return "".join(piece for piece, _ in pieces(text, lines=lines))


def name(text: str) -> str:
    """A client's or model's name on one line; joiners are drawn too, since they could forge a name.

    Ledgers keep names short. Of one that is longer the ends are drawn, and a digest that no other name has.
    """
    if len(text) > LONGEST_NAME:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{name(text[:60])}⟨{len(text)} characters, {digest}⟩{name(text[-20:])}"
    return "".join(_drawn(c) if c in _JOINERS else c for c in visible(text, lines=False))


def pieces(text: str, *, lines: bool = True) -> Iterator[tuple[str, bool]]:
    """(piece, drawn) in order; ``drawn`` marks a picture that stands for a character."""
    plain, stacked = "", 0
    for character in text:
        stacked = stacked + 1 if unicodedata.category(character) in _MARKS else 0
        picture = _picture(character, lines) if stacked <= _STACK else _drawn(character)
        if picture is None:
            plain += character
            continue
        if plain:
            yield plain, False
        plain = ""
        yield picture, True
    if plain:
        yield plain, False


def _picture(character: str, lines: bool) -> str | None:
    if character in "\n\t":
        return None if lines else "↵⇥"["\n\t".index(character)]
    if character in _JOINERS:
        return None
    code = ord(character)
    if unicodedata.category(character) in _CONTROL or character in _UNSEEN or 0xE0100 <= code <= 0xE01EF:
        return _drawn(character)
    return None


def _drawn(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"

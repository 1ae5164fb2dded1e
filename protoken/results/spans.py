"""Where the sentences and phrases of a response stand, in whole tokens."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from protoken.results.parts import Token

# A run of end marks with closing quotes and brackets before white space or the end; CJK full stops need
# no space after them; a line break always ends. "3.5" has no space after its dot and so stays whole.
_END = re.compile(r"""(?:[.!?…]+["'”’»)\]*_]*(?=\s|$)|[。！？｡]+["”’»」』）)]*)[^\S\n]*|\n+\s*""")
# Dots that end an abbreviation, or a list number at the start of a line.
_NOT_END = re.compile(r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|cf|e\.g|i\.e|approx|Fig|Eq|No)|(?:^|\n)\s*\d{1,3})\.$")


def sentence_ranges(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """Half-open token ranges, one per sentence, in order, covering every token exactly once.

    A token belongs to the sentence of its first visible character; white space, special tokens and empty
    pieces of split characters stay with the sentence before them, or with the first if none is before.
    """
    pieces = _pieces(tokens, " ")
    cuts = _cuts("".join(pieces))
    starts, position, passed, seen = [0], 0, 0, False
    for index, piece in enumerate(pieces):
        visible = len(piece) - len(piece.lstrip())
        if visible < len(piece):
            before = passed
            while passed < len(cuts) and cuts[passed] <= position + visible:
                passed += 1
            if passed > before and seen:
                starts.append(index)
            seen = True
        position += len(piece)
    return list(pairwise([*starts, len(pieces)])) if pieces else []


def phrase_ranges(tokens: Sequence[Token], phrase: str, *, ignore_case: bool = False) -> list[tuple[int, int]]:
    """Half-open token ranges, one per occurrence of the phrase, in order; occurrences do not overlap.

    A range holds every token with a character of the phrase in it, and the empty pieces of split characters before it.
    """
    pieces = _pieces(tokens, "\0")
    ends = list(accumulate(map(len, pieces)))
    found = []
    for match in re.finditer(re.escape(phrase), "".join(pieces), re.IGNORECASE if ignore_case else 0):
        first, last = bisect_right(ends, match.start()), bisect_left(ends, match.end())
        while first and not pieces[first - 1]:
            first -= 1
        found.append((first, last + 1))
    return found


def _pieces(tokens: Sequence[Token], blank: str) -> list[str]:
    """The tokens' texts, special ones blanked out: "<|im_end|>" ends no sentence and is no word."""
    return [re.sub(r"\S", blank, token.text) if token.special else token.text for token in tokens]


def _cuts(text: str) -> list[int]:
    """Ascending character positions at which a new sentence may start."""
    cuts = []
    for match in _END.finditer(text):
        end = match.group().rstrip()
        if not (end == "." and _NOT_END.search(text[max(0, match.start() - 16) : match.start() + 1])):
            cuts.append(match.end())
    return cuts

"""What a report promises: nothing from outside acts, nothing is requested, every number is there."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import sys
import unicodedata
from base64 import b64encode
from collections import Counter
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from protoken.report import terminal_svg
from protoken.report.palette import COLOURS, colour_slots, mix
from protoken.report.sections import sentences, slot_name
from protoken.report.view import build_view, leads, number_format, percent, timing
from protoken.report.visible import name, visible
from protoken.results import Token, Trace, TraceInfo

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><style>*{display:none}",
    "--><!-- ]]> {{ 7*7 }} {% raw %}",
    "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "\u202egpj.exe\u202c\u2066x\u2069\u200b\u200e",
    "[bold red]markup[/] :smile:",
    "\r\x00\x7f\u2028\ufeff\U000e0041",
    "&lt;b&gt; &amp; ` ${1} \\u003c",
]


def make(
    texts: list[str] | None = None,
    scores: Any = None,
    *,
    clients: tuple[str, ...] | None = None,
    per_token: bool = True,
    prompt: str = "Is the INR fine?",
    method: str = "protoken",
    model: str = "tiny",
) -> Trace:
    pieces = ["The", " INR", " is", "\n", "fine", ".", "<|im_end|>"] if texts is None else texts
    tokens = tuple(Token(i, piece, piece.startswith("<|")) for i, piece in enumerate(pieces))
    count = len(clients) if clients else 3
    default = np.random.default_rng(0).normal(size=(len(tokens), count))
    own = default if scores is None else np.asarray(scores, dtype=float)
    info = TraceInfo(
        method=method,
        way="local",
        objective="log_prob",
        layers=("layers.1.o_proj", model),
        rounds=(1, 2, 3),
        model=model,
        ledger=prompt,
        versions={model: prompt},
        seconds_generate=1.8,
        seconds_trace=1.84,
        generate_arguments={"stop": prompt},
        created="2026-01-02T03:04:05+00:00",
    )
    return Trace(
        prompt=prompt,
        prompt_ids=(1, 2),
        response="".join(pieces),
        token_list=tokens,
        client_ids=clients or tuple(f"client_{k}" for k in range(own.shape[1])),
        weights=np.full(own.shape[1], 1 / own.shape[1]),
        token_scores=own if per_token else None,
        totals=own.sum(axis=0),
        objective_values=np.full(len(tokens), -0.25),
        token_residual=np.zeros(len(tokens)) if per_token else None,
        residual=0.0,
        change=own.sum(),
        layer_totals=np.stack([own.sum(axis=0), np.zeros(own.shape[1])]),
        info=info,
    )


class Page(HTMLParser):
    """What a browser would see: elements with attribute names, text per element class, open tags."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.shape: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.comments = 0
        self.texts: list[tuple[str, str]] = []  # (class of innermost element with one, text)
        self.stack: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape[tag, tuple(sorted(key for key, _ in attrs))] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in {"meta", "br", "link", "img", "input"}:
            self.stack.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.stack.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_comment(self, data: str) -> None:
        self.comments += 1

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1][1] if self.stack else "", data))

    def text_of(self, part: str) -> str:
        return "".join(data for owner, data in self.texts if owner.split()[:1] == [part])


def check_harmless(page: Page, source: str) -> None:
    elements = {tag for tag, _ in page.shape}
    assert not elements & {"img", "link", "iframe", "object", "embed", "base", "form", "svg"}
    assert sum(n for (tag, _), n in page.shape.items() if tag == "script") == 1
    assert sum(n for (tag, _), n in page.shape.items() if tag == "style") == 1
    assert page.comments == 0
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in {"src", "href", "srcdoc", "action"}]
    assert not page.stack
    for character in source:
        assert (
            character in "\n\t"
            or character.isprintable()
            or character in "\u200c\u200d \u3000"
            or (character.isspace() and ord(character) > 0x9F)
        ), hex(ord(character))


STRANGE = st.text(max_size=24) | st.sampled_from(HOSTILE)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(STRANGE, min_size=1, max_size=5),
    st.lists(STRANGE, min_size=2, max_size=3, unique=True),
    STRANGE,
)
@example(HOSTILE, HOSTILE, "".join(HOSTILE))
def test_no_text_from_outside_becomes_an_element_or_attribute(
    texts: list[str], clients: list[str], prompt: str
) -> None:
    scores = np.ones((len(texts), len(clients))) * np.arange(1.0, len(clients) + 1)
    source = make(texts, scores, clients=tuple(clients), prompt=prompt, model=prompt).to_html()
    found = Page(source)
    check_harmless(found, source)
    # The same trace with harmless text has the same elements and attributes, but for pictures of
    # control characters and for optional rows.
    plain = [re.sub(r".", "x", text, flags=re.DOTALL) for text in texts]
    calm = Page(
        make(plain, scores, clients=tuple(f"c{k}" for k in range(len(clients))), prompt="x", model="x").to_html()
    )
    assert set(found.shape) <= set(calm.shape) | {("span", ("class",)), ("bdi", ())} | sentence_shapes()
    tokens = [(shape, n) for shape, n in found.shape.items() if "data-piece" in shape[1]]
    assert sum(n for _, n in tokens) == len(texts)


def sentence_shapes() -> set[tuple[str, tuple[str, ...]]]:
    return set(Page(make(["Yes.", " No."], [[1.0, 0], [0, 1.0]]).to_html()).shape)


def test_drawn_tokens_and_prompt_read_as_what_was_said() -> None:
    page = Page(make(["The", " <b>", "\n\n", "fine", " é🙂"], prompt="a < b && c").to_html())
    assert page.text_of("t") == "The <b>\n\nfine é🙂"
    assert page.text_of("prompt") == "a < b && c"


def test_page_requests_nothing_and_runs_only_its_own_script() -> None:
    source = make().to_html()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    policy = next(value for _, key, value in Page(source).attributes if key == "content" and "default-src" in value)
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)
    assert script
    assert b64encode(hashlib.sha256(script[1].encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'")


def test_page_without_script_still_tells_every_score() -> None:
    trace = make(["a", "b"], [[1.25, -2.5], [0.125, 0.0]])
    titles = [value for _, key, value in Page(trace.to_html()).attributes if key == "title"]
    assert "+1.25  client_0" in titles[0]
    assert "-2.5  client_1" in titles[0]
    table = "".join(data for _, data in Page(trace.to_html()).texts)
    for figure in ("+1.375", "-2.500", "+0.125", "nats", "softmax"):
        assert figure in table


@pytest.mark.parametrize(
    ("values", "said", "unsaid"),
    [
        ([2.0, 1.0], ("Most came from", ", then"), "No client"),
        ([2.0, -1.0], ("Most came from", "no other client raised it as a whole"), ", then"),
        ([-1.0, -2.0], ("No client raised this answer as a whole", ", then"), "Most came from"),
    ],
)
def test_page_says_first_who_raised_the_answer(values: list[float], said: tuple[str, ...], unsaid: str) -> None:
    page = make(["a"], [values], clients=("x", "y")).to_html()
    summary = page[page.index('<p class="lede">') :].partition("</p>")[0]
    assert all(words in summary for words in said)
    assert unsaid not in summary


def test_page_is_written_as_utf8(tmp_path: Path) -> None:
    trace = make(["é🙂"])
    source = trace.to_html(tmp_path / "trace.html")
    assert (tmp_path / "trace.html").read_bytes() == source.encode()


def test_page_is_the_same_every_time() -> None:
    assert make().to_html() == make().to_html()


def test_notebook_frame_is_sandboxed_and_holds_the_page() -> None:
    trace = make(HOSTILE, np.ones((len(HOSTILE), 3)))
    page = Page(trace._repr_html_())
    assert dict(page.shape) == {("iframe", ("sandbox", "srcdoc", "style", "title")): 1}
    frame = {key: value for _, key, value in page.attributes}
    assert frame["sandbox"] == "allow-scripts"
    assert frame["srcdoc"] == trace.to_html()


SHAPES = {
    "one client": lambda: make(["a", "b"], [[1.0], [-2.0]]),
    "no tokens": lambda: make([], np.zeros((0, 3))),
    "no tokens, one client": lambda: make([], np.zeros((0, 1))),
    "totals only": lambda: make(per_token=False),
    "all zero": lambda: make(["a", "b"], np.zeros((2, 3))),
    "all negative": lambda: make(["a", "b"], -np.ones((2, 3))),
    "forty clients": lambda: make(["a"], np.arange(40.0)[None]),
    "huge and tiny": lambda: make(["a", "b"], [[1e300, -1e-300], [5e-324, 0.0]]),
    "many scores": lambda: make(["a "] * 400, np.ones((400, 60))),
    "empty pieces": lambda: make(["", "", " "], np.ones((3, 2))),
    "paper offsets": lambda: make(["a"], [[-390.3, -389.4]], method="paper"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_trace_renders_everywhere(shape: str) -> None:
    trace = SHAPES[shape]()
    source = trace.to_html()
    check_harmless(Page(source), source)
    assert trace.clients[0].client in printed(trace)
    assert terminal_svg(trace).startswith("<svg")
    assert trace.clients[0].client in str(trace.__rich__())


# ---- terminal ----------------------------------------------------------------------------------------


def printed(trace: Trace, width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    trace.show(console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@settings(deadline=None)
@given(st.lists(STRANGE, min_size=2, max_size=5, unique=True), STRANGE)
@example(HOSTILE, "".join(HOSTILE))
def test_terminal_never_receives_control_characters(texts: list[str], prompt: str) -> None:
    trace = make(texts, np.ones((len(texts), len(texts))), clients=tuple(texts), prompt=prompt, model=prompt)
    for output in (printed(trace), str(trace.__rich__())):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]", output)


def test_coloured_output_holds_only_styles_of_our_own() -> None:
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="truecolor")
    make(HOSTILE, np.ones((len(HOSTILE), 3))).show(console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert "[bold red]markup[/]" in output


def test_show_names_scores_shares_residual_and_timings() -> None:
    output = printed(make(["a", "b"], [[1.25, -2.5], [0.125, 0.0]]))
    for part in ("score (nats)", "+1.375", "-2.500", "share", "98.0 %", "residual", "generated in 1.80 s", "(+2 %)"):
        assert part in output, part


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_show_prints_what_the_encoding_of_stdout_lacks_plainly(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    make(["漢", "b"], np.ones((2, 2))).show()
    stdout.flush()
    output = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "??b" in output
    assert "protoken trace" in output
    assert stdout.errors == "strict"  # as it was


def test_show_limits_the_ranking_and_sums_the_rest() -> None:
    trace = make(["a"], [[4.0, 3.0, 2.0, 1.0]])
    assert re.search(r"and 2 more +\+3\.00 ", printed(trace, top=2))
    assert "more" not in printed(trace, top=None)


def test_answer_is_printed_as_it_was_generated() -> None:
    assert "  The INR is\n" in re.sub(r" +\n", "\n", printed(make()))


def test_svg_requests_nothing_and_escapes() -> None:
    picture = terminal_svg(make(HOSTILE, np.ones((len(HOSTILE), 3))))
    assert not re.search(r"font-face|url\((?!#)|href|<script|https?://(?!www\.w3\.org/2000/svg)", picture)
    assert "&lt;script&gt;" in picture


# ---- what is drawn -----------------------------------------------------------------------------------


def test_strength_is_the_lead_over_the_mean_of_the_others() -> None:
    trace = make(["a", "b", "c"], [[3.0, 0.0, 0.0], [0.0, 1.5, 0.0], [-1.0, -2.0, -3.0]])
    places, lead, strength = leads(trace)
    assert places.tolist() == [0, 1, -1]
    assert lead.tolist() == [3.0, 1.5, 0.0]
    assert strength == pytest.approx([1.0, 1.5 / 2.85, 0.0])


def test_two_clients_who_taught_the_same_do_not_fade_each_other() -> None:
    _, lead, _ = leads(make(["a", "b"], [[1.0, 1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]]))
    assert lead[0] == pytest.approx(0.8)


def test_paper_scores_are_drawn_whatever_their_common_offset() -> None:
    base = np.array([[2.0, 1.0], [0.0, 4.0]])
    for offset in (0.0, -390.0):
        places, lead, _ = leads(make(["a", "b"], base + offset, method="paper"))
        assert places.tolist() == [0, 1]
        assert lead == pytest.approx([1.0, 4.0])


def test_bars_share_one_axis_around_zero() -> None:
    rows = build_view(make(["a"], [[3.0, -1.0, 0.0]])).clients
    assert [(row.client, row.bar) for row in rows] == [
        ("client_0", (25.0, 75.0)),
        ("client_2", (25.0, 0.0)),
        ("client_1", (0.0, 25.0)),
    ]


@pytest.mark.parametrize(
    ("values", "value", "text"),
    [
        ([2.9876, -1.0], 2.9876, "+2.988"),
        ([390.31], 390.31, "+390.3"),
        ([1e-9], 1e-9, "+1.000e-09"),
        ([0.0], 0.0, "+0.000"),
        ([2.0], -1e-9, "+0.000"),
        ([], 1.0, "+1.000"),
    ],
)
def test_numbers_carry_a_sign_and_four_figures(values: list[float], value: float, text: str) -> None:
    assert number_format(values)(value) == text


def test_percentages_never_round_to_nothing_or_to_all() -> None:
    assert [percent(v) for v in (0.0, 1e-5, 0.5, 0.99999, 1.0)] == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100.0 %"]


def test_timing_names_its_price() -> None:
    assert timing(make()) == "generated in 1.80 s, traced in 1.84 s (+2 %)"


# ---- text and colours --------------------------------------------------------------------------------


def test_control_characters_are_drawn() -> None:
    assert visible("a\x1b[31m\r\n\tb\x7f") == "a⟨U+001B⟩[31m⟨U+000D⟩\n\tb⟨U+007F⟩"
    assert visible("a\u202eb\u200b") == "a⟨U+202E⟩b⟨U+200B⟩"
    assert visible("a\nb", lines=False) == "a↵b"


def test_joiners_stay_in_prose_and_are_drawn_in_names() -> None:
    assert visible("می\u200cخواهم 👩\u200d🔬") == "می\u200cخواهم 👩\u200d🔬"
    assert name("bank\u200d_a") == "bank⟨U+200D⟩_a"


@given(st.text())
def test_visible_text_is_left_alone_and_the_rest_is_shown(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_clients_keep_their_colours_between_traces() -> None:
    clients = tuple("abcdef")
    assert colour_slots(clients, "fedcba") == colour_slots(clients, "abcdef")


def test_beyond_ten_clients_the_best_ranked_are_coloured_and_the_rest_grey() -> None:
    clients = [f"c{k}" for k in range(12)]
    slots = colour_slots(clients, clients[::-1])
    assert (slots["c11"], slots["c2"], slots["c1"], slots["c0"]) == (0, 9, None, None)


def test_mix_blends_channels() -> None:
    assert mix("#ff0000", "#0000ff", 0.5) == "#800080"


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_client_colours_stay_apart_for_every_kind_of_vision(vision: str, page: int) -> None:
    """CIE76 distance of every pair: 12 is told apart at a glance (2.3 is just noticeable)."""
    seen = [lab(np.array(VISION[vision]) @ linear(pair[page])) for pair in COLOURS]
    closest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert closest > 12.0


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_text_on_a_fully_tinted_token_keeps_its_contrast(page: int) -> None:
    """WCAG AA asks for 4.5; the page mixes at most --tint of the colour into the card."""
    style = files("protoken.report").joinpath("trace.css").read_text(encoding="utf-8")
    card, ink, tint = (re.findall(rf"--{key}: ([^;]+);", style)[page] for key in ("card", "ink", "tint"))
    weights = np.array([0.2126, 0.7152, 0.0722])
    for pair in COLOURS:
        low, high = sorted(
            float(weights @ linear(c)) for c in (mix(pair[page], card, float(tint.rstrip("%")) / 100), ink)
        )
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair[page]


def test_names_beyond_any_ledgers_are_drawn_short_and_apart() -> None:
    long = ["a" * 5000 + middle + "z" * 5000 for middle in "xy"]
    drawn = [name(one) for one in long]
    assert max(map(len, drawn)) < 200
    assert len(set(drawn)) == 2
    assert all(text.startswith("a" * 60) and text.endswith("z" * 20) and "10001 characters" in text for text in drawn)
    assert name("n" * 256) == "n" * 256  # twice as long as a ledger takes
    texts = ["word "] * 200
    page = make(texts, np.ones((200, 2)), clients=(long[0], long[1])).to_html()
    assert len(page) < 300_000


@pytest.mark.parametrize("text", ["Tiếng Việt", "בְּרֵאשִׁ֖ית", "कृत्रिम", "é", "ﷺ"])
def test_marks_that_languages_put_on_a_character_stay(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert visible(unicodedata.normalize(form, text)) == unicodedata.normalize(form, text)


@pytest.mark.parametrize("mark", ["\u0301", "\u0489", "\u20e3"])
def test_a_pile_of_marks_covers_no_other_line(mark: str) -> None:
    for draw in (visible, name):
        drawn = draw("a" + mark * 50 + "b")
        assert drawn == "a" + mark * 4 + f"⟨U+{ord(mark):04X}⟩" * 46 + "b"


def test_a_sentence_has_its_client_in_the_colour_of_the_page() -> None:
    clients = tuple(f"c{k:02}" for k in range(15))
    scores = np.zeros((4, 15))
    scores[:, 3] = 0.06  # the best of all
    scores[0, 9] = scores[2, 12] = 0.15
    trace = make(["One", ". ", "Two", "."], scores, clients=clients)
    view = build_view(trace)
    rows = [sentence["row"] for sentence in sentences(trace, view)]
    assert [row["client"] for row in rows] == ["c09", "c12"]
    places = [clients.index(row["client"]) for row in rows]
    assert [row["slot"] for row in rows] == [slot_name(view.by_place[place].slot) for place in places]
    assert len({row["slot"] for row in rows}) == 2
    for row, part in zip(rows, trace.sentences(), strict=True):
        own = build_view(part).clients[0]
        assert (row["client"], row["score"], row["share"]) == (own.client, own.score, own.share)

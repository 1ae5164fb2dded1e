"""A trace in the terminal, by rich; the same picture as SVG.

Text from outside goes through `visible` and into `Text` objects, never through rich's markup, so neither
escape sequences nor "[bold]" in a token do anything.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from protoken.arguments import check_count
from protoken.errors import ArgumentError
from protoken.report.encoding import any_encoding
from protoken.report.fitting import Column, Fitted
from protoken.report.palette import COLOURS, GREY, mix
from protoken.report.view import ClientRow, TokenView, View, accounting, build_view, gaps_of, timing, weight_heading
from protoken.report.visible import name, visible
from protoken.results import Trace

_INK = "#16181d"  # text on a filled token


def show(trace: Trace, console: Console | None = None, *, top: int | None = 10) -> None:
    """Print ``trace``: prompt, coloured tokens, ranking of the ``top`` clients, residual, timings."""
    if console is not None and not isinstance(console, Console):
        raise ArgumentError("console", expected="a rich.console.Console, or None", got=f"a {type(console).__name__}")
    shown = render(trace, top=top)
    if console is not None:
        console.print(shown)
        return
    with any_encoding(sys.stdout):
        Console().print(shown)


def headline(trace: Trace) -> Text:
    """The trace in one line."""
    best = build_view(trace).clients[0]
    line = Text.assemble(("Trace", "bold"), f" {len(trace.token_list)} tokens, {len(trace.client_ids)} clients, top ")
    line.append(best.client, Style(color=_colour(best.slot), bold=True))
    line.append(f" {best.score} {trace.unit}")
    return line


def render(trace: Trace, *, top: int | None = 10) -> RenderableType:
    """Everything `show` prints, as one renderable."""
    if top is not None:
        check_count("top", top, 0)
    view = build_view(trace)
    info = trace.info
    about = f"{name(info.method)} · {name(info.way)} way · {info.objective} · {_layers(trace)}"
    if info.model:
        about += f" · {name(info.model)}"
    parts: list[RenderableType] = [
        Text.assemble(("protoken trace  ", "bold"), (about, "dim")),
        Text(),
        Text("prompt", style="dim"),
        Padding(Text(visible(trace.prompt).strip("\n"), style="italic"), (0, 0, 0, 2)),
        Text(),
        Text("answer, handed in" if info.forced else "answer", style="dim"),
        Padding(response(view), (0, 0, 0, 2)),
        Text(),
        legend(trace, view),
        Text(),
        ranking(trace, view, top),
        Text(),
        *(_fact(label, value) for label, value in _facts(trace, view)),
    ]
    return Group(*parts)


def response(view: View) -> Text:
    """The generated tokens, coloured; nothing else, so that it reads as the answer."""
    text = Text(no_wrap=False, overflow="fold")
    for token in view.tokens:
        shown = visible(token.text)
        if token.special:
            text.append(shown, Style(dim=True))
        elif token.place is None:
            text.append(shown)
        else:
            text.append(shown, _style(token))
    return text


def legend(trace: Trace, view: View) -> Text:
    """One swatch per client that leads a token, and what strength means."""
    if trace.token_scores is None:
        return Text("Sequence totals only: tokens are not coloured.", style="dim")
    line = Text(overflow="fold")
    for row in view.clients:
        if row.led and row.slot is not None:
            line.append("■ ", Style(color=_colour(row.slot)))
            line.append(f"{row.client}  ")
    if any(row.led and row.slot is None for row in view.clients):
        line.append("■ ", Style(color=GREY[0]))
        line.append("others  ")
    if not view.tokens:
        return Text("No tokens were generated.", style="dim")
    note = "no client raised a token, so none is coloured"
    if view.full_lead:
        full = f"{view.full_lead:.2g} {trace.unit}"
        note = f"colour: top client, strongest from a lead of {full}; plain: raised by none"
    line.append(("\n" if line.plain else "") + note, "dim")
    return line


def ranking(trace: Trace, view: View, top: int | None) -> Fitted:
    """Clients by raw score; the share stands beside it, never alone."""
    shown = view.clients[:top]
    names = [Text(row.client) for row in shown]
    # The mark stands by the rank: a name may be broken anywhere.
    marks = [Text.assemble((f"{row.rank} ", "dim"), ("■", Style(color=_colour(row.slot)))) for row in shown]
    figures = [(row.score, row.share, row.weight) for row in shown]
    bars = [_bar(row) for row in shown]
    rest = trace.clients[len(shown) :]
    if rest:
        names.append(Text(f"and {len(rest)} more", style="dim"))
        marks.append(Text())
        figures.append((view.number(sum(client.score for client in rest)), "", ""))
        bars.append(Text())
    scores, shares, weights = ([Text(cell) for cell in cells] for cells in zip(*figures, strict=True))
    return Fitted(
        [
            Column("#", marks, right=True),
            Column("client", names, breaks=True),
            Column(f"score ({trace.unit})", scores, right=True),
            Column("", bars, drop=3),
            Column("share", shares, right=True, drop=1),
            Column(weight_heading(trace), weights, right=True, drop=2, style="dim"),
        ]
    )


def terminal_svg(trace: Trace, *, width: int = 100, top: int | None = 10) -> str:
    """What `show` prints, as an SVG picture that requests nothing (rich's own would fetch fonts)."""
    console = Console(
        record=True,
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    console.print(render(trace, top=top))
    return console.export_svg(title="protoken", code_format=_svg_format())


def _svg_format() -> str:
    """rich's frame without its @font-face rules and credit: the viewer's own monospace font serves."""
    start, end = CONSOLE_SVG_FORMAT.index("@font-face"), CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")
    frame = CONSOLE_SVG_FORMAT[:start] + CONSOLE_SVG_FORMAT[end:]
    return re.sub(r"<!--.*?-->", "", frame, flags=re.DOTALL)


def _facts(trace: Trace, view: View) -> Iterator[tuple[str, str]]:
    yield "residual", f"{trace.residual:+.2g} {trace.unit}; {accounting(trace)}"
    yield "change", f"{view.number(trace.change)} {trace.unit}; all scores and the residual together"
    if trace.info.objective == "log_prob" and len(trace.objective_values):
        yield "answer", f"log-probability {trace.objective_values.sum():+.4g} nats"
    if gaps := gaps_of(trace):
        yield "gap", gaps
    yield "time", timing(trace)


def _fact(label: str, value: str) -> Text:
    return Text.assemble((f"{label:<10}", "dim"), value)


def _layers(trace: Trace) -> str:
    layers, rounds = trace.info.layers, trace.info.rounds
    what = f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"
    return what + (f" · round{'s' if len(rounds) != 1 else ''} {_ranges(rounds)}" if rounds else "")


def _ranges(numbers: tuple[int, ...]) -> str:
    consecutive = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))
    return f"{numbers[0]} to {numbers[-1]}" if consecutive else ", ".join(map(str, numbers))


def _colour(slot: int | None) -> str:
    # The dark page's variants read on dark and on light terminals alike.
    return GREY[1] if slot is None else COLOURS[slot][1]


def _style(token: TokenView) -> Style:
    """Three steps that read on any background: coloured letters, bold ones, filled."""
    colour = _colour(token.slot)
    if token.strength >= 0.6:
        return Style(color=_INK, bgcolor=mix(colour, "#ffffff", 0.55 + 0.45 * token.strength), bold=True)
    return Style(color=colour, bold=token.strength >= 0.25)


def _bar(row: ClientRow, width: int = 20) -> Text:
    left, size = (round(part / 100 * width) for part in row.bar)
    size = min(max(size, 1 if row.bar[1] > 0 else 0), width)
    left = min(left, width - size)
    style = Style(color=_colour(row.slot))
    return Text.assemble(" " * left, ("╍" * size if row.negative else "━" * size, style))

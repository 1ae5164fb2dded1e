"""Draws a `Trace`: in the terminal, in a notebook, as one self-contained page, as a picture; and a `History`.

view.py       what there is to show, computed once: colours, leads, bars, figures
html.py       the page, from trace.html.jinja, trace.css and script.html.jinja
history.py    a history as a table and, from history.html.jinja, as a page
page.py       what pages share: templates, style sheet, file
sections.py   the page's tables and lists below the answer, as plain data
terminal.py   rich output, and the same as SVG
fitting.py    tables for terminals of any width
palette.py    colours that survive colour blindness
visible.py    text from strangers, made harmless and visible
encoding.py   streams whose encoding lacks some of our characters
"""

from protoken.report.html import notebook_html, trace_html
from protoken.report.terminal import show, terminal_svg

__all__ = ["notebook_html", "show", "terminal_svg", "trace_html"]

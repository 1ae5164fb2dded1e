"""What every page shares: the templates' environment, the style sheet with the clients' colours, the file.

Three walls against hostile text: jinja's autoescape on every value, `visible` for control characters, and a
Content-Security-Policy in each template that loads nothing and runs no script but the page's own.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from protoken.paths import path_of, write_text
from protoken.report.palette import COLOURS, GREY


def rendered(template: str, context: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> str:
    """The page as a str, also written to ``path`` if given."""
    target = None if path is None else path_of("path", path)
    page = _template(template).render(context)
    if target is not None:
        write_text(target, page)
    return page


def framed(page: str, title: str) -> str:
    """A page in a sandboxed frame, so that neither notebook nor page can touch the other."""
    look = "width:100%;height:720px;border:0;border-radius:12px"
    inside = html.escape(page, quote=True)
    return f'<iframe sandbox="allow-scripts" style="{look}" title="{title}" srcdoc="{inside}"></iframe>'


def style() -> Markup:
    """The style sheet: .k0 to .k9 and .kx (grey) set a client's colour --c, the dark variants under the media query."""
    every = [*enumerate(COLOURS), ("x", GREY)]
    light = "".join(f".k{slot}{{--c:{pair[0]}}}" for slot, pair in every)
    dark = "".join(f".k{slot}{{--c:{pair[1]}}}" for slot, pair in every)
    return Markup(f"{read('trace.css')}{light}\n@media (prefers-color-scheme:dark){{{dark}}}")


def read(file: str) -> str:
    """A file of this package as text."""
    return files("protoken.report").joinpath(file).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=False)
    return environment.from_string(read(name))

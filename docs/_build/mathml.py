"""A MkDocs hook: formulas become MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that the Markdown extension arithmatex has marked."""
    return FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    found = convert(html.unescape(match[3]).strip(), display=display)
    # latex2mathml draws the line over a mean as a dash that does not stretch.
    return found.replace('<mo accent="true">&#x02015;</mo>', '<mo stretchy="true">&#x203E;</mo>')

"""A Griffe extension: docstrings are reStructuredText in the code, and Markdown in the API page."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
MATH = re.compile(r":math:`([^`]+)`")
EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1\S.*\n)*", re.MULTILINE)
BLOCK = re.compile(r"^( *)\.\. math::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


class Roles(Extension):
    """Rewrites the roles and formulas of every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The same text. Roles and examples become code, and formulas get arithmatex's delimiters."""
    text = BLOCK.sub(_block, text + "\n")
    text = EXAMPLE.sub(_example, text)
    text = MATH.sub(r"\\(\1\\)", text)
    return ROLE.sub(lambda match: f"`{match[1].rpartition('lightning_alrc.')[2]}`", text).rstrip()


def _block(match: re.Match[str]) -> str:
    lines = dedent(match[2]).strip()
    if "&" in lines and "\\\\" in lines:
        lines = f"\\begin{{aligned}}{lines}\\end{{aligned}}"
    indented = lines.replace("\n", "\n" + match[1])
    return f"{match[1]}$$\n{match[1]}{indented}\n{match[1]}$$\n\n"


def _example(match: re.Match[str]) -> str:
    code = re.sub(r" *# doctest: .*", "", match[0])
    return f"{match[1]}```pycon\n{code}{match[1]}```\n"

"""Templates to pages: their parts, and how names and values are written in them."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from perturbflow.report.plotting import interval, number, signed

FOLDER = Path(__file__).parent
PARTS = ("head.html", "style.html", "tables.html", "screen_section.html")
"""Parts that pages share: head and style, the script that sorts and filters tables, and the section on a screen."""


def _words(name: str) -> Markup:
    """Return a name that may be broken after an underscore: long names must not widen a phone's page."""
    return Markup("_<wbr>").join(str(name).split("_"))


def _plain(value: Any) -> str:
    """Return a value of a table cell."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        value = float(value)
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else number(value)
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def render(template: str, folder: Path = FOLDER, **content: object) -> str:
    """Return the page of a template, in this folder or another one."""
    files = [folder / template, *(FOLDER / part for part in PARTS)]
    loader = jinja2.DictLoader({file.name: file.read_text(encoding="utf-8") for file in files})
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "interval": lambda score: interval(score.low, score.high),
        "words": _words,
        "plain": _plain,
        "signed": signed,
    }
    return environment.get_template(template).render(**content)

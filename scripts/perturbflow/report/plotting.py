"""How figures and numbers look: colours, style, axes, inline SVG within bounds, digits."""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK = "#010203"  # stands for the colour of the text around the figure: the page is read in light and in dark
NOISE = 1e-6  # of single precision: values below it are zero
# matplotlib has a type of its own for the names of settings, which no dictionary of some of them fits.
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "perturbflow",
}


@dataclass
class Plots:
    """Turns figures into inline SVG until a section's bytes are spent.

    Attributes
    ----------
    section
        Prefix of the ids within the figures: ids are unique on a page.
    bytes_left
        The room that the section still has.
    n_plotted, n_left_out
        Figures so far.
    """

    section: str
    bytes_left: int
    n_plotted: int = 0
    n_left_out: int = 0

    @mpl.rc_context(STYLE)
    def svg(self, alt: str, plot: Callable[..., Figure], *arguments: object) -> Markup | None:
        """Return the figure that `plot` makes, with its alternative text, or None where the section is full."""
        if self.bytes_left <= 0:
            self.n_left_out += 1
            return None
        buffer, figure = io.StringIO(), plot(*arguments)
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            dpi=144,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
        text = buffer.getvalue()
        text = text[text.index("<svg") :]  # no XML declaration and no DTD within HTML
        for line in [line for axes in figure.axes for line in axes.lines if isinstance(line, NamedPoints)]:
            text = line.titled(text)
        referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", text)
        for reference in (' id="', 'href="#', "url(#"):
            text = text.replace(reference, f"{reference}{self.section}-{self.n_plotted}-")
        for idle in (r"<!--.*?-->\s*", r"<style.*?</style>\s*", r' transform="rotate\(-0 [^"]*\)"', r"\s+(?=[<\n])"):
            text = re.sub(idle, "", text, flags=re.DOTALL)
        text = text.replace(INK, "currentColor")
        text = text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
        self.n_plotted += 1
        self.bytes_left -= len(text)
        return Markup(text)  # noqa: S704  matplotlib escapes the text that it writes

    def png(self, path: Path) -> str | None:
        """Return a PNG file as a data URI, or None where the section is full."""
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > self.bytes_left:
            self.n_left_out += 1
            return None
        self.n_plotted += 1
        self.bytes_left -= len(data)
        return f"data:image/png;base64,{data}"


class NamedPoints(Line2D):
    """Points that tell their names to a pointer above them.

    Parameters
    ----------
    names
        One per point.
    others
        Of matplotlib's Line2D.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, names: Sequence[str], **others: Any) -> None:
        super().__init__(x, y, linestyle="none", **others)
        self.names = names
        self.set_gid(f"points-{id(self)}")

    def titled(self, svg: str) -> str:
        """Return the figure with a title in every point; as it is where points are pixels."""
        group = re.compile(rf'id="{self.get_gid()}".*?</g>', flags=re.DOTALL).search(svg)
        if group is None:
            return svg
        points = list(re.compile(r"<use [^>]*?(/>)").finditer(svg, group.start(), group.end()))
        if len(points) != len(self.names):
            return svg
        for point, name in reversed(list(zip(points, self.names, strict=True))):
            svg = f"{svg[: point.start(1)]}><title>{escape(name)}</title></use>{svg[point.end(1) :]}"
        return svg


def new_axes(
    width: float, height: float, left: float, bottom: float = 0.45, top: float = 0.12, right: float = 0.15
) -> tuple[Figure, Axes]:
    """Return a new figure and its axes; all in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Make every row of the axes one of these, from the top, over a light grid."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(b=True)
    axes.spines["left"].set_visible(False)


def room_for(names: Iterable[str]) -> float:
    """Return the inches that the longest of the names takes at the left of the axes."""
    return 0.2 + 0.072 * max(map(len, names))


def number(value: float | None) -> str:
    """Return three significant digits; whole above a thousand, 0 for what is noise, a dash for none."""
    if value is None or not np.isfinite(value):
        return "–"
    if abs(value) < NOISE:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def signed(value: float) -> str:
    """Return two significant digits with the sign; a value below the noise of single precision is 0."""
    if not np.isfinite(value):
        return "–"
    return "0" if abs(value) < NOISE else np.format_float_positional(float(f"{value:.2g}"), sign=True, trim="-")


def interval(low: float, high: float) -> str:
    """Return both bounds in words, or that there are none."""
    return f"{number(low)} to {number(high)}" if np.isfinite([low, high]).all() else "no interval"

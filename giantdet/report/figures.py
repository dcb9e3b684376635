"""Charts: each is written as a PNG file, and returned as SVG whose ink is the text colour of the page."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS = ("#3b78e7", "#e5803a", "#24a37a", "#c9527f", "#8a70d6", "#b8931f", "#38a3b8", "#8a8f98")
_INK, _LINE = "#20242b", "#d8dce3"  # no other colour of a chart is one of these
_SIZE = (4.8, 3.0)  # inches of 72 points: at 390 pixels of a phone letters of 9 points stay readable
_RC: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the reader's fonts have all scripts
    "text.parse_math": False,  # a class name may have a $
    "font.size": 9,
    "font.family": ["sans-serif"],
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


class Chart:
    """A figure of one or several axes below each other, drawn in a `with` block; `svg` is there after it.

    Args:
        file: the PNG file that is written, in a folder that exists.
        rows: axes below each other with one x axis.
        size: width and height in inches.
        heights: of the axes, relative to each other.
    """

    svg = ""

    def __init__(
        self,
        file: Path,
        rows: int = 1,
        size: tuple[float, float] = _SIZE,
        heights: Sequence[float] | None = None,
    ) -> None:
        self.file, self.rows, self.size, self.heights = file, rows, size, heights

    def __enter__(self) -> Chart:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        style: Any = _RC | {"svg.hashsalt": self.file.stem}  # one hash for one chart: pages can be compared
        self._pyplot, self._style = pyplot, matplotlib.rc_context(style)
        self._style.__enter__()
        self.figure, axes = pyplot.subplots(
            self.rows,
            1,
            sharex=True,
            figsize=self.size,
            squeeze=False,
            layout="constrained",
            height_ratios=self.heights,
        )
        self.axes = list(axes[:, 0])
        self.axis = self.axes[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with warnings.catch_warnings():
                    # Of names in scripts that matplotlib's font lacks; the page uses the reader's fonts.
                    warnings.filterwarnings("ignore", message="Glyph ")
                    self.figure.savefig(self.file, dpi=110, facecolor="white")
                    self.figure.set_layout_engine("none")  # the layout is done, and takes time
                    text = io.StringIO()
                    self.figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
                self.svg = _inline(text.getvalue())
        finally:
            self._pyplot.close(self.figure)
            self._style.__exit__(None, None, None)


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _inline(svg: str) -> str:
    """Return the element of an SVG file, in the colours of the page."""
    element = svg[svg.index("<svg") :]
    return element.replace(_INK, "currentColor").replace(_LINE, "var(--line)")


def over_steps(
    file: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    epoch_steps: float | None = None,
    log: bool = False,
    thick: str | None = None,
    points: bool = False,
) -> str:
    """Draw curves, steps and values by name, with epochs on a second axis above; NaN leaves a gap."""
    with Chart(file) as chart:
        axis = chart.axis
        for name, (steps, values) in curves.items():
            few = points or sum(map(math.isfinite, values)) < 4
            width = 2.2 if name == thick else 1.2
            axis.plot(steps, values, label=name, linewidth=width, marker="o" if few else None, markersize=4)
        finite = [v for _, values in curves.values() for v in values if math.isfinite(v)]
        if log and finite and min(finite) > 0:
            _log(axis)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        if len(curves) > 1:
            chart.figure.legend(loc="outside lower center", ncols=3)
        if epoch_steps is not None:
            per = epoch_steps
            above = axis.secondary_xaxis("top", functions=(lambda s: s / per, lambda e: e * per))
            above.set_xlabel("epoch")
    return chart.svg


def bars(file: Path, values: Mapping[str, Sequence[float | None]], series: Sequence[str], label: str) -> str:
    """Draw horizontal bars, the values of each name by series; None: no bar."""
    rows = len(values)
    with Chart(file, size=(_SIZE[0], max(1.2, 0.5 + 0.11 * rows * (1 + len(series))))) as chart:
        place_N, height = np.arange(rows), 0.8 / len(series)
        for number, name in enumerate(series):
            widths = [row[number] for row in values.values()]
            widths = [0.0 if width is None else width for width in widths]
            offset = (number - (len(series) - 1) / 2) * height
            chart.axis.barh(place_N + offset, widths, height * 0.9, label=name)
        chart.axis.set_yticks(place_N, [shortened(name) for name in values])
        chart.axis.set_ylim(rows - 0.4, -0.6)  # the first on top
        chart.axis.grid(visible=False, axis="y")
        chart.axis.set_xlabel(label)
        if len(series) > 1:
            chart.figure.legend(loc="outside upper right", ncols=len(series))
    return chart.svg


def curves_of_recall(file: Path, curves: Mapping[str, NDArray[np.float64]]) -> str:
    """Draw precision over recall, by name."""
    with Chart(file) as chart:
        for name, precision_R in curves.items():
            chart.axis.plot(np.linspace(0, 1, len(precision_R)), precision_R, label=shortened(name))
        _unit(chart.axis, "recall", "precision")
        chart.axis.legend(loc="upper right" if len(curves) < 5 else "best")
    return chart.svg


def over_thresholds(
    file: Path, threshold_T: NDArray[np.float64], curves: Mapping[str, NDArray[np.float64]], best: float
) -> str:
    """Draw numbers over the score threshold, with a line at the best one."""
    with Chart(file) as chart:
        for name, values_T in curves.items():
            chart.axis.plot(threshold_T, values_T, label=name)
        chart.axis.axvline(best, color=_INK, linewidth=1, linestyle=":")
        _unit(chart.axis, "score threshold", "")
        chart.axis.legend()
    return chart.svg


def reliability_diagram(
    file: Path,
    score_Q: NDArray[np.float64],
    precision_Q: NDArray[np.float64],
    counts_Q: NDArray[np.int64],
) -> str:
    """Draw the precision of each bin of scores, and below how many detections it holds."""
    with Chart(file, rows=2, size=(_SIZE[0], 3.4), heights=(4, 1)) as chart:
        upper, lower = chart.axes
        bins = len(counts_Q)
        centre_Q = (np.arange(bins) + 0.5) / bins
        upper.bar(centre_Q, np.nan_to_num(precision_Q), 0.9 / bins, color=COLORS[0], alpha=0.45)
        upper.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":", label="score = precision")
        some_Q = counts_Q > 0
        upper.plot(score_Q[some_Q], precision_Q[some_Q], "o-", color=COLORS[0], markersize=4)
        _unit(upper, "", "precision")
        upper.legend(loc="upper left")
        lower.bar(centre_Q, counts_Q, 0.9 / bins, color=COLORS[7])
        if counts_Q.max(initial=0) > 0:
            _log(lower, bottom=0.8)
        lower.set_xlabel("score")
        lower.set_ylabel("number")
    return chart.svg


def matrix(
    file: Path, shares_KK: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], texts: bool
) -> str:
    """Draw shares in [0, 1] as a matrix of true (rows) and predicted classes; `texts`: as numbers too."""
    side = 0.34 if texts else 0.16
    labels = 0.075 * max(len(shortened(name)) for name in (*rows, *columns))
    size = (max(3.2, side * len(columns) + labels + 0.5), max(2.6, side * len(rows) + labels + 0.4))
    with Chart(file, size=size) as chart:
        axis = chart.axis
        # White (or the page's colour) to blue, by opacity: it reads on light and dark pages.
        color_KK4 = np.zeros((*shares_KK.shape, 4))
        color_KK4[..., :3] = np.array([0x3B, 0x78, 0xE7]) / 255
        color_KK4[..., 3] = np.sqrt(np.clip(np.nan_to_num(shares_KK), 0, 1)) * 0.85
        axis.imshow(color_KK4, aspect="equal", interpolation="nearest")
        axis.set_xticks(range(len(columns)), [shortened(name) for name in columns], rotation=90)
        axis.set_yticks(range(len(rows)), [shortened(name) for name in rows])
        axis.grid(visible=False)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        for r, c in np.ndindex(*shares_KK.shape) if texts else ():
            share = shares_KK[r, c]
            if share == share and share >= 0.005:
                axis.text(c, r, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    return chart.svg


def panels(
    file: Path,
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
) -> str:
    """Draw groups of curves below each other over the same steps, with one legend."""
    with Chart(file, rows=len(groups), size=(_SIZE[0] * 1.3, 1.7 * len(groups) + 0.5)) as chart:
        for axis, (label, curves) in zip(chart.axes, groups.items(), strict=True):
            for name, (steps, values) in curves.items():
                axis.plot(steps, values, label=name, linewidth=1.2)
            axis.set_ylabel(label)
        handles, names = chart.axes[0].get_legend_handles_labels()
        if handles:
            chart.figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
        chart.axes[-1].set_xlabel("optimizer step")
    return chart.svg


def shortened(name: str, length: int = 22) -> str:
    """Return a name that fits beside an axis; matplotlib leaves names that begin with _ out of legends."""
    cut = name if len(name) <= length else name[: length - 1] + "…"
    return f"\u200b{cut}" if cut.startswith("_") else cut


def _log(axis: Any, bottom: float | None = None) -> None:
    """Make the y axis logarithmic, with numbers as they are written: matplotlib's are formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if bottom is None and high < 200 * low else (1,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _unit(axis: Any, x: str, y: str) -> None:
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel(x)
    axis.set_ylabel(y)

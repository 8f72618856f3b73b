"""What the plots of stage 2 share: colours that differ in grey too, named layers, labels that do not collide."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from engine.store.files import write_whole

POSITIVE, ZERO, NEGATIVE = "#e08a6f", "#e9e9e9", "#2b4a73"
DARK, GREEN, GREY = "#333333", "#3f8f5f", "#8a8a8a"
NAMED = 70  # layers whose names can be read side by side; of more, every second, third ... has its name
AROUND = ((5, 5), (-5, 5), (5, -5), (-5, -5), (5, 17), (-5, 17), (5, -17), (-5, -17), (5, 29), (-5, -29))  # points


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as `path`, a PNG, and as a PDF beside it; return `path`."""
    for place, options in ((path, {"dpi": 110}), (path.with_suffix(".pdf"), {"metadata": {"CreationDate": None}})):
        picture = io.BytesIO()
        figure.savefig(picture, format=place.suffix[1:], **options)
        write_whole(picture.getbuffer(), place)
        figure.set_layout_engine("none")  # the first picture's is kept: finding one takes longer than drawing
    return path


def draw_bars(
    axes: Axes, heights: Sequence[float] | np.ndarray, bottom: np.ndarray | float, color: str, label: str | None = None
) -> None:
    """Bars without gaps, one a layer, from `bottom` up to `heights`; one shape, which is faster than `Axes.bar`."""
    edges = np.arange(len(heights) + 1) - 0.5
    axes.stairs(heights, edges, baseline=bottom, fill=True, color=color, label=label)


def draw_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Bars of the number of weights of each layer, on a logarithmic scale."""
    draw_bars(axes, sizes, min(sizes) / 2, color=DARK)
    axes.set(ylabel="weights", yscale="log", ylim=(min(sizes) / 2, 2 * max(sizes)))


def stack(axes: Axes, shares: np.ndarray, colours: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Stacked bars, one a layer, of shares `[kinds, layers]` that sum to 1; kinds that no layer has get no label."""
    for share, top, colour, label in zip(shares, np.cumsum(shares, 0), colours, labels, strict=True):
        if share.any():
            draw_bars(axes, top, top - share, color=colour, label=label)
    axes.set(ylabel="share of weights", ylim=(0, 1), xlim=(-0.5, shares.shape[1] - 0.5))


def name_layers(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Name the layers below the last of `axes`, and separate the network's parts: where the first word changes."""
    short = [name.removesuffix(".weight") for name in names]
    parts = [name.split(".")[0] for name in short]
    edges = [i - 0.5 for i in range(1, len(parts)) if parts[i] != parts[i - 1]]
    shown = range(0, len(short), -(-len(short) // NAMED))
    for place in axes:
        place.set(xlim=(-0.5, len(short) - 0.5))
        place.set_xticks(shown)
        place.tick_params(labelbottom=place is axes[-1])
        for edge in edges:
            place.axvline(edge, color=GREY, lw=0.6)
    axes[-1].set_xticks(shown, [short[i] for i in shown], rotation=90, fontsize=7)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write each text beside its point, on the side where it covers least of the points and the texts before it."""
    figure = axes.figure.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    marks = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(np.array(points))]
    for point, text in zip(points, texts, strict=True):
        label = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", fontsize=8)

        def covered(offset: tuple[int, int], label: Annotation = label) -> float:
            label.set(ha="left" if offset[0] > 0 else "right", va="bottom" if offset[1] > 0 else "top")
            label.xyann = offset
            box = label.get_window_extent()
            shared = [Bbox.intersection(box, other) for other in marks]
            outside = box.width * box.height - _area(Bbox.intersection(box, axes.bbox))
            return sum(map(_area, shared)) + outside

        covered(min(AROUND, key=covered))
        marks.append(label.get_window_extent())


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box else 0.0

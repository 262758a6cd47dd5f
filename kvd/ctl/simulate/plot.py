"""Hit rate over capacity as a picture: an HTML page with an SVG in it, or a PNG where matplotlib is installed."""

import html
import math
from importlib import import_module
from pathlib import Path

from kvd.errors import KvdError

Rates = dict[str, dict[int, float]]  # policy -> capacity -> block hit rate

_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 420, 60, 20
_COLOURS = ("#c0392b", "#2c3e50", "#2980b9", "#27ae60", "#8e44ad", "#d68910", "#7f8c8d")


def draw(path: Path, rates: Rates, title: str) -> None:
    """Write the picture. Raises KvdError."""
    if path.suffix not in (".html", ".png"):
        raise KvdError(f"cannot draw {path}", "a plot is .html or .png")
    try:
        if path.suffix == ".png":
            _png(path, rates, title)
        else:
            path.write_text(page(rates, title))
    except OSError as error:
        raise KvdError(f"cannot write {path}: {error}", "name a place that can be written") from error


def page(rates: Rates, title: str) -> str:
    """The whole HTML page."""
    capacities = sorted({capacity for row in rates.values() for capacity in row})
    low, high = math.log(capacities[0]), math.log(capacities[-1])
    top = max(max(row.values()) for row in rates.values()) or 1.0

    def x(capacity: int) -> float:
        return _LEFT + (_WIDTH - 2 * _LEFT) * ((math.log(capacity) - low) / (high - low) if high > low else 0.5)

    def y(rate: float) -> float:
        return _TOP + (_HEIGHT - 3 * _TOP) * (1 - rate / top)

    shapes = [f'<text x="{x(c):.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{c:,}</text>' for c in capacities]
    shapes += [f'<text x="5" y="{y(top * part / 4) + 4:.0f}">{top * part / 4:.3f}</text>' for part in range(5)]
    for number, (policy, row) in enumerate(rates.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(capacity):.1f},{y(row[capacity]):.1f}" for capacity in sorted(row))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [
            f'<circle cx="{x(capacity):.1f}" cy="{y(rate):.1f}" r="3" fill="{colour}">'
            f"<title>{policy} {capacity:,}: {rate:.4f}</title></circle>"
            for capacity, rate in row.items()
        ]
        label = f'<text x="{_WIDTH - _LEFT + 5}" y="{_TOP + 16 * number + 10}" fill="{colour}">{policy}</text>'
        shapes.append(label)
    name = html.escape(title)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{name}</title><h3>{name}</h3>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-family="sans-serif" font-size="12">'
        + "".join(shapes)
        + "</svg><p>Block hit rate over capacity in blocks (logarithmic).</p>\n"
    )


def _png(path: Path, rates: Rates, title: str) -> None:
    try:
        figure = import_module("matplotlib.figure").Figure(figsize=(8, 5))
    except ImportError as error:
        raise KvdError("a .png plot needs matplotlib", "pip install matplotlib, or name a .html file") from error
    axes = figure.subplots()
    for policy, row in rates.items():
        axes.plot(sorted(row), [row[capacity] for capacity in sorted(row)], marker="o", label=policy)
    axes.set(xscale="log", xlabel="capacity in blocks", ylabel="block hit rate", title=title)
    axes.legend()
    figure.savefig(path)

"""Curves as SVG, with logarithmic axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 70, 190, 36, 48  # of the picture, and its margins
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's, for color blindness too


@dataclass(frozen=True)
class Curve:
    """Points with positive coordinates; a roofline is dashed, in the color of the curve before it."""

    name: str
    points: Sequence[Point]
    roofline: bool = False


@dataclass(frozen=True)
class Axis:
    """Maps low .. high to begin .. end."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        span = math.log(self.high / self.low) or 1.0
        return self.begin + (self.end - self.begin) * math.log(value / self.low) / span


def svg(title: str, x_name: str, y_name: str, curves: Sequence[Curve]) -> str:
    """The SVG file's text."""
    xs = sorted({x for c in curves for x, _ in c.points})
    ys = [y for c in curves for _, y in c.points]
    x = Axis(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    y = Axis(10.0**low, 10.0**high, HEIGHT - BOTTOM, TOP)
    tens = [10.0**n for n in range(low, high + 1)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, title, size=15),
        _text((x.begin + x.end) / 2, HEIGHT - 10, x_name),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, y_name)}</g>',
        *(_tick(x.at(v), y.begin, x.at(v), y.end, x.at(v), y.begin + 16, f"{v:g}", "middle") for v in xs),
        *(_tick(x.begin, y.at(v), x.end, y.at(v), x.begin - 6, y.at(v) + 4, f"{v:g}", "end") for v in tens),
    ]
    color = -1
    for n, curve in enumerate(curves):
        color += not curve.roofline
        lines += _curve(curve, x, y, COLORS[color % len(COLORS)], TOP + 14 + 18 * n)
    return "\n".join([*lines, "</svg>\n"])


def _curve(curve: Curve, x: Axis, y: Axis, color: str, legend: float) -> list[str]:
    at = [(x.at(a), y.at(b)) for a, b in curve.points]
    style = f'fill="none" stroke="{color}" stroke-width="2"' + (' stroke-dasharray="5 4"' if curve.roofline else "")
    path, right = " ".join(f"{a:.1f},{b:.1f}" for a, b in at), WIDTH - RIGHT + 12
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in at]
    return [
        f"<polyline points={quoteattr(path)} {style}/>",
        *([] if curve.roofline else dots),
        f'<line x1="{right}" y1="{legend}" x2="{right + 24}" y2="{legend}" {style}/>',
        _text(right + 30, legend + 4, curve.name, anchor="start"),
    ]


def _tick(x1: float, y1: float, x2: float, y2: float, x: float, y: float, label: str, anchor: str) -> str:
    line = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'
    return line + _text(x, y, label, anchor=anchor)


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'

"""Line charts as SVG: small, the same bytes everywhere, and readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, BOTTOM = 52, 18, 46
LEGEND = 18  # height of a line of it
COLOURS = 6
STYLE = """
.chart { --c0:#2563eb; --c1:#d9480f; --c2:#0f8a5f; --c3:#9333ea; --c4:#b45309; --c5:#64748b;
  --ink:#1f2328; --faint:#6b7280; --grid:#e5e7eb; font:12px system-ui,-apple-system,"Segoe UI",sans-serif; }
@media (prefers-color-scheme: dark) { .chart { --c0:#6ea8fe; --c1:#ff9466; --c2:#4fd1a1; --c3:#c99bff; --c4:#fbbf57;
  --c5:#94a3b8; --ink:#e6e8eb; --faint:#9aa4b2; --grid:#2d333b; } }
.chart text { fill:var(--faint); } .chart .name { fill:var(--ink); }
.chart .rule { stroke:var(--grid); stroke-width:1; } .chart .line { fill:none; stroke-width:2; }
.chart .dashed { stroke-dasharray:5 4; stroke-width:1.5; } .chart .spread { stroke-width:1.5; }
""" + "".join(f".chart .k{n} {{ stroke:var(--c{n}); }} .chart .d{n} {{ fill:var(--c{n}); }}\n" for n in range(COLOURS))


@dataclass(frozen=True)
class Series:
    name: str
    """Empty of a line that is of the same thing as another."""
    points: Sequence[tuple[float, float, float]]
    """(x, y, half the length of the error bar), by rising x."""
    colour: int
    dashed: bool = False
    """For what the paper reports, beside what ran here."""
    dots: bool = True


def chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, ticks: Sequence[float] = (), log: bool = False
) -> str:
    """An <svg> element of class chart; `STYLE` gives it its colours. `ticks` are the places on the x axis."""
    xs = [x for s in series for x, _, _ in s.points] + list(ticks)
    highs = [y + e for s in series for _, y, e in s.points]
    low_x, high_x = (min(xs), max(xs)) if xs else (0.0, 1.0)
    high_x = high_x if high_x > low_x else low_x + 1
    places, rows = _legend(series)
    top = 28 + LEGEND * rows
    step = _step(max(highs, default=1.0))
    high_y = step * max(1, math.ceil(max(highs, default=1.0) / step - 1e-9))

    def across(x: float) -> str:
        a, b, c = (math.log(v) for v in (low_x, x, high_x)) if log else (low_x, x, high_x)
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (b - a) / (c - a):.1f}"

    def down(y: float) -> str:
        return f"{HEIGHT - BOTTOM - (HEIGHT - top - BOTTOM) * y / high_y:.1f}"

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in (number * step for number in range(round(high_y / step) + 1)):
        place = down(value)
        out.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{place}" dy="4" text-anchor="end">{value:g}</text>')
    for x in ticks or _ticks(low_x, high_x):
        out.append(f'<text x="{across(x)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
    out.append(f'<text x="8" y="{top - 14}">{escape(y_label)}</text>')
    for s, (start, line) in zip(series, places):
        colour, kind = s.colour % COLOURS, "line dashed" if s.dashed else "line"
        if s.name:
            out.append(
                f'<line class="{kind} k{colour}" x1="{start}" x2="{start + 22}" y1="{line - 4}" y2="{line - 4}"/>'
            )
            out.append(f'<text class="name" x="{start + 28}" y="{line}">{escape(s.name)}</text>')
        path = " ".join(f"{across(x)},{down(y)}" for x, y, _ in s.points)
        out.append(f'<polyline class="{kind} k{colour}" points="{path}"/>')
        for x, y, e in s.points:
            if e:
                ends = f'y1="{down(max(0, y - e))}" y2="{down(y + e)}"'
                out.append(f'<line class="spread k{colour}" x1="{across(x)}" x2="{across(x)}" {ends}/>')
            if s.dots:
                text = f"{s.name}, {x:g}: {y:.1f}" + (f" ± {e:.1f}" if e else "")
                dot = f'<circle class="d{colour}" cx="{across(x)}" cy="{down(y)}" r="{2.5 if s.dashed else 3.5}">'
                out.append(f"{dot}<title>{escape(text)}</title></circle>")
    return "\n".join([*out, "</svg>\n"])


def _legend(series: Sequence[Series]) -> tuple[list[tuple[int, int]], int]:
    """(places of the names, as many lines as they take)."""
    places, x, y = [], 8, 15
    for s in series:
        width = 44 + round(6.6 * len(s.name)) if s.name else 0
        if x > 8 and x + width > WIDTH:
            x, y = 8, y + LEGEND
        places.append((x, y))
        x += width
    return places, (y - 15) // LEGEND + 1


def standalone(svg: str) -> str:
    """An SVG file of `chart`'s element."""
    first, rest = svg.split("\n", 1)
    return f'{first[:-1]} xmlns="http://www.w3.org/2000/svg">\n<style>{STYLE}</style>\n{rest}'


def _step(high: float) -> float:
    """Distance of the rules: 1, 2 or 5 times a power of ten, four to eight rules."""
    power = 10 ** math.floor(math.log10(max(high, 1e-9) / 4))
    return next(power * m for m in (1, 2, 5, 10) if high / (power * m) <= 6)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 9) for n in range(first, math.floor(high / step + 1e-9) + 1)]

"""Pieces of the report page as HTML: tables, curves, time axes, pyramids. Nothing is fetched.

Every text that comes from files is escaped here, in `text`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator
from PIL import Image

from utils.pictures.draw import event_rows

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 320, 190, 46, 10, 10, 22  # of a chart, in its own units
ROW_HEIGHT = 0.75  # rem of a pyramid's row
SCALE = colormaps["cividis"]
DRAWING = {"quality": 88, "subsampling": 0}  # of JPEG; as PNG they are three times as large


def text(value: object) -> str:
    """Anything as text that is safe between tags and inside quoted attributes."""
    return html.escape(str(value))


def table(
    caption: str,
    rows: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, str],
    published: Sequence[str] = (),
) -> str:
    """Numbers under their heads; what a row lacks is a dash.

    Args:
        rows: name of the row to its numbers.
        columns: keys of the numbers and their heads.
        published: names of rows to set apart.
    """
    heads = "".join(f'<th scope="col">{text(head)}</th>' for head in columns.values())
    body = []
    for name, numbers in rows.items():
        cells = "".join(f"<td>{_number(numbers.get(key))}</td>" for key in columns)
        kind = ' class="published"' if name in published else ""
        body.append(f'<tr{kind}><th scope="row">{text(name)}</th>{cells}</tr>')
    return (
        f'<p class="caption" aria-hidden="true">{text(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table><thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def settings_table(settings: Mapping[str, object]) -> str:
    """Names and values, as they stand in args.json."""
    rows = "".join(
        f'<tr><th scope="row"><code>{text(name)}</code></th><td>{text(value)}</td></tr>'
        for name, value in settings.items()
    )
    return f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'


def line_chart(
    title: str, points: Sequence[tuple[int, float]], best: int | None, published: float | None
) -> str:
    """One curve by epoch with its axes, the best epoch ringed, the published value dashed."""
    xs, ys = zip(*points, strict=True)
    shown = [*ys, published] if published is not None else ys
    y_ticks = _ticks(min(shown), max(shown), integer=False)
    x_ticks = _ticks(min(xs), max(xs), integer=True)
    x_range = (min(xs), max(max(xs), min(xs) + 1))
    y_range = (min(*y_ticks, *shown), max(*y_ticks, *shown))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(xs[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x, _ = place(tick, y_range[0])
            parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{tick:.0f}</text>')
    if published is not None:
        _, y = place(xs[0], published)
        parts.append(
            f'<line class="published" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        )
    path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for epoch, value in points:
        x, y = place(epoch, value)
        look = ("best", 5) if epoch == best else ("dot", 3 if len(points) < 30 else 2)
        parts.append(
            f'<circle class="{look[0]}" cx="{x}" cy="{y}" r="{look[1]}">'
            f"<title>epoch {epoch}: {value:.5g}</title></circle>"
        )
    summary = f"{title}: {ys[0]:.4g} in epoch {xs[0]}, {ys[-1]:.4g} in epoch {xs[-1]}"
    if published is not None:
        summary += f", published {published:g}"
    return (
        f"<figure><figcaption>{text(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(summary)}">{"".join(parts)}</svg></figure>'
    )


def data_uri(picture: np.ndarray | Image.Image, width: int | None = None) -> str:
    """A picture as the value of src.

    Args:
        picture: uint8 [H, W, 3] for a photograph, or a drawing opened with PIL, whose lines and
            letters get a better quality.
        width: largest width in pixels.
    """
    photograph = isinstance(picture, np.ndarray)
    image = Image.fromarray(picture) if photograph else picture.convert("RGB")
    if width and image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 75} if photograph else DRAWING))
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def lane(
    duration: float,
    moments: Sequence[tuple[float, float, str]],
    summary: str,
) -> str:
    """One line of a time axis. Args: moments: start and end in seconds, and chosen or true."""
    bars = "".join(
        f'<div class="bar {kind}" style="{_extent(start, end, duration)}"'
        f' title="{kind} {seconds(start, end)}"></div>'
        for start, end, kind in moments
    )
    return f'<div class="lane" role="img" aria-label="{text(summary)}">{bars}</div>'


def time_axis(duration: float, parts: int = 4) -> str:
    """Seconds under what spans the whole width."""
    marks = "".join(
        f'<span style="left:{100 * i / parts:g}%">{duration * i / parts:.1f} s</span>'
        for i in range(parts + 1)
    )
    return f'<div class="axis" aria-hidden="true">{marks}</div>'


def pyramid(
    proposals: np.ndarray, scores: np.ndarray, chosen: int, duration: float, score_name: str
) -> str:
    """Every event over its span, the bottom level lowest, coloured by score.

    Args:
        proposals: [N_e, 2] shares of the video.
        scores: [N_e].
        chosen: the event to mark.
    """
    # Levels differ in length; one level's events differ by rounding.
    levels = np.unique((proposals[:, 1] - proposals[:, 0]).round(5), return_inverse=True)[1]
    rows, _ = event_rows(proposals.round(6).tolist(), levels.tolist())
    height = (max(rows) + 1) * ROW_HEIGHT
    low, high = float(scores.min()), float(scores.max())
    shades = (scores - low) / ((high - low) or 1)
    boxes = []
    for event, (start, end) in enumerate(proposals.tolist()):
        top = height - (rows[event] + 1) * ROW_HEIGHT
        span = seconds(start * duration, end * duration)
        boxes.append(
            f'<div class="bar{" chosen-edge" if event == chosen else ""}" style="'
            f"{_extent(start, end, 1)};top:{top:.2f}rem;bottom:auto;"
            f'height:{ROW_HEIGHT - 0.1:.2f}rem;background:{to_hex(SCALE(shades[event]))}"'
            f' title="event {event}, {span}: {score_name} {scores[event]:.3f}"></div>'
        )
    start, end = proposals[chosen] * duration
    summary = (
        f"{len(scores)} events of the pyramid, {score_name} from {low:.3f} to {high:.3f}; "
        f"the highest is event {chosen}, {seconds(start, end)}"
    )
    return (
        f'<div class="pyramid" role="img" aria-label="{text(summary)}" '
        f'style="height:{height:.2f}rem">{"".join(boxes)}</div>'
    )


def legend(scores: np.ndarray, score_name: str, timed: bool) -> str:
    """What the colours of a time axis with its pyramid mean."""
    stops = ",".join(to_hex(SCALE(x)) for x in np.linspace(0.0, 1.0, 9))
    true = '<span><span class="key true"></span>true moment</span>' if timed else ""
    return (
        f'<div class="legend"><span>{text(score_name)} {scores.min():.3f}<span class="scale" '
        f'style="background:linear-gradient(90deg,{stops})"></span>{scores.max():.3f}</span>'
        f'<span><span class="key edge"></span>best event</span>{true}'
        "<span>rows: levels of the pyramid, the shortest events lowest</span></div>"
    )


def seconds(start: float, end: float) -> str:
    """A moment in words."""
    return f"{start:.1f}–{end:.1f} s"


def _extent(start: float, end: float, whole: float) -> str:
    start, end = (min(max(time / whole, 0), 1) if whole else 0 for time in (start, end))
    return f"left:{100 * start:.3f}%;width:{100 * max(end - start, 0):.3f}%"


def _ticks(low: float, high: float, integer: bool) -> list[float]:
    if low == high:
        low, high = low - 0.5 * (not integer), high + (1 if integer else 0.5)
    return MaxNLocator(5, integer=integer).tick_values(low, high).tolist()


def _short(tick: float) -> str:
    """Few characters: 0.25, 1.6e-3, 1e7."""
    if tick == 0 or 0.01 <= abs(tick) < 1e5:
        return f"{tick:.4g}"
    digits, exponent = f"{tick:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"

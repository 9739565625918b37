"""Pictures of one query: its frames with attention over them, the pyramid, and an overview of both.

The event drawn is the one whose embedding is closest to the text; what is shown of it is what it
attends to in one layer: the patches of the frames, and the other events (ProPy, §3.3).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch.nn import functional as F

from dataloaders.annotations import Query
from modules.pyramid import PromptPyramid

# Colours of Okabe and Ito, which all eyes tell apart.
VERMILLION, YELLOW, GREEN = "#D55E00", "#F0E442", "#009E73"
GREY = "#767676"
STRIP_HEIGHT = 112  # pixels of a frame in the overview; more would not be seen
LEVEL_GAP = 0.3  # between the levels of the pyramid, in rows
DPI = 150
# Text stays text in vector files, so that it can be searched and edited.
VECTOR_TEXT = {"svg.fonttype": "none", "pdf.fonttype": 42}


@dataclass(frozen=True)
class Style:
    """Colours of the pictures.

    Attributes:
        heat: colour map of attention over patches.
        chosen, strongest: edges of the chosen event and of the one it attends to most.
        dashes: line style of the latter, for those who cannot tell the edges' colours apart.
        stretch: show every frame, under the heat, from its darkest to its brightest value.
    """

    heat: str
    chosen: str
    strongest: str
    dashes: str
    stretch: bool

    @property
    def events(self) -> Colormap:
        """Colour map of attention to events: ten blues, dark for much."""
        return colormaps["Blues"].resampled(10)


# The authors' pictures: jet, red and orange edges, which the colour-blind cannot tell apart, and
# frames that are stretched one by one. Kept for comparing with their figures.
STYLES = {
    "readable": Style("inferno", VERMILLION, YELLOW, "--", stretch=False),
    "authors": Style("jet", "red", "orange", "-", stretch=True),
}


@dataclass(frozen=True)
class EventAttention:
    """What one event attends to in one layer, by kind; together the weights add up to one."""

    events: np.ndarray  # [N_e]
    prompts: float
    class_tokens: np.ndarray  # [N_f]
    patches: np.ndarray  # [N_f, G, G]

    @classmethod
    def from_row(cls, row: np.ndarray, pyramid: PromptPyramid, num_prompts: int) -> EventAttention:
        """Args: row: [keys] of one event and layer, in the column order of ``visibility``."""
        first_token = pyramid.num_events + num_prompts * pyramid.num_bottom_events
        tokens = row[first_token:].reshape(-1, pyramid.num_frames).T  # [N_f, 1+G²]
        grid = round((tokens.shape[1] - 1) ** 0.5)
        return cls(
            events=row[: pyramid.num_events],
            prompts=float(row[pyramid.num_events : first_token].sum()),
            class_tokens=tokens[:, 0],
            patches=tokens[:, 1:].reshape(-1, grid, grid),
        )


@dataclass(frozen=True)
class QueryPicture:
    """All that the pictures of a query show.

    Attributes:
        query: its text is the title, its windows are marked.
        subtitle: a line about video, rank, layer.
        frames: uint8 [N_f, 3, S, S] of the right video.
        attention: of `event`, the chosen one.
        scores: [N_e] of the text with every event of the right video.
        score_name: what kind of numbers these are.
    """

    query: Query
    subtitle: str
    frames: torch.Tensor
    attention: EventAttention
    event: int
    scores: np.ndarray
    score_name: str
    pyramid: PromptPyramid

    @property
    def windows(self) -> Sequence[tuple[float, float]]:
        """True moments in seconds; empty where none is known."""
        return self.query.windows or ()

    @property
    def seconds_per_frame(self) -> float:
        """Of the frames that the model sees."""
        return self.query.duration / self.pyramid.num_frames

    @property
    def strongest(self) -> int:
        """The event which the chosen one attends to most."""
        return int(self.attention.events.argmax())


def heat_frames(frames: torch.Tensor, patches: np.ndarray, style: Style) -> np.ndarray:
    """Attention over patches, laid half over the frames it belongs to.

    Attention is scaled over the whole video, from its least to its largest weight, so that frames
    compare.

    Args:
        frames: uint8 [N_f, 3, S, S].
        patches: [N_f, G, G].

    Returns:
        uint8 [N_f, S, S, 3].
    """
    scaled = torch.from_numpy(_stretch(patches, axes=(0, 1, 2)))
    size = frames.shape[-2:]
    scaled = F.interpolate(scaled[:, None], size=size, mode="bilinear", align_corners=False)
    colours = colormaps[style.heat](scaled[:, 0].numpy())[..., :3]
    pictures = frames.permute(0, 2, 3, 1).numpy()
    pictures = _stretch(pictures, axes=(1, 2, 3)) if style.stretch else pictures / 255
    return np.rint(255 * (colours + pictures) / 2).astype(np.uint8)


def save_figures(folder: Path, picture: QueryPicture, style: Style) -> None:
    """<folder>/<frame>.jpg of all frames, counted from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    heat = heat_frames(picture.frames, picture.attention.patches, style)
    for number, frame in enumerate(heat):
        Image.fromarray(frame).save(folder / f"{number}.jpg", quality=90)


def save_tree(path: Path, picture: QueryPicture, style: Style) -> None:
    """The pyramid alone; the ending of the path chooses the format."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_pyramid(axes, picture, style, frame_width=1)
    axes.set_xlabel("frame")
    num_frames = picture.pyramid.num_frames
    axes.set_xticks(range(0, num_frames + 1, max(1, num_frames // 16)))
    figure.colorbar(
        _event_colours(picture, style), ax=axes, label="attention of the chosen event", pad=0.01
    )
    figure.legend(handles=_event_marks(style), loc="outside lower center", ncols=3, frameon=False)
    _title(figure, picture)
    _save(figure, path)


def save_overview(path: Path, picture: QueryPicture, style: Style) -> None:
    """Frames, heat, moments, pyramid and event scores on one time axis; format by ending."""
    figure = Figure(figsize=(16, 9.5), layout="constrained")
    strip = 11.5 / picture.pyramid.num_frames  # makes the frames square, more or less
    heights = [strip, strip, 0.45, 3.0, 2.4]
    rows = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    _draw_strip(rows[0], picture, _square_strip(picture.frames), "frames")
    heat = heat_frames(picture.frames, picture.attention.patches, style)
    heat = torch.from_numpy(heat).permute(0, 3, 1, 2)
    _draw_strip(rows[1], picture, _square_strip(heat), "attention\nto patches")
    _draw_moments(rows[2], picture, style)
    _draw_pyramid(rows[3], picture, style, picture.seconds_per_frame)
    _draw_scores(rows[4], picture, style)
    rows[4].set_xlabel("time (s)")
    rows[4].set_xlim(0, picture.query.duration)
    patches = picture.attention.patches
    norm = Normalize(patches.min(), patches.max())
    heat = ScalarMappable(norm, style.heat)
    events = _event_colours(picture, style)
    figure.colorbar(heat, ax=rows[:3], label="attention per patch", pad=0.005, aspect=14)
    figure.colorbar(events, ax=rows[3], label="attention to events", pad=0.005)
    handles = [*_event_marks(style), Patch(facecolor=GREEN, label="true moment")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    _title(figure, picture)
    _save(figure, path)


def _draw_strip(axes: Axes, picture: QueryPicture, strip: np.ndarray, name: str) -> None:
    axes.imshow(
        strip, extent=(0, picture.query.duration, 0, 1), aspect="auto", interpolation="none"
    )
    axes.set_yticks([])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.tick_params(bottom=False)


def _draw_moments(axes: Axes, picture: QueryPicture, style: Style) -> None:
    scale = picture.seconds_per_frame
    start, end = picture.pyramid.spans[picture.event].tolist()
    axes.broken_barh([(start * scale, (end - start) * scale)], (0, 0.9), color=style.chosen)
    for start, end in picture.windows:
        axes.broken_barh([(start, end - start)], (1, 0.9), color=GREEN)
    axes.set_ylim(0, 2)
    names = ["chosen event", "true moment" if picture.windows else "true moment: unknown"]
    axes.set_yticks([0.45, 1.45], names)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)


def _draw_pyramid(axes: Axes, picture: QueryPicture, style: Style, frame_width: float) -> None:
    """Every event over its span, the bottom level lowest, coloured by attention."""
    pyramid = picture.pyramid
    colours = _event_colours(picture, style)
    visible = pyramid.related[picture.event].tolist()
    rows, centres = event_rows(pyramid.spans.tolist(), pyramid.level_of_event.tolist())

    def draw_box(event: int, **look: object) -> None:
        start, end = (frame_width * frame for frame in pyramid.spans[event].tolist())
        axes.add_patch(Rectangle((start, rows[event] + 0.06), end - start, 0.88, **look))

    for event, weight in enumerate(picture.attention.events):
        seen = {"facecolor": colours.to_rgba(weight)}
        look = seen if visible[event] else {"facecolor": "none", "linestyle": ":"}
        draw_box(event, edgecolor=GREY, linewidth=0.8, **look)
    chosen, strongest = _edges(style)
    draw_box(picture.event, **chosen)
    draw_box(picture.strongest, **strongest)
    axes.set_xlim(0, pyramid.num_frames * frame_width)
    axes.set_ylim(-LEVEL_GAP / 2, max(rows) + 1 + LEVEL_GAP / 2)
    lengths = dict(zip(pyramid.level_of_event.tolist(), pyramid.spans.diff()[:, 0], strict=True))
    axes.set_yticks(
        centres, [f"level {n}\n({lengths[n]} frames)" for n in range(1, len(centres) + 1)]
    )
    axes.tick_params(left=False)
    axes.spines[["left", "right", "top"]].set_visible(False)


def _edges(style: Style) -> tuple[dict, dict]:
    """How the chosen event and the one it attends to most are marked."""
    hollow = {"facecolor": "none", "clip_on": False}
    return (
        hollow | {"edgecolor": style.chosen, "linewidth": 3.5, "zorder": 3},
        hollow | {"edgecolor": style.strongest, "linestyle": style.dashes, "linewidth": 2.2,
                  "zorder": 4},
    )  # fmt: skip


def event_rows(
    spans: Sequence[tuple[float, float]], levels: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Where the pyramid's boxes are drawn: heights in rows, the bottom level at 0.

    A level's events may overlap in time; those that do stand in rows of their own.

    Args:
        spans: start and end of every event, left to right within a level.
        levels: of every event.

    Returns:
        The lower edge of every event's row, and the middle of every level, bottom level first.
    """
    rows, centres, base = [0.0] * len(spans), [], 0.0
    for level in sorted(set(levels)):
        ends: list[float] = []  # of the last event in every row of this level
        for event, (start, end) in enumerate(spans):
            if levels[event] == level:
                free = (row for row, last in enumerate(ends) if last <= start)
                row = next(free, len(ends))
                ends[row : row + 1] = [end]
                rows[event] = base + row
        centres.append(base + len(ends) / 2)
        base += len(ends) + LEVEL_GAP
    return rows, centres


def _draw_scores(axes: Axes, picture: QueryPicture, style: Style) -> None:
    """Every event's score as a bar over its span, coloured by level."""
    pyramid = picture.pyramid
    scale = picture.seconds_per_frame
    levels = len(pyramid.events_per_level)
    # the bright end of the map is too faint on white
    palette = colormaps["viridis"](np.linspace(0, 0.88, levels))
    starts, ends = (pyramid.spans * scale).T.tolist()
    for level in range(1, levels + 1):
        at = (pyramid.level_of_event == level).nonzero()[:, 0].tolist()
        axes.hlines(
            picture.scores[at], [starts[e] for e in at], [ends[e] for e in at],
            color=palette[level - 1], linewidth=2.5, label=f"level {level}",
        )  # fmt: skip
    score = picture.scores[picture.event]
    axes.hlines(
        score, starts[picture.event], ends[picture.event], color=style.chosen, linewidth=5, zorder=3
    )
    for start, end in picture.windows:
        axes.axvspan(start, end, color=GREEN, alpha=0.12, linewidth=0)
    axes.set_ylabel(f"{picture.score_name} of\ntext and event")
    axes.margins(y=0.12)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)


def _event_colours(picture: QueryPicture, style: Style) -> ScalarMappable:
    weights = picture.attention.events
    return ScalarMappable(Normalize(weights.min(), weights.max()), style.events)


def _event_marks(style: Style) -> list[Patch]:
    chosen, strongest = _edges(style)
    return [
        Patch(**chosen, label="chosen event"),
        Patch(**strongest, label="event it attends to most"),
        Patch(facecolor="none", edgecolor=GREY, linestyle=":", label="event it cannot see"),
    ]


def _square_strip(frames: torch.Tensor) -> np.ndarray:
    """Frames [N_f, 3, S, S] side by side, a white line between them: uint8 [S', N_f·S', 3]."""
    side = min(STRIP_HEIGHT, frames.shape[-1])
    small = F.interpolate(frames.float(), size=(side, side), mode="area").round().byte()
    small[:, :, :, -1] = 255
    return small.permute(2, 0, 3, 1).flatten(1, 2).numpy()


def _stretch(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Scaled to 0 … 1 over the axes; what is constant becomes 0."""
    values = values.astype(np.float32)
    low, high = (limit(axis=axes, keepdims=True) for limit in (values.min, values.max))
    return (values - low) / np.where(high > low, high - low, 1)


def _title(figure: Figure, picture: QueryPicture) -> None:
    width = int(figure.get_figwidth() * 8)
    lines = textwrap.wrap(picture.query.desc, width, max_lines=3, placeholder=" …") or [""]
    # A dollar sign is no formula in a caption.
    figure.suptitle("\n".join(lines), fontsize=13, fontweight="bold").set_parse_math(False)
    figure.axes[0].set_title(
        "\n".join(textwrap.wrap(picture.subtitle, int(width * 1.3))), fontsize=10, color="0.3"
    ).set_parse_math(False)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(VECTOR_TEXT):
        figure.savefig(path, dpi=DPI)

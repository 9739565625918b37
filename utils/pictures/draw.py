"""Pictures of one query: its frames with attention over them, the pyramid, and an overview of both.

The event drawn is the one whose embedding is closest to the text; what is shown of it is what it
attends to in one layer: the patches of the frames, and the other events (ProPy, §3.3).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch.nn import functional as F

from modules.pyramid import PromptPyramid

logger = logging.getLogger("propy.pictures")

# Colours of Okabe and Ito, which all eyes tell apart.
VERMILLION, YELLOW, GREEN = "#D55E00", "#F0E442", "#009E73"
GREY = "#767676"
STRIP_HEIGHT = 112  # pixels of a frame in the overview; more would not be seen
LEVEL_GAP = 0.3  # between the levels of the pyramid, in rows
DPI = 150
# Text stays text in vector files, so that it can be searched and edited.
VECTOR_TEXT = {"svg.fonttype": "none", "pdf.fonttype": 42}


@contextlib.contextmanager
def caption_fonts(text: str) -> Iterator[None]:
    """Within, pictures of this text are set in matplotlib's font and in installed ones with what
    that lacks. Letters that no font has are boxes in the pictures: one warning names them."""
    families = list(matplotlib.rcParams["font.family"])
    lacking = {letter for letter in text if unicodedata.category(letter) != "Cc"}
    lacking -= _letters(font_manager.findfont(font_manager.FontProperties()))
    fonts = font_manager.fontManager
    if lacking:  # matplotlib's list may be older than what is installed
        for path in {*font_manager.findSystemFonts()} - {font.fname for font in fonts.ttflist}:
            with contextlib.suppress(Exception):  # of any kind: a font that it cannot draw
                fonts.addfont(path)
        for font in sorted(fonts.ttflist, key=lambda font: (font.style != "normal", font.name)):
            if "LastResort" not in font.fname and lacking & _letters(font.fname):
                families.append(font.name)
                lacking -= _letters(font.fname)
    if lacking:
        scripts = sorted({unicodedata.name(letter, "unknown").split()[0] for letter in lacking})
        logger.warning(
            "no installed font has these letters of captions, which are boxes in the pictures: %s "
            "(%s): install one, such as those of the package fonts-noto-cjk",
            "".join(sorted(lacking)[:20]) + "…" * (len(lacking) > 20), ", ".join(scripts[:5]),
        )  # fmt: skip
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """All that a font can write."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # it was removed, or is damaged
        return frozenset()


@dataclass(frozen=True)
class Style:
    """Colours of the pictures."""

    heat: str  # map of attention over patches
    chosen: str  # edge of the chosen event
    strongest: str  # of the one it attends to most
    dashes: str  # the latter's line style, for those who cannot tell the edges' colours apart
    stretch: bool  # every frame, under the heat, from its darkest to its brightest value

    @property
    def edges(self) -> tuple[dict, dict]:
        """How the chosen event and the one it attends to most are marked."""
        hollow = {"facecolor": "none", "clip_on": False}
        chosen = {"edgecolor": self.chosen, "linewidth": 3.5, "zorder": 3}
        strongest = {"edgecolor": self.strongest, "linewidth": 2.2, "zorder": 4}
        return hollow | chosen, hollow | strongest | {"linestyle": self.dashes}


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
    visible: np.ndarray  # bool [N_e], which events it can see
    prompts: float
    class_tokens: np.ndarray  # [N_f]
    patches: np.ndarray  # [N_f, G, G]

    @classmethod
    def of_event(
        cls, attention: np.ndarray, event: int, pyramid: PromptPyramid, num_prompts: int,
        visibility: str = "relatives",
    ) -> EventAttention:  # fmt: skip
        """Args: attention: [N_e, keys] of a layer, in the column order of ``visibility``."""
        row = attention[event]
        first_token = pyramid.num_events + num_prompts * pyramid.num_bottom_events
        tokens = row[first_token:].reshape(-1, pyramid.num_frames).T  # [N_f, 1+G²]
        grid = round((tokens.shape[1] - 1) ** 0.5)
        return cls(
            events=row[: pyramid.num_events],
            visible=pyramid.sees(visibility)[event].numpy(),
            prompts=float(row[pyramid.num_events : first_token].sum()),
            class_tokens=tokens[:, 0],
            patches=tokens[:, 1:].reshape(-1, grid, grid),
        )


@dataclass(frozen=True)
class QueryPicture:
    """All that the pictures of a query show."""

    duration: float  # of the right video, seconds
    windows: Sequence[tuple[float, float]]  # true moments, seconds; empty where none is known
    frames: torch.Tensor  # uint8 [N_f, 3, S, S] of the right video
    spans: np.ndarray  # [N_e, 2] of its events, seconds
    levels: np.ndarray  # int [N_e], 1 the shortest events
    event: int  # the chosen one
    scores: np.ndarray  # [N_e] of the text with every event
    score_name: str  # what kind of numbers these are
    title: str = ""
    subtitle: str = ""
    attention: EventAttention | None = None  # the chosen event's; without: none, and no pyramid

    @property
    def strongest(self) -> int:
        """The event which the chosen one attends to most."""
        return int(self.attention.events.argmax())


def heat_frames(frames: torch.Tensor, patches: np.ndarray, style: Style) -> torch.Tensor:
    """Attention over patches [N_f, G, G], laid half over the frames it belongs to and like them
    uint8 [N_f, 3, S, S]. It is scaled over the whole video, from its least to its largest weight,
    so that frames compare."""
    scaled = torch.from_numpy(_stretch(patches, axes=(0, 1, 2)))
    size = frames.shape[-2:]
    scaled = F.interpolate(scaled[:, None], size=size, mode="bilinear", align_corners=False)
    colours = colormaps[style.heat](scaled[:, 0].numpy())[..., :3]
    pictures = frames.permute(0, 2, 3, 1).numpy()
    pictures = _stretch(pictures, axes=(1, 2, 3)) if style.stretch else pictures / 255
    heat = np.rint(255 * (colours + pictures) / 2).astype(np.uint8)
    return torch.from_numpy(heat).permute(0, 3, 1, 2)


def _stretch(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Scaled to 0 … 1 over the axes; what is constant becomes 0."""
    values = values.astype(np.float32)
    low, high = (limit(axis=axes, keepdims=True) for limit in (values.min, values.max))
    return (values - low) / np.where(high > low, high - low, 1)


def save_figures(folder: Path, picture: QueryPicture, style: Style) -> None:
    """<folder>/<frame>.jpg of all frames, counted from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    heat = heat_frames(picture.frames, picture.attention.patches, style)
    for number, frame in enumerate(heat.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(frame).save(folder / f"{number}.jpg", quality=90)


def save_tree(path: Path, picture: QueryPicture, style: Style) -> None:
    """The pyramid alone; the ending of the path chooses the format."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_pyramid(axes, picture, style)
    axes.set_xlabel("time (s)")
    axes.set_xlim(0, picture.duration)
    _save(figure, path, picture)


def save_overview(
    path: Path | BinaryIO, picture: QueryPicture, style: Style, **how: object
) -> None:
    """Frames, moments and event scores on one time axis, attention and pyramid between them; the
    ending of the path chooses the format, `how` are options of matplotlib's savefig."""
    attention, count = picture.attention, len(picture.frames)
    if attention:
        figure = Figure(figsize=(16, 9.5), layout="constrained")
        heights = [11.5 / count] * 2 + [0.45, 3.0, 2.4]  # make the frames square, more or less
    else:
        figure = Figure(figsize=(11, 8.5 / count + 3.4), layout="constrained")
        heights = [8.5 / count, 0.45, 2.2]
    rows = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    _draw_strip(rows[0], picture, picture.frames, "frames")
    _draw_moments(rows[2 if attention else 1], picture, style)
    _draw_scores(rows[-1], picture, style)
    if attention:
        heat = heat_frames(picture.frames, attention.patches, style)
        _draw_strip(rows[1], picture, heat, "attention\nto patches")
        norm = Normalize(attention.patches.min(), attention.patches.max())
        colours = ScalarMappable(norm, style.heat)
        figure.colorbar(colours, ax=rows[:3], label="attention per patch", pad=0.005, aspect=14)
        _draw_pyramid(rows[3], picture, style)
    rows[-1].set_xlabel("time (s)")
    rows[-1].set_xlim(0, picture.duration)
    _save(figure, path, picture, **how)


def _draw_strip(axes: Axes, picture: QueryPicture, frames: torch.Tensor, name: str) -> None:
    """Frames [N_f, 3, S, S] side by side, a white line between them."""
    side = min(STRIP_HEIGHT, frames.shape[-1])
    small = F.interpolate(frames.float(), size=(side, side), mode="area").round().byte()
    small[:, :, :, -1] = 255
    strip = small.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # [S', N_f·S', 3]
    axes.imshow(strip, extent=(0, picture.duration, 0, 1), aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.tick_params(bottom=False)


def _draw_moments(axes: Axes, picture: QueryPicture, style: Style) -> None:
    start, end = picture.spans[picture.event].tolist()
    axes.broken_barh([(start, end - start)], (0, 0.9), color=style.chosen)
    for start, end in picture.windows:
        axes.broken_barh([(start, end - start)], (1, 0.9), color=GREEN)
    axes.set_ylim(0, 2)
    names = ["chosen event", "true moment" if picture.windows else "true moment: unknown"]
    axes.set_yticks([0.45, 1.45], names)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)


def _draw_pyramid(axes: Axes, picture: QueryPicture, style: Style) -> None:
    """Every event over its span, the bottom level lowest, coloured by attention."""
    spans, weights = picture.spans.tolist(), picture.attention.events
    blues = colormaps["Blues"].resampled(10)  # dark for much
    colours = ScalarMappable(Normalize(weights.min(), weights.max()), blues)
    rows, centres = event_rows(picture.spans, picture.levels)

    def draw_box(event: int, **look: object) -> None:
        start, end = spans[event]
        axes.add_patch(Rectangle((start, rows[event] + 0.06), end - start, 0.88, **look))

    unseen = {"facecolor": "none", "linestyle": ":"}
    for event, weight in enumerate(weights):
        seen = picture.attention.visible[event]
        look = {"facecolor": colours.to_rgba(weight)} if seen else unseen
        draw_box(event, edgecolor=GREY, linewidth=0.8, **look)
    chosen, strongest = style.edges
    draw_box(picture.event, **chosen)
    draw_box(picture.strongest, **strongest)
    axes.set_ylim(-LEVEL_GAP / 2, max(rows) + 1 + LEVEL_GAP / 2)
    length = {level: end - start for level, (start, end) in zip(picture.levels, spans, strict=True)}
    names = [f"level {level}\n({length[level]:.3g} s)" for level in sorted(length)]
    axes.set_yticks(centres, names)
    axes.tick_params(left=False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.figure.colorbar(colours, ax=axes, label="attention to events", pad=0.005)
    marks = [
        Patch(**chosen, label="chosen event"),
        Patch(**strongest, label="event it attends to most"),
        Patch(**unseen, edgecolor=GREY, label="event it cannot see"),
    ]
    axes.figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)


def event_rows(spans: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Where the pyramid's boxes are drawn, in rows from 0, the bottom: the lower edge of every
    event's row, and the middle of every level, bottom level first.

    A level's events are evenly spaced; those that overlap in time stand in rows of their own.
    """
    rows, centres, base = np.zeros(len(spans)), [], 0.0
    for level in np.unique(levels):
        (members,) = (levels == level).nonzero()
        overlapping = int((spans[members, 0] < spans[members[0], 1] - 1e-9).sum())
        rows[members] = base + np.arange(len(members)) % overlapping
        centres.append(base + overlapping / 2)
        base += overlapping + LEVEL_GAP
    return rows, centres


def _draw_scores(axes: Axes, picture: QueryPicture, style: Style) -> None:
    """Every event's score as a bar over its span, coloured by level."""
    (starts, ends), levels = picture.spans.T, picture.levels
    # the bright end of the map is too faint on white
    palette = colormaps["viridis"](np.linspace(0, 0.88, levels.max()))
    for level, colour in enumerate(palette, start=1):
        axes.hlines(
            picture.scores[levels == level], starts[levels == level], ends[levels == level],
            color=colour, linewidth=2.5, label=f"level {level}",
        )  # fmt: skip
    best = picture.event
    axes.hlines(
        picture.scores[best], starts[best], ends[best], color=style.chosen, linewidth=5, zorder=3
    )
    for start, end in picture.windows:
        axes.axvspan(start, end, color=GREEN, alpha=0.12, linewidth=0)
    axes.set_ylabel(f"{picture.score_name} of\ntext and event")
    axes.margins(y=0.12)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)


def _save(figure: Figure, path: Path | BinaryIO, picture: QueryPicture, **how: object) -> None:
    """With the texts above the picture, in which a dollar sign is no formula."""
    width = int(figure.get_figwidth() * 8)
    if lines := textwrap.wrap(picture.title, width, max_lines=3, placeholder=" …"):
        title = figure.suptitle("\n".join(lines), fontsize=13, fontweight="bold")
        title.set_parse_math(False)
    subtitle = "\n".join(textwrap.wrap(picture.subtitle, int(width * 1.3)))
    figure.axes[0].set_title(subtitle, fontsize=10, color="0.3").set_parse_math(False)
    with matplotlib.rc_context(VECTOR_TEXT):
        figure.savefig(path, **{"dpi": DPI} | how)

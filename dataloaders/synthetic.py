"""The demo corpus: a small rendered world in which the whole method can be tried without any data.

A clip is a row of shots; in each an object (size, colour, shape) does something over a background.
Every clip has a twin which shows the same motion shots *played backwards*, so that what moves left
in one moves right in the other: frame by frame the two are alike, only time tells them apart.
Captions come from a grammar and are true of one moment of one clip; their times are exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from utils.ffmpeg import PREPARED_FPS, write_video

COLOURS = {
    "red": (225, 40, 40),
    "orange": (245, 150, 30),
    "yellow": (240, 225, 60),
    "green": (50, 180, 70),
    "cyan": (80, 220, 230),
    "blue": (50, 85, 235),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": 0.14, "large": 0.24}  # in frame widths
BACKGROUNDS = {
    "plain": ("a plain wall", "an empty wall"),
    "stripes": ("stripes", "a striped wall"),
    "checks": ("a checkered floor", "checks"),
    "dots": ("dots", "a dotted wall"),
    "waves": ("waves", "wavy lines"),
    "sunset": ("a gradient", "a fading sky"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
VERBS = {
    "left": ("moves left", "slides to the left"),
    "right": ("moves right", "slides to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "appear": ("appears", "fades in"),
    "vanish": ("vanishes", "fades out"),
    "clockwise": ("circles clockwise", "goes round clockwise"),
    "anticlockwise": ("circles anticlockwise", "goes round anticlockwise"),
    "still": ("stands still", "does not move"),
    "bounce": ("bounces", "hops up and down"),
    "sway": ("sways", "swings from side to side"),
    "blink": ("blinks", "flashes"),
}
# Played backwards each of these becomes the other; a single frame of one is a frame of the other.
_FORWARD = {
    "left": "right",
    "up": "down",
    "grow": "shrink",
    "appear": "vanish",
    "clockwise": "anticlockwise",
}
OPPOSITE = _FORWARD | {backward: forward for forward, backward in _FORWARD.items()}
RESTING = ("still", "bounce", "sway", "blink")  # the same forwards and backwards
RESIZING = ("grow", "shrink")


@dataclass(frozen=True)
class Thing:
    """What a caption says of an object; `size` None where it changes or is left open."""

    size: str | None
    colour: str
    shape: str


@dataclass(frozen=True)
class Shot:
    """One thing doing one action over one background for `num_frames` frames."""

    thing: Thing
    action: str
    background: str
    num_frames: int
    seed: int  # placement, speed and tints; the backwards shot has the same

    def shows(self, thing: Thing) -> bool:
        """True if a caption that speaks of `thing` can mean this shot's object."""
        size_fits = None in (thing.size, self.thing.size) or thing.size == self.thing.size
        return size_fits and (thing.colour, thing.shape) == (self.thing.colour, self.thing.shape)

    def backwards(self) -> Shot:
        """The same frames in the opposite order."""
        return replace(self, action=OPPOSITE.get(self.action, self.action))


@dataclass(frozen=True)
class Meaning:
    """What a caption claims: its type and the fields that must hold.

    appearance: `things[0]` over `background`; motion: `things[0]` does `action`;
    order: `things[0]` is seen, and later `things[1]`.
    """

    query_type: str
    things: tuple[Thing, ...]
    action: str | None = None
    background: str | None = None

    def true_of(self, shots: Sequence[Shot]) -> bool:
        """True if the row of shots contains such a moment (found by looking, not by construction)."""
        if self.query_type == "order":
            first, then = self.things
            return any(
                shot.shows(first) and any(later.shows(then) for later in shots[i + 1 :])
                for i, shot in enumerate(shots)
            )
        return any(
            shot.shows(self.things[0])
            and self.action in (None, shot.action)
            and self.background in (None, shot.background)
            for shot in shots
        )


@dataclass(frozen=True)
class Caption:
    """A sentence, what it means, and the shots [first, last] in which it is true."""

    text: str
    meaning: Meaning
    first: int
    last: int


@dataclass(frozen=True)
class Clip:
    """One video of the corpus and its captions; `twin` names the clip with the reversed shots."""

    vid_name: str
    twin: str
    shots: tuple[Shot, ...]
    captions: tuple[Caption, ...]

    @property
    def duration(self) -> float:
        """Seconds."""
        return sum(shot.num_frames for shot in self.shots) / PREPARED_FPS

    def window(self, caption: Caption) -> tuple[float, float]:
        """When the caption is true: [start, end] in seconds."""
        lengths = [shot.num_frames for shot in self.shots]
        start, end = sum(lengths[: caption.first]), sum(lengths[: caption.last + 1])
        return start / PREPARED_FPS, end / PREPARED_FPS


# ---------------------------------------------------------------------------------- rendering


def _path(shot: Shot, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y, radius (frame widths) and opacity at the times u in (0, 1)."""
    rng = np.random.default_rng([shot.seed, 1])
    action = shot.action
    if action in _FORWARD.values():
        action, u = OPPOSITE[action], 1 - u
    radius = RADII.get(shot.thing.size, 0.2) * rng.uniform(0.92, 1.08)
    x, y = rng.uniform(0.3, 0.7, 2)
    reach, cycles, angle = rng.uniform(0.27, 0.33), rng.integers(2, 4), rng.uniform(0, 2 * math.pi)
    one = np.ones_like(u)
    x, y, radius, opacity = x * one, y * one, radius * one, one
    if action == "left":
        x = 0.5 + reach * (1 - 2 * u)
    elif action == "up":
        y = 0.5 + reach * (1 - 2 * u)
    elif action == "grow":
        radius = 0.08 + reach * u
    elif action == "appear":
        opacity = u
    elif action == "clockwise":
        x = 0.5 + 0.25 * np.cos(angle + 2 * math.pi * u)
        y = 0.5 + 0.25 * np.sin(angle + 2 * math.pi * u)
    elif action == "bounce":
        y = 0.72 - 0.45 * np.abs(np.sin(cycles * math.pi * u))
    elif action == "sway":
        x = 0.5 + 0.25 * np.cos(2 * cycles * math.pi * u)
    elif action == "blink":
        opacity = (np.cos(2 * cycles * math.pi * u) > -0.3).astype(np.float64)
    return x, y, radius, opacity


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (inside negative, in radii) from the outline; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.55
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 0.32, y - 1), np.maximum(x - 1, y - 0.32))
    corner = 2 * math.pi / 5  # star: fold the plane into one of five points, then one straight edge
    angle = np.abs((np.arctan2(x, -y) + corner / 2) % corner - corner / 2)
    length = np.hypot(x, y)
    return (length * np.cos(angle) - 1.1) * 0.46 + length * np.sin(angle) * 0.89


def _backdrop(shot: Shot, size: int) -> np.ndarray:
    """The still background, float64 [size, size, 3] in 0..255: two muted tones of one pattern."""
    rng = np.random.default_rng([shot.seed, 2])
    tones = rng.uniform(35, 75) + rng.uniform(-15, 15, 3) + np.array([[0.0], [rng.uniform(35, 50)]])
    y, x = np.mgrid[:size, :size] / size + rng.uniform(0, 1, 2).reshape(2, 1, 1)
    count = rng.uniform(4, 6)
    wave = 2 * math.pi * count
    if shot.background == "plain":
        mix = np.full((size, size), rng.uniform(0, 1))
    elif shot.background == "stripes":
        mix = np.sin(wave * x) > 0
    elif shot.background == "checks":
        mix = (np.sin(wave * x) > 0) ^ (np.sin(wave * y) > 0)
    elif shot.background == "dots":
        mix = np.hypot((count * x) % 1 - 0.5, (count * y) % 1 - 0.5) < 0.3
    elif shot.background == "waves":
        mix = np.sin(wave * y + 2.5 * np.sin(wave * x / 2)) > 0
    else:
        mix = np.mgrid[:size, :size][0] / size
    return tones[0] + mix[..., None] * (tones[1] - tones[0])


def render_shot(shot: Shot, size: int, frames: Sequence[int] | None = None) -> np.ndarray:
    """Draw the shot (or only the given frame numbers): uint8 [n, size, size, 3]."""
    chosen = np.arange(shot.num_frames) if frames is None else np.asarray(frames)
    x, y, radius, opacity = (
        a[:, None, None] for a in _path(shot, (chosen + 0.5) / shot.num_frames)
    )
    centres = (np.arange(size) + 0.5) / size
    distance = _distance(
        shot.thing.shape, (centres[None, None, :] - x) / radius, (centres[None, :, None] - y) / radius
    )
    cover = np.clip(0.5 - distance * radius * size, 0, 1) * opacity  # edges one pixel soft
    backdrop = _backdrop(shot, size)
    colour = np.array(COLOURS[shot.thing.colour], float)
    return np.rint(backdrop + cover[..., None] * (colour - backdrop)).astype(np.uint8)


def render_clip(clip: Clip, size: int) -> np.ndarray:
    """Draw all shots of the clip: uint8 [n, size, size, 3]."""
    return np.concatenate([render_shot(shot, size) for shot in clip.shots])


# ---------------------------------------------------------------------------------- the grammar


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    words = [] if thing.size is None else [str(rng.choice(SIZE_WORDS[thing.size]))]
    words += [thing.colour, thing.shape]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _sentence(meaning: Meaning, shot: Shot, rng: np.random.Generator) -> str:
    """One of the grammar's sentences with this meaning; `shot` is where it is true."""
    subject = _phrase(meaning.things[0], rng)
    if meaning.query_type == "order":
        then = _phrase(meaning.things[1], rng)
        forms = (f"first {subject}, then {then}", f"{subject} is followed by {then}")
        return str(rng.choice(forms))
    verb = str(rng.choice(VERBS[shot.action]))
    place = str(rng.choice(BACKGROUNDS[shot.background]))
    if meaning.query_type == "motion":
        return f"{subject} {verb}"
    forms = (f"{subject} over {place}", f"{place} behind {subject}", f"{subject} {verb} over {place}")
    return str(rng.choice(forms))


def _captions(shots: Sequence[Shot], rng: np.random.Generator) -> tuple[Caption, ...]:
    """A caption for every shot and one for the order of two neighbouring motion shots."""
    meanings = []
    moving = [i for i, shot in enumerate(shots) if shot.action in OPPOSITE]
    for i, shot in enumerate(shots):
        if shot.action in OPPOSITE:
            meanings.append((Meaning("motion", (shot.thing,), action=shot.action), i, i))
        else:
            meanings.append((Meaning("appearance", (shot.thing,), background=shot.background), i, i))
    k = int(rng.integers(len(moving) - 1))
    first, last = moving[k], moving[k + 1]
    meanings.append((Meaning("order", (shots[first].thing, shots[last].thing)), first, last))
    return tuple(
        Caption(_sentence(meaning, shots[first], rng), meaning, first, last)
        for meaning, first, last in meanings
    )


def _shot_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of each shot; together 20 to 60 seconds."""
    total = int(rng.integers(20 * PREPARED_FPS, 60 * PREPARED_FPS + 1))
    shares = rng.uniform(0.7, 1.4, count)
    edges = np.rint(total * np.concatenate([[0], np.cumsum(shares / shares.sum())])).astype(int)
    return np.diff(edges)


def _draw_pair(names: tuple[str, str], rng: np.random.Generator) -> tuple[Clip, Clip]:
    """A clip and its twin: motion shots reversed in order and in time, resting shots replaced."""
    moves = [True] * int(rng.integers(2, 4)) + [False] * int(rng.integers(1, 3))
    rng.shuffle(moves)
    # No colour and shape twice in the pair, so that a caption means one moment of a clip only.
    looks = iter(rng.permutation(len(COLOURS) * len(SHAPES)))

    def draw_shot(moving: bool, num_frames: int) -> Shot:
        action = str(rng.choice(tuple(OPPOSITE) if moving else RESTING))
        look = int(next(looks))
        size = None if action in RESIZING else str(rng.choice(tuple(RADII)))
        thing = Thing(size, tuple(COLOURS)[look % len(COLOURS)], SHAPES[look // len(COLOURS)])
        background = str(rng.choice(tuple(BACKGROUNDS)))
        return Shot(thing, action, background, int(num_frames), int(rng.integers(2**31)))

    lengths = _shot_lengths(len(moves), rng)
    shots = [draw_shot(m, n) for m, n in zip(moves, lengths, strict=True)]
    twin_shots = [
        shot.backwards() if shot.action in OPPOSITE else draw_shot(False, shot.num_frames)
        for shot in reversed(shots)
    ]
    return (
        Clip(names[0], names[1], tuple(shots), _captions(shots, rng)),
        Clip(names[1], names[0], tuple(twin_shots), _captions(twin_shots, rng)),
    )


def draw_clips(name: str, num_clips: int, seed: int, unambiguous: bool) -> list[Clip]:
    """Draw `num_clips` clips (an even number: clip and twin) named `<name>_0000` and so on.

    `unambiguous`: redraw a pair until every caption is true of its own clip only, as a test split
    needs; without it a few captions fit several clips, as in any training set.
    """
    if num_clips % 2:
        raise ValueError(f"num_clips is {num_clips}: clips come in pairs, give an even number")
    clips: list[Clip] = []
    for first in range(0, num_clips, 2):
        names = (f"{name}_{first:04d}", f"{name}_{first + 1:04d}")
        for attempt in range(1000):
            rng = np.random.default_rng([seed, *name.encode(), first, attempt])
            pair = _draw_pair(names, rng)
            if not unambiguous or not _confused(clips, pair):
                break
        else:
            raise ValueError(f"{num_clips} clips are too many for this world: choose fewer")
        clips += pair
    return clips


def _confused(clips: Sequence[Clip], pair: tuple[Clip, Clip]) -> bool:
    """True if a caption of the pair is true of another clip, or one of `clips` of the pair."""
    checks = [(pair[0], pair[1]), (pair[1], pair[0])]
    checks += [(new, old) for new in pair for old in clips]
    checks += [(old, new) for new in pair for old in clips]
    return any(
        caption.meaning.true_of(other.shots) for clip, other in checks for caption in clip.captions
    )


# ---------------------------------------------------------------------------------- what is written


def annotation_lines(clips: Sequence[Clip]) -> list[dict]:
    """The clips' captions as the lines of an annotation file, `type` being the caption's."""
    return [
        {
            "vid_name": clip.vid_name,
            "desc_id": f"{clip.vid_name}_{i}",
            "desc": caption.text,
            "duration": round(clip.duration, 3),
            "ts": [round(t, 3) for t in clip.window(caption)],
            "type": caption.meaning.query_type,
        }
        for clip in clips
        for i, caption in enumerate(clip.captions)
    ]


def write_annotations(path: Path, clips: Sequence[Clip]) -> None:
    """Write the clips' captions as JSONL."""
    lines = [json.dumps(line) for line in annotation_lines(clips)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_clip(job: tuple[Path, Clip, int]) -> None:
    folder, clip, size = job
    write_video(folder / f"{clip.vid_name}.mp4", render_clip(clip, size))


def write_clips(
    folder: Path, clips: Sequence[Clip], size: int, num_workers: int = 1
) -> Iterator[None]:
    """Render and encode `<folder>/<vid_name>.mp4`, yielding once per finished clip."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, clip, size) for clip in clips]
    if num_workers <= 1:
        yield from map(_write_clip, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write_clip, jobs, chunksize=8)


def draw_pictures(num_pictures: int, size: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Single frames of clips that are in no split, each with the caption of its moment.

    Returns uint8 [num_pictures, size, size, 3] and as many captions: what a CLIP learns from.
    """
    pictures = np.empty((num_pictures, size, size, 3), np.uint8)
    captions: list[str] = []
    rng = np.random.default_rng([seed, *b"pictures"])
    while len(captions) < num_pictures:
        for clip in _draw_pair(("", ""), rng):
            for caption in clip.captions[: num_pictures - len(captions)]:
                shot = clip.shots[int(rng.choice((caption.first, caption.last)))]
                frame = int(rng.integers(shot.num_frames))
                pictures[len(captions)] = render_shot(shot, size, [frame])[0]
                captions.append(caption.text)
    return pictures, captions

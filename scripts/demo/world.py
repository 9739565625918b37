"""The demo corpus: a small rendered world in which the whole method can be tried without any data.

A clip is a row of shots; in each an object (size, colour, shape) does something over a background.
Every clip has a twin which shows the same motion shots *played backwards*, so that what moves left
in one moves right in the other: frame by frame the two are alike, only time tells them apart.
Captions come from a grammar and have exact times. The world is small on purpose: where many clips
show a red circle, what it does has to be learned.
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

from dataloaders.ffmpeg import PREPARED_FPS, write_video

COLOURS = {
    "red": (225, 40, 40),
    "yellow": (240, 225, 60),
    "green": (50, 180, 70),
    "blue": (50, 85, 235),
}
SHAPES = ("circle", "bar")
RADII = {"small": 0.17, "large": 0.29}  # in frame widths
# Names, and a dark and a light tone; every place has a pattern of its own as well.
BACKGROUNDS = {
    "grass": (("grass", "a meadow"), (40, 75, 40), (65, 110, 55)),
    "water": (("water", "the sea"), (25, 60, 95), (50, 95, 130)),
    "sand": (("sand", "a beach"), (135, 115, 85), (165, 145, 110)),
    "bricks": (("bricks", "a brick wall"), (70, 45, 40), (115, 65, 50)),
    "night": (("the night sky", "a dark sky"), (30, 25, 55), (120, 120, 140)),
    "fog": (("fog", "grey mist"), (95, 98, 102), (145, 148, 150)),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
# Verbs end in words that stills have too: what moves to the left is on the left in the end.
VERBS = {
    "left": ("moves to the left", "slides left"),
    "right": ("moves to the right", "slides right"),
    "up": ("moves to the top", "rises to the top"),
    "down": ("moves to the bottom", "sinks to the bottom"),
    "grow": ("becomes large", "gets big"),
    "shrink": ("becomes small", "gets little"),
}
# Played backwards each of these becomes the other; a single frame of one is a frame of the other.
_FORWARD = {"left": "right", "up": "down", "grow": "shrink"}
OPPOSITE = _FORWARD | {backward: forward for forward, backward in _FORWARD.items()}
RESTING = ("still", "bounce", "sway", "blink")  # the same forwards and backwards
RESIZING = ("grow", "shrink")
SATURATION, BRIGHTNESS, BLACK = 0.7, 0.7, 5  # of the camera; still pictures have 1, 1, 0


@dataclass(frozen=True)
class Scale:
    """How much happens in a video."""

    seconds: tuple[int, int]  # of a video, the shorter the more often
    moving: tuple[int, int]  # shots in which a thing moves, at least and at most; in one it rests
    shares: tuple[float, float]  # of the video that a shot takes, against the others
    order: bool  # whether captions also say which of two things comes first


SMALL = Scale((20, 60), (2, 3), (0.7, 1.4), order=False)
# Shots of a twentieth to a third of the video, and moments of two things up to all of it.
LARGE = Scale((40, 120), (4, 6), (0.4, 2.0), order=True)


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

    def backwards(self) -> Shot:
        """The same frames in the opposite order."""
        return replace(self, action=OPPOSITE.get(self.action, self.action))


@dataclass(frozen=True)
class Meaning:
    """What a caption claims: its type and the fields that must hold.

    appearance: `thing` over `background`; motion: `thing` does `action`, perhaps over `background`;
    order: that appearance comes before `later`, another one.
    """

    query_type: str
    thing: Thing
    action: str | None = None
    background: str | None = None
    later: Meaning | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence, what it means, and the numbers of the shots it was written for."""

    text: str
    meaning: Meaning
    shot: int
    last_shot: int


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
        start, end = sum(lengths[: caption.shot]), sum(lengths[: caption.last_shot + 1])
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
    reach, cycles = rng.uniform(0.27, 0.33), rng.integers(2, 4)
    x, y, radius, opacity = (value * np.ones_like(u) for value in (x, y, radius, 1.0))
    if action == "left":
        x = 0.5 + reach * (1 - 2 * u)
    elif action == "up":
        y = 0.5 + reach * (1 - 2 * u)
    elif action == "grow":
        radius = 0.08 + reach * u
    elif action == "bounce":
        y = 0.72 - 0.45 * np.abs(np.sin(cycles * math.pi * u))
    elif action == "sway":
        x = 0.5 + 0.25 * np.cos(2 * cycles * math.pi * u)
    elif action == "blink":
        opacity = (np.cos(2 * cycles * math.pi * u) > -0.3).astype(np.float64)
    return x, y, radius, opacity


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (inside negative, in radii) from the outline."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    return np.maximum(np.abs(x) - 1.25, np.abs(y) - 0.4)


def _backdrop(shot: Shot, size: int) -> np.ndarray:
    """The still background, float64 [size, size, 3] in 0..255: two tones of one pattern."""
    rng = np.random.default_rng([shot.seed, 2])
    dark, light = np.array(BACKGROUNDS[shot.background][1:]) + rng.uniform(-12, 12)
    height, x = np.mgrid[:size, :size] / size
    y, x = height + rng.uniform(), x + rng.uniform()
    count = rng.uniform(4, 6)
    wave = 2 * math.pi * count
    if shot.background == "grass":
        mix = np.sin(2 * wave * x + 2 * np.sin(wave * y)) > 0
    elif shot.background == "water":
        mix = 0.5 + 0.5 * np.sin(wave * y + 2 * np.sin(wave * x / 2))
    elif shot.background == "sand":
        mix = np.hypot((2 * count * x) % 1 - 0.5, (2 * count * y) % 1 - 0.5) < 0.3
    elif shot.background == "bricks":
        row = np.floor(2 * count * y)
        mix = ((2 * count * y) % 1 > 0.2) & ((count * x + row / 2) % 1 > 0.12)
    elif shot.background == "night":
        mix = np.hypot((count * x) % 1 - 0.5, (count * y + 2 * x) % 1 - 0.5) < 0.12
    else:
        mix = height
    return np.clip(dark + mix[..., None] * (light - dark), 0, 255)


def render_shot(shot: Shot, size: int, frames: Sequence[int] | None = None) -> np.ndarray:
    """Draw the shot (or only the given frame numbers): uint8 [n, size, size, 3]."""
    chosen = np.arange(shot.num_frames) if frames is None else np.asarray(frames)
    x, y, radius, opacity = (
        a[:, None, None] for a in _path(shot, (chosen + 0.5) / shot.num_frames)
    )
    centres = (np.arange(size) + 0.5) / size
    distance = _distance(
        shot.thing.shape,
        (centres[None, None, :] - x) / radius,
        (centres[None, :, None] - y) / radius,
    )
    cover = np.clip(0.5 - distance * radius * size, 0, 1) * opacity  # edges one pixel soft
    backdrop = _backdrop(shot, size)
    colour = np.array(COLOURS[shot.thing.colour], float)
    return np.rint(backdrop + cover[..., None] * (colour - backdrop)).astype(np.uint8)


def render_clip(clip: Clip, size: int) -> np.ndarray:
    """Film all shots of the clip: uint8 [n, size, size, 3]."""
    return np.concatenate([film(render_shot(shot, size)) for shot in clip.shots])


def film(frames: np.ndarray) -> np.ndarray:
    """The frames, uint8 [n, H, W, 3], as a poor camera in dim light shows them.

    That the videos look unlike the pictures which CLIP learned from is as in life, and a reason to
    adapt it.
    """
    grey = frames.mean(axis=-1, keepdims=True)
    pale = grey + SATURATION * (frames - grey)
    return np.rint(BLACK + BRIGHTNESS * pale).astype(np.uint8)


# ---------------------------------------------------------------------------------- the grammar


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    words = [] if thing.size is None else [str(rng.choice(SIZE_WORDS[thing.size]))]
    return " ".join(["a", *words, thing.colour, thing.shape])


def _in_place(subject: str, place: str, rng: np.random.Generator) -> str:
    return str(rng.choice((f"{subject} over {place}", f"{place} behind {subject}")))


def _sentence(meaning: Meaning, rng: np.random.Generator) -> str:
    """One of the grammar's sentences with this meaning."""
    if meaning.later:
        first, later = _sentence(replace(meaning, later=None), rng), _sentence(meaning.later, rng)
        return str(rng.choice((f"{first} before {later}", f"{later} after {first}")))
    subject = _phrase(meaning.thing, rng)
    if meaning.action:
        subject = f"{subject} {rng.choice(VERBS[meaning.action])}"
    if meaning.background is None:
        return subject
    return _in_place(subject, str(rng.choice(BACKGROUNDS[meaning.background][0])), rng)


def _captions(shots: Sequence[Shot], rng: np.random.Generator) -> tuple[Caption, ...]:
    """For every shot in order: two of what moves, without and with the place, one of what rests."""
    captions = []
    for i, shot in enumerate(shots):
        meanings = [Meaning("appearance", shot.thing, background=shot.background)]
        if shot.action in OPPOSITE:
            meanings = [
                Meaning("motion", shot.thing, shot.action, place)
                for place in (None, shot.background)
            ]
        captions += [Caption(_sentence(meaning, rng), meaning, i, i) for meaning in meanings]
    return tuple(captions)


def _order_captions(shots: Sequence[Shot], rng: np.random.Generator) -> tuple[Caption, ...]:
    """Two of the things that move, by their order in time, once for each distance between them."""
    moving = [i for i, shot in enumerate(shots) if shot.action in OPPOSITE]
    captions = []
    for distance in range(1, len(moving)):
        i = int(rng.integers(len(moving) - distance))
        first, last = moving[i], moving[i + distance]
        shot, later = shots[first], shots[last]
        meaning = Meaning("appearance", later.thing, background=later.background)
        meaning = Meaning("order", shot.thing, background=shot.background, later=meaning)
        captions.append(Caption(_sentence(meaning, rng), meaning, first, last))
    return tuple(captions)


def _shot_lengths(count: int, scale: Scale, rng: np.random.Generator) -> np.ndarray:
    """Frames of each shot."""
    shortest, longest = scale.seconds
    total = round((shortest + (longest - shortest) * rng.uniform() ** 2) * PREPARED_FPS)
    shares = rng.uniform(*scale.shares, count)
    edges = np.rint(total * np.concatenate([[0], np.cumsum(shares / shares.sum())])).astype(int)
    return np.diff(edges)


def _draw_pair(names: tuple[str, str], scale: Scale, rng: np.random.Generator) -> tuple[Clip, Clip]:
    """A clip and its twin: motion shots reversed in order and in time, resting shots replaced."""
    moves = [True] * int(rng.integers(*scale.moving, endpoint=True)) + [False]
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

    lengths = _shot_lengths(len(moves), scale, rng)
    shots = [draw_shot(m, n) for m, n in zip(moves, lengths, strict=True)]
    twin_shots = [
        shot.backwards() if shot.action in OPPOSITE else draw_shot(False, shot.num_frames)
        for shot in reversed(shots)
    ]

    def captions(shots: Sequence[Shot]) -> tuple[Caption, ...]:
        return _captions(shots, rng) + (_order_captions(shots, rng) if scale.order else ())

    return (
        Clip(names[0], names[1], tuple(shots), captions(shots)),
        Clip(names[1], names[0], tuple(twin_shots), captions(twin_shots)),
    )


def draw_clips(name: str, num_clips: int, seed: int, scale: Scale = SMALL) -> list[Clip]:
    """Draw clips named `<name>_0000` and so on, each followed by its twin.

    As in any data set some captions fit several clips; but none of motion or order fits the clip's
    twin.

    Args:
        num_clips: an even number.
        seed: the same clips for the same seed and name.

    Raises:
        ValueError: an odd number of clips.
    """
    if num_clips % 2:
        raise ValueError(f"num_clips is {num_clips}: clips come in pairs, give an even number")
    clips: list[Clip] = []
    for first in range(0, num_clips, 2):
        rng = np.random.default_rng([seed, *name.encode(), first])
        clips += _draw_pair((f"{name}_{first:04d}", f"{name}_{first + 1:04d}"), scale, rng)
    return clips


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
    """Single frames of clips that are in no split, with what can be seen in them: for a CLIP.

    Args:
        num_pictures: how many.
        size: side in pixels.

    Returns:
        uint8 [num_pictures, size, size, 3] and as many captions, without any verb.
    """
    pictures = np.empty((num_pictures, size, size, 3), np.uint8)
    captions: list[str] = []
    rng = np.random.default_rng([seed, *b"pictures"])
    while len(captions) < num_pictures:
        for clip in _draw_pair(("", ""), SMALL, rng):
            for shot in clip.shots[: num_pictures - len(captions)]:
                frame = int(rng.integers(shot.num_frames))
                pictures[len(captions)] = render_shot(shot, size, [frame])[0]
                captions.append(_still_caption(shot, frame, rng))
    return pictures, captions


def _still_caption(shot: Shot, frame: int, rng: np.random.Generator) -> str:
    """What is where in one frame: now and then how large, at which side, over what."""
    x, y, radius, opacity = (
        float(value[0]) for value in _path(shot, np.array([(frame + 0.5) / shot.num_frames]))
    )
    size = shot.thing.size
    if shot.action in RESIZING:
        size = "small" if radius < 0.17 else "large" if radius > 0.27 else None
    place = str(rng.choice(BACKGROUNDS[shot.background][0]))
    if not opacity:
        return place
    named = size if size is not None and rng.random() < 0.6 else None
    text = _phrase(replace(shot.thing, size=named), rng)
    places = {"left": x < 0.38, "right": x > 0.62, "top": y < 0.38, "bottom": y > 0.62}
    sides = [side for side, there in places.items() if there]
    if sides and rng.random() < 0.9:
        text += f" {rng.choice(('on', 'at'))} the {rng.choice(sides)}"
    return _in_place(text, place, rng) if rng.random() < 0.4 else text

"""The prompt pyramid: which events there are, which frames each spans, and who may see whom.

Level 0 is the frames; an event of level k covers c consecutive nodes of level k-1, and neighbours
start o nodes apart (ProPy, §3.2). Events are listed top level first, bottom level last, left to
right within a level. No weights: also used by evaluation and by the plots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules import ModelError

# The paper's: 32 frames; 16, 15, 7, 3 and 1 events (scripts/pyramids/cfg_32.json).
PUBLISHED_PYRAMID = {"Nf": 32, "H": [[2, 2], [2, 1], [3, 2], [3, 2], [3, 1]]}

# Which other events an event may attend to; the published rule first. Frames and prompts are seen
# alike under each.
VISIBILITIES = ("relatives", "ancestors", "descendants", "all", "self")

# Guards against typing errors: far beyond what fits in a GPU's memory.
MAX_FRAMES = 4096
MAX_EVENTS = 10_000


class PromptPyramid:
    """Levels, spans, proposals and visibility of the events.

    Args:
        num_frames: N_f.
        levels: (c, o) of every level over the one below, bottom level first.
        drop_top: so many of the highest levels are then left out.

    Attributes:
        config: these arguments as a configuration file holds them.
        events_per_level: events of each level, bottom first: n_1 … n_K.
        num_events: N_e, over all levels.
        spans: int64 [N_e, 2], first frame and last frame + 1 of each event.
        proposals: float32 [N_e, 2], the spans as fractions of the video, in [0, 1].
        level_of_event: int64 [N_e], 1 (bottom) … K (top).

    Raises:
        ModelError: a window does not fit, a level's count is not whole, the top is not one event;
            no level is left.
    """

    def __init__(
        self, num_frames: int, levels: Sequence[tuple[int, int]], drop_top: int = 0
    ) -> None:
        if not _is_count(num_frames) or num_frames > MAX_FRAMES:
            raise ModelError(
                f"Nf must be a whole number from 1 to {MAX_FRAMES}: {_show(num_frames)}"
            )
        if not levels:
            raise ModelError("the pyramid has no level: H needs at least one [window, stride]")
        self.num_frames = num_frames
        self.events_per_level: list[int] = []
        spans_bottom_up: list[list[tuple[int, int]]] = []
        below = [(frame, frame + 1) for frame in range(num_frames)]
        for number, level in enumerate(levels, start=1):
            window, stride = _window_and_stride(number, level)
            steps, rest = divmod(len(below) - window, stride)
            if steps < 0 or rest:
                raise ModelError(
                    f"level {number} [{window}, {stride}] does not fit the {len(below)} nodes "
                    f"below: ({len(below)} - {window}) / {stride} + 1 must be whole and positive"
                )
            starts = range(0, steps * stride + 1, stride)
            below = [(below[i][0], below[i + window - 1][1]) for i in starts]
            spans_bottom_up.append(below)
            self.events_per_level.append(len(below))
            if sum(self.events_per_level) > MAX_EVENTS:
                raise ModelError(f"level {number}: more than {MAX_EVENTS} events up to here")
        if len(below) != 1:
            raise ModelError(
                f"level {len(levels)} (the top) has {len(below)} events; it must be the whole video"
            )
        if type(drop_top) is not int or not 0 <= drop_top < len(levels):
            raise ModelError(
                f"drop_top is a whole number of the {len(levels)} levels, not all: "
                f"{_show(drop_top)}"
            )
        self.config = {"Nf": num_frames, "H": [list(level) for level in levels]}
        if drop_top:
            self.config["drop_top"] = drop_top
            del spans_bottom_up[-drop_top:], self.events_per_level[-drop_top:]
        self.num_events = sum(self.events_per_level)
        self.num_bottom_events = self.events_per_level[0]
        top_first = list(enumerate(spans_bottom_up, start=1))[::-1]
        self.spans = torch.tensor([span for _, spans in top_first for span in spans])
        self.level_of_event = torch.tensor([level for level, spans in top_first for _ in spans])
        self.proposals = self.spans.to(torch.float32) / num_frames

    @classmethod
    def from_config(cls, config: Mapping | str | Path) -> PromptPyramid:
        """Build from a JSON file or its content, in either of the two forms.

        ``{"Nf": 32, "H": [[2, 2], [2, 1], …]}`` gives window and stride per level, bottom first.
        ``{"Nf": 32, "offset": [0, 1, …]}`` halves the number of segments from level to level
        (Nf = 2^K); at level k segments of 2^k frames start 2^k (0, no overlap) or 2^(k-1) frames
        apart (1, half overlap). The last entry is ignored: the top level is the whole video.
        Either may also have ``"drop_top": n``; lower levels are left out by another H.

        ModelError: with the file's name, for anything that is not a pyramid.
        """
        if isinstance(config, Mapping):
            return cls._from_mapping(config)
        path = Path(config)
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ModelError(f"{path}: cannot read the pyramid: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # the latter: brackets without end
            raise ModelError(f"{path}: not a JSON file: {error}") from error
        try:
            return cls._from_mapping(content)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    @classmethod
    def _from_mapping(cls, config: Mapping) -> PromptPyramid:
        forms = ({"Nf", "H"}, {"Nf", "offset"})
        if not isinstance(config, Mapping) or set(config) - {"drop_top"} not in forms:
            raise ModelError('a pyramid is {"Nf": …, "H": […]} or {"Nf": …, "offset": […]}')
        num_frames, levels = config["Nf"], config.get("H", config.get("offset"))
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            raise ModelError(f"H and offset are lists, one entry a level: {_show(levels)}")
        if "offset" in config:
            levels = _levels_of_offsets(num_frames, levels)
        return cls(num_frames, levels, config.get("drop_top", 0))

    @property
    def contains(self) -> Tensor:
        """bool [N_e, N_e]: an event (row) spans another (column) or is that one."""
        return _contains(self.spans, self.spans)

    @property
    def related(self) -> Tensor:
        """bool [N_e, N_e]: the same event, or ancestor and descendant at any distance in levels.

        Two nodes are related exactly when one frame span contains the other.
        """
        return self.contains | self.contains.T

    def sees(self, visibility: str = "relatives") -> Tensor:
        """bool [N_e, N_e]: the events that each event may attend to, itself always among them.

        Args:
            visibility: "relatives", ancestors and descendants; one of the two; "all"; or "self".

        Raises:
            ModelError: another one.
        """
        if visibility not in VISIBILITIES:
            raise ModelError(f"visibility {visibility!r} is none of {', '.join(VISIBILITIES)}")
        below = self.level_of_event.unsqueeze(1) >= self.level_of_event
        return {
            "relatives": self.related,
            "ancestors": self.contains.T & below.T,
            "descendants": self.contains & below,
            "all": torch.ones_like(below),
            "self": torch.eye(self.num_events, dtype=torch.bool),
        }[visibility]

    @property
    def frames_of_event(self) -> Tensor:
        """bool [N_e, N_f]: the frames of each event's span."""
        frames = torch.arange(self.num_frames)
        return _contains(self.spans, torch.stack([frames, frames + 1], dim=1))

    def visibility(
        self, num_prompts: int, tokens_per_frame: int, visibility: str = "relatives"
    ) -> Tensor:
        """What an event may attend to (ProPy, §3.3), True = visible.

        Args:
            num_prompts: N_p visual prompts, repeated once per bottom-level event.
            tokens_per_frame: 1+G².
            visibility: which events, see `sees`; an event sees its own span's frames, and the
                prompts of the bottom-level events related to it, whatever the rule.

        Returns:
            bool [N_e, N_e + N_p·n_1 + (1+G²)·N_f]. Columns: the events; N_e + p·n_1 + i for prompt
            p of bottom event i; N_e + N_p·n_1 + t·N_f + f for token t (0 = class) of frame f.
        """
        prompts = self.related[:, -self.num_bottom_events :].repeat(1, num_prompts)
        frames = self.frames_of_event.repeat(1, tokens_per_frame)
        return torch.cat([self.sees(visibility), prompts, frames], dim=1)


def _contains(outer: Tensor, inner: Tensor) -> Tensor:
    """bool [N, M]: span n contains span m, spans [·, 2] as first and last + 1."""
    return (outer[:, None, 0] <= inner[None, :, 0]) & (inner[None, :, 1] <= outer[:, None, 1])


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number without end"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _window_and_stride(number: int, level: object) -> tuple[int, int]:
    pair = isinstance(level, Sequence) and not isinstance(level, str) and len(level) == 2
    if not pair or not all(_is_count(value) for value in level):
        raise ModelError(
            f"level {number} must be [window, stride], whole numbers > 0: {_show(level)}"
        )
    return level[0], level[1]


def _levels_of_offsets(num_frames: object, offsets: Sequence) -> list[tuple[int, int]]:
    """(c, o) per level of the offset form, from the levels' segment lengths and strides."""
    if not _is_count(num_frames) or num_frames & (num_frames - 1):
        raise ModelError(f"the offset form needs Nf to be a power of two: {_show(num_frames)}")
    depth = num_frames.bit_length() - 1
    if len(offsets) != depth or depth == 0:
        raise ModelError(
            f"the offset form needs one entry for each of log2(Nf) = {depth} levels, "
            f"and at least one: {len(offsets)} given"
        )
    levels, length, stride = [], 1, 1
    for number, offset in enumerate(offsets, start=1):
        if isinstance(offset, bool) or offset not in (0, 1):
            raise ModelError(f"level {number}: an offset is 0 or 1: {_show(offset)}")
        next_length = 2**number
        # the top level is one segment, whose stride to a next one is never used
        top = number == depth
        next_stride = stride if top else next_length // (2 if offset else 1)
        window, rest = divmod(next_length - length, stride)
        step, odd = divmod(next_stride, stride)
        if rest or odd:
            raise ModelError(
                f"level {number}: segments of {next_length} frames, {next_stride} apart, cannot be "
                f"made of segments of {length} frames, {stride} apart"
            )
        levels.append((window + 1, step))
        length, stride = next_length, next_stride
    return levels

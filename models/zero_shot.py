"""CLIP alone as a model of videos: what finds them without any training.

CLIP's features of a video's frames stand in place of ProPy's events, in one of three ways:

    mean     one event, the whole video: the mean of all frames
    best     an event a frame, so that the best frame decides
    events   the events of a pyramid, each the mean of the frames it spans; moments have a score too

Features are normalised before they are averaged, in all three: the length of a frame's feature says
nothing of what it shows, but would decide how much the frame counts. "mean" is the top event of
"events".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from models.clip import CLIP
from models.clip_weights import build_clip
from models.propy import ProPy, ProPyConfig
from modules import ModelError
from modules.pyramid import PUBLISHED_PYRAMID, PromptPyramid
from modules.readout import best_event
from modules.similarity import event_scores, unit

SCORINGS = ("mean", "best", "events")


def events_of(scoring: str, pyramid: PromptPyramid) -> PromptPyramid:
    """The events of a scoring on a pyramid's frames. ModelError: there is no such scoring."""
    if scoring not in SCORINGS:
        raise ModelError(f"zero-shot scoring {scoring!r} is none of {', '.join(SCORINGS)}")
    if scoring == "events":
        return pyramid
    frames = pyramid.num_frames
    if scoring == "mean":
        return PromptPyramid(frames, [(frames, 1)])
    return PromptPyramid(frames, [(1, 1), (frames, 1)], drop_top=1)


def span_means(frames: Tensor, events: PromptPyramid) -> Tensor:
    """Normalised features of frames, [..., N_f, D], averaged over each event: [..., N_e, D]."""
    members = events.frames_of_event.to(frames)  # [N_e, N_f]
    return members / members.sum(dim=1, keepdim=True) @ frames


class ZeroShot(nn.Module):
    """What evaluation, pictures and search ask of a ProPy, by CLIP alone.

    Args:
        clip: used as it is; whether it is trained and its mode stay.
        config: gives the pyramid; of the rest only what describes CLIP and texts has a meaning.
        scoring: one of `SCORINGS`.

    Attributes:
        pyramid: the scoring's events, see `events_of`.
        num_heads: of attention that could be drawn; events here attend to nothing.

    Raises:
        ModelError: no such scoring, or no pyramid.
    """

    readout = staticmethod(best_event)
    num_heads = 0
    # ProPy's, which need nothing but `clip`, `scores` and the two encoders.
    input_resolution = ProPy.input_resolution
    forward = ProPy.forward
    compile_encoders = ProPy.compile_encoders

    def __init__(self, clip: CLIP, config: ProPyConfig, scoring: str = "events") -> None:
        super().__init__()
        self.pyramid = events_of(scoring, PromptPyramid.from_config(config.pyramid))
        self.clip, self.config, self.scoring = clip, config, scoring

    def encode_video(self, frames: Tensor) -> Tensor:
        """Embeddings of the scoring's events, [B, N_e, D].

        Args:
            frames: [B, N_f, 3, H, W], uint8, or float and normalised with CLIP's mean and std.

        Raises:
            ValueError: another number or size of frames than the model's.
        """
        side = self.input_resolution
        expected = (self.pyramid.num_frames, 3, side, side)
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(f"frames are [B, {expected}], not {list(frames.shape)}")
        features = self.clip.encode_image(self.clip.normalize(frames).flatten(0, 1))
        features = features.unflatten(0, (len(frames), -1))
        return span_means(unit(features), self.pyramid)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """CLIP's own text features, at each row's end-of-text token: [T, D], not normalised.

        Args:
            token_ids: int64 [T, W], 0-padded; W is at most CLIP's context length.
        """
        return self.clip.encode_text(token_ids)

    def scores(self, texts: Tensor, events: Tensor) -> Tensor:
        """Scaled similarity of texts [T, D] and videos [B, N_e, D], as ProPy's: [T, B]."""
        return self.readout(event_scores(texts, events)) * self.clip.logit_scale.exp()


def load_zero_shot(
    clip_weights: Path | str | Mapping[str, Tensor],
    scoring: str = "events",
    pyramid: Path | str | Mapping = PUBLISHED_PYRAMID,
    clip_activation: str | None = None,
    trust_archive: bool = False,
) -> ZeroShot:
    """CLIP alone, in evaluation mode and frozen; reads captions up to CLIP's context length.

    Args:
        clip_weights: file, content or name of a model, see ``models.clip_weights.read_weights``.
        scoring: one of `SCORINGS`.
        pyramid: see ``PromptPyramid.from_config``; "mean" and "best" take its number of frames.
        clip_activation, trust_archive: see ``models.clip_weights.build_clip``.

    Raises:
        ModelError: weights or pyramid are missing, unreadable or damaged, or no such scoring.
    """
    in_memory = isinstance(clip_weights, Mapping)
    events_of(scoring, pyramid := PromptPyramid.from_config(pyramid))  # before the long reading
    clip = build_clip(clip_weights, trust_archive, clip_activation).requires_grad_(False)
    config = ProPyConfig(
        pyramid=pyramid.config, max_words=clip.sizes.context_length,
        clip_name=ProPyConfig.clip_name if in_memory else str(clip_weights),
        **clip.settings.as_fields(),
    )  # fmt: skip
    return ZeroShot(clip, config, scoring).eval()

"""CLIP alone as a model of videos, against open_clip and sums written out."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch.nn import functional as F

from dataloaders.tokenizer import tokenize
from models import ProPyConfig
from models.clip_weights import build_clip
from models.zero_shot import SCORINGS, ZeroShot, load_zero_shot
from modules import ModelError
from modules.pyramid import PUBLISHED_PYRAMID, PromptPyramid
from modules.transformer import QUICK_GELU
from tests.golden_model import make_weights
from tests.models.test_clip import CAPTIONS, reference

PYRAMID = {"Nf": 6, "H": [[2, 2], [2, 1], [2, 1]]}


@pytest.fixture(scope="module")
def state() -> dict:
    return make_weights.torch_state(make_weights.make("tiny", 1, "fp16"))


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Two videos, uint8."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 6, 3, 64, 64), generator=generator).to(torch.uint8)


def theirs(state: dict, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """open_clip's normalised features of the videos' frames, [V, N_f, D], and captions, [T, D]."""
    sizes = build_clip(state, activation=QUICK_GELU).sizes
    floats = {name: tensor.float() for name, tensor in state.items()}
    model = reference(floats, sizes)
    mean, std = (
        torch.tensor(x).view(3, 1, 1)
        for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (frames / 255 - mean) / std
    padded = tokenize(CAPTIONS, sizes.context_length)
    padded = F.pad(padded, (0, sizes.context_length - padded.shape[1]))
    with torch.no_grad():
        seen = model.encode_image(images.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return F.normalize(seen, dim=-1), F.normalize(model.encode_text(padded), dim=-1)


def test_scores_of_every_scoring(state, frames) -> None:
    seen, said = theirs(state, frames)
    spans = PromptPyramid.from_config(PYRAMID).spans.tolist()
    for scoring in SCORINGS:
        model = load_zero_shot(state, scoring, PYRAMID, clip_activation="quick_gelu")
        with torch.no_grad():
            events = model.encode_video(frames)
            found = model(frames, tokenize(CAPTIONS, 32))
        expected = torch.empty(len(said), len(seen))
        for v, video in enumerate(seen):
            parts = {
                "mean": [video.mean(0)],
                "best": list(video),
                "events": [video[first:end].mean(0) for first, end in spans],
            }[scoring]
            torch.testing.assert_close(events[v], torch.stack(parts), atol=1e-5, rtol=1e-4)
            for t, sentence in enumerate(said):
                expected[t, v] = max(F.cosine_similarity(sentence, part, dim=0) for part in parts)
        scale = state["logit_scale"].float().exp()
        torch.testing.assert_close(found, expected * scale, atol=1e-3, rtol=1e-4)
        assert len(model.pyramid.proposals) == model.pyramid.num_events == events.shape[1]


def test_moments_of_every_scoring(state) -> None:
    events = {name: load_zero_shot(state, name, PYRAMID, "quick_gelu").pyramid for name in SCORINGS}
    assert events["mean"].proposals.tolist() == [[0, 1]]
    assert events["events"].proposals.equal(PromptPyramid.from_config(PYRAMID).proposals)
    best = events["best"]
    assert best.spans.tolist() == [[i, i + 1] for i in range(6)]
    torch.testing.assert_close(best.proposals * 6, best.spans.float())
    assert best.frames_of_event.equal(torch.eye(6, dtype=torch.bool))
    assert best.level_of_event.tolist() == [1] * 6 and best.events_per_level == [6]


def test_frames_may_be_normalised_already(state, frames) -> None:
    model = load_zero_shot(state, "best", PYRAMID, "quick_gelu")
    normalised = (frames / 255 - model.clip.image_mean) / model.clip.image_std
    assert model.encode_video(frames).equal(model.encode_video(normalised))
    with pytest.raises(ValueError, match="frames are"):
        model.encode_video(frames[:, :5])


def test_loading(state, tmp_path, frames) -> None:
    torch.save(state, tmp_path / "clip.pt")
    model = load_zero_shot(tmp_path / "clip.pt", clip_activation="gelu")
    assert model.config.pyramid == PUBLISHED_PYRAMID and model.pyramid.num_events == 42
    assert model.config.clip_activation == "gelu" and model.config.clip_seconds is None
    assert model.config.clip_name == str(tmp_path / "clip.pt")
    assert model.config.max_words == model.clip.sizes.context_length
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match=r"absent\.pt: no CLIP weights there"):
        load_zero_shot(tmp_path / "absent.pt")
    with pytest.raises(
        ModelError, match="zero-shot scoring 'median' is none of mean, best, events"
    ):
        load_zero_shot(tmp_path / "absent.pt", "median")


def test_a_clip_in_use_stays_as_it_is(state) -> None:
    clip = build_clip(state, activation="quick_gelu").train()
    ZeroShot(clip, ProPyConfig(pyramid=PYRAMID), "events")
    assert clip.training and all(p.requires_grad for p in clip.parameters())

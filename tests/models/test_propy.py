"""The shortcuts against ProPy written down plainly, and what callers may rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.tokenizer import tokenize
from models import ProPy, build_model, reference
from modules import ModelError
from modules.losses import video_text_loss
from modules.pyramid import PUBLISHED_PYRAMID, VISIBILITIES
from modules.readout import READOUTS
from tests.golden_model import GoldenModel
from utils.training.engine import train_step
from utils.training.optim import build_optimizer

PYRAMID = {"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}


def random_model(seed: int = 0, pyramid: dict = PYRAMID, **chosen) -> ProPy:
    """A tiny model whose adapters, zero at the start of training, do something."""
    torch.manual_seed(seed)
    chosen = {"num_prompts": 3, "adapter_channels": 16, "adapter_kernel": 3} | chosen
    model = build_model(GoldenModel.read("m3").clip_state(), pyramid, **chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in model.backbone_names():
                parameter.normal_(std=0.2)
    return model.double()


def random_batch(model, videos: int = 3, seed: int = 1) -> dict:
    torch.manual_seed(seed)
    side, frames = model.input_resolution, model.pyramid.num_frames
    captions = ["a dog", "a man opens the door", "two", "she walks <|endoftext|> away", "x y z"]
    return {
        "frames": torch.randn(videos, frames, 3, side, side, dtype=torch.float64),
        "token_ids": tokenize(captions, max_words=12),
        "text_to_video": torch.tensor([0, 1, 1, 2, 2]) % videos,
    }


@pytest.mark.parametrize(
    "pyramid",
    [PYRAMID, {"Nf": 8, "offset": [1, 1, 0]}, {"Nf": 4, "H": [[4, 1]]}, {"Nf": 1, "H": [[1, 1]]}],
)
def test_equals_plain_definition(pyramid) -> None:
    assert_equals_plain(random_model(pyramid=pyramid))


@settings(max_examples=25)
@given(
    pyramid=st.sampled_from([
        PYRAMID, PYRAMID | {"drop_top": 1}, {"Nf": 8, "offset": [1, 1, 0], "drop_top": 2},
        {"Nf": 8, "H": [[2, 3], [2, 1], [2, 1]]}, {"Nf": 4, "H": [[2, 2], [1, 1], [2, 1]]},
    ]),
    clip_activation=st.sampled_from(["quick_gelu", "gelu"]),
    visibility=st.sampled_from(VISIBILITIES),
    num_prompts=st.sampled_from([0, 1, 4]),
    text_prompts=st.sampled_from(["projected", "none"]),
    num_adapter_layers=st.integers(0, 3),
    adapter_kernel=st.sampled_from([1, 3, 7]),
    adapter_channels=st.sampled_from([1, 16]),
    lora_rank=st.sampled_from([0, 2]),
    frame_groups=st.sampled_from(["", "2", "4", "2,4", "4,2"]),
    frame_embedding=st.integers(0, 1),
    readout=st.sampled_from(list(READOUTS)),
)  # fmt: skip
def test_every_option_equals_its_plain_definition(**chosen) -> None:
    """In numbers and gradients, the latter also as far as any parameter is reached."""
    model = random_model(**chosen)
    gradients = assert_equals_plain(model)
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    dead = model.unreachable_parameters()
    assert reached == gradients.keys() - dead


def assert_equals_plain(model: ProPy) -> dict[str, torch.Tensor]:
    """Numbers and gradients are those of models.reference; returns the latter, zeros for none."""
    batch = random_batch(model)
    events, attention = model.encode_video(batch["frames"], return_attention=True)
    texts = model.encode_text(batch["token_ids"])
    loss = video_text_loss(model.scores(texts, events), batch["text_to_video"])
    plain_events, plain_attention = reference.encode_video(model, batch["frames"])
    plain_texts = reference.encode_text(model, batch["token_ids"])
    plain_scores = reference.scores(model, plain_texts, plain_events)
    plain_loss = reference.loss(plain_scores, batch["text_to_video"])
    plain = (plain_events, plain_attention, plain_texts, plain_loss)
    torch.testing.assert_close((events, attention, texts, loss), plain, rtol=0, atol=1e-12)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    plain = torch.autograd.grad(plain_loss, trained.values(), allow_unused=True)
    ours, plain = ([torch.zeros(1) if g is None else g for g in x] for x in (ours, plain))
    for name, a, b in zip(trained, ours, plain, strict=True):
        assert not (a - b).numel() or (a - b).abs().max() < 1e-10, name
    return dict(zip(trained, ours, strict=True))


def test_padding_and_batch_mates_do_not_change_an_embedding() -> None:
    model = random_model()
    batch = random_batch(model)
    with torch.no_grad():
        alone = model.encode_text(tokenize(["a dog"], 12))
        together = model.encode_text(batch["token_ids"])
        torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-12)
        one = model.encode_video(batch["frames"][1:2])
        all_videos = model.encode_video(batch["frames"])
    torch.testing.assert_close(one[0], all_videos[1], rtol=0, atol=1e-12)


def test_events_see_their_own_frames_only() -> None:
    """Without adapters, a frame outside of an event's relatives' spans cannot reach it."""
    model = random_model(num_adapter_layers=0)
    frames = random_batch(model, videos=1)["frames"]
    changed = frames.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        difference = (model.encode_video(frames) - model.encode_video(changed)).abs().amax(-1)[0]
    spans = model.pyramid.spans
    assert (difference[spans[:, 1] == 8] > 1e-6).all()
    # Over two layers the top, which sees all and is seen by all, passes it on: so one layer's.
    _, attention = model.encode_video(frames, return_attention=True)
    assert (attention[:, 0][:, ~model.visibility] == 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


EVERYTHING = {
    "lora_rank": 2, "frame_groups": "2,4", "frame_embedding": 1, "readout": "consensus",
    "visibility": "all",
}  # fmt: skip


@pytest.mark.parametrize(("parts", "chosen"), [(2, {}), (5, {}), (2, EVERYTHING)])
def test_a_batch_in_parts_is_the_whole_batch(parts: int, chosen: dict) -> None:
    """Accumulation gives loss and gradients of one batch, negatives of all parts included."""
    results = []
    for count in (1, parts):
        model = random_model(**chosen)
        optimizer = build_optimizer(model, 0.0, 1.0, 0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        step = train_step(
            model, random_batch(model), optimizer, scaler, micro_batches=count, clip_grad_norm=1e9
        )
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((step, gradients))
    (whole, gradients), (in_parts, part_gradients) = results
    assert in_parts.loss == pytest.approx(whole.loss, abs=1e-12)
    assert in_parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)
    assert in_parts.level_shares == pytest.approx(whole.level_shares, rel=1e-6)
    torch.testing.assert_close(part_gradients, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_mixed_precision_stays_close(precision: str) -> None:
    model = random_model().float()
    batch = random_batch(model)
    batch["frames"] = batch["frames"].float()
    losses = []
    for mode in ("fp32", precision):
        scaler = torch.amp.GradScaler("cpu", enabled=mode == "amp")
        optimizer = build_optimizer(model, 0.0, 1.0, 0.0)
        losses.append(train_step(model, batch, optimizer, scaler, precision=mode).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0], "autocast did nothing"


def test_only_new_parameters_train_on_a_frozen_clip() -> None:
    model = random_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, 1e-2, 1.0, 0.2)
    train_step(model, random_batch(model), optimizer, torch.amp.GradScaler("cpu", enabled=False))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - model.backbone_names() - model.unreachable_parameters()


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build_model(GoldenModel.read("m3").clip_state(), PYRAMID, adapter_channels=32)
    bound = (6 / (3 * 32**2 + 128)) ** 0.5
    for prompts in (model.prompts.event_prompts, model.prompts.visual_prompts):
        assert prompts.abs().max() <= bound
        assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    for adapter in model.adapters:
        x = torch.randn(8, 4, 128)
        assert (adapter(x, 8) == 0).all(), "an adapter starts as nothing"
        assert adapter.fc1.weight.abs().max() > 0 and adapter.fc2.weight.abs().max() > 0


def test_options_of_the_tower_start_as_nothing() -> None:
    """Whatever is drawn for them; with LoRA merged, which is without gradients, the same."""
    state, models = GoldenModel.read("m3").clip_state(), []
    for chosen in ({}, {"lora_rank": 4, "frame_embedding": 1}):
        torch.manual_seed(0)
        models.append(build_model(state, PYRAMID, **chosen).double())
    batch = random_batch(models[0])
    for encode, inputs in (("encode_video", "frames"), ("encode_text", "token_ids")):
        plain, *others = (getattr(model, encode)(batch[inputs]) for model in models)
        torch.testing.assert_close(others[0], plain, rtol=0, atol=0)
        changed = random_model(lora_rank=4)
        apart = getattr(changed, encode)(batch[inputs])
        with torch.no_grad():
            merged = getattr(changed, encode)(batch[inputs])
        torch.testing.assert_close(merged, apart, rtol=0, atol=1e-12)
        assert not torch.allclose(merged, getattr(random_model(), encode)(batch[inputs]))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"frame_groups": "3"}, r"frame_groups '3': .* divide the 8 frames"),
        ({"frame_groups": "2,2,2"}, "for at most 2 layers"),
        ({"frame_groups": "two"}, "frame_groups 'two'"),
        ({"frame_groups": "0"}, "frame_groups '0'"),
        ({"frame_groups": "2,1"}, "sizes from 2"),  # of one frame no distance is learned
        ({"lora_rank": -1}, "a rank are 0 or more"),
        ({"text_prompts": "learned"}, "text_prompts 'learned' is none of"),
        ({"visibility": "none"}, "visibility 'none' is none of"),
        ({"readout": "mean"}, "read-out 'mean' is none of"),
        ({"rank_readout": "mean"}, "read-out 'mean' is none of"),
    ],
)
def test_settings_that_make_no_model(chosen: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        random_model(**chosen)


def test_more_visual_than_text_layers() -> None:
    """As in ViT-L/14: text layer l takes the prompts of visual layer l."""
    state = GoldenModel.read("m3").clip_state()
    short = {k: v for k, v in state.items() if not k.startswith("transformer.resblocks.2.")}
    model = build_model(short, PYRAMID)
    assert len(model.prompts.visual_prompts) == 3
    assert model.encode_text(tokenize(["a dog"], 8)).shape == (1, 64)


def test_wrong_frames_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="64"):
        model.encode_video(torch.zeros(1, 8, 3, 32, 32))
    with pytest.raises(ValueError, match="8"):
        model.encode_video(torch.zeros(1, 4, 3, 64, 64))


@pytest.mark.slow
def test_published_parameter_count() -> None:
    """7.98 M trained parameters for the published setting, as the paper's table says."""
    model = build_model(GoldenModel.read("vitb32").clip_state(), PUBLISHED_PYRAMID)
    report = model.parameter_counts()
    assert round(report["trainable"] / 1e6, 2) == 7.98
    assert report["reached_by_gradient"] < report["trainable"]


@pytest.mark.parametrize("chosen", [{}, EVERYTHING])
def test_checkpointed_activations_change_no_number(chosen: dict) -> None:
    results = []
    for checkpointed in (False, True):
        model = random_model(checkpoint_activations=checkpointed, **chosen).float()
        batch, kept = random_batch(model), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            scores = model(batch["frames"].float(), batch["token_ids"])
        video_text_loss(scores, batch["text_to_video"]).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((scores, gradients, sum(kept)))
    (plain, gradients, much), (scores, same_gradients, little) = results
    torch.testing.assert_close(scores, plain, rtol=0, atol=0)
    torch.testing.assert_close(same_gradients, gradients, rtol=0, atol=0)
    assert little < much / 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_compiled_equals_plain(checkpoint_activations: bool) -> None:
    """In one graph: nothing of the encoders falls back to Python."""
    torch._dynamo.reset()
    model = random_model().float()
    model.checkpoint_activations = checkpoint_activations
    batch = random_batch(model)
    frames = batch["frames"].float()
    plain = model(frames, batch["token_ids"])
    gradients = torch.autograd.grad(plain.sum(), model.prompts.visual_prompts)
    for encoder, inputs in ((model.encode_video, frames), (model.encode_text, batch["token_ids"])):
        graphs = torch._dynamo.explain(encoder)(inputs)
        assert graphs.graph_break_count == 0, graphs.break_reasons
    model.compile_encoders()
    compiled = model(frames, batch["token_ids"])
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    compiled_gradients = torch.autograd.grad(compiled.sum(), model.prompts.visual_prompts)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-3, atol=1e-4)

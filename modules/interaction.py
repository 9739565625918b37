"""One layer of ProPy on a frozen CLIP block: the frames with their adapter, the events with their
ancestor–descendant attention (§3.3), and the prompted text layer (§3.4).

Numbers are those of the plain definition, work is not: keys and values of the frames are projected
once for both sides, prompts are one set of keys for all their copies, and what the last layer would
compute for no one is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.adapter import TemporalAdapter
from modules.frame_groups import FrameGroups
from modules.lora import LoRA
from modules.pyramid import PromptPyramid
from modules.transformer import ResidualAttentionBlock


def event_key_counts(
    pyramid: PromptPyramid, num_prompts: int, grid_tokens: int, visibility: str = "relatives"
) -> Tensor:
    """How many copies of each key an event sees, over the keys as this module orders them.

    A prompt has one copy per bottom-level event. n visible copies weigh as much as one key with
    log n added to its logit, so the logarithm of the counts is the attention's mask. Whole numbers
    are kept because they are exact in every dtype the model may be moved to.

    Args:
        num_prompts: N_p.
        grid_tokens: 1+G² tokens of a frame.
        visibility: which events, see `PromptPyramid.sees`.

    Returns:
        int64 [N_e, N_e + N_p + N_f·(1+G²)]. Keys: events; prompts; tokens of frame 0, of frame 1, …
    """
    copies = pyramid.related[:, -pyramid.num_bottom_events :].sum(dim=1, keepdim=True)
    frames = pyramid.frames_of_event.repeat_interleave(grid_tokens, dim=1)
    events = pyramid.sees(visibility)
    return torch.cat([events, copies.expand(-1, num_prompts), frames], dim=1)


def expand_attention(weights: Tensor, pyramid: PromptPyramid, num_prompts: int) -> Tensor:
    """Attention over this module's keys, in the column order of ``PromptPyramid.visibility``.

    Args:
        weights: [B, N_e, N_e + N_p + N_f·(1+G²)].

    Returns:
        [B, N_e, N_e + N_p·n_1 + (1+G²)·N_f]; a prompt's weight is split equally over its visible
        copies.
    """
    num_events = pyramid.num_events
    events, prompts, frames = weights.tensor_split([num_events, num_events + num_prompts], dim=-1)
    copies = pyramid.related[:, -pyramid.num_bottom_events :].to(weights)  # [N_e, n_1]
    shares = copies / copies.sum(dim=1, keepdim=True)
    prompts = (prompts.unsqueeze(-1) * shares.unsqueeze(1)).flatten(-2)
    frames = frames.unflatten(-1, (pyramid.num_frames, -1)).transpose(-2, -1).flatten(-2)
    return torch.cat([events, prompts, frames], dim=-1)


def video_layer(
    block: ResidualAttentionBlock, adapter: TemporalAdapter | None,
    frames: Tensor, events: Tensor, prompts: Tensor, bias: Tensor,
    *, last: bool = False, lora: LoRA | None = None, groups: FrameGroups | None = None,
    return_attention: bool = False, head: int | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Both sides of one layer; each sees what the layer before has left.

    Args:
        block: CLIP's block; its norms, attention and MLP serve every token.
        frames: [B·N_f, 1+G², D_v].
        events: [B, N_e, D_v].
        prompts: this layer's visual prompts, [N_p, D_v].
        bias: the log of ``event_key_counts``, added to the events' attention logits.
        last: frames are not needed after this layer, only their keys and values in it.
        lora: of the block's projection, for frames, events and prompts.
        groups: in which frames attend together, in place of each by itself.
        return_attention: also the events' attention, averaged over heads, or of one `head`.

    Returns:
        frames (None after the last layer), events, and the attention [B, N_e, keys] or None.
    """
    attn = block.attn
    num_frames = len(frames) // len(events)
    first = "k" if last else "q"
    *frame_queries, keys, values = attn.project(block.ln_1(frames), first, lora=lora)
    q, *event_keys_values = attn.project(block.ln_1(events), lora=lora)
    prompt_keys_values = attn.project(block.ln_1(prompts).unsqueeze(0), "k", lora=lora)
    keys_of, values_of = zip(event_keys_values, prompt_keys_values, (keys, values), strict=True)
    bias = bias.to(q.dtype)

    def see(q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        return attn.attend(q, _join(*keys), _join(*values), mask=bias)

    # The joined keys and values are a copy of the frames': a seventh of what a training step would
    # keep, and quickly made again.
    seen = recomputed(see, q, keys_of, values_of)
    events = block.feed_forward(events + seen)
    attention = _attention_weights(q, _join(*keys_of), bias, head) if return_attention else None
    if last:
        return None, events, attention

    attend = partial(groups.attend, attn) if groups else attn.attend
    attended = attend(*frame_queries, keys, values)  # [B·N_f, 1+G², D_v]
    frames = frames + attended
    if adapter is not None:
        mixed = adapter(attended[:, 1:], num_frames)
        frames = torch.cat([frames[:, :1], frames[:, 1:] + mixed], dim=1)
    return block.feed_forward(frames), events, attention


def recomputed(function: Callable, *arguments: Any, **settings: Any) -> Any:
    """What the function returns; what it kept for the gradient is computed again instead."""
    if not torch.is_grad_enabled():
        return function(*arguments, **settings)
    # nothing here is random
    return checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, **settings
    )


def text_layer(
    block: ResidualAttentionBlock, words: Tensor, prefix: Tensor, read: Tensor | None = None,
    lora: LoRA | None = None,
) -> Tensor:  # fmt: skip
    """CLIP's text block over [SOS, prefix, words …] whose prefix outputs are dropped again.

    Since the prefix is replaced before the next layer, it only serves as keys and values. A postfix
    would stand after every word, out of sight under the causal mask.

    Args:
        words: SOS and the other tokens, [T, W, D_t].
        prefix: this layer's text prompts, [N_p, D_t].
        read: int64 [T]; compute this one position of each text only.
        lora: of the block's projection.

    Returns:
        [T, W, D_t], or [T, 1, D_t] with ``read``.
    """
    attn, batch = block.attn, len(words)
    normed = block.ln_1(words)
    position = torch.arange(words.shape[1], device=words.device)
    if read is None:
        q, *keys_values = attn.project(normed, lora=lora)
        rows = position.unsqueeze(0)  # [1, W]
    else:
        keys_values = attn.project(normed, "k", lora=lora)
        row = torch.arange(batch, device=words.device), read
        (q,) = attn.project(normed[row].unsqueeze(1), "q", "q", lora)
        words, rows = words[row].unsqueeze(1), read.unsqueeze(1)  # [T, 1]
    prefix_keys_values = attn.project(block.ln_1(prefix).unsqueeze(0), "k", lora=lora)
    k, v = (
        torch.cat([p.expand(batch, -1, -1, -1), w], dim=1)
        for p, w in zip(prefix_keys_values, keys_values, strict=True)
    )  # [T, N_p + W, heads, 64]
    sees_prefix = (rows > 0).unsqueeze(-1).expand(-1, -1, len(prefix))  # SOS stands before it
    sees_words = rows.unsqueeze(-1) >= position
    mask = torch.cat([sees_prefix, sees_words], dim=-1).unsqueeze(1)  # [1 or T, 1, rows, N_p + W]
    return block.feed_forward(words + attn.attend(q, k, v, mask=mask))


def _join(events: Tensor, prompts: Tensor, frames: Tensor) -> Tensor:
    """Keys (or values) of the events' attention, [B, N_e + N_p + N_f·(1+G²), heads, 64]."""
    batch, _, *head = events.shape
    return torch.cat(
        [events, prompts.expand(batch, -1, -1, -1), frames.reshape(batch, -1, *head)], dim=1
    )


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor, head: int | None) -> Tensor:
    """softmax(q kᵀ / √c + bias) of one head, or averaged over heads: [B, N_e, keys]."""
    if head is not None:
        q, k = q[:, :, head : head + 1], k[:, :, head : head + 1]
    logits = torch.einsum("bnhc,bmhc->bhnm", q, k) / q.shape[-1] ** 0.5 + bias
    return logits.softmax(dim=-1).mean(dim=1)

"""ProPy written down plainly, the way the paper describes it and without any shortcut.

Everything a token could attend to is concatenated and masked, prompts are copied and carried
through the MLP, frames are projected for both sides, attention weights are explicit, the adapter is
a Conv3d. The program's shortcuts are tested, and its speed is measured, against this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.propy import ProPy
from modules.pyramid import PromptPyramid


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] to [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(
    block, queries: Tensor, others: Tensor, visible: Tensor | None = None, lora=None,
    added: Tensor | float = 0.0,
) -> tuple:  # fmt: skip
    """Explicit multi-head attention of normalised queries over normalised others; `added` to its
    logits."""
    attn = block.attn
    weight, bias = attn.in_proj_weight, attn.in_proj_bias.chunk(3)
    if lora is not None:
        weight = weight + 2 * lora.up @ lora.down
    weight = weight.chunk(3)
    heads = attn.num_heads
    q = heads_of(F.linear(queries, weight[0], bias[0]), heads)
    k, v = (heads_of(F.linear(others, weight[i], bias[i]), heads) for i in (1, 2))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + added
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    weights = logits.softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).flatten(-2)
    return F.linear(out, attn.out_proj.weight, attn.out_proj.bias), weights.mean(dim=1)


def mlp(block, x: Tensor) -> Tensor:
    hidden = F.linear(block.ln_2(x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    if block.activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        hidden = hidden * torch.sigmoid(1.702 * hidden)
    return x + F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)


def adapt(adapter, patches: Tensor, num_frames: int, grid: int) -> Tensor:
    """fc1, a grouped Conv3d over time, fc2, on [B·N_f, G², D_v]."""
    x = F.linear(patches, adapter.fc1.weight, adapter.fc1.bias)
    x = x.unflatten(1, (grid, grid)).unflatten(0, (-1, num_frames)).permute(0, 4, 1, 2, 3)
    weight = adapter.conv.weight.unsqueeze(-1)  # [C, 1, k, 1, 1]
    padding = (weight.shape[2] // 2, 0, 0)
    x = F.conv3d(x, weight, adapter.conv.bias, padding=padding, groups=len(weight))
    x = x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    return F.linear(x, adapter.fc2.weight, adapter.fc2.bias)


def encode_video(model: ProPy, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised frames [B,N_f,3,H,W] to embeddings [B,N_e,D] and attention [L,B,N_e,keys]."""
    visual, pyramid = model.clip.visual, model.pyramid
    batch, num_frames = frames.shape[:2]
    grid = model.clip.sizes.grid
    x = visual.conv1(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding
    if model.config.frame_embedding:
        x = x + model.frame_embedding.repeat(batch, 1).unsqueeze(1)
    x = visual.ln_pre(x)
    events = model.prompts.event_prompts.expand(batch, -1, -1)
    all_weights = []
    for layer, block in enumerate(visual.transformer.resblocks):
        lora = model.vision_lora[layer] if model.config.lora_rank else None
        copies = model.prompts.visual_prompts[layer].repeat_interleave(
            pyramid.num_bottom_events, dim=0
        )  # prompt-major, as the columns of the visibility
        tokens = x.unflatten(0, (batch, num_frames)).transpose(1, 2).flatten(1, 2)  # token-major
        everything = torch.cat([events, copies.expand(batch, -1, -1), tokens], dim=1)
        seen, weights = attention(
            block, block.ln_1(events), block.ln_1(everything), model.visibility, lora
        )
        all_weights.append(weights)
        carried = torch.cat([events + seen, copies.expand(batch, -1, -1)], dim=1)
        attended = attend_frames(model, layer, block.ln_1(x), lora)
        if layer < len(model.adapters):
            mixed = adapt(model.adapters[layer], attended[:, 1:], num_frames, grid)
            attended = torch.cat([attended[:, :1], attended[:, 1:] + mixed], dim=1)
        x = mlp(block, x + attended)
        events = mlp(block, carried)[:, : pyramid.num_events]
    tokens = x.unflatten(0, (batch, num_frames)).flatten(1, 2)
    everything = visual.ln_post(torch.cat([events, tokens], dim=1)) @ visual.proj
    return everything[:, : pyramid.num_events], torch.stack(all_weights)


def attend_frames(model: ProPy, layer: int, normed: Tensor, lora) -> Tensor:
    """Every frame by itself, or a group of frames together: [B·N_f, 1+G², D_v]."""
    block = model.clip.visual.transformer.resblocks[layer]
    sizes = [int(size) for size in model.config.frame_groups.split(",") if size]
    index = layer - (len(model.clip.visual.transformer.resblocks) - 1 - len(sizes))
    if not 0 <= index < len(sizes):
        return attention(block, normed, normed, lora=lora)[0]
    size, bias = sizes[index], model.frame_groups[index].bias
    num_frames, tokens = model.pyramid.num_frames, normed.shape[1]
    frame = torch.arange(num_frames).repeat_interleave(tokens).to(normed.device)
    together = frame // size == (frame // size).unsqueeze(1)
    distance = (frame - frame.unsqueeze(1)).clamp(1 - size, size - 1)  # key − query
    video = normed.unflatten(0, (-1, num_frames)).flatten(1, 2)
    attended, _ = attention(block, video, video, together, lora, bias[distance + size - 1])
    return attended.unflatten(1, (num_frames, tokens)).flatten(0, 1)


def encode_text(model: ProPy, token_ids: Tensor) -> Tensor:
    """Token ids [T,W] to features [T,D], prefix and postfix prompts in the sequence."""
    clip, prompts = model.clip, model.prompts
    x = clip.token_embedding(token_ids) + clip.positional_embedding[: token_ids.shape[1]]
    visual_prompts = prompts.visual_prompts
    if model.config.text_prompts == "none":
        visual_prompts = visual_prompts[:, :0]
    num_prompts = visual_prompts.shape[1]
    length = x.shape[1] + 2 * num_prompts
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    for layer, block in enumerate(clip.transformer.resblocks):
        sequence = x
        if num_prompts:
            before = prompts.prefix_proj(visual_prompts[layer]).expand(len(x), -1, -1)
            after = prompts.postfix_proj(visual_prompts[layer]).expand(len(x), -1, -1)
            sequence = torch.cat([x[:, :1], before, x[:, 1:], after], dim=1)
        normed = block.ln_1(sequence)
        lora = model.text_lora[layer] if model.config.lora_rank else None
        sequence = mlp(block, sequence + attention(block, normed, normed, causal, lora)[0])
        words = sequence[:, 1 + num_prompts : length - num_prompts]
        x = torch.cat([sequence[:, :1], words], dim=1)
    x = clip.ln_final(x)
    end = [row.index(max(row)) for row in token_ids.tolist()]
    return x[torch.arange(len(x)), end] @ clip.text_projection


def readout(name: str, cosines: Tensor, pyramid: PromptPyramid) -> Tensor:
    """[..., N_e] to [...]: the score of a video in training, at its end, or in ranking."""
    best = cosines.max(dim=-1).values
    if name == "max":
        return best
    level, spans = pyramid.level_of_event, pyramid.spans
    if name == "levels":
        levels = [cosines[..., level == k].max(dim=-1).values for k in level.unique()]
        return torch.stack(levels).mean(dim=0)
    if name in ("consensus", "half"):
        slots = []
        for first, last in spans[level == 1].tolist():
            covers = (spans[:, 0] <= first) & (last <= spans[:, 1])
            heard = [covers & (level == k) for k in level[covers].unique()]
            slots.append(sum(cosines[..., here].max(dim=-1).values for here in heard) / len(heard))
        consensus = torch.stack(slots).max(dim=0).values
        return consensus if name == "consensus" else (best + consensus) / 2
    if name == "top4_bottom":
        cosines = cosines[..., level == 1]
    if name != "annealed":
        cosines = cosines.sort(dim=-1, descending=True).values[..., :4]
    weights = torch.exp(cosines / (0.005 if name == "annealed" else 0.05))
    return (weights * cosines).sum(dim=-1) / weights.sum(dim=-1)


def scores(model: ProPy, texts: Tensor, events: Tensor) -> Tensor:
    """[T, B]: the training's read-out of a video's cosines, scaled."""
    texts = texts / texts.norm(dim=-1, keepdim=True)
    events = events / events.norm(dim=-1, keepdim=True)
    cosines = torch.stack([texts @ video.T for video in events], dim=1)
    similarity = readout(model.config.readout, cosines, model.pyramid)
    return similarity * model.clip.logit_scale.exp()


def loss(similarity: Tensor, text_to_video: Tensor) -> Tensor:
    """The two directions, with a loop over texts and one over videos."""
    rows = [
        similarity[t].logsumexp(0) - similarity[t, v] for t, v in enumerate(text_to_video.tolist())
    ]
    columns = [
        similarity[:, v].logsumexp(0) - similarity[text_to_video == v, v].logsumexp(0)
        for v in range(similarity.shape[1])
    ]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2

"""A corpus as the model sees it: every video and every text of a split, embedded once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Embeddings:
    """A corpus as the model sees it, in float32 on the model's device."""

    events: Tensor  # [V, N_e, D]
    texts: Tensor  # [T, D]

    def to(self, device: torch.device) -> Embeddings:
        """The same on another device."""
        return Embeddings(self.events.to(device), self.texts.to(device))


@torch.inference_mode()
def embed_corpus(
    model: nn.Module,
    videos: Collection[dict],
    texts: Sequence[dict],
    device: torch.device,
) -> Embeddings:
    """Every video and every text of a split, once each, in float32.

    The loader's workers decode the first videos while texts are encoded, and the next ones while
    videos are; on a GPU nothing in here waits for its results.

    Args:
        videos: batches {frames, indices} as ``EvaluationLoader`` gives them, in order.
        texts: batches {token_ids, indices} of ``evaluation_text_batches``, in any order.
    """
    model.eval()
    shown = {"unit": "batch", "dynamic_ncols": True, "leave": False}
    clips = iter(videos)
    indices, features = [], []
    for batch in tqdm(texts, desc="texts", **shown):
        indices.append(batch["indices"])
        features.append(model.encode_text(batch["token_ids"].to(device)))
    in_order = torch.empty_like(torch.cat(features))
    in_order[torch.cat(indices).to(device)] = torch.cat(features)
    events = []
    for batch in tqdm(clips, desc="videos", total=len(videos), **shown):
        events.append(model.encode_video(batch["frames"].to(device, non_blocking=True)))
    return Embeddings(torch.cat(events), in_order)

"""A corpus as the model sees it: every video and every text of a split, embedded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

SHOWN = {"unit": "batch", "dynamic_ncols": True, "leave": False}  # of the progress bars


@dataclass
class Embeddings:
    """A corpus as the model sees it, in float32 on the model's device."""

    events: Tensor  # [V, N_e, D]
    texts: Tensor  # [T, D]

    def to(self, device: torch.device) -> Embeddings:
        """The same on another device."""
        return Embeddings(self.events.to(device), self.texts.to(device))


@torch.inference_mode()
def embed_videos(
    model: nn.Module, batches: Iterable[dict], device: torch.device, total: int | None = None
) -> Tensor:
    """Event embeddings, float32 [V, N_e, D], of the videos in the order of ``EvaluationLoader``'s
    batches, `total` of them. On a GPU nothing in here waits for its results."""
    model.eval()
    return torch.cat([
        model.encode_video(batch["frames"].to(device, non_blocking=True))
        for batch in tqdm(batches, desc="videos", total=total, **SHOWN)
    ])  # fmt: skip


@torch.inference_mode()
def embed_texts(model: nn.Module, batches: Sequence[dict], device: torch.device) -> Tensor:
    """Embeddings, float32 [T, D], of texts in the order of their indices, given as the batches of
    ``evaluation_text_batches`` in any order."""
    model.eval()
    features = torch.cat([
        model.encode_text(batch["token_ids"].to(device))
        for batch in tqdm(batches, desc="texts", **SHOWN)
    ])  # fmt: skip
    indices = torch.cat([batch["indices"] for batch in batches]).to(device)
    in_order = torch.empty_like(features)
    in_order[indices] = features
    return in_order

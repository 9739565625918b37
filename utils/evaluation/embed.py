"""A corpus as the model sees it: every video and every text of a split, embedded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders.sampling import share
from utils.distributed import gather, is_main, own_share, world_size

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
) -> list[Tensor]:
    """Event embeddings, float32 [B, N_e, D] a batch, of the videos in ``EvaluationLoader``'s
    batches, `total` of them. On a GPU nothing in here waits for its results."""
    model.eval()
    return [
        model.encode_video(batch["frames"].to(device, non_blocking=True))
        for batch in tqdm(batches, desc="videos", total=total, disable=not is_main(), **SHOWN)
    ]


@torch.inference_mode()
def embed_texts(model: nn.Module, batches: Sequence[dict], device: torch.device) -> Tensor:
    """Embeddings, float32 [T, D], of texts in the order of their indices, given as the batches of
    ``evaluation_text_batches`` in any order."""
    model.eval()
    features = gather_batches(
        [
            model.encode_text(batch["token_ids"].to(device))
            for batch in tqdm(
                batches[own_share(len(batches))], desc="texts", disable=not is_main(), **SHOWN
            )
        ],
        [len(batch["indices"]) for batch in batches],
        (model.clip.sizes.embed_dim,) if world_size() > 1 else (),
        device,
    )
    in_order = torch.empty_like(features)
    in_order[torch.cat([batch["indices"] for batch in batches]).to(device)] = features
    return in_order


def gather_batches(
    own: Sequence[Tensor], sizes: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """The rows of all batches, each of which one process has encoded.

    Args:
        own: this process's, [rows, *shape]; none where there are more processes than batches.
        sizes: rows of every batch.
    """
    rows = torch.cat(list(own)) if own else torch.empty(0, *shape, device=device)
    cuts = (share(len(sizes), r, world_size()) for r in range(world_size()))
    return gather(rows, [sum(sizes[cut]) for cut in cuts])

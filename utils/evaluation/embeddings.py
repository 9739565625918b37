"""Embeddings of an evaluated split, kept in an HDF5 file and read again instead of computed.

What they depend on is kept with them: the checkpoint's bytes, captions, videos, pyramid and the
length of texts. Only the videos' pixels cannot be compared, since nothing of them is read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dataloaders.annotations import Query, corpus_videos
from utils import RunError
from utils.evaluation.embed import Embeddings
from utils.evaluation.hdf5 import Hdf5Writer, read_hdf5
from utils.files import atomic_write

FORMAT = "ProPy embeddings, version 1"
TEXTS = ("desc_ids", "captions", "vid_names")
NUMBERS = {
    "events": np.float32, "texts": np.float32, "target": np.int32, "durations": np.float32,
    "proposals": np.float32,
}  # fmt: skip
ATTRIBUTES = {"max_words": int, "checkpoint": str, "sha256": str, "epoch": int}
REMEDY = "make the file again with main.py --save_embeddings"


@dataclass(frozen=True)
class KeptEmbeddings:
    """Embeddings of T texts and V videos, and what they were computed from.

    Attributes:
        embeddings: events float32 [V, N_e, D] and texts float32 [T, D].
        desc_ids, captions: of every text; ids as text.
        vid_names: of every video.
        target: int32 [T], the right video of each text.
        durations: float32 [V] seconds.
        proposals: float32 [N_e, 2] start and end of every event as a share of the video.
        max_words: tokens of a caption that were read.
        checkpoint: path of the model, as it was named.
        sha256: of the checkpoint's file.
        epoch: epochs that it was trained.
    """

    embeddings: Embeddings
    desc_ids: list[str]
    captions: list[str]
    vid_names: list[str]
    target: Tensor
    durations: Tensor
    proposals: Tensor
    max_words: int
    checkpoint: str
    sha256: str
    epoch: int

    @classmethod
    def of(
        cls,
        embeddings: Embeddings,
        queries: Sequence[Query],
        proposals: Tensor,
        *,
        max_words: int,
        checkpoint: Path,
        epoch: int,
    ) -> KeptEmbeddings:
        """Embeddings of the queries and of their videos, in the order of first appearance."""
        videos = corpus_videos(list(queries))
        column = {video.vid_name: index for index, video in enumerate(videos)}
        return cls(
            embeddings=Embeddings(embeddings.events.cpu(), embeddings.texts.cpu()),
            desc_ids=[str(query.desc_id) for query in queries],
            captions=[query.desc for query in queries],
            vid_names=list(column),
            target=torch.tensor([column[query.vid_name] for query in queries], dtype=torch.int32),
            durations=torch.tensor([video.duration for video in videos]),
            proposals=proposals.cpu().float(),
            max_words=max_words,
            checkpoint=str(checkpoint),
            sha256=_sha256(checkpoint),
            epoch=epoch,
        )

    def lacking(self, queries: Sequence[Query]) -> list[str]:
        """The queries' videos that they were made without, as with --allow_missing 1."""
        return sorted({query.vid_name for query in queries} - set(self.vid_names))

    def check(
        self,
        queries: Sequence[Query],
        proposals: Tensor,
        *,
        max_words: int,
        checkpoint: Path | None,
    ) -> None:
        """Compare with what they would be computed from now.

        Args:
            checkpoint: None if there is none at hand to compare.

        Raises:
            RunError: they are of something else; says of what.
        """
        if not queries:
            raise RunError(f"none of the annotated videos is in it: {REMEDY}")
        wanted = [(str(query.desc_id), query.desc, query.vid_name) for query in queries]
        videos = [self.vid_names[column] for column in self.target.tolist()]
        kept = list(zip(self.desc_ids, self.captions, videos, strict=True))
        if len(kept) != len(wanted):
            lacking = len(self.lacking(queries))
            raise RunError(
                f"it holds {len(kept):,} queries, the annotations {len(wanted):,}: {REMEDY}"
                + f", or go on without the {lacking:,} videos it lacks: --allow_missing 1"
                * bool(lacking)
            )
        for row, (theirs, ours) in enumerate(zip(kept, wanted, strict=True)):
            for what, a, b in zip(("desc_id", "desc", "vid_name"), theirs, ours, strict=True):
                if a != b:
                    raise RunError(
                        f"{what} of query {row + 1} is {a!r}, in the annotations {b!r}: {REMEDY}"
                    )
        if self.max_words != max_words:
            raise RunError(
                f"made with --max_words {self.max_words}, not {max_words}: give that, or {REMEDY}"
            )
        proposals = proposals.cpu().float()
        if proposals.shape != self.proposals.shape or not proposals.equal(self.proposals):
            raise RunError(
                f"made with another pyramid, of {len(self.proposals)} events: give its "
                f"--pyr_config_path, or {REMEDY}"
            )
        if checkpoint is not None and _sha256(checkpoint) != self.sha256:
            raise RunError(
                f"made with another checkpoint than {checkpoint}, {self.checkpoint} after epoch "
                f"{self.epoch} (sha256 {self.sha256[:12]}…): {REMEDY}"
            )


def save_embeddings(path: Path, kept: KeptEmbeddings) -> None:
    """Write an HDF5 file: data sets and attributes with the names of `KeptEmbeddings`.

    Raises:
        OutputError: it cannot be written. What was there before is still there then.
    """
    tensors = vars(kept) | vars(kept.embeddings)
    with atomic_write(path) as part, Hdf5Writer(part, path) as writer:
        file = writer.file
        file.attrs["format"] = FORMAT
        for name in ATTRIBUTES:
            file.attrs[name] = getattr(kept, name)
        for name in TEXTS:
            file.create_dataset(name, data=getattr(kept, name), dtype=h5py.string_dtype())
        for name, dtype in NUMBERS.items():
            file.create_dataset(name, data=tensors[name].numpy(), dtype=dtype)


def load_embeddings(path: Path) -> KeptEmbeddings:
    """Read what `save_embeddings` wrote, into the CPU's memory.

    Raises:
        RunError: no such file, another format, or contents that contradict each other.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file: main.py --save_embeddings makes one")
    try:
        found = read_hdf5(path, FORMAT, TEXTS, NUMBERS, ATTRIBUTES)
    except RunError as error:
        raise RunError(f"{path}: {error}: {REMEDY}") from error
    kept = KeptEmbeddings(Embeddings(found.pop("events"), found.pop("texts")), **found)
    wrong = _contradiction(kept)
    if wrong:
        raise RunError(f"{path}: {wrong}: {REMEDY}")
    return kept


def _contradiction(kept: KeptEmbeddings) -> str | None:
    events, texts = kept.embeddings.events, kept.embeddings.texts
    num_texts, num_videos, width = len(kept.desc_ids), len(kept.vid_names), texts.shape[-1]
    shapes = {
        "events": (events, (num_videos, len(kept.proposals), width)),
        "texts": (texts, (num_texts, width)),
        "target": (kept.target, (num_texts,)),
        "durations": (kept.durations, (num_videos,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)}, expected {list(shape)}"
        if not tensor.isfinite().all():
            return f"{name} has values that are not finite"
    if len(kept.captions) != num_texts:
        return f"{len(kept.captions)} captions of {num_texts} queries"
    if num_texts and not 0 <= kept.target.min() <= kept.target.max() < num_videos:
        return f"target holds an index that is not one of the {num_videos} videos"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

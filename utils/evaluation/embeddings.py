"""Embeddings of an evaluated split, saved in an HDF5 file and read again instead of computed.

What they depend on is saved with them: the checkpoint's bytes, captions, videos, pyramid and the
length of texts. Only the videos' pixels cannot be compared, since nothing of them is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.annotations import Query, Split
from modules.torch_files import sha256_of
from utils import RunError
from utils.evaluation.embed import Embeddings
from utils.evaluation.hdf5 import read_hdf5, write_hdf5
from utils.evaluation.rows import scoring_of, zero_shot_name

REMEDY = "make the file with main.py --save_embeddings"
FORMAT = "ProPy embeddings, version 2"
LAYOUT = {
    "max_words": "int", "checkpoint": "text", "sha256": "text", "epoch": "int", "readout": "text",
    "desc_ids": "text T", "captions": "text T", "vid_names": "text V", "target": "int32<V T",
    "durations": "float32 V", "proposals": "float32 N_e 2", "events": "float32 V N_e D",
    "texts": "float32 T D",
}  # fmt: skip


@dataclass(frozen=True)
class SavedEmbeddings:
    """Embeddings of T texts and V videos, and what they were computed from."""

    embeddings: Embeddings  # events float32 [V, N_e, D] and texts float32 [T, D]
    desc_ids: list[str]  # of every text
    captions: list[str]
    vid_names: list[str]
    target: Tensor  # int32 [T] the right video of each text
    durations: Tensor  # float32 [V] seconds
    proposals: Tensor  # float32 [N_e, 2] start and end of every event as a share of the video
    max_words: int  # tokens of a caption that were read
    checkpoint: str  # path of the model, as it was named, or zero_shot_name
    sha256: str  # of that file, or of CLIP's weights
    epoch: int  # epochs that it was trained
    readout: str  # that it was trained with, by which goes how videos are ranked

    @classmethod
    def from_split(
        cls, embeddings: Embeddings, split: Split, proposals: Tensor,
        *, max_words: int, checkpoint: Path, epoch: int, readout: str, scoring: str | None = None,
    ) -> SavedEmbeddings:  # fmt: skip
        """Embeddings of a split; those of zero-shot CLIP have a scoring, and its weights in place
        of a checkpoint."""
        return cls(
            embeddings=embeddings.to(torch.device("cpu")),
            desc_ids=[str(query.desc_id) for query in split.queries],
            captions=[query.desc for query in split.queries],
            vid_names=[video.vid_name for video in split.videos],
            target=split.target.int(),
            durations=torch.tensor([video.duration for video in split.videos]),
            proposals=proposals.cpu().float(),
            max_words=max_words,
            checkpoint=zero_shot_name(scoring, checkpoint) if scoring else str(checkpoint),
            sha256=sha256_of(checkpoint),
            epoch=epoch,
            readout=readout,
        )

    def check(
        self, queries: Sequence[Query], proposals: Tensor,
        *, max_words: int, readout: str, checkpoint: Path | None, scoring: str | None = None,
    ) -> None:  # fmt: skip
        """Compare with what they would be computed from now: a checkpoint, None if there is none at
        hand, or a zero-shot scoring.

        RunError: they are of something else; says of what.
        """
        if not queries:
            raise RunError(f"none of the annotated videos is in it: {REMEDY}")
        if len(queries) != len(self.desc_ids):
            missing = len({query.vid_name for query in queries} - set(self.vid_names))
            hint = f", or continue without the {missing:,} missing videos: --allow_missing 1"
            counts = f"{len(self.desc_ids):,} queries, the annotations {len(queries):,}"
            raise RunError(f"it holds {counts}: {REMEDY}{hint * bool(missing)}")
        for row, query in enumerate(queries):
            old = (self.desc_ids[row], self.captions[row], self.vid_names[self.target[row]])
            new = (str(query.desc_id), query.desc, query.vid_name)
            for what, before, now in zip(("desc_id", "desc", "vid_name"), old, new, strict=True):
                if before != now:
                    which = f"{what} of query {row + 1}"
                    raise RunError(f"{which} is {before!r}, in the annotations {now!r}: {REMEDY}")
        made, own = None, scoring_of(self.checkpoint)
        if own != scoring:
            flag = f"with --zero_shot {own}" if own else "without --zero_shot"
            made = f"{self.checkpoint}: evaluate it {flag}, or"
        elif self.max_words != max_words:
            made = f"--max_words {self.max_words}, not {max_words}: give that, or"
        elif self.readout != readout:
            made = f"--readout {self.readout}, not {readout}: give that, or"
        elif not torch.equal(proposals.cpu().float(), self.proposals):
            events = f"of {len(self.proposals)} events"
            made = f"another pyramid, {events}: give its --pyr_config_path, or"
        elif checkpoint is not None and sha256_of(checkpoint) != self.sha256:
            other = f"{self.checkpoint} after epoch {self.epoch} (sha256 {self.sha256[:12]}…)"
            made = f"another checkpoint than {checkpoint}, {other}:"
        if made:
            raise RunError(f"made with {made} {REMEDY}")


def save_embeddings(path: Path, saved: SavedEmbeddings) -> None:
    """Write an HDF5 file: the attributes under their names. OutputError: see `write_hdf5`."""
    write_hdf5(path, FORMAT, LAYOUT, vars(saved) | vars(saved.embeddings))


def load_embeddings(path: Path) -> SavedEmbeddings:
    """Read what `save_embeddings` wrote, into the CPU's memory. RunError: no such file, another
    format, or contents that contradict each other."""
    found = read_hdf5(path, FORMAT, LAYOUT, REMEDY)
    for name in ("events", "texts", "durations"):
        if not found[name].isfinite().all():
            raise RunError(f"{path}: {name} has values that are not finite: {REMEDY}")
    return SavedEmbeddings(Embeddings(found.pop("events"), found.pop("texts")), **found)

"""What a run leaves behind to read: log.txt for people, log.jsonl for programs, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def setup_logging(folder: Path) -> logging.Logger:
    """The program's logger, writing to the terminal and, appending, to ``folder/log.txt``.

    Warnings of libraries and of the other parts of the program go the same way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s  %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[
            logging.StreamHandler(sys.stdout),
            logging.FileHandler(folder / "log.txt", encoding="utf-8"),
        ],
        force=True,
    )
    log = logging.getLogger("propy")
    log.setLevel(logging.INFO)
    return log


def append_json(path: Path, record: dict) -> None:
    """Append one record as one line; what stands in the file already is never touched."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class EpochLog:
    """One record an epoch, to log.jsonl and as TensorBoard scalars."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self.board = SummaryWriter(str(folder))

    def write(self, record: dict) -> None:
        """Args: record: flat, with ``epoch`` and ``global_step``; numbers are plotted."""
        append_json(self.path, record)
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.board.add_scalar(name, value, record["global_step"])
        self.board.flush()

    def close(self) -> None:
        self.board.close()

"""What a run leaves to read: log.txt for people, log.jsonl for programs, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.command import USER_ERRORS
from utils.files import append_line, read_records, write_json, writing
from utils.misc import git_revision

# Numbers of an epoch that differ from one time to the next.
MEASURED = ("data_time", "step_time", "memory_gib")


def setup_logging(folder: Path | None) -> None:
    """What this program logs, and libraries' warnings, to the terminal and to ``folder/log.txt``,
    which is appended to; errors alone, and to the terminal, in a process that does not write, whose
    folder is None. OutputError: the file cannot be opened."""
    if folder is None:
        logging.basicConfig(level=logging.ERROR, force=True)
        return
    with writing(folder / "log.txt"):
        log_file = _LogFile(folder / "log.txt", encoding="utf-8")
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s  %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout), log_file],
        force=True,
    )
    logging.getLogger("propy").setLevel(logging.INFO)


class _LogFile(logging.FileHandler):
    """What cannot be written to log.txt, on a full disk, is on the terminal still: warns once."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if not self.warned:
            print(f"{self.baseFilename}: incomplete: {sys.exc_info()[1]}", file=sys.stderr)
        self.warned = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def log_to_file(message: str) -> None:
    """Into log.txt alone, if there is one already: for what the terminal gets in another way."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            handler.emit(logging.makeLogRecord({"msg": message}))


@contextlib.contextmanager
def errors_in_log() -> Iterator[None]:
    """What ends the block is in log.txt too: an error's message, or a bug's traceback."""
    try:
        yield
    except USER_ERRORS as error:
        log_to_file(f"error: {error}")
        raise
    except Exception:
        log_to_file(traceback.format_exc())
        raise


def write_args(folder: Path, settings: Mapping[str, Any]) -> None:
    """``args.json`` of a run: what it was started with, and by which revision of the program."""
    write_json(folder / "args.json", {**settings, "git": git_revision()})


def append_json(path: Path, record: dict) -> None:
    """Append one record as one line of strict JSON. OutputError: it could not be written."""
    append_line(path, json.dumps(_strict(record), allow_nan=False))


def _strict(value: object) -> object:
    """null in place of NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EpochLog:
    """One record an epoch, to log.jsonl and as TensorBoard scalars, and some steps to TensorBoard.

    Args:
        folder: of the run.
        resumed_at: the step after which a resumed run continues. What TensorBoard has beyond it is
            hidden, and an epoch that log.jsonl has already is not written a second time unless
            something else came out of it.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.path = folder / "log.jsonl"
        resumed = resumed_at is not None
        known = read_records(self.path) if resumed and self.path.is_file() else []
        self._known = {_outcome(record) for record in known}
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # Constructed last: it may not be closed by an error above.
        self.board = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed else None)

    def write(self, record: dict) -> None:
        """Args: record: flat, with ``epoch`` and ``global_step``; numbers are plotted."""
        if _outcome(record) in self._known:
            return
        self._plot(record, record["global_step"])
        self.flush()
        append_json(self.path, record)

    def write_step(self, step: int, record: dict) -> None:
        """Args: step: counted from 1 over the whole run; record: numbers to plot."""
        self._plot({f"step/{name}": value for name, value in record.items()}, step)

    def flush(self) -> None:
        """See all scalars in the file."""
        with writing(self.path.parent):
            self.board.flush()

    def close(self) -> None:
        self.board.close()

    def _plot(self, record: dict, step: int) -> None:
        with writing(self.path.parent):
            for name, value in record.items():
                if type(value) in (int, float):
                    self.board.add_scalar(name, value, step)


class SilentEpochLog:
    """In place of an `EpochLog`, of a process that does not write."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _outcome(record: dict) -> str:
    """What is the same whenever an epoch is computed again."""
    return json.dumps(_strict({k: value for k, value in record.items() if k not in MEASURED}))

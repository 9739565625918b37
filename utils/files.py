"""Files that appear whole or not at all, and folders that one run at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataloaders.storage import PARTIAL_PREFIX, commit, lock, sync, temporary_sibling
from utils import OutputError, RunError
from utils.command import USER_ERRORS

LOCK_NAME = ".lock"
TRACES = {LOCK_NAME, "log.txt"}  # of any run

logger = logging.getLogger("propy.files")

_appending = threading.Lock()  # a process's own lock on a file holds back none of its threads


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """`temporary_sibling`, committed when the block ends without an error.

    OutputError: it could not be written. What was there before is still there then.
    """
    with writing(path), temporary_sibling(path) as part:
        yield part
        commit(part, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The system's errors in the block as an OutputError that names the file or folder."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}. Make room, fix what is wrong "
            "there, or write elsewhere"
        ) from error


def check_outputs(files: Iterable[Path]) -> None:
    """OutputError, before hours are spent, if a file cannot be written, by the calls that are made
    later, or is a folder."""
    for path in files:
        with writing(path), temporary_sibling(path) as part, temporary_sibling(path) as target:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            part.write_bytes(b"\n")
            commit(part, target)
            if path.suffix == ".jsonl" and path.exists():
                path.open("ab+").close()


def append_line(path: Path, line: str) -> None:
    """Append a line and see it on the disk. OutputError: it could not be written, or only in part.

    A last line that a killed run left without its end is closed first, and stays a line of its own.
    Other processes may append to the file too, also from other machines.
    """
    with writing(path), _appending, path.open("ab+") as file:
        lock(file.fileno(), wait=True)
        torn = False
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        sync(file.fileno())


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, unless it is there; what an error leaves empty goes again.

    Empty is one with nothing but a lock and a log.txt, which says no more than the error.

    OutputError: it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (*USER_ERRORS, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            if made and {path.name for path in folder.iterdir()} <= TRACES:
                for name in TRACES:
                    (folder / name).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder and keep every other process out of it; the end of this one, however it comes
    about, ends that too. Temporary files of runs that were killed are removed.

    OutputError: another run has it, which the message names, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(new_folder(folder))
        with writing(folder):
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            _lock(descriptor, folder)
        holder = f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
        for part in folder.glob(f"{PARTIAL_PREFIX}*.part"):
            logger.warning("%s: removed, a run was killed while it wrote this file", part)
            part.unlink(missing_ok=True)
        yield


def _lock(descriptor: int, folder: Path) -> None:
    locked = lock(descriptor)
    if locked is None:
        logger.warning("%s: its file system has no locks; start no second run there", folder)
    elif not locked:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        raise OutputError(
            f"{folder}: another run is writing there: {holder or 'of unknown name'}. Wait for it, "
            "or give another --output_dir"
        )


def read_records(path: Path) -> list[dict]:
    """The lines of a .jsonl file, each an object. RunError: no such file.

    Other lines are skipped with a warning: one was torn off if the run was killed while it wrote,
    and may be anything if the power failed.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file: give the folder of a run, such as logs/prvr_tvr")
    records, unreadable = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            unreadable.append(str(number))
    if unreadable:
        first = ", ".join(unreadable[:10]) + (", …" if len(unreadable) > 10 else "")
        logger.warning("%s: unreadable lines skipped: %d (line %s)", path, len(unreadable), first)
    return records


def write_json(path: Path, content: dict) -> None:
    """A JSON file, whole or not at all. OutputError: it cannot be written."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_records(path: Path, records: Iterable[dict]) -> None:
    """A file of JSON lines, whole or not at all. OutputError: it cannot be written."""
    with atomic_write(path) as part:
        part.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

"""Files on any file system: NFS, Lustre, CIFS and FUSE lack locks, fsync and more, in many ways.

What only makes writing safer is forgone there. HDF5 is opened without locks of its own anywhere:
its files appear whole here and never change afterwards. (A set HDF5_USE_FILE_LOCKING overrules it.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py

PARTIAL_PREFIX = ".preparing-"  # of files that are still being written
UNSUPPORTED = {
    errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL,
    524,  # ENOTSUPP of the Linux kernel, which has no name outside
}  # fmt: skip


@contextlib.contextmanager
def if_supported() -> Iterator[None]:
    """What the file system does not offer is left out."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync(descriptor: int) -> None:
    """See an open file's bytes on the disk. OSError: they cannot be written."""
    with if_supported():
        os.fsync(descriptor)


def lock(descriptor: int, wait: bool = False, shared: bool = False) -> bool | None:
    """Take a POSIX lock; False: another process has it, None: the file system has no locks.

    With `wait` until the other one has ended or closed the file. A `shared` one excludes others
    that are not.

    Unlike flock's it is the process's own, so a forked loader worker, which may outlive a killed
    run by seconds, does not hold it. Within one process it excludes no one.
    """
    try:
        with if_supported():
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.lockf(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
            return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # which, POSIX leaves open
            raise
        return False
    return None


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A hidden, unique, empty file beside `path` to write to; removed unless committed."""
    part = path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}.part"
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def commit(part: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk; the name is there too then."""
    with part.open("rb+") as file:
        sync(file.fileno())
    part.replace(path)
    with contextlib.suppress(OSError):  # many file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def open_hdf5(file: Any, mode: str = "r", **settings: Any) -> h5py.File:
    """A path, or an open file. OSError: it cannot be opened, or is no HDF5 file."""
    import h5py

    return h5py.File(file, mode, locking=False, **settings)

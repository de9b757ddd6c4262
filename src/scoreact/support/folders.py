"""Folders that one process at a time is at work in: new ones, which the making decides, and a lock.

Knows folders; does not know what is done in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .errors import RunExists

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"  # the lock's file; it is removed at the end, and one that a kill left behind locks nothing
_held: set[Path] = set()  # by this process, which the system would give its own locks again


@contextlib.contextmanager
def made_folder(parent: Path, name: Callable[[int], str]) -> Iterator[Path]:
    """The first of parent/name(1), parent/name(2), ... that could be made; removed at the end where it stayed empty."""
    number, folder, new = 0, None, not parent.exists()
    while folder is None:
        number += 1
        with contextlib.suppress(FileExistsError):
            (parent / name(number)).mkdir(parents=True)
            folder = parent / name(number)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
            if new:
                parent.rmdir()


class FolderLock:
    """Taken when it is made. Raises RunExists where another process, or another run of this one, is at work.

    missing: why there is no lock, where the file system has none, else "". A lock of POSIX record locks: a process that was
    forked by the holder does not keep it.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.missing = folder.resolve() / LOCK, ""
        self._file: IO[str] | None = None
        if self.path in _held:
            raise self._taken(folder, "another run of this process")
        if sys.platform == "win32":
            self.missing = "this system has no locks of that kind"
            return
        while self._file is None:
            self._file = self._locked(folder)
        _held.add(self.path)

    def _locked(self, folder: Path) -> IO[str] | None:
        """The file once it is locked; None where its last holder removed it meanwhile."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._taken(folder, holder or "another process") from None
            self.missing = error.strerror or "the file system has no locks"
            return self.path.open("a+", encoding="utf-8")
        if not self.path.exists() or os.fstat(file.fileno()).st_ino != self.path.stat().st_ino:
            file.close()
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
        return file

    def _taken(self, folder: Path, holder: str) -> RunExists:
        return RunExists(f"{holder} is at work in {folder}; wait for its end, or give another folder.")

    def release(self) -> None:
        """Give the folder free; nothing if that was done before."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)  # while it is locked: who opened it in between sees that it is gone
            self._file.close()
            self._file = None
            _held.discard(self.path)

"""Durable file primitives: what is complete has its final name, and its hash is known from the writing of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from glm_export.runtime.errors import IntegrityError, ResourceError

Progress = Callable[[int], None]
"""Is told the number of bytes done since the last call."""

_CHUNK = 1 << 20  # stays in the second-level cache between reading and hashing
_LONGEST_PATH = 1024
_MUCH = 1 << 20  # bytes: to hash them takes far longer than to hand them to a thread
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FAILS = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What identifies a file's content: its size in bytes and its sha256 in lower-case hex."""

    size: int
    sha256: str


def sha256_of(path: Path, progress: Progress | None = None, *, forget: bool = False) -> str:
    """Returns the sha256 of a file in lower-case hex.

    Args:
        path: the file.
        progress: is told the bytes hashed.
        forget: drop the file from the page cache on the way, whose pages then serve again instead of ever new ones.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if forget:
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
            if progress:
                progress(size)
    return digest.hexdigest()


def fits_page_cache(size: int) -> bool:
    """Whether so many bytes take at most half of the memory, and may well stay there for whoever reads them next."""
    return size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class HashingWriter:
    """Writes `path` so that it exists either complete and on disk, or not at all.

    A context manager: the bytes go to `<name>.tmp` and are hashed on the way; leaving without an exception syncs the
    file and renames it, leaving with one removes it. `size` counts what was written, `record` is known after success.

    Raises:
        ResourceError: the disk is full or fails (also on leaving, where delayed writes are reported).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")  # starts its thread when it has work
        self._file: BinaryIO | None = None
        self._done = False

    @property
    def sha256(self) -> str:
        """The hash of what was written so far, in lower-case hex."""
        return self._digest.hexdigest()

    @property
    def record(self) -> FileRecord:
        """Size and hash of the finished file.

        Raises:
            RuntimeError: the file is not finished.
        """
        if not self._done:
            raise RuntimeError(f"{self.path.name} is not finished")
        return FileRecord(size=self.size, sha256=self.sha256)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes (any contiguous buffer); much at once is hashed while it is written."""
        if self._file is None:
            raise RuntimeError(f"{self.path.name} is not open for writing")
        view = memoryview(data).cast("B")
        if len(view) < _MUCH:
            self._digest.update(view)
            self._append(view)
        else:
            hashed = self._hasher.submit(self._digest.update, view)
            try:
                self._append(view)
            finally:
                hashed.result()
        self.size += len(view)

    def _append(self, view: memoryview) -> None:
        assert self._file is not None
        with write_errors(self.path):
            self._file.write(view)
            if len(view) >= _MUCH:
                # Sends to the disk what was just written, or the sync at the end would have to wait for all of it; and
                # drops what has arrived there from the page cache, whose pages serve again instead of ever new ones.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> HashingWriter:
        with write_errors(self.path):
            self._temporary.unlink(missing_ok=True)  # of a killed build; and a link there must not be written through
            self._file = self._temporary.open("xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        file, self._file = self._file, None
        self._hasher.shutdown()
        try:
            if kind is None:
                with write_errors(self.path):
                    file.flush()
                    os.fsync(file.fileno())
                    if self.size >= _MUCH:
                        # The rest too: who reads the file first brings it back in large pages (large_pages.py).
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    file.close()
                    self._temporary.replace(self.path)
                    sync_directory(self.path.parent)
                    self._done = True
        finally:
            with contextlib.suppress(OSError):  # closing flushes once more, which fails again on a full disk
                file.close()
            if not self._done:
                with contextlib.suppress(OSError):  # what went wrong before is what counts
                    self._temporary.unlink(missing_ok=True)


def write_text_durably(path: Path, text: str) -> FileRecord:
    """Replaces `path` by UTF-8 text in one step: a crash leaves the old content or the new, never a mixture."""
    with HashingWriter(path) as writer:
        writer.write(text.encode("utf-8"))
    return writer.record


def sync_directory(directory: Path) -> None:
    """Makes names created, renamed or removed in `directory` survive a power failure."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_relative(path: str) -> bool:
    """Whether a path names something below a root in exactly one way: no root, no `..`, `.`, backslash or NUL.

    One that is not printable or longer than any of ours is none either.
    """
    harmless = len(path) <= _LONGEST_PATH and path.isprintable() and "\\" not in path
    return harmless and all(part not in ("", ".", "..") for part in path.split("/"))


def resolve_inside(root: Path, relative: str) -> Path:
    """Returns `root/relative` if it is a plain file that nobody outside `root` can reach or redirect.

    Raises:
        IntegrityError: the path leaves the root or is not normalized, the file is missing, something on the way is a
            symbolic link, or it is not a regular file with exactly one link (onnx refuses others as external data).
    """
    if not is_plain_relative(relative):
        raise IntegrityError(f"{relative!r} is not a plain path below {root}: the bundle is damaged, build it again.")
    path = root
    parts = relative.split("/")
    for depth, part in enumerate(parts, start=1):
        path = path / part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise IntegrityError(f"{path} is missing: copy the bundle again, or build it again.") from None
        except OSError as error:
            raise IntegrityError(f"{path} can not be read ({error.strerror}): copy the bundle again.") from error
        if stat.S_ISLNK(status.st_mode):
            raise IntegrityError(
                f"{path} is a symbolic link, a bundle holds plain files: copy it with links followed (cp -rL)."
            )
        if depth == len(parts) and not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is not a regular file: copy the bundle again, or build it again.")
        if depth == len(parts) and status.st_nlink != 1:
            raise IntegrityError(
                f"{path} has {status.st_nlink} hard links, a bundle file has one: copy the bundle without links."
            )
    return path


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what a disk reports while `path` is being written into a ResourceError; other errors pass."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno in _DISK_FULL:
            raise ResourceError(
                f"No room to write {place} ({error.strerror}): free some space and run the same command again."
            ) from error
        if error.errno in _DISK_FAILS:
            raise ResourceError(
                f"{place} can not be written ({error.strerror}): check the disk and run the same command again."
            ) from error
        raise

"""Files that may be anyone's: opened without side effects, read by position, and watched for changes.

A symbolic link is fine, the Hugging Face cache is made of them: what counts is that it leads to a regular file. Reading
goes through pread rather than a memory map, so that a disk error or a file cut short is an error with a sentence, not a
signal that ends the process.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_export.runtime.errors import InputError, IntegrityError

LARGEST_TEXT = 25_000_000
"""Bytes of JSON that are read at most: what the Hugging Face Hub accepts as a header; real ones stay below 10 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """What changes when a file is written to or replaced by another of the same name."""

    device: int
    inode: int
    size: int
    """In bytes."""
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """From the result of a stat."""
        return cls(device=status.st_dev, inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, Stamp]]:
    """Opens a file for reading; yields its descriptor and stamp.

    A device or FIFO is refused before it is opened, which could already do something; one that takes the place of a
    file in between does not block.

    Raises:
        InputError: it is missing, not readable, or anything but a regular file.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        else:
            descriptor = None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        seen = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: can not be read ({seen}); copy or download it again.") from None
    if descriptor is None:
        raise InputError(f"{path}: not a regular file; copy or download it again.")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file; copy or download it again.")
        yield descriptor, Stamp.of(status)
    finally:
        os.close(descriptor)


def read_text_file(path: Path, limit: int = LARGEST_TEXT) -> tuple[bytes, Stamp]:
    """The whole content of a file of at most `limit` bytes, and its stamp.

    Raises:
        InputError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as (descriptor, stamp):
        if stamp.size > limit:
            raise InputError(
                f"{path}: is {stamp.size} bytes long, more than {limit}; this is not the file it should be."
            )
        return read_exactly(path, descriptor, 0, stamp.size), stamp


def read_exactly(path: Path, descriptor: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of an open file.

    Raises:
        InputError: a read error.
        IntegrityError: the file ends before that.
    """
    buffer = bytearray(length)
    read_into(path, descriptor, offset, memoryview(buffer))
    return bytes(buffer)


def read_into(path: Path, descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes of an open file from `offset` on; raises as `read_exactly`."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise InputError(f"{path}: can not be read ({error.strerror}); check the disk it lies on.") from None
        if not count:
            raise changed(path, "has become shorter")
        done += count


def check_stamp(path: Path, expected: Stamp) -> None:
    """Checks that a file is still the one it was when it was opened first.

    Raises:
        IntegrityError: its size, time or identity is another, or it is gone.
    """
    try:
        seen = Stamp.of(os.stat(path))
    except OSError:
        raise changed(path, "has disappeared") from None
    refuse_change(path, expected, seen)


def refuse_change(path: Path, expected: Stamp, seen: Stamp) -> None:
    """Compares the stamps of a file; raises as `check_stamp`."""
    if seen == expected:
        return
    if seen.size != expected.size:
        raise changed(path, f"was {expected.size} bytes long and now is {seen.size}")
    if (seen.device, seen.inode) != (expected.device, expected.inode):
        raise changed(path, "has been replaced by another file")
    raise changed(path, "has been written to")


def changed(path: Path, how: str) -> IntegrityError:
    """The error of a source that does not hold still."""
    return IntegrityError(f"{path}: {how} while it was being read; let nothing write to it and start again.")

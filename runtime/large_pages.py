"""Files in large pages: the processor looks up one address for 2 MiB instead of 512, and reads weights faster.

What decides is how the page cache holds a file, and that is how it came there. A read, or a page fault like any other,
brings small pages; a fault in a mapping that asks for large ones brings 2 MiB at once, if the file system can (ext4
since Linux 6.16, XFS). Pages that are cached stay as they are, those of a file that was just copied among them, until
they are dropped: `glm-export verify` does that. Where something of this is missing, the same bytes come in small pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

SIZE = 2 << 20
"""Of a large page, in bytes."""

_MADV_POPULATE_READ = 22  # Linux 5.14; the module mmap has no name for it
_madvise = ctypes.CDLL(None).madvise  # the one of the module mmap keeps all other threads waiting for the disk
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_file(path: Path, *, large: bool = True) -> mmap.mmap:
    """Maps a file for reading, and has its pages read when they are needed, in large pages where the system can.

    Args:
        path: the file.
        large: False for one of which only some rows are needed, here and there: 2 MiB for each would be too much.

    Raises:
        OSError: the file can not be opened or mapped.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapped.madvise(mmap.MADV_HUGEPAGE if large else mmap.MADV_NOHUGEPAGE)
    return mapped


def read_ahead(path: Path) -> None:
    """Brings a file into the page cache, what is not there yet in large pages; what fails is left to who reads it."""
    import numpy as np  # not for `--help`, which is to be instant

    with contextlib.suppress(OSError, ValueError), map_file(path) as mapped:
        if len(mapped) >= SIZE:
            _madvise(np.frombuffer(mapped, np.uint8).ctypes.data, len(mapped), _MADV_POPULATE_READ)


def drop(path: Path) -> None:
    """Has the page cache forget a file as soon as the disk has it, but for what somebody has mapped; never fails."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""One process at a time builds a bundle, or an engine of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from glm_export.runtime.errors import LockedError


@contextmanager
def only_builder(bundle: Path) -> Iterator[None]:
    """Holds the lock beside a bundle, which need not exist yet.

    Raises:
        LockedError: another process holds it.
    """
    lock = filelock.FileLock(bundle.with_name(bundle.name + ".lock"))
    try:
        with lock.acquire(timeout=0):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # still locked: whoever comes now makes a new one
    except filelock.Timeout:
        raise LockedError(f"Another process is building {bundle}; wait for it or choose another place.") from None

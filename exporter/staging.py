"""The directory beside a bundle's final place in which it grows, and how it gets there.

`<out>.building-<host>-<pid>-<random>` belongs to one process. Whoever goes on with what another one left renames the
directory to a name of its own first: only one can, and if the other one is alive after all, its next step finds its
directory gone. So two builders never write into the same one, even on network file systems where every lock succeeds;
the lock only spares the second builder the work.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from glm_export.runtime.errors import LockedError, UsageError
from glm_export.runtime.files import sync_directory, write_errors
from glm_export.runtime.manifest import MANIFEST_NAME

_UNFINISHED, _REPLACED = ".building-", ".replaced-"
_OWN = re.compile("[^-]*-[0-9]+-[0-9a-f]{6}")  # what follows: a directory of another name may be anyone's
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """A bundle in the making."""

    directory: Path
    out: Path
    replace: bool

    @classmethod
    @contextmanager
    def open(cls, out: Path, *, replace: bool) -> Iterator[Staging]:
        """Claims the right to build `out`, and what an earlier builder left of it.

        Args:
            out: the bundle's final place.
            replace: whether a bundle may be there already.

        Raises:
            UsageError: there is something that must not be replaced, or it is no name for a folder.
            LockedError: another process is building it, or took over this build.
            ResourceError: the disk is full or fails.
        """
        if out.name in ("", ".."):
            raise UsageError(f"{out} is no name to be given; write the folder that is to be made.")
        with write_errors(out):
            _refuse_existing(out, replace)  # also before a lock file appears beside it
            out.parent.mkdir(parents=True, exist_ok=True)
            with only_builder(out):
                _put_back(out)
                _refuse_existing(out, replace)
                staging = cls(directory=_claim(out), out=out, replace=replace)
                try:
                    yield staging
                except FileNotFoundError as error:
                    if staging.directory.exists():
                        raise
                    raise LockedError(
                        f"Another process took over the build of {out}; wait for it or choose another place."
                    ) from error

    def publish(self) -> None:
        """Gives the finished bundle its final name. A bundle of that name is there until then, and deleted after."""
        sync_directory(self.directory)
        if not self.replace or not self.out.exists():
            try:
                self.directory.rename(self.out)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise LockedError(
                    f"{self.out} appeared while it was being built, in {self.directory}: remove one of the two."
                ) from None
            sync_directory(self.out.parent)
            return
        if _exchange(self.directory, self.out):
            replaced = self.directory
        else:
            # Between these two lines the bundle has no name; `_put_back` of the next build gives it back.
            replaced = self.out.with_name(_own_name(self.out, _REPLACED))
            self.out.rename(replaced)
            self.directory.rename(self.out)
        sync_directory(self.out.parent)
        shutil.rmtree(replaced)


def bytes_left(out: Path) -> int:
    """How much of the disk unfinished builds of `out` take, which the next one will use or remove."""
    left = (path for directory in _left(out, _UNFINISHED) for path in directory.rglob("*"))
    return sum(path.lstat().st_size for path in left if path.is_file())


def _refuse_existing(out: Path, replace: bool) -> None:
    if not os.path.lexists(out):
        return
    if not replace:
        raise UsageError(
            f"{out} already exists; remove it, choose another place for the bundle, or replace a bundle by --replace."
        )
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out} is no bundle, and only a bundle is replaced; choose another place.")


@contextmanager
def only_builder(out: Path) -> Iterator[None]:
    """Holds the lock beside a bundle, which need not exist yet.

    Raises:
        UsageError: something else has the lock's name.
        LockedError: another process holds it.
    """
    lock = filelock.FileLock(out.with_name(out.name + ".lock"))
    with suppress(FileNotFoundError):
        seen = os.lstat(lock.lock_file)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size:
            raise UsageError(
                f"{lock.lock_file} is not a lock of an earlier build, which is an empty file; move it, or choose "
                "another place."
            )
    try:
        with lock.acquire(timeout=0):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # still locked: whoever comes now makes a new one
    except filelock.Timeout:
        at = [path.name.partition(_UNFINISHED)[2] for path in _left(out, _UNFINISHED)]
        who = f" ({', '.join(at)})" if at else ""
        raise LockedError(f"Another process{who} is building {out}; wait for it or choose another place.") from None


def _claim(out: Path) -> Path:
    """A directory of our own: the last one that another builder left, or a new one."""
    own = out.with_name(_own_name(out, _UNFINISHED))
    for left in _left(out, _UNFINISHED):
        place = own if not own.exists() else out.with_name(_own_name(out, _UNFINISHED))
        with suppress(FileNotFoundError):  # someone else was faster
            left.rename(place)
            if place != own:
                shutil.rmtree(place)
    own.mkdir(exist_ok=True)
    sync_directory(out.parent)
    return own


def _put_back(out: Path) -> None:
    """Undoes the first half of a replacement that was killed in the middle."""
    for replaced in _left(out, _REPLACED):
        if os.path.lexists(out):
            shutil.rmtree(replaced)
        else:
            replaced.rename(out)
            sync_directory(out.parent)


def _left(out: Path, kind: str) -> list[Path]:
    """Directories of earlier builders, the last one first."""
    if not out.parent.is_dir():
        return []
    found = []
    for entry in os.scandir(out.parent):
        with suppress(FileNotFoundError):  # claimed by someone else
            ours = _OWN.fullmatch(entry.name.removeprefix(out.name + kind)) and entry.name.startswith(out.name + kind)
            if ours and entry.is_dir(follow_symlinks=False):
                found.append((entry.stat().st_mtime_ns, out.with_name(entry.name)))
    return [path for _, path in sorted(found, reverse=True)]


def _own_name(out: Path, kind: str) -> str:
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum())[:20]
    return f"{out.name}{kind}{host}-{os.getpid()}-{secrets.token_hex(3)}"


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step; False where the file system can not."""
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))

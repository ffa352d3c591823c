import errno
import hashlib
import os
from pathlib import Path

import pytest

from glm_export.runtime.errors import IntegrityError, ResourceError
from glm_export.runtime.files import FileRecord, HashingWriter, resolve_inside, sha256_of, write_text_durably

DATA = bytes(range(256)) * 40_000  # more than two chunks


def test_writer_hashes_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with HashingWriter(path) as writer:
        writer.write(DATA[:1000])
        assert not path.exists()
        assert (tmp_path / "file.bin.tmp").exists()
        writer.write(memoryview(DATA)[1000:])
        with pytest.raises(RuntimeError, match="not finished"):
            _ = writer.record
    assert path.read_bytes() == DATA
    assert writer.record == FileRecord(size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    assert os.listdir(tmp_path) == ["file.bin"]


def test_hash_reports_progress(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(DATA)
    done: list[int] = []
    assert sha256_of(path, done.append) == hashlib.sha256(DATA).hexdigest()
    assert sum(done) == len(DATA)
    assert len(done) > 1


def write_and_fail(path: Path) -> None:
    with HashingWriter(path) as writer:
        writer.write(b"new")
        raise KeyboardInterrupt


def test_exception_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text_durably(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, r"No room to write .*file\.txt \(No space left on device\): free some space and run"),
        (errno.EDQUOT, r"No room to write .*Disk quota exceeded"),
        (errno.EIO, r"file\.txt can not be written \(Input/output error\): check the disk and run the same command"),
        (errno.ESTALE, r"can not be written \(Stale file handle\)"),
    ],
)
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, sentence: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, call)), fail)
    with pytest.raises(ResourceError, match=sentence):
        write_text_durably(tmp_path / "file.txt", "text")
    assert os.listdir(tmp_path) == []


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_durably(tmp_path / "missing" / "file.txt", "text")


def test_a_failing_write_waits_for_the_hash_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fadvise", fail)
    data = bytearray(DATA)
    writer = HashingWriter(tmp_path / "file")
    with pytest.raises(ResourceError, match="can not be written"), writer:
        writer.write(data)
    data.clear()  # not possible while a thread still reads it
    assert writer.sha256 == hashlib.sha256(DATA).hexdigest()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: open_file(Path("/dev/full"), "wb"))
        with pytest.raises(ResourceError, match="No room"):
            write_text_durably(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


def test_link_in_place_of_the_temporary_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file.tmp").symlink_to(victim)
    write_text_durably(tmp_path / "file", "text")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "text"


def test_fsync_happens_before_rename_and_of_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle: int) -> None:
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def spy_replace(path: Path, target: Path) -> Path:
        calls.append(f"rename {path.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_text_durably(tmp_path / "a", "text")
    assert calls == ["sync a.tmp", "rename a.tmp", f"sync {tmp_path.name}"]


def test_what_was_written_is_dropped_when_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    advise, fsync = os.posix_fadvise, os.fsync

    def spy_advise(handle: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        calls.append(f"drop {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        advise(handle, start, length, advice)

    def spy_fsync(handle: int) -> None:
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    monkeypatch.setattr(os, "posix_fadvise", spy_advise)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    with HashingWriter(tmp_path / "large") as writer:
        for start in range(0, len(DATA), 1 << 16):
            writer.write(memoryview(DATA)[start : start + (1 << 16)])
    write_text_durably(tmp_path / "small", "text")
    folder = f"sync {tmp_path.name}"
    assert calls == ["sync large.tmp", "drop large.tmp", folder, "sync small.tmp", folder]


def test_plain_files_resolve(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "layer 0.safetensors").write_bytes(b"1")
    assert resolve_inside(tmp_path, "weights/layer 0.safetensors").read_bytes() == b"1"


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../x", "./x", "a//b", "a/", "a\\b", "a\0b", "a\nb", "..", "a/.."]
)
def test_paths_that_are_not_plain_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(IntegrityError, match="not a plain path"):
        resolve_inside(tmp_path, path)


def test_redirections_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (root / "file").write_text("1")
    (root / "link").symlink_to(root / "file")
    (root / "linked").symlink_to(root / "dir")
    (root / "dir" / "twice").write_text("1")
    os.link(root / "dir" / "twice", root / "hard")
    os.mkfifo(root / "pipe")
    for path, message in {
        "missing": "is missing",
        "file/below": "is missing",
        "dir": "not a regular file",
        "pipe": "not a regular file",
        "link": "is a symbolic link",
        "linked/twice": "is a symbolic link",
        "hard": "has 2 hard links",
        "x" * 300: "can not be read",
    }.items():
        with pytest.raises(IntegrityError, match=message):
            resolve_inside(root, path)

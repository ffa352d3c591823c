import os
import re
from pathlib import Path

import numpy as np
import pytest

from glm_export.runtime import large_pages
from glm_export.runtime.large_pages import SIZE, drop, map_file, read_ahead

PAGES = 8
"""Large ones, of the files here: the system may be short of a few."""


def file_of_large_pages(folder: Path) -> Path:
    path = folder / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(PAGES * SIZE + 5))
    return path


def file_system(path: Path) -> str:
    """The type of the file system that holds a path."""
    mounts = (line.split(" ") for line in Path("/proc/self/mounts").read_text().splitlines())
    places = [(mount[1], mount[2]) for mount in mounts if path.is_relative_to(mount[1])]
    return max(places, key=lambda place: len(place[0]))[1]


def mapped_large(start: int) -> int:
    """The bytes in large pages of the mapping that starts there."""
    entries = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (entry,) = (entry for entry in entries if entry and int(entry.split("-")[0], 16) == start)
    found = re.search(r"^FilePmdMapped: +(\d+) kB$", entry, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def missing_for_large_pages(path: Path) -> str | None:
    """What this machine lacks to hold a file in large pages, if anything."""
    version = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    if (kind := file_system(path)) != "ext4" or version < (6, 16):
        return f"{kind} on Linux {version[0]}.{version[1]}: ext4 on 6.16 or newer has large pages"
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        return "large pages are switched off"
    return None


def test_a_mapped_file_has_its_bytes_and_is_not_written_to(tmp_path: Path) -> None:
    path = file_of_large_pages(tmp_path)
    mapped = map_file(path)
    assert mapped[:] == path.read_bytes()
    with pytest.raises(TypeError, match="modify a readonly"):
        mapped[0] = 0


@pytest.mark.parametrize("ahead", [True, False])
def test_a_file_that_is_not_cached_comes_in_large_pages(tmp_path: Path, ahead: bool) -> None:
    if missing := missing_for_large_pages(tmp_path):
        pytest.skip(missing)
    path = file_of_large_pages(tmp_path)
    drop(path)
    if ahead:
        read_ahead(path)
        seen = np.memmap(path, np.uint8, "r")  # as anybody maps it, who finds what was read
    else:
        seen = np.frombuffer(map_file(path), np.uint8)
    assert mapped_large(seen.ctypes.data) == 0
    seen[::4096].max()  # touches every page
    assert mapped_large(seen.ctypes.data) >= PAGES // 2 * SIZE


def test_a_table_is_not_read_in_large_pages(tmp_path: Path) -> None:
    if missing := missing_for_large_pages(tmp_path):
        pytest.skip(missing)
    path = file_of_large_pages(tmp_path)
    drop(path)
    seen = np.frombuffer(map_file(path, large=False), np.uint8)
    assert seen[SIZE] == path.read_bytes()[SIZE]
    seen[::4096].max()
    assert mapped_large(seen.ctypes.data) == 0


def test_without_large_pages_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages.mmap, "MADV_HUGEPAGE", -1)  # as of a kernel that does not know it
    monkeypatch.setattr(large_pages, "_MADV_POPULATE_READ", -1)
    path = file_of_large_pages(tmp_path)
    read_ahead(path)
    assert map_file(path)[:] == path.read_bytes()


def test_what_can_not_be_read_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for name in ("missing", "empty", "."):
        read_ahead(tmp_path / name)
        drop(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "missing")
    with pytest.raises(ValueError, match="empty"):
        map_file(tmp_path / "empty")

"""Every place that opens a file by a name, and everything that may be there or be called so.

Whatever it is: a command ends by itself, with the exit code for it and one sentence, or does its work; and nothing
outside the folder that it was pointed at is written to, removed or copied.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import cli_tools
import onnx
import pytest
from cli_tools import bundle, call, checkpoint, copied

from glm_export.exporter.source.companions import COPIED
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.files import FileRecord, sha256_of

SECONDS = 60  # no command takes ten; who opens a FIFO waits for ever
CANARY = "nobody's business"

Make = Callable[[Path], None]


# What may be at a path instead of a file. `outside` is a folder beside the root, with a file in it.


def outside(path: Path) -> Path:
    """The folder of the canaries: beside the folder that the test is about."""
    return next(parent for parent in path.parents if (parent / "outside").is_dir()) / "outside"


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_outside(path: Path) -> None:
    path.symlink_to(outside(path) / "canary")


def link_to_folder_outside(path: Path) -> None:
    path.symlink_to(outside(path))


def relative_link_outside(path: Path) -> None:
    path.symlink_to(os.path.relpath(outside(path) / "canary", path.parent))


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to(outside(path) / "new")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


OTHERS: Mapping[str, Make] = {
    "directory": directory,
    "FIFO": fifo,
    "socket": unix_socket,
    "endless device": endless,
    "link to nothing": dangling,
    "circle of links": circle,
    "link to a folder outside": link_to_folder_outside,
}
LINKS: Mapping[str, Make] = {"link outside": link_outside, "relative link outside": relative_link_outside}
REFUSED = {
    **dict.fromkeys(OTHERS, "not a regular file"),
    **dict.fromkeys(LINKS, "leads out of"),
    "link to nothing": "No such file",
    "circle of links": "Too many levels of symbolic links",
}


@pytest.fixture(autouse=True)
def canaries(tmp_path: Path) -> Iterator[None]:
    """What is outside stays as it is: names, content, times of writing. And nothing waits for ever."""

    def too_late(*_: object) -> NoReturn:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "canary").write_text(CANARY)
    before = snapshot(folder)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def refused(code: int, *arguments: object) -> str:
    """As in cli_tools; and the sentence is short, harmless to a terminal and shows nothing of what is outside."""
    sentence = cli_tools.refused(code, *arguments)
    assert sentence.isprintable()
    assert len(sentence) < 8000  # some have a path of 6000 in them that the user gave
    assert CANARY not in sentence
    return sentence


# A checkpoint: what it is made of may be links, as in the Hugging Face cache, but nothing else is copied along.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copied(checkpoint(), tmp_path / "root" / "checkpoint")


def build(source: Path, *more: object) -> list[object]:
    return ["build", source, "-o", source.parent / "out", "--recipe", "tiny", "--layers", 1, "--quiet", *more]


def put(path: Path, make: Make) -> None:
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("kind", [*OTHERS, *LINKS])
@pytest.mark.parametrize("name", COPIED)
def test_companion(name: str, kind: str, source: Path) -> None:
    put(source / name, {**OTHERS, **LINKS}[kind])
    sentence = refused(3, *build(source))
    assert name in sentence
    assert REFUSED[kind] in sentence
    assert not list(source.parent.glob("out*"))


def test_companion_of_another_checkpoint(source: Path) -> None:
    put(source / "tokenizer.json", link_outside)
    assert "leads out of" in refused(3, "checkpoint", source, "-o", source.parent / "out", "--quiet")
    assert not list(source.parent.glob("out*"))


def test_companion_beyond_all_sizes(source: Path) -> None:
    os.truncate(source / "tokenizer.json", 2**40)
    assert "is 1099511627776 bytes long" in refused(3, *build(source))
    assert not list(source.parent.glob("out*"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_what_is_read_of_a_link_is_not_shown(file: str, source: Path) -> None:
    put(source / file, link_outside)
    assert "not valid JSON" in refused(3, *build(source))


def test_huggingface_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--zai-org--GLM-4.5"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    copied(checkpoint(), blobs)
    snapshot.mkdir(parents=True)
    for blob in list(blobs.iterdir()):
        hashed = blob.rename(blobs / sha256_of(blob))
        (snapshot / blob.name).symlink_to(Path("../../blobs") / hashed.name)
    assert (snapshot / "tokenizer.json").is_symlink()
    out = tmp_path / "out"
    called = call("build", snapshot, "-o", out, "--recipe", "tiny", "--layers", 1, "--quiet")
    assert called.code == 0, called
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert Bundle.open(out).verify()


def test_names_that_could_command_a_terminal(source: Path) -> None:
    (source / "\x1b[2J.safetensors").write_bytes(b"junk")
    assert "\\x1b[2J.safetensors" in refused(3, *build(source))


# A recipe

RECIPES: Mapping[str, tuple[str, Make | None, str]] = {
    "name with a NUL": ("a\0.toml", None, "null"),
    "name that is too long": ("a" * 5000 + ".toml", None, "File name too long"),
    "FIFO": ("other.toml", fifo, "not a regular file"),
    "socket": ("other.toml", unix_socket, "not a regular file"),
    "directory": ("other.toml", directory, "not a regular file"),
    "endless device": ("other.toml", endless, "not a regular file"),
    "device": ("/dev/zero/x.toml", None, "Not a directory"),
    "circle of links": ("other.toml", circle, "links"),
    "secret that is no recipe": ("other.toml", link_outside, "not valid TOML"),
    "name that is no path": ("../../etc/passwd", None, "does not exist"),
    "itself by a link": ("other.toml", lambda path: path.symlink_to("first.toml"), "extends itself"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_extends(name: str, source: Path) -> None:
    extended, make, words = RECIPES[name]
    recipe = source.parent / "first.toml"
    recipe.write_text(f"extends = {json.dumps(extended)}\n")
    if make:
        make(source.parent / extended)
    assert words in refused(2, "build", source, "-o", source.parent / "out", "--recipe", recipe)


# Where a bundle goes

PLACES: Mapping[str, tuple[str, Make | None, int, str]] = {
    "directory": ("out", directory, 2, "already exists"),
    "FIFO": ("out", fifo, 2, "already exists"),
    "socket": ("out", unix_socket, 2, "already exists"),
    "endless device": ("out", endless, 2, "already exists"),
    "link to nothing": ("out", dangling, 2, "already exists"),
    "link to a folder": ("out", link_to_folder_outside, 2, "already exists"),
    "circle of links": ("out", circle, 2, "already exists"),
    "parent of what is not there": ("new/..", None, 2, "no name"),
    "where we are": (".", None, 2, "already exists"),
    "root": ("/", None, 2, "no name"),
    "name that is too long": ("x" * 300, None, 3, "File name too long"),
    "path that is too long": ("/".join(["x" * 200] * 30), None, 3, "File name too long"),
    "below a device": ("/dev/null/out", None, 3, "File exists"),
    "lock that is somebody's file": ("out.lock", lambda path: path.write_text("keep") and None, 2, "is not a lock"),
    "lock that is a directory": ("out.lock", directory, 2, "is not a lock"),
    "lock that is a FIFO": ("out.lock", fifo, 2, "is not a lock"),
    "lock that is a link": ("out.lock", link_outside, 2, "is not a lock"),
    "lock that is a link to nothing": ("out.lock", dangling, 2, "is not a lock"),
    "lock that is a hard link": (
        "out.lock",
        lambda path: path.hardlink_to(outside(path) / "canary"),
        2,
        "is not a lock",
    ),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("command", ["build", "checkpoint"])
def test_place(command: str, name: str, source: Path) -> None:
    path, make, code, words = PLACES[name]
    if make:
        make(source.parent / path)
    place = source.parent / path.removesuffix(".lock")
    more = ["--recipe", "tiny", "--layers", 1] if command == "build" else []
    before = sorted(source.parent.iterdir())
    sentence = refused(code, command, source, "-o", place, *more, "--quiet")
    assert words in sentence or words == "no name"
    assert sorted(source.parent.iterdir()) == before


NEIGHBOURS = ("out.building-notes", "out.building", "out.replaced-by-mine", "out.building-host-1-abcdef.old", "out.tmp")


def test_neighbours_of_like_names_are_left_alone(source: Path) -> None:
    for name in NEIGHBOURS:
        (source.parent / name).mkdir()
        (source.parent / name / "mine").write_text("keep")
    (source.parent / "out.building-host-2-abcdef").symlink_to(outside(source))
    assert call(*build(source)).code == 0
    assert call(*build(source, "--replace")).code == 0
    shutil.rmtree(source.parent / "out")
    assert call("checkpoint", source, "-o", source.parent / "out", "--quiet").code == 0
    assert {name: (source.parent / name / "mine").read_text() for name in NEIGHBOURS} == dict.fromkeys(
        NEIGHBOURS, "keep"
    )


# What an earlier build left: somebody may have been there.

LEFT: Mapping[str, Callable[[Path], object]] = {
    "journal that is a FIFO": lambda left: fifo(left / "journal.json"),
    "journal that is endless": lambda left: endless(left / "journal.json"),
    "journal that is a link": lambda left: link_outside(left / "journal.json"),
    "weights that lead outside": lambda left: link_to_folder_outside(left / "weights"),
    "graph that is a link": lambda left: link_outside(left / "model.onnx"),
    "temporary file that is a link": lambda left: link_outside(left / "model.onnx.tmp"),
    "temporary journal that is a link": lambda left: link_outside(left / "journal.json.tmp"),
    "config that is a FIFO": lambda left: fifo(left / "config.json"),
    "file that is none of ours": lambda left: (left / "mine").write_text("x"),
}


@pytest.mark.parametrize("name", LEFT)
def test_unfinished_build(name: str, source: Path) -> None:
    left = source.parent / "out.building-host-1-abcdef"
    left.mkdir()
    LEFT[name](left)
    called = call(*build(source))
    assert called.code == 0, called
    found = source.parent / "out"
    assert not any(path.is_symlink() for path in found.rglob("*"))
    assert Bundle.open(found).verify()


@pytest.mark.parametrize("way", ["link", "hard link"])
def test_unfinished_build_whose_files_were_moved_out(way: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal knows the hash, and it is right; but who made it a link can change it later."""
    out = source.parent / "out"
    monkeypatch.setattr("glm_export.exporter.build.Manifest.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(*build(source)).code != 0
    monkeypatch.undo()
    (left,) = source.parent.glob("out.building-*")
    graph, moved = left / "model.onnx", source.parent / "moved"
    graph.rename(moved)
    graph.symlink_to(moved) if way == "link" else graph.hardlink_to(moved)
    assert call(*build(source)).code == 0
    assert Bundle.open(out).verify()


# A bundle that is not ours: whatever its manifest says, sealed and with the right hashes.


def sealed(directory: Path, **changes: Any) -> None:
    """Writes the manifest again after changes: of its fields, and of files."""
    manifest = Bundle.open(directory, check="manifest").manifest
    files = dict(manifest.files) | changes.pop("files", {})
    for name in files:
        path = directory / name
        if name in manifest.files and path.is_file():
            files[name] = FileRecord(size=path.stat().st_size, sha256=sha256_of(path))
    dataclasses.replace(manifest, files=files, **changes).write(directory)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return copied(bundle("fp32"), tmp_path / "root" / "bundle")


RECORD = FileRecord(size=len(CANARY), sha256="0" * 64)
LISTED = {
    "above": "../outside/canary",
    "above, from inside": "weights/../../outside/canary",
    "absolute": "/etc/passwd",
    "dot": "./model.onnx",
    "empty": "",
    "empty part": "weights//x",
    "backslash": "..\\x",
    "NUL": "a\0b",
    "terminal escape": "\x1b[2J",
    "line feed": "a\nb",
    "too long": "x" * 5000,
    "too long for a name": "x" * 300,
    "the manifest itself": "manifest.json",
    "below a file": "model.onnx/x",
}


@pytest.mark.parametrize("command", ["run", "inspect", "validate"])
@pytest.mark.parametrize("name", LISTED)
def test_listed_name(name: str, command: str, theirs: Path) -> None:
    sealed(theirs, files={LISTED[name]: RECORD})
    refused(8, command, theirs, *(["--ids", 1] if command == "run" else []))


@pytest.mark.parametrize("command", ["run", "verify", "validate"])
@pytest.mark.parametrize("kind", [*OTHERS, *LINKS])
@pytest.mark.parametrize("file", ["weights/layer-001.safetensors", "tokenizer.json", "manifest.json"])
def test_listed_file(file: str, kind: str, command: str, theirs: Path) -> None:
    put(theirs / file, {**OTHERS, **LINKS}[kind])
    called = call(command, theirs, *(["--ids", 1] if command == "run" else []), "--quiet")
    assert called.code == 8, called
    assert CANARY not in called.out + called.err


@pytest.mark.parametrize("folder", ["weights", "engines/x"])
def test_folder_that_is_a_link(folder: str, theirs: Path) -> None:
    place = theirs / folder
    place.parent.mkdir(exist_ok=True)
    if place.is_dir():
        shutil.rmtree(place)
    link_to_folder_outside(place)
    sealed(theirs, files={f"{folder}/canary": RECORD}, engines={"x": (f"{folder}/canary",)})
    refused(8, "run", theirs, "--ids", 1)


LOCATIONS: Mapping[str, tuple[str, Make | None]] = {
    "above": ("../../outside/canary", None),
    "absolute": ("/etc/passwd", None),
    "memory of the process": ("*/_ORT_MEM_ADDR_/*", None),
    "memory as a file": ("/proc/self/mem", None),
    "NUL": ("a\0b", None),
    "too long": ("x" * 5000, None),
    "empty": ("", None),
    "backslash": ("..\\x", None),
    "folder": ("weights", None),
    "FIFO": ("more", fifo),
    "socket": ("more", unix_socket),
    "endless device": ("more", endless),
    "link outside": ("more", link_outside),
}


@pytest.mark.parametrize("name", LOCATIONS)
def test_external_data(name: str, theirs: Path) -> None:
    location, make = LOCATIONS[name]
    model = onnx.load(theirs / "model.onnx", load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (theirs / "model.onnx").write_bytes(model.SerializeToString())
    if make:
        make(theirs / location)
    sealed(theirs)
    assert "can not load" in refused(8, "run", theirs, "--ids", 1)


def test_inspect_shows_no_commands_for_a_terminal(theirs: Path) -> None:
    sealed(theirs, name="\x1b[2J", versions={"\x1b]0;x\x07": "\n1"})
    called = call("inspect", theirs)
    assert called.code == 0, called
    assert all(line.isprintable() for line in called.out.split("\n"))
    assert "\\x1b[2J" in called.out


# What validate reads and writes

VALIDATE = ("--prompts", 1, "--prompt-tokens", 2, "--steps", 1, "--quiet")


@pytest.mark.parametrize("make", [link_to_folder_outside, dangling, circle, fifo, lambda path: path.write_text("")])
def test_reports_that_are_no_folder(make: Make, theirs: Path) -> None:
    shutil.rmtree(theirs / "reports", ignore_errors=True)
    make(theirs / "reports")
    refused(8, "validate", theirs, "--no-drift", *VALIDATE)


@pytest.mark.parametrize("file", ["validation.json", "validation.json.tmp"])
def test_report_that_is_a_link(file: str, theirs: Path) -> None:
    (theirs / "reports").mkdir(exist_ok=True)
    put(theirs / "reports" / file, link_outside)
    called = call("validate", theirs, "--no-drift", *VALIDATE)
    assert called.code == 0, called
    assert not (theirs / "reports" / "validation.json").is_symlink()


SOURCES: Mapping[str, tuple[int, Any]] = {
    "above": (3, "../outside"),
    "absolute": (3, "/etc"),
    "device": (3, "/dev/zero"),
    "NUL": (3, "a\0b"),
    "too long": (3, "x" * 5000),
    "terminal escape": (3, "\x1b[2J"),
    "none": (8, None),
    "number": (8, 3),
    "list": (8, ["/etc"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_recorded_checkpoint(name: str, theirs: Path) -> None:
    code, path = SOURCES[name]
    source = dict(Bundle.open(theirs, check="manifest").manifest.source) | {"path": path}
    sealed(theirs, source=source)
    refused(code, "validate", theirs, *VALIDATE)

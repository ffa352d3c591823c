"""journal.json of an unfinished build: which files are complete, and what each of them depends on.

A build that finds one goes on after it. A file is kept if nothing that it depends on has changed and its bytes are
still those that were written; everything else is written again, and the user is told why.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from glm_export.exporter.config import parse_json, plural
from glm_export.exporter.pipeline import in_order
from glm_export.exporter.progress import Reporter
from glm_export.exporter.source.quantized import RoundingError
from glm_export.exporter.source.source_file import read_text_file
from glm_export.runtime.bundle import JOURNAL_NAME
from glm_export.runtime.errors import InputError, IntegrityError
from glm_export.runtime.files import FileRecord, Progress, resolve_inside, sha256_of, write_text_durably


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What a file depends on, as digests."""

    recipe: str
    source: str
    program: str

    def differs(self, other: Key) -> str:
        """What has changed, for a sentence."""
        names = {
            "recipe": "the recipe",
            "source": "the checkpoint",
            "program": "the version of a library or of glm-export",
        }
        return " and ".join(text for name, text in names.items() if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A complete file."""

    record: FileRecord
    key: Key
    rounding: Mapping[str, RoundingError]
    """Of a weight file: what quantizing once more did, by kind of parameter."""


class Journal:
    """The complete files of a build, on disk and in memory."""

    def __init__(self, directory: Path, keys: Mapping[str, Key]) -> None:
        self._path = directory / JOURNAL_NAME
        self._keys = keys
        self._entries: dict[str, Entry] = {}

    @classmethod
    def open(cls, directory: Path, keys: Mapping[str, Key], reporter: Reporter, *, threads: int) -> Journal:
        """Takes over what an earlier build left in `directory`, and removes from there what can not be used.

        Args:
            directory: of the unfinished bundle.
            keys: path -> what the file depends on, for every file of this build that is worth keeping.
            reporter: is told what is kept, what is not, and why.
            threads: how many files are hashed at once.
        """
        journal = cls(directory, keys)
        found = journal._read()
        fitting = {path: entry for path, entry in found.items() if keys.get(path) == entry.key}
        if fitting:
            total = sum(entry.record.size for entry in fitting.values())
            with reporter.stage(
                f"checking {len(fitting)} {plural('file', fitting)} of an unfinished build", total
            ) as done:
                states = in_order(
                    lambda path: _is_still(directory, path, fitting[path].record, done),
                    fitting,
                    threads=threads,
                    ahead=len(fitting),
                )
                journal._entries = {path: fitting[path] for path, still in zip(fitting, states, strict=True) if still}
        _explain(found, journal._entries, keys, reporter)
        _remove_all_but(directory, {JOURNAL_NAME, *journal._entries})
        journal._write()
        return journal

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def add(self, path: str, record: FileRecord, rounding: Mapping[str, RoundingError] = MappingProxyType({})) -> None:
        """Notes a file that is on disk under its final name."""
        self._entries[path] = Entry(record=record, key=self._keys[path], rounding=dict(rounding))
        self._write()

    def _read(self) -> dict[str, Entry]:
        """The entries of an earlier build; none if there is no journal or it is not ours."""
        try:
            seen = parse_json(read_text_file(self._path)[0], JOURNAL_NAME)
            return {
                path: Entry(
                    record=FileRecord(**value["record"]),
                    key=Key(**value["key"]),
                    rounding={kind: RoundingError(**error) for kind, error in value["rounding"].items()},
                )
                for path, value in seen["files"].items()
            }
        except (OSError, InputError, KeyError, TypeError, ValueError, AttributeError):
            return {}

    def _write(self) -> None:
        files = {path: dataclasses.asdict(entry) for path, entry in self._entries.items()}
        write_text_durably(self._path, json.dumps({"files": files}, indent=1))


def _is_still(directory: Path, path: str, record: FileRecord, progress: Progress) -> bool:
    try:
        place = resolve_inside(directory, path)
        return place.stat().st_size == record.size and sha256_of(place, progress) == record.sha256
    except (OSError, IntegrityError):  # no plain file: someone else made it
        return False


def _explain(
    found: Mapping[str, Entry], kept: Mapping[str, Entry], keys: Mapping[str, Key], reporter: Reporter
) -> None:
    """Says what is not used of an earlier build: one line per reason."""
    reasons: dict[str, list[str]] = {}
    for path, entry in found.items():
        if path in kept:
            continue
        if path not in keys:
            reason = "this build has no such file"
        else:
            changed = keys[path].differs(entry.key)
            reason = f"{changed} changed" if changed else "the file is damaged"
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        names = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        reporter.note(f"not used of the unfinished build: {names}, because {reason}")
    if kept:
        reporter.note(f"going on with {len(kept)} complete {plural('file', kept)} of {len(keys)}")


def _remove_all_but(directory: Path, kept: set[str]) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in kept:
            path.unlink()

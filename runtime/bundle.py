"""A bundle on disk, opened: the manifest, and files that are what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glm_export.runtime.errors import InputError, IntegrityError
from glm_export.runtime.files import Progress, fits_page_cache, resolve_inside, sha256_of
from glm_export.runtime.large_pages import drop, read_ahead
from glm_export.runtime.manifest import MANIFEST_NAME, Manifest
from glm_export.runtime.strict_json import parse_json

Check = Literal["manifest", "size", "full"]
"""How much `Bundle.open` checks: only the manifest; or the sizes of all files, and the hashes of all but weights and
engines (a target hashes its engine before it loads it); or the sizes and hashes of all files."""

_Stamp = tuple[int, int, int, int, int]

JOURNAL_NAME = "journal.json"
MODEL_NAME = "model.onnx"
BUILDING = ".building"
"""Ends the name of the folder below engines/ in which an engine is built, before any manifest lists it."""

_BIG_FOLDERS = ("weights/", "engines/")
_REPORTS = "reports/"  # written by later runs of validate, and nothing reads them to decode


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProblem:
    """A file that is not what the manifest says."""

    path: str
    kind: Literal["missing", "changed", "not plain", "unexpected"]
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """The outcome of hashing a whole bundle. True only if something was checked and all of it was good."""

    files: int
    """Files hashed and found as recorded."""
    bytes: int
    """Their size."""
    problems: tuple[FileProblem, ...]

    def __bool__(self) -> bool:
        return self.files > 0 and not self.problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle directory and its manifest."""

    directory: Path
    manifest: Manifest
    _hashed: dict[str, _Stamp] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Files whose hash was found right, with what would change if they were written to or replaced since."""

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        check: Check = "full",
        progress: Progress | None = None,
        *,
        threads: int | None = None,
    ) -> Bundle:
        """Opens a bundle and checks its files.

        Args:
            directory: the bundle.
            check: how much to check, see `Check`. Each file is hashed once, however often it is asked for later.
            progress: is told the bytes hashed, from several threads.
            threads: how many files are hashed at once; as many as there are CPUs when None.

        Raises:
            InputError: this is no bundle, or its build did not finish.
            IntegrityError: the manifest or a file is damaged or missing.
        """
        root = Path(directory)
        if (root / JOURNAL_NAME).exists() and not (root / MANIFEST_NAME).exists():
            raise InputError(f"The build of {root} did not finish: run the same `glm-export build` again to resume it.")
        bundle = cls(directory=root, manifest=Manifest.read(root))
        if check != "manifest":
            if MODEL_NAME not in bundle.manifest.files:
                raise IntegrityError(f"The manifest of {root} lists no {MODEL_NAME}: build the bundle again.")
            with _pool(threads) as pool:
                checked = pool.map(
                    lambda path: bundle.file(
                        path, hashed=check == "full" or not path.startswith(_BIG_FOLDERS), progress=progress
                    ),
                    bundle.manifest.files,
                )
                for _ in checked:  # raises in the order of the manifest what a check raised
                    pass
        return bundle

    def require_weights(self) -> None:
        """Raises InputError if this is a graph without weights, which can be looked at but not run."""
        if not self.manifest.weights:
            raise InputError(f"{self.directory} was built without weights: build it from a checkpoint to run it.")

    @property
    def total_bytes(self) -> int:
        """The size of all files that the manifest lists."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def model_path(self) -> Path:
        """The ONNX graph."""
        return self.directory / MODEL_NAME

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer, or None in a bundle without one."""
        return self._listed("tokenizer.json")

    @property
    def chat_template_path(self) -> Path | None:
        """The chat template, or None in a bundle without one."""
        return self._listed("chat_template.jinja")

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json of the checkpoint; empty in a bundle without one.

        Raises:
            InputError: it is not a JSON object.
        """
        path = self._listed("generation_config.json")
        if path is None:
            return {}
        try:
            value = parse_json(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error}): build from a repaired checkpoint.") from None
        if not isinstance(value, dict):
            raise InputError(f"{path} holds {type(value).__name__}, expected an object: repair the checkpoint.")
        return value

    def file(self, path: str, *, hashed: bool = True, progress: Progress | None = None) -> Path:
        """Returns the absolute place of a listed file after checking it; what loads code must leave `hashed` on.

        Raises:
            IntegrityError: it is not listed, missing, not a plain file, or not of the recorded size (and hash).
        """
        record = self.manifest.files.get(path)
        if record is None:
            raise IntegrityError(f"{path} is not in the manifest of {self.directory}: build the bundle again.")
        place = resolve_inside(self.directory, path)
        stamp = _stamp(place)
        size = stamp[2]
        if size != record.size:
            raise IntegrityError(
                f"{place} has {size} bytes, the manifest says {record.size}: copy the bundle again, or build it again."
            )
        if hashed and self._hashed.get(path) != stamp:
            if (seen := self._sha256(place, progress)) != record.sha256:
                raise IntegrityError(
                    f"{place} has sha256 {seen[:12]}..., the manifest says {record.sha256[:12]}...: "
                    "copy the bundle again, or build it again."
                )
            self._hashed[path] = stamp
        return place

    def verify(self, progress: Progress | None = None, *, threads: int | None = None) -> VerifyReport:
        """Hashes every file as the disk has it, and looks for files that nobody listed; reports all problems.

        Args:
            progress: is told the bytes hashed, from several threads.
            threads: how many files are hashed at once; as many as there are CPUs when None.
        """
        self._hashed.clear()
        with _pool(threads) as pool:
            outcomes = [*pool.map(lambda path: self._problem(path, progress), self.manifest.files)]
        problems = [problem for problem in outcomes if problem]
        good = [
            record.size
            for record, problem in zip(self.manifest.files.values(), outcomes, strict=True)
            if problem is None
        ]
        problems += [
            FileProblem(path=path, kind="unexpected", message=f"{self.directory / path} is not in the manifest.")
            for path in sorted(self._found())
            if path not in self.manifest.files
        ]
        return VerifyReport(files=len(good), bytes=sum(good), problems=tuple(problems))

    def _sha256(self, place: Path, progress: Progress | None) -> str:
        stays = fits_page_cache(self.total_bytes)
        if stays:
            read_ahead(place)
        return sha256_of(place, progress, forget=not stays)

    def _problem(self, path: str, progress: Progress | None) -> FileProblem | None:
        try:
            drop(resolve_inside(self.directory, path))
            self.file(path, progress=progress)
        except IntegrityError as error:
            return FileProblem(path=path, kind=self._kind_of_problem(path), message=str(error))
        return None

    def _listed(self, path: str) -> Path | None:
        return self.directory / path if path in self.manifest.files else None

    def _kind_of_problem(self, path: str) -> Literal["missing", "changed", "not plain"]:
        if not os.path.lexists(self.directory / path):
            return "missing"
        try:
            resolve_inside(self.directory, path)
        except IntegrityError:
            return "not plain"
        return "changed"

    def _found(self) -> Iterator[str]:
        """Every file below the directory, and every symbolic link, as listed paths are written."""
        for folder, subfolders, names in os.walk(self.directory):
            here = Path(folder)
            for name in (*names, *(name for name in subfolders if (here / name).is_symlink())):
                path = (here / name).relative_to(self.directory).as_posix()
                being_built = path.startswith("engines/") and path.split("/")[1].endswith(BUILDING)
                if path not in (MANIFEST_NAME, JOURNAL_NAME) and not path.startswith(_REPORTS) and not being_built:
                    yield path


def _pool(threads: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="sha256")


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

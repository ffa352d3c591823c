"""manifest.json: what a bundle is, and the size and hash of every file in it. Written last, read first, strictly.

A directory without a manifest is not a bundle (InputError); a manifest that can not be right is a damaged bundle
(IntegrityError); a newer schema is neither, it needs a newer program (InputError).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from glm_export.runtime.contract import COMPUTE_DTYPES, OPTIONAL_OUTPUTS, Binding, Contract
from glm_export.runtime.errors import InputError, IntegrityError
from glm_export.runtime.files import FileRecord, is_plain_relative, resolve_inside, write_text_durably
from glm_export.runtime.strict_json import exact, one_of, parse_json, positive, typed

__all__ = ["MANIFEST_NAME", "SCHEMA_VERSION", "FileRecord", "Manifest"]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 2
_LARGEST_MANIFEST = 16 << 20
_MOST_LAYERS = 4096  # a bound on the work a hostile manifest can ask for
_SHOWN = 100  # characters of a name
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a bundle says about itself."""

    name: str
    precision: str
    """A key of contract.COMPUTE_DTYPES."""
    contract: Contract
    recipe: Mapping[str, Any]
    """All choices of the build, as resolved."""
    source: Mapping[str, Any]
    """Identity of the checkpoint."""
    versions: Mapping[str, str]
    """Library -> version that took part in the build."""
    weights: bool
    """False for a graph that was traced without weights: it can be looked at, not run."""
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int
    capacity: int
    """Default cache capacity of a session."""
    batch: int
    """Default batch size of a session."""
    files: Mapping[str, FileRecord]
    """Path relative to the bundle -> size and hash. All files but the manifest, the journal and later reports."""
    engines: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Target -> its files, each also in `files`."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads `directory/manifest.json`.

        Raises:
            InputError: the directory has no manifest, or one of a newer schema.
            IntegrityError: the manifest is damaged; the sentence says where.
        """
        path = directory / MANIFEST_NAME
        if not path.is_symlink() and not path.exists():
            what = "has no manifest.json" if directory.is_dir() else "is not a directory"
            raise InputError(f"{directory} {what}: expected a bundle written by `glm-export build`.")
        resolve_inside(directory, MANIFEST_NAME)
        if path.stat().st_size > _LARGEST_MANIFEST:
            _damaged(path, f"it is larger than {_LARGEST_MANIFEST >> 20} MiB")
        try:
            return cls.from_json(parse_json(path.read_bytes()))
        except ValueError as error:
            _damaged(path, str(error))
        except RecursionError:
            _damaged(path, "it is nested too deeply")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def write(self, directory: Path) -> FileRecord:
        """Writes `directory/manifest.json` in one durable step."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text_durably(directory / MANIFEST_NAME, text)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values. The binding tables are there for readers in other languages."""
        value: dict[str, Any] = {"schema_version": self.schema_version}
        value |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value["contract"] = dataclasses.asdict(self.contract) | {"outputs": list(self.contract.outputs)}
        value["bindings"] = _binding_tables(self.contract)
        value["files"] = {path: dataclasses.asdict(record) for path, record in sorted(self.files.items())}
        value["engines"] = {target: list(paths) for target, paths in sorted(self.engines.items())}
        value["eos_token_ids"] = list(self.eos_token_ids)
        return sealed(value)

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            InputError: the schema is newer than this program.
            ValueError: anything else is wrong; the message says what.
        """
        version = typed(typed(value, dict, "the manifest").get("schema_version"), int, "schema_version")
        if version > SCHEMA_VERSION:
            raise InputError(
                f"the bundle has schema {version}, this glm-export reads up to {SCHEMA_VERSION}: install a newer one."
            )
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version}, expected {SCHEMA_VERSION}")
        own = {field.name for field in dataclasses.fields(cls)}
        fields = exact(value, own | {"bindings", "sha256"}, "the manifest")
        precision = one_of(fields["precision"], tuple(COMPUTE_DTYPES), "precision")
        contract = _contract(fields["contract"], precision)
        if fields["bindings"] != _binding_tables(contract):
            raise ValueError("bindings are not the ones that contract describes")
        files = _files(fields["files"])
        manifest = cls(
            name=typed(fields["name"], str, "name"),
            precision=precision,
            contract=contract,
            recipe=typed(fields["recipe"], dict, "recipe"),
            source=typed(fields["source"], dict, "source"),
            versions={
                key: typed(item, str, f"versions.{key[:_SHOWN]}")
                for key, item in typed(fields["versions"], dict, "versions").items()
            },
            weights=typed(fields["weights"], bool, "weights"),
            eos_token_ids=_token_ids(fields["eos_token_ids"], contract.vocab_size),
            max_position_embeddings=positive(fields["max_position_embeddings"], "max_position_embeddings"),
            capacity=positive(fields["capacity"], "capacity"),
            batch=positive(fields["batch"], "batch"),
            files=files,
            engines=_engines(fields["engines"], files),
        )
        if sealed(fields)["sha256"] != fields["sha256"]:
            raise ValueError("its sha256 is not that of its content")
        return manifest


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of all of it, however it is laid out: so what no other check looks at is covered."""
    rest = {key: item for key, item in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return rest | {"sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def _damaged(path: Path, reason: str) -> NoReturn:
    raise IntegrityError(f"{path} is damaged ({reason}): copy the bundle again, or build it again.") from None


def _binding_tables(contract: Contract) -> dict[str, list[dict[str, Any]]]:
    def row(binding: Binding) -> dict[str, Any]:
        return dataclasses.asdict(binding) | {"shape": list(binding.shape)}

    return {
        "inputs": [row(binding) for binding in contract.inputs()],
        "outputs": [row(binding) for binding in contract.outputs_of_step()],
    }


def _contract(value: object, precision: str) -> Contract:
    names = {field.name for field in dataclasses.fields(Contract)}
    fields = dict(exact(value, names, "contract"))
    outputs = tuple(typed(fields["outputs"], list, "contract.outputs"))
    if outputs != tuple(kind for kind in OPTIONAL_OUTPUTS if kind in outputs):
        raise ValueError(
            f"contract.outputs is {reprlib.repr(list(outputs))}, expected some of {list(OPTIONAL_OUTPUTS)} in order"
        )
    if fields["compute_dtype"] != COMPUTE_DTYPES[precision]:
        raise ValueError(
            f"contract.compute_dtype is {reprlib.repr(fields['compute_dtype'])}, wrong for precision {precision}"
        )
    one_of(fields["logits"], ("last", "all"), "contract.logits")
    typed(fields["inputs_embeds"], bool, "contract.inputs_embeds")
    if typed(fields["first_k_dense_replace"], int, "contract.first_k_dense_replace") < 0:
        raise ValueError("contract.first_k_dense_replace is negative")
    for name in names - {"outputs", "compute_dtype", "logits", "inputs_embeds", "first_k_dense_replace"}:
        if positive(fields[name], f"contract.{name}") > (_MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1):
            raise ValueError(f"contract.{name} is larger than that of any model")
    return Contract(**fields | {"outputs": outputs})


def _files(value: object) -> dict[str, FileRecord]:
    files = {}
    for path, item in typed(value, dict, "files").items():
        if not is_plain_relative(path) or path == MANIFEST_NAME:
            raise ValueError(f"the file name {reprlib.repr(path)} is not a plain path inside the bundle")
        fields = exact(item, {"size", "sha256"}, f"files.{path}")
        size, sha256 = typed(fields["size"], int, f"{path}: size"), typed(fields["sha256"], str, f"{path}: sha256")
        if size < 0 or not _SHA256.fullmatch(sha256):
            raise ValueError(f"size or sha256 of {path} can not be right")
        files[path] = FileRecord(size=size, sha256=sha256)
    return files


def _engines(value: object, files: Mapping[str, FileRecord]) -> dict[str, tuple[str, ...]]:
    engines = {}
    for target, paths in typed(value, dict, "engines").items():
        engines[target] = tuple(typed(paths, list, f"engines.{target[:_SHOWN]}"))
        for path in engines[target]:
            if not isinstance(path, str) or path not in files:
                raise ValueError(f"the engine file {reprlib.repr(path)} of {target[:_SHOWN]} is not listed in files")
    return engines


def _token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    ids = tuple(typed(item, int, "eos_token_ids") for item in typed(value, list, "eos_token_ids"))
    if not all(0 <= token < vocab_size for token in ids):
        raise ValueError(f"eos_token_ids has an id outside 0..{vocab_size - 1}")
    return ids

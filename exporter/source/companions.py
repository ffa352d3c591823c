"""The small files that go along with the weights as they are: tokenizer, chat template, generation config."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from glm_export.exporter.source.source_file import open_regular, read_text_file
from glm_export.runtime.errors import InputError
from glm_export.runtime.files import FileRecord, HashingWriter

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Taken over from the checkpoint where it has them."""

_LARGEST = 100_000_000  # bytes: the tokenizer of these models has 20 MB


def companions(directory: Path) -> tuple[Path, ...]:
    """Those of a checkpoint that it has.

    Nobody looks into them before they are copied, so a link in a downloaded folder must not lead to something else:
    only into the folder itself, or to the blobs of the Hugging Face cache that it is a snapshot in.

    Raises:
        InputError: one is a link to elsewhere or to nothing, too large, or anything but a regular file.
    """
    root = Path(os.path.realpath(directory))
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    found = []
    for path in (directory / name for name in COPIED):
        if not os.path.lexists(path):
            continue
        with open_regular(path) as (_, stamp):
            if stamp.size > _LARGEST:
                raise InputError(f"{path}: is {stamp.size} bytes long, more than {_LARGEST}; download it again.")
        if not any(Path(os.path.realpath(path)).is_relative_to(each) for each in roots):
            raise InputError(f"{path}: is a link that leads out of the checkpoint; put the file itself there.")
        found.append(path)
    return tuple(found)


def copy_companions(paths: Iterable[Path], directory: Path) -> dict[str, FileRecord]:
    """Copies them into a folder; raises as `read_text_file`.

    Returns:
        Name -> size and hash of what was written.
    """
    records = {}
    for path in paths:
        data, _ = read_text_file(path, _LARGEST)
        with HashingWriter(directory / path.name) as writer:
            writer.write(data)
        records[path.name] = writer.record
    return records

"""Keeps a checkpoint from pushing everything else out of the page cache."""

from __future__ import annotations

import os

from glm_export.exporter.plan import BuildPlan
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.source_file import open_regular
from glm_export.exporter.storage import Block
from glm_export.runtime.files import fits_page_cache


def too_large_to_stay(plan: BuildPlan) -> bool:
    """Whether what is read is better dropped; a smaller source may stay cached for the next build."""
    return not fits_page_cache(sum(file.source_bytes for file in plan.weight_files))


def forget(checkpoint: Checkpoint, block: Block) -> None:
    """Drops the source of a block from the page cache."""
    tensor = block.piece.tensor
    start = tensor.start + block.first * (tensor.nbytes // block.piece.rows)
    with open_regular(checkpoint.directory / tensor.file) as (descriptor, _):
        os.posix_fadvise(descriptor, start, block.source_bytes, os.POSIX_FADV_DONTNEED)

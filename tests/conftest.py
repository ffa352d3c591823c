"""What most tests start from: the tiny recipe, a checkpoint of it, and a bundle per precision, built on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glm_export.exporter.build import build
from glm_export.exporter.progress import Reporter
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import Recipe, load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.runtime.bundle import Bundle

BundleOf = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return load_recipe("tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert tiny_recipe.model is not None
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_random_checkpoint(tiny_recipe.model, directory, seed=1, shard_bytes=200_000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture(scope="session")
def bundle_of(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """The tiny bundle of a precision. Tests must not change it."""
    built: dict[str, Bundle] = {}

    def get(precision: str) -> Bundle:
        if precision not in built:
            out = tmp_path_factory.mktemp(precision) / "bundle"
            recipe = load_recipe("tiny", {"precision": precision})
            build(Checkpoint.open(tiny_checkpoint), recipe, out, Reporter(quiet=True))
            built[precision] = Bundle.open(out, check="full")
        return built[precision]

    return get

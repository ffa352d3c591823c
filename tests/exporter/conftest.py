"""Bundles with an engine, built once for all tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_tools import EngineOf, rtx

from glm_export.exporter.progress import Reporter
from glm_export.exporter.tensorrt.builder import build_engine
from glm_export.runtime.bundle import Bundle


@pytest.fixture(scope="session")
def engine_of(bundle_of: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> EngineOf:
    """The tiny bundle of a precision and cache dtype with an engine. Tests must not change it."""
    built: dict[tuple[str, str], Bundle] = {}

    def get(precision: str, cache_dtype: str = "compute") -> Bundle:
        key = (precision, cache_dtype)
        if key not in built:
            path = tmp_path_factory.mktemp(f"engine-{precision}-{cache_dtype}") / "bundle"
            shutil.copytree(bundle_of(precision).directory, path)
            build_engine(Bundle.open(path), rtx(cache_dtype=cache_dtype), Reporter(quiet=True))
            built[key] = Bundle.open(path, check="full")
        return built[key]

    return get


@pytest.fixture
def copy_of(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> Callable[[str], Bundle]:
    """A tiny bundle of a precision that a test may change."""

    def get(precision: str) -> Bundle:
        return Bundle.open(shutil.copytree(bundle_of(precision).directory, tmp_path / "bundle"))

    return get

"""Toy bundles with an engine for every target, on the fake GPU and, where there is one, on a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import real_engine
from fake_tensorrt import FakeGpu
from toy import OpenToy, ToyBundle, write_bundle, write_engine

from glm_export.runtime import cuda
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.open import open_session
from glm_export.runtime.session import Session

AddEngine = Callable[..., object]

ON_A_GPU = " on a GPU"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu.install(monkeypatch)
    yield fake
    for library in fake.libraries.values():
        assert library.logger.take_errors() == []


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> ToyBundle:
    """A toy bundle, with what `add` adds to it, or with a fake engine. Tests must not change it."""
    made: dict[str, Bundle] = {}

    def bundle(
        engine: dict[str, Any] | None = None, add: Callable[..., object] = write_engine, **choices: Any
    ) -> Bundle:
        key = repr((sorted(choices.items()), engine, add.__name__))
        if key not in made:
            directory = write_bundle(tmp_path_factory.mktemp("bundle") / "toy", **choices)
            if engine:
                add(directory, **engine)
            made[key] = Bundle.open(directory)
        return made[key]

    return bundle


PLACES = [
    "onnxruntime",
    *ENGINE_TARGETS,
    # Where these are missing, the one test of a real engine in test_trt_session.py is skipped and says why.
    *(target + ON_A_GPU for target in ENGINE_TARGETS if not real_engine.missing(target)),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Every target, and where it runs."""
    if request.param in ENGINE_TARGETS:
        request.getfixturevalue("gpu")
    return str(request.param)


@pytest.fixture
def target(place: str) -> str:
    return place.removesuffix(ON_A_GPU)


@pytest.fixture
def add_engine(place: str) -> AddEngine:
    """Adds an engine of the target to a toy bundle, if the target has engines."""

    def add_none(directory: Path, target: str, **choices: Any) -> None:
        assert target == "onnxruntime"

    def add_real(directory: Path, target: str, **choices: Any) -> object:
        capabilities = (cuda.gpu().compute_capability,)
        return real_engine.write_real_engine(directory, target, compute_capabilities=capabilities, **choices)

    if place.endswith(ON_A_GPU):
        return add_real
    return write_engine if place in ENGINE_TARGETS else add_none


@pytest.fixture
def open_toy(target: str, place: str, add_engine: AddEngine, toy_bundle: ToyBundle) -> OpenToy:
    """Opens a session of the target; an engine has the capacity that is asked for."""

    def opened(batch: int | None = None, capacity: int | None = None, **choices: Any) -> Session:
        if target == "onnxruntime":
            return open_session(toy_bundle(**choices), batch=batch, capacity=capacity, threads=1)
        if place.endswith(ON_A_GPU) and choices.get("precision", "fp32") != "fp32":
            pytest.skip("TensorRT fuses attention in 16 bits, and the toy's oracle is float32 but for the cache")
        bundle = toy_bundle(engine={"target": target, "capacity": capacity or 32}, add=add_engine, **choices)
        return open_session(bundle, target=target, batch=batch, capacity=capacity)

    return opened

"""Engines that are really built, with TensorRT-RTX on a CPU: what is in them, and what a failed build leaves."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from engine_tools import EngineOf, rtx

from glm_export.exporter.progress import Reporter
from glm_export.exporter.tensorrt import builder as builder_module
from glm_export.exporter.tensorrt import plan as plan_module
from glm_export.exporter.tensorrt.builder import build_engine, lowered_network
from glm_export.exporter.tensorrt.plan import Phases, PlanOptions, build_plan
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.errors import BackendError, ResourceError
from glm_export.runtime.files import FileRecord, HashingWriter, sha256_of
from glm_export.runtime.tensorrt_library import load_library

CopyOf = Callable[[str], Bundle]
PLAN = "engines/tensorrt-rtx/model.plan"


@pytest.mark.parametrize(("precision", "cache_dtype"), [("bf16", "compute"), ("fp8", "compute"), ("fp8", "fp8")])
def test_an_engine_is_a_part_of_its_bundle(engine_of: EngineOf, precision: str, cache_dtype: str) -> None:
    bundle = engine_of(precision, cache_dtype)
    assert bundle.manifest.engines == {"tensorrt-rtx": (PLAN, "engines/tensorrt-rtx/engine.json")}
    assert bundle.manifest.versions["tensorrt-rtx"] == load_library("tensorrt-rtx").version
    assert bundle.verify()
    info = EngineInfo.read(bundle, "tensorrt-rtx")
    assert info.compute_capabilities == ("8.9", "12.0")
    assert (info.gpu, info.capacity, info.batch, info.prefill) == (None, 64, 2, 16)
    assert info.compute_dtype == "bfloat16"
    assert info.cache_dtype == ("float8_e4m3fn" if cache_dtype == "fp8" else "bfloat16")
    assert info.graph_sha256 == sha256_of(bundle.model_path)
    assert info.plan_bytes == (bundle.directory / PLAN).stat().st_size
    assert info.build_peak_bytes > info.plan_bytes
    assert info.layers["MoERouter"] == 3


def kernels(plan: bytes) -> Iterator[tuple[str, list[str]]]:
    """The fully connected nodes of a plan's kernel list: which layers they are, and the dtypes of their inputs."""
    text = plan.decode("latin-1")
    types = dict(re.findall(r'tensor=\{[^\n]*? name="([^"]+)" [^\n]*? type=(\w+) \}', text))
    for line in re.findall(r"fully_connected=\{[^\n]*", text):
        inputs = re.search(r"input=\{([^}]*)\}", line)
        assert inputs
        yield line, [types[name] for name in re.findall(r'"([^"]+)"', inputs[1])[:2]]


@pytest.mark.parametrize(("precision", "count"), [("fp8", 28), ("fp8-head", 29)])
def test_the_plan_multiplies_fp8_by_fp8(engine_of: EngineOf, precision: str, count: int) -> None:
    """The plan's text is not documented: this looks at what the library made of the network, once."""
    bundle = engine_of(precision)
    found = {}
    for line, types in kernels((bundle.directory / PLAN).read_bytes()):
        for name in re.findall(r"\[ONNX Layer: ([^\]]*/FP8Linear/MatMul)\]", line):
            found.setdefault(name, set()).add(tuple(types))
    assert len(found) == count, found
    assert set().union(*found.values()) == {("fp8_e4m3", "fp8_e4m3")}


# A build that fails leaves the bundle as it was


@contextmanager
def left_as_it_was(bundle: Bundle) -> Iterator[None]:
    def content() -> dict[str, str]:
        files = (path for path in sorted(bundle.directory.rglob("*")))
        return {str(path): sha256_of(path) if path.is_file() else "" for path in files}

    before = content()
    yield
    assert content() == before
    assert not list(bundle.directory.parent.glob("*.lock"))


def test_a_disk_that_gets_full(copy_of: CopyOf, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copy_of("fp8")
    write = HashingWriter.write

    def full(self: HashingWriter, data: bytes) -> None:
        if self.path.name == "model.plan":
            assert self._file is not None
            device = os.open("/dev/full", os.O_WRONLY)
            os.dup2(device, self._file.fileno())
            os.close(device)
        write(self, data)

    monkeypatch.setattr(HashingWriter, "write", full)
    with left_as_it_was(bundle), pytest.raises(ResourceError, match=r"No room to write .*/model\.plan"):
        build_engine(bundle, rtx(compute_capabilities=("8.9",)), Reporter(quiet=True))


def test_an_error_in_the_display_ends_the_build(copy_of: CopyOf) -> None:
    class Broken(Reporter):
        @contextmanager
        def phases(self, title: str) -> Iterator[Callable[[float, str], None]]:
            def show(done: float, what: str) -> None:
                raise BrokenPipeError(errno.EPIPE, "nobody reads")

            yield show

    bundle = copy_of("fp8")
    with left_as_it_was(bundle), pytest.raises(BrokenPipeError):
        build_engine(bundle, rtx(compute_capabilities=("8.9",)), Broken(quiet=True))


def options(**changes: object) -> PlanOptions:
    values: dict[str, object] = {
        "batch": 2,
        "capacity": 64,
        "prefill": 16,
        "compute_capabilities": ("8.9",),
        "in_place_plugins": False,
        "timing_cache": None,
    }
    return PlanOptions(**values | changes)


def plan_of(bundle: Bundle, path: Path, chosen: PlanOptions, **engine: object) -> None:
    library = load_library("tensorrt-rtx")
    model = onnx.load(bundle.model_path, load_external_data=False)
    network, _, _ = lowered_network(library, bundle, model, rtx(**engine))
    build_plan(network, bundle.manifest.contract, path, chosen, Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "engine", "sentence"),
    [
        # The network has caches of 64 tokens.
        ({"capacity": 32}, {}, "cache"),
        ({}, {"cache_dtype": "fp8"}, "(?i)alias"),
        ({"compute_capabilities": ("8.6",)}, {}, "(?i)fp8"),
    ],
    ids=["profile that does not fit", "in place without asking", "FP8 on a GPU without it"],
)
def test_the_library_says_why_it_does_not_build(
    bundle_of: CopyOf, tmp_path: Path, changes: dict[str, object], engine: dict[str, object], sentence: str
) -> None:
    with pytest.raises(BackendError, match=sentence):
        plan_of(bundle_of("fp8"), tmp_path / "model.plan", options(**changes), **engine)
    assert not list(tmp_path.iterdir())


def test_memory_that_is_too_small_is_no_fault_of_the_library() -> None:
    explain = plan_module._explained
    assert isinstance(explain("t", "1", ["[x.cpp::y::1] Error Code 2: OutOfMemory (z)"]), ResourceError)
    assert isinstance(explain("t", "1", ["std::bad_alloc"]), ResourceError)
    assert isinstance(explain("t", "1", ["Error Code 9: Internal Error"]), BackendError)
    assert "it gave no reason" in str(explain("t", "1", []))


# Progress


def test_phases_add_up_to_one() -> None:
    phases = Phases()
    phases.start("all", 2)
    phases.start("first", 4)
    assert [phases.step("first", k) for k in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    phases.finish("first")
    assert phases.step("all", 0) == 0.5
    phases.start("second", 1)
    phases.start("inner", 2)
    assert phases.step("inner", 0) == 0.75
    phases.finish("second")  # with what is inside
    assert phases.step("all", 1) == 1


def test_phases_never_go_back_or_beyond() -> None:
    phases = Phases()
    phases.start("all", 1)
    phases.start("twice", 2)
    assert phases.step("twice", 1) == 1
    phases.finish("twice")
    phases.start("twice", 2)
    assert phases.step("twice", 0) == 1
    assert phases.step("unknown", 7) == 1
    phases.finish("unknown")
    phases.start("empty", 0)
    assert phases.step("empty", 5) == 1


# The timing cache of TensorRT (TensorRT-RTX has none)


class FakeConfig:
    """Takes the timing cache `known`, and knows neither others nor garbage."""

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == b"garbage" else data

    def set_timing_cache(self, cache: bytes | None, ignore_mismatch: bool) -> bool:
        assert cache is not None
        assert not ignore_mismatch
        if cache in (b"", b"known"):
            self.cache = cache
        return self.cache == cache


@pytest.mark.parametrize(
    ("stored", "used"), [(b"known", b"known"), (b"of another GPU", b""), (b"garbage", b""), (None, b"")]
)
def test_a_timing_cache_is_used_where_it_fits(tmp_path: Path, stored: bytes | None, used: bytes) -> None:
    config, path = FakeConfig(), tmp_path / "timing.cache"
    if stored is not None:
        path.write_bytes(stored)
    plan_module._read_timing_cache(config, path)
    assert config.cache == used


# What is there already


def test_another_engine_that_came_meanwhile_is_kept(copy_of: CopyOf) -> None:
    """The manifest that counts is the one under the lock, not the one that the caller opened."""
    bundle = copy_of("fp8")
    other = bundle.directory / "engines/tensorrt/model.plan"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"plan")
    path = "engines/tensorrt/model.plan"
    files = {**bundle.manifest.files, path: FileRecord(size=4, sha256=sha256_of(other))}
    replace(bundle.manifest, files=files, engines={"tensorrt": (path,)}).write(bundle.directory)
    manifest = build_engine(bundle, rtx(compute_capabilities=("8.9",)), Reporter(quiet=True))
    assert set(manifest.engines) == {"tensorrt", "tensorrt-rtx"}
    assert Bundle.open(bundle.directory, check="full").verify()


def test_a_crash_while_an_engine_is_replaced_leaves_no_half(
    engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(engine_of("bf16").directory, tmp_path / "bundle"))
    staging = bundle.directory / "engines/tensorrt-rtx.building"
    staging.mkdir()
    (staging / "model.plan").write_bytes(b"new")
    records = {PLAN: FileRecord(size=3, sha256=sha256_of(staging / "model.plan"))}

    def crash(*_: object) -> None:
        raise OSError("power failure")

    with monkeypatch.context() as patched:
        patched.setattr(builder_module, "sync_directory", crash)
        with pytest.raises(OSError, match="power failure"):
            builder_module._enter(bundle, "tensorrt-rtx", staging, records, load_library("tensorrt-rtx"))
    left = Bundle.open(bundle.directory, check="full")
    assert left.manifest.engines == {}
    assert [problem.kind for problem in left.verify().problems] == ["unexpected"]
    build_engine(left, rtx(compute_capabilities=("8.9",)), Reporter(quiet=True))
    assert Bundle.open(bundle.directory, check="full").verify()

"""A parsed network -> model.plan: configuration, profiles, progress, cancelling, and the stream that is written.

The library calls back into Python while it builds. It ignores what goes wrong there (a stream that refuses bytes still
gives a successful build), so every callback keeps its error, and it is raised when the build has returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_export.exporter.progress import Reporter
from glm_export.exporter.tensorrt.network import Network
from glm_export.runtime.contract import Contract
from glm_export.runtime.errors import BackendError, GlmExportError, ResourceError
from glm_export.runtime.files import FileRecord, HashingWriter

_OUT_OF_MEMORY = ("outofmemory", "out of memory", "bad_alloc", "std::bad")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What a plan is built for."""

    batch: int
    """Most rows."""
    capacity: int
    """Tokens per row, exactly."""
    prefill: int
    """Most new tokens per row in one step."""
    compute_capabilities: Sequence[str]
    """Of TensorRT-RTX, such as 8.9; TensorRT builds for the GPU it finds."""
    in_place_plugins: bool
    """Whether a plugin writes into its input."""
    timing_cache: Path | None
    """What TensorRT measured before, read where it exists and written again; None to keep nothing."""


def build_plan(
    network: Network, contract: Contract, path: Path, options: PlanOptions, reporter: Reporter
) -> FileRecord:
    """Builds the engine of a network into the file `path`, which exists complete or not at all.

    A signal ends the build at its next step.

    Raises:
        BackendError: the library can not build it; the sentence has its reason.
        ResourceError: the disk is full, or the memory.
    """
    library = network.library
    config = _config(network, contract, options)
    library.logger.take_errors()  # what it remarks on a timing cache of another machine is no reason for anything
    failed = _Failed()
    with HashingWriter(path) as writer, reporter.phases("building the engine") as show:
        monitor, stream = _monitor(library.module, failed, show), _stream(library.module, failed, writer)
        config.progress_monitor = monitor
        built = _interruptibly(
            lambda: bool(network.builder.build_serialized_network_to_stream(network.definition, config, stream)),
            failed,
            reporter,
        )
        if failed.error:
            raise failed.error
        if not built:
            raise _explained(library.target, library.version, library.logger.take_errors())
    if options.timing_cache:
        _write_timing_cache(config, options.timing_cache)
    return writer.record


class _Failed:
    """The first error of any callback; from then on the build is to stop."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.stop = False

    def __call__(self, error: BaseException) -> None:
        self.error = self.error or error
        self.stop = True


def _interruptibly(build: Callable[[], bool], failed: _Failed, reporter: Reporter) -> bool:
    """Runs a build in a thread of its own: signal handlers run in the main one, when that executes Python."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine") as pool:
        future = pool.submit(build)
        try:
            return future.result()
        except BaseException:
            failed.stop = True
            if not future.done():  # a signal
                reporter.note("stopping at the library's next step; once more stops at once")
                wait([future])
            raise


def _config(network: Network, contract: Contract, options: PlanOptions) -> Any:
    module = network.library.module
    config = network.builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)  # the router is float32
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.in_place_plugins:
        config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if network.library.is_rtx:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            name = "SM" + capability.replace(".", "")
            if not config.set_compute_capability(getattr(module.ComputeCapability, name), index):
                raise _refused_setting(network, f"compute capability {capability}")
    if options.timing_cache:
        _read_timing_cache(config, options.timing_cache)
    rows = (1, options.batch, options.batch)
    for new in ((1, 1, 1), (1, options.prefill, options.prefill)):  # decode, prefill: one copy of the weights
        profile = network.builder.create_optimization_profile()
        for binding in contract.inputs():
            sizes: Mapping[str, tuple[int, int, int]] = {"B": rows, "S": new, "C": (options.capacity,) * 3}
            shapes = [tuple(sizes[dim][k] if isinstance(dim, str) else dim for dim in binding.shape) for k in range(3)]
            profile.set_shape(binding.name, *shapes)  # smallest, best, largest
        if config.add_optimization_profile(profile) < 0:
            raise _refused_setting(network, f"profile of {options.batch} rows and {new[2]} new tokens")
    return config


def _monitor(module: Any, failed: _Failed, show: Callable[[float, str], None]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Shows how far the build is, and ends it when something failed."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.start(name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                show(self._phases.step(name, step), name)
            except BaseException as error:
                failed(error)
            return not failed.stop

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)

    return Monitor()


class Phases:
    """Nested phases, each of a number of steps, as one fraction that only grows."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int, int]] = []  # name, steps, steps done; the outermost first
        self._lock = threading.Lock()  # the library may build parts of an engine in threads of its own
        self._reached = 0.0

    def start(self, name: str, steps: int) -> None:
        """A phase begins, inside the last one that did not end."""
        with self._lock:
            self._open.append((name, max(1, steps), 0))

    def step(self, name: str, step: int) -> float:
        """Step number `step` of a phase is done; returns the fraction of everything that is."""
        with self._lock:
            self._open = [(n, steps, step + 1 if n == name else done) for n, steps, done in self._open]
            fraction, width = 0.0, 1.0
            for _, steps, done in self._open:
                fraction += width * min(done, steps) / steps
                width /= steps
            self._reached = max(self._reached, min(fraction, 1.0))
            return self._reached

    def finish(self, name: str) -> None:
        """A phase ends, and whatever is still open inside it."""
        with self._lock:
            names = [n for n, _, _ in self._open]
            if name in names:
                del self._open[names.index(name) :]


def _stream(module: Any, failed: _Failed, writer: HashingWriter) -> Any:
    class Stream(module.IStreamWriter):  # type: ignore[misc]
        """Hashes and writes the plan as it comes, so that it is never whole in memory a second time."""

        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            if failed.stop:
                return 0
            try:
                writer.write(data)
            except BaseException as error:
                failed(error)
                return 0
            return len(data)

    return Stream()


def _read_timing_cache(config: Any, path: Path) -> None:
    """Starts with what was measured before; with nothing, if that was on another GPU or with another version."""
    known = config.create_timing_cache(path.read_bytes()) if path.exists() else None
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_timing_cache(config: Any, path: Path) -> None:
    with HashingWriter(path) as writer:
        writer.write(memoryview(config.get_timing_cache().serialize()))


def _refused_setting(network: Network, what: str) -> BackendError:
    reasons = "; ".join(network.library.logger.take_errors()[:1]) or "it gave no reason"
    return BackendError(f"{network.library.target} {network.library.version} refuses the {what}: {reasons}")


def _explained(target: str, version: str, errors: Sequence[str]) -> GlmExportError:
    """The reason among the library's complaints; a build without a driver also complains about that, at the end."""
    reason = " ".join(next(iter(errors), "it gave no reason").split())[:400]
    if any(words in reason.lower() for words in _OUT_OF_MEMORY):
        return ResourceError(f"There is not enough memory to build the engine ({reason}): use a larger machine.")
    return BackendError(f"{target} {version} can not build the engine: {reason}")

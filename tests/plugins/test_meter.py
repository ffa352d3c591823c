"""plugins/meter.py: every byte is read once, whatever the threads, the blocks and the instruction set."""

from __future__ import annotations

import os

import numpy as np
import pytest

from glm_export.plugins import meter
from glm_export.plugins.library import CPU_VARIABLE, cpu_kernels, cpu_library


@pytest.fixture(params=["scalar", "avx2", ""], ids=["scalar", "avx2", "best"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    library = cpu_library()
    assert library is not None, "libglm_ops.so is not built: run `make kernels`, or install the package"
    monkeypatch.setenv(CPU_VARIABLE, request.param)
    return cpu_kernels(library).isa


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("words", [1, 7, 8, 63, 64, 65, 1000, 100_003])
@pytest.mark.parametrize("block_bytes", [None, 8, 1000, 1 << 16])
def test_every_word_is_read_once(words: int, block_bytes: int | None, threads: int) -> None:
    block_bytes = None if block_bytes == 8 and words > 1000 else block_bytes  # it would take seconds
    memory = np.random.default_rng(words).integers(0, 1 << 64, words + 1, np.uint64)
    for start in (0, 1):  # also where no vector is aligned
        got = meter.read(memory[start : start + words], threads=threads, block_bytes=block_bytes)
        assert got.sum == int(memory[start : start + words].sum(dtype=np.uint64))
        assert got.seconds > 0


def test_rates_are_those_of_a_computer(isa: str) -> None:
    memory = np.ones(1 << 21, np.uint64)
    rate = memory.nbytes / meter.read(memory, threads=2).seconds
    assert 1e7 < rate < 1e13
    flops = meter.multiply("float32", threads=1)
    assert flops is not None
    assert 1e7 < flops < 1e13
    dots = meter.multiply("bfloat16", threads=1)
    assert (dots is not None) == (isa == "avx512")


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, "mmx")
    memory = np.ones(8, np.uint64)
    with pytest.raises(ValueError, match="mmx"):
        meter.read(memory, threads=1)
    with pytest.raises(ValueError, match="mmx"):
        meter.multiply("float32", threads=1)


def test_threads_go_where_the_process_may_run() -> None:
    allowed = os.sched_getaffinity(0)
    meter.read(np.ones(1 << 16, np.uint64), threads=4)
    assert os.sched_getaffinity(0) == allowed  # that of the calling thread is left alone

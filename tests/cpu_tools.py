"""The CPU kernels for every instruction set: the installed library, and for AVX-512 where the machine lacks it the same
sources with emulated intrinsics."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from glm_export.plugins.library import cpu_kernels, cpu_library, forced_cpu

ISAS = ("scalar", "avx2", "avx512")
EVALUATORS = tuple(f"kernel_{isa}" for isa in ISAS)

REPOSITORY = Path(__file__).parents[1]
EMULATOR = REPOSITORY / "tests/plugins/avx512_emulator"
EXPORTS = REPOSITORY / "plugins/cpu/exports.map"

FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Vectors of 512 bits never cross from one compiled file to another, where their place would matter.
EMULATED = [*AVX2, f"-I{EMULATOR}", "-Wno-psabi"]
# The emulated machine has everything.
MACHINE = ["-D__builtin_cpu_supports(feature)=1"]


def built_library() -> Path:
    """The kernels' library; there is no reason to test without it."""
    library = cpu_library()
    assert library is not None, "libglm_ops.so is not built: run `make kernels`, or install the package"
    return library


@cache
def machine_has(isa: str) -> bool:
    """Whether the installed library runs with an instruction set here."""
    library = cpu_library()
    with forced_cpu(isa):
        try:
            return library is not None and cpu_kernels(library).isa == isa
        except ValueError:
            return False


def is_emulated(isa: str) -> bool:
    """Whether an instruction set is AVX-512 on a machine that can only emulate it, which takes AVX2."""
    return isa == "avx512" and machine_has("avx2") and not machine_has(isa)


def library_for(isa: str) -> Path | None:
    """The library in which GLM_EXPORT_CPU can be `isa`; None if the machine lacks that."""
    installed = built_library()
    if is_emulated(isa):
        return emulated_library()
    return installed if machine_has(isa) else None


@cache
def emulated_library() -> Path:
    """libglm_ops with the emulator's AVX-512; built for a state of the sources by who comes first, and kept."""
    sources = [path for path in sorted(REPOSITORY.glob("plugins/*/*.cpp")) if path.parent.name != "tensorrt"]
    read = [*sources, *sorted(REPOSITORY.glob("plugins/*/*.h")), EXPORTS, *sorted(EMULATOR.iterdir()), Path(__file__)]
    state = hashlib.sha256(b"\0".join(path.read_bytes() for path in read)).hexdigest()[:16]
    folder = REPOSITORY / "build/avx512_emulator" / state
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libglm_ops.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failure = folder / "failure"  # kept too: there are many who would try again
        assert not failure.exists(), failure.read_text()
        if not library.exists():
            try:
                _compile(sources, library)
            except AssertionError as error:
                failure.write_text(str(error))
                raise
    return library


def compiler() -> str:
    found = shutil.which("c++")
    assert found, "the kernels need a C++ compiler"
    return found


def _compile(sources: list[Path], library: Path) -> None:
    objects = {source: library.with_name(f"{source.parent.name}_{source.stem}.o") for source in sources}
    own_flags = {"avx2": AVX2, "avx512": EMULATED, "isa": MACHINE}

    def ending(source: Path) -> str:
        return source.stem.rpartition("_")[2]

    def compile_one(source: Path) -> None:
        own = own_flags.get(ending(source), [])
        command = [compiler(), *FLAGS, *own, f"-I{REPOSITORY}", "-c", source, "-o", objects[source]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source}:\n{done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    link = ["-Wl,-z,nodelete", "-Wl,-z,defs", f"-Wl,--version-script={EXPORTS}"]
    unfinished = library.with_suffix(".unfinished")
    subprocess.run([compiler(), "-shared", *link, *objects.values(), "-o", unfinished], check=True)
    unfinished.rename(library)
    for path in objects.values():
        path.unlink()

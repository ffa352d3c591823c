"""What every CUDA kernel takes on every architecture, from what ptxas said while `make cuda` built them.

    python bench/cuda_resources.py build/cuda/ptxas.txt > bench/CUDA_RESOURCES.md

Exits with 1 if a kernel spills registers or keeps an array in local memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HEAD = """# Registers of the CUDA kernels

Written by `make cuda` with nvcc {nvcc}. Registers per thread; a stack or spills would stand behind them. Shared memory
is dynamic: the launchers choose it.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int

    @property
    def clean(self) -> bool:
        return not (self.stack or self.spilled)

    def __str__(self) -> str:
        return f"{self.registers}" if self.clean else f"**{self.registers}, stack {self.stack}, spills {self.spilled}**"


def read(log: str) -> list[Use]:
    """All kernels of a build log, in the order of the log."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Use(
            kernel=m["name"],
            architecture=m["sm"],
            registers=int(m["registers"]),
            stack=int(m["stack"]),
            spilled=int(m["stores"]) + int(m["loads"]),
        )
        for m in pattern.finditer(log)
    ]


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> name without namespaces and parameters."""
    found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for mangled, name in zip(names, found.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").replace("glm::", "").removeprefix("void ")
        short[mangled] = name.split("(")[0] if "<" not in name else name[: name.rindex(">") + 1].split(">(")[0]
        if "<" in name and not short[mangled].endswith(">"):
            short[mangled] += ">"
    return short


def main() -> None:
    uses = read(Path(sys.argv[1]).read_text())
    assert uses, "the log names no kernel: was it built with GLM_CUDA_REPORT?"
    names = readable(sorted({use.kernel for use in uses}))
    architectures = sorted({use.architecture for use in uses}, key=lambda sm: int(re.sub(r"\D", "", sm)))
    nvcc = shutil.which("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    print(HEAD.format(nvcc=(re.findall(r"V([\d.]+)", version) or ["unknown"])[0]), end="")
    print(f"| kernel | {' | '.join(f'SM{sm}' for sm in architectures)} |")
    print(f"|---{'|---:' * len(architectures)}|")
    table = {(use.kernel, use.architecture): str(use) for use in uses}
    for kernel in sorted(names, key=lambda mangled: names[mangled]):
        row = " | ".join(table.get((kernel, sm), "") for sm in architectures)
        print(f"| `{names[kernel]}` | {row} |")
    unclean = [use for use in uses if not use.clean]
    for use in unclean:
        print(f"{names[use.kernel]} on SM{use.architecture}: {use}", file=sys.stderr)
    sys.exit(1 if unclean else 0)


if __name__ == "__main__":
    main()

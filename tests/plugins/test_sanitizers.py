"""The sanitizers see what they are there for, and find nothing in a short run; `make sanitize` is the long one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sanitize
from onnx import TensorProto, helper

from glm_export.plugins.schema import DOMAIN, VERSION

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")  # as CMakeLists.txt has them

RUN = """
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.enable_cpu_mem_arena = False
options.register_custom_ops_library(sys.argv[1])
print(ort.InferenceSession(sys.argv[2], options).run(["y"], {"x": np.ones(6, np.float32)})[0].sum())
"""


@pytest.fixture(scope="module")
def probe(build_probe: Callable[..., Path]) -> Path:
    return build_probe(*FLAGS)


@pytest.mark.parametrize(
    ("fail", "report"),
    [
        (0, ""),
        (6, "heap-buffer-overflow"),  # reads behind an input
        (7, "heap-buffer-overflow"),  # writes behind an output
        (8, "heap-buffer-overflow"),  # writes behind the memory for intermediate results
        (9, "signed integer overflow"),
    ],
)
def test_planted_mistakes_are_seen(probe: Path, tmp_path: Path, fail: int, report: str) -> None:
    node = helper.make_node("Probe", ["x"], ["y", "report"], domain=DOMAIN, whole=0, part=0.0, fail=fail)
    x, y, told = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "report"))
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    made = helper.make_model(helper.make_graph([node], "g", [x], [y, told]), opset_imports=imports, ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    command = [sys.executable, "-c", RUN, str(probe), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, env=sanitize.environment(), capture_output=True, text=True)
    if report:
        assert done.returncode != 0
        assert report in done.stderr
        assert "probe.cpp" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "6.0\n"), done.stderr


@pytest.fixture(scope="module")
def _built() -> None:
    sanitize.build()


@pytest.mark.usefixtures("_built")
def test_library_has_sanitizers() -> None:
    # It is found as any other is, and can not be loaded where they are not.
    command = [
        sys.executable,
        "-c",
        "import glm_export.plugins.library as l; print(l.cpu_kernels(l.cpu_library()).isa)",
    ]
    with_them = sanitize.environment()
    without = {name: value for name, value in with_them.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "ASan runtime does not come first" in done.stderr
    subprocess.run(command, env=with_them, check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_built")
def test_short_run_finds_nothing() -> None:
    tests = [f"tests/plugins/test_{name}.py" for name in ("hostile", "linear", "moe_experts")]
    command = sanitize.pytest_command("-q", *tests, "-k", "kernel_ and (test_hostile or borders)")
    done = subprocess.run(command, cwd=sanitize.REPOSITORY, env=sanitize.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout

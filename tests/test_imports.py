"""Who may import whom, read from the source and checked in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glm_export.exporter
import glm_export.plugins
import glm_export.runtime

ROOTS = {
    name: Path(next(iter(package.__path__)))
    for name, package in {
        "exporter": glm_export.exporter,
        "runtime": glm_export.runtime,
        "plugins": glm_export.plugins,
    }.items()
}
ALLOWED = {"exporter": {"exporter", "runtime", "plugins"}, "runtime": {"runtime", "plugins"}, "plugins": {"plugins"}}
FORBIDDEN = {
    "runtime": {"torch", "click", "rich", "onnx", "onnx_ir", "onnxscript"},
    "plugins": {"click", "onnxruntime"},
}


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", sorted(ROOTS))
def test_imports_point_downwards(package):
    files = sorted(ROOTS[package].rglob("*.py"))
    assert len(files) > 5
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "glm_export":
                assert parts[1] in ALLOWED[package], f"{path} imports {name}"
            assert parts[0] not in FORBIDDEN.get(package, ()), f"{path} imports {name}"


def test_nothing_reads_pickles():
    for root in ROOTS.values():
        for path in root.rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "dill"}, path
            assert "torch.load" not in path.read_text().replace("Never torch.load", ""), path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("glm_export.runtime.generate", {"torch", "click", "onnx"}),
        ("glm_export.plugins.ops", {"torch", "onnx", "onnxscript", "numpy"}),
        ("glm_export.plugins.bodies", {"torch", "onnxruntime"}),
        ("glm_export.exporter.tensorrt.builder", {"torch", "tensorrt", "tensorrt_rtx"}),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())

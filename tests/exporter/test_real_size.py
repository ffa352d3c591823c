"""The graph of a released model, in full depth and width, without a single weight."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import onnx
import pytest

from glm_export.exporter.recipe import load_recipe


def peak_memory(command: list[str]) -> int:
    """The bytes that a command takes at most, started by a small process: its record begins with that of its parent."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.slow
def test_glm_4_5_air_is_traced_without_weights(tmp_path):
    out = tmp_path / "graph"
    command = [sys.executable, "-m", "glm_export.exporter.cli", "build", "--no-weights", "--quiet"]
    assert peak_memory([*command, "--recipe", "glm-4.5-air-fp8", "-o", str(out)]) < 4 << 30
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) < 4_000_000

    config = load_recipe("glm-4.5-air-fp8").model
    assert config is not None
    model = onnx.load(out / "model.onnx", load_external_data=False)
    ops = Counter(node.op_type for node in model.graph.node if node.domain == "glm")
    dense, moe = 1, 45
    assert ops == {
        "RMSNorm": 2 * (dense + moe) + 1,  # no q/k norms in Air
        "FP8Linear": 4 * (dense + moe) + 3 * (dense + moe),  # attention, dense or shared MLP
        "Linear": moe + 1,  # router, head
        "CachedAttention": dense + moe,
        "SiluMul": dense + moe,
        "ResidualAdd": 2 * (dense + moe) + moe,
        "MoERouter": moe,
        "FP8MoEExperts": moe,
    }
    # Parameters and scales: every one has its place in a file, of the size that its shape needs.
    sizes = {"F8": 1, "F32": 4, "BF16": 2}
    names = {onnx.TensorProto.FLOAT8E4M3FN: "F8", onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.BFLOAT16: "BF16"}
    weights = [i for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    total = 0
    for tensor in weights:
        place = {entry.key: entry.value for entry in tensor.external_data}
        count = 1
        for dim in tensor.dims:
            count *= dim
        assert int(place["length"]) == count * sizes[names[tensor.data_type]], tensor.name
        assert int(place["offset"]) % 64 == 0, tensor.name
        total += int(place["length"])
    # facts: main weights of the official FP8 checkpoint are 108.3 GB; ours keep router, norms and biases in float32.
    assert total / 1e9 == pytest.approx(108.3, rel=0.01)

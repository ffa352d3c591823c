"""One dense and one MoE layer at the width of GLM-4.5-Air, built for two GPUs on a CPU.

The weights are stand-ins (zeros, each tensor at its own address): the build moves as many bytes as with real ones.
"""

import dataclasses
from pathlib import Path

import onnx
import pytest

from glm_export.exporter.build import build
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import Engine, load_recipe
from glm_export.exporter.tensorrt.builder import EngineChoices, lowered_network
from glm_export.exporter.tensorrt.estimate import PeakMemory
from glm_export.exporter.tensorrt.plan import PlanOptions, build_plan
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.tensorrt_library import load_library

VOCABULARY = 512  # the only thing that is smaller


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_two_layers_of_glm_4_5_air(precision: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"glm-4.5-air-{precision}")
    assert recipe.model is not None
    config = dataclasses.replace(recipe.model.with_layers(2), vocab_size=VOCABULARY, eos_token_id=(1,), pad_token_id=0)
    build(config, dataclasses.replace(recipe, model=config), tmp_path / "graph", Reporter(quiet=True))
    bundle = Bundle.open(tmp_path / "graph")
    library, engine = load_library("tensorrt-rtx"), Engine(prefill=512)
    choices = EngineChoices(target="tensorrt-rtx", batch=4, capacity=4096, engine=engine)
    model = onnx.load(bundle.model_path, load_external_data=False)

    peak = PeakMemory()
    network, layers, counts = lowered_network(library, bundle, model, choices)
    fp8 = precision == "fp8"
    experts = "FP8MoEExperts" if fp8 else "MoEExperts"
    expected = {"MoERouter": 1, experts: 1, "kv_cache_update": 4, "attention": 2} | ({"fp8_gemm": 14} if fp8 else {})
    assert counts == expected
    (plugin,) = (layer for layer in layers.layers if layer.plugin == experts)
    D, E, F = 4096, 128, 1408
    shapes = [value.shape for value in plugin.inputs if value]
    assert {(E, 2 * F, D), (E, D, F)} <= set(shapes)
    assert network.weight_bytes > (2.3e9 if fp8 else 4.6e9)

    options = PlanOptions(
        batch=choices.batch,
        capacity=choices.capacity,
        prefill=choices.prefill,
        compute_capabilities=engine.compute_capabilities,
        in_place_plugins=False,
        timing_cache=None,
    )
    record = build_plan(network, bundle.manifest.contract, tmp_path / "model.plan", options, Reporter(quiet=True))
    # No weight is there twice, nor wider than it was: what is beyond the weights are kernels. (The library stores equal
    # tensors once, as the projections of equal shape are here; the experts are most of it.)
    routed = E * 3 * F * D * (1 if fp8 else 2)
    assert routed < record.size < network.weight_bytes + 60e6
    assert peak.bytes < 2.6 * network.weight_bytes + 1e9

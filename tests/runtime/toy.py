"""A toy bundle that honours the contract, and the same model in numpy without a cache: the oracle of these tests.

Two layers of causal grouped-query attention over token plus position embeddings, so that a wrong write index, length,
mask or cache row shows in the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import ml_dtypes
import numpy as np
import onnx
from fake_tensorrt import plan_of
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.contract import COMPUTE_DTYPES, Contract
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.files import FileRecord, sha256_of
from glm_export.runtime.manifest import Manifest
from glm_export.runtime.session import Session

L, H, J, A, D, V, POSITIONS = 2, 4, 2, 8, 16, 61, 64
TYPES = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}
NUMPY = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
INT64 = TensorProto.INT64
END = "<|end|>"

ToyBundle = Callable[..., Bundle]
OpenToy = Callable[..., Session]


def contract_of(precision: str = "fp32", **choices: Any) -> Contract:
    return Contract(
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=J,
        head_dim=A,
        hidden_size=D,
        vocab_size=V,
        n_routed_experts=4,
        first_k_dense_replace=1,
        compute_dtype=COMPUTE_DTYPES[precision],
        **choices,
    )


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-2]))

    named = {"embed": normal(V, D) * 8, "position": normal(POSITIONS + 512, D) * 20, "head": normal(D, V) * 3}
    for i in range(L):
        named |= {f"q.{i}": normal(D, H * A), f"k.{i}": normal(D, J * A), f"v.{i}": normal(D, J * A)}
        named |= {f"o.{i}": normal(H * A, D), f"router.{i}": normal(D, 4)}
    return named


def oracle(ids: list[int], precision: str = "fp32", seed: int = 0, cache_dtype: str | None = None) -> np.ndarray:
    """Logits [S,V] of one whole sequence."""
    w = weights(seed)
    dtype = NUMPY[cache_dtype or COMPUTE_DTYPES[precision]]
    n = len(ids)
    x = w["embed"][ids] + w["position"][:n]
    causal = np.tril(np.ones((n, n), bool))
    for i in range(L):
        q = (x @ w[f"q.{i}"]).reshape(n, H, A)
        k, v = ((x @ w[f"{name}.{i}"]).astype(dtype).astype(np.float32).reshape(n, J, A) for name in "kv")
        out = np.empty((n, H, A), np.float32)
        for h in range(H):
            scores = q[:, h] @ k[:, h // (H // J)].T / np.sqrt(A)
            scores = np.where(causal, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // (H // J)]
        x = x + out.reshape(n, H * A) @ w[f"o.{i}"]
    return x @ w["head"]


def greedy(prompt: list[int], steps: int, precision: str = "fp32", stop: frozenset[int] = frozenset()) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + steps:
        token = int(oracle(ids, precision)[-1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def graph(
    contract: Contract,
    seed: int = 0,
    *,
    cache_dtype: str | None = None,
    capacity: int | None = None,
    tensorrt: bool = False,
) -> onnx.ModelProto:
    """The toy as a graph; with an FP8 cache or a fixed capacity it is what a fake engine is made of.

    With `tensorrt` it is in TensorRT's own words: Attention ignores the lengths there.
    """
    nodes: list[onnx.NodeProto] = []
    constants = {name: value for name, value in weights(seed).items() if name != "embed" or not contract.inputs_embeds}
    constants |= {f"shape.{n}": np.array([0, 0, heads, A]) for n, heads in (("q", H), ("kv", J))}
    constants |= {"flat": np.array([0, 0, H * A]), "zero": np.array(0), "one": np.array(1), "axis1": np.array([1])}
    constants |= {"rows": np.array([-1, 4]), "probability": np.zeros((1, H, 1, 1), np.float32)}
    compute, cache = TYPES[contract.compute_dtype], TYPES[cache_dtype or contract.compute_dtype]

    def op(kind: str, inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs.split(" "), [output], name=output, **attributes))
        return output

    tokens = contract.inputs()[0].name
    op("Shape", tokens, "S", start=1, end=2)
    op("Squeeze", "S", "S0")
    op("Range", "zero S0 one", "offsets")
    op("Unsqueeze", "write_index axis1", "start")
    op("Add", "start offsets", "positions")
    op("Gather", "position positions", "position_embeds")
    if contract.inputs_embeds:
        op("Cast", tokens, "embeds", to=TensorProto.FLOAT)
    else:
        op("Gather", f"embed {tokens}", "embeds")
    x = op("Add", "embeds position_embeds", "x.0")
    op("Add", "write_index S", "written")
    if tensorrt:
        op("Cast", "written", "written32", to=TensorProto.INT32)
        constants["scale"] = np.array(A**-0.5, np.float32)
    hidden = [x]
    for i in range(L):
        op("MatMul", f"{x} q.{i}", f"q2.{i}")
        op("Reshape", f"q2.{i} shape.q", f"q3.{i}")
        q = op("Transpose", f"q3.{i}", f"q4.{i}", perm=[0, 2, 1, 3])
        for n in "kv":
            op("MatMul", f"{x} {n}.{i}", f"{n}2.{i}")
            op("Reshape", f"{n}2.{i} shape.kv", f"{n}3.{i}")
            op("Transpose", f"{n}3.{i}", f"{n}4.{i}", perm=[0, 2, 1, 3])
            if cache == TensorProto.FLOAT8E4M3FN:  # which TensorScatter does not know: it passes through float32
                op("Cast", f"{n}_cache.{i}", f"{n}_cache32.{i}", to=TensorProto.FLOAT)
                op("TensorScatter", f"{n}_cache32.{i} {n}4.{i} write_index", f"{n}5.{i}", axis=-2, mode="linear")
                op("Cast", f"{n}5.{i}", f"{n}_cache_out.{i}", to=cache)
            else:
                op("Cast", f"{n}4.{i}", f"{n}5.{i}", to=compute)
                op("TensorScatter", f"{n}_cache.{i} {n}5.{i} write_index", f"{n}_cache_out.{i}", axis=-2, mode="linear")
            op("Cast", f"{n}_cache_out.{i}", f"{n}6.{i}", to=TensorProto.FLOAT)
        if tensorrt:
            op("Mul", f"{q} scale", f"q5.{i}")
            inputs = f"q5.{i} k6.{i} v6.{i}   written32"
            lower_right = {"causal_kind": "lower_right", "TRT_decomposable": 1}
            op("TRT_Attention", inputs, f"attended.{i}", domain="trt", **lower_right)
        else:
            op("Attention", f"{q} k6.{i} v6.{i}    written", f"attended.{i}", is_causal=1)
        op("Transpose", f"attended.{i}", f"a3.{i}", perm=[0, 2, 1, 3])
        op("Reshape", f"a3.{i} flat", f"a2.{i}")
        op("MatMul", f"a2.{i} o.{i}", f"a1.{i}")
        x = op("Add", f"{x} a1.{i}", f"x.{i + 1}")
        hidden.append(x)
    if contract.logits == "all":
        op("MatMul", f"{x} head", "logits")
    else:
        op("Sub", "length write_index", "own")
        op("Sub", "own one", "last")
        op("Max", "last zero", "last0")
        op("Unsqueeze", "last0 axis1", "last1")
        op("GatherND", f"{x} last1", "x_last", batch_dims=1)
        op("MatMul", "x_last head", "logits")
    if "hidden_states" in contract.outputs:
        for i, name in enumerate(hidden):
            op("Cast", name, f"hidden_states.{i}", to=compute)
    if "router_logits" in contract.outputs:
        op("MatMul", f"{x} router.1", "router3.1")
        op("Reshape", "router3.1 rows", "router_logits.1")
    if "attentions" in contract.outputs:  # only of the right shape
        op("Shape", tokens, "B", start=0, end=1)
        op("Shape", "k_cache.0", "C", start=2, end=3)
        constants["heads"] = np.array([H])
        op("Concat", "B heads S C", "attention_shape", axis=0)
        for i in range(L):
            op("Expand", "probability attention_shape", f"attentions.{i}")

    def info(binding: Any) -> onnx.ValueInfoProto:
        kind = cache if "_cache" in binding.name else {"int64": INT64, **TYPES}[binding.dtype]
        shape = [capacity if dim == "C" and capacity else dim for dim in binding.shape]
        return helper.make_tensor_value_info(binding.name, kind, shape)

    toy = helper.make_graph(
        nodes,
        "toy",
        [info(binding) for binding in contract.inputs()],
        [info(binding) for binding in contract.outputs_of_step()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = {"": 24, **({"trt": 1} if tensorrt else {})}
    return helper.make_model(toy, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=11)


def tokenizer() -> Tokenizer:
    """One token per byte (not limited to the toy's vocabulary), and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    toy = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    toy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    toy.decoder = decoders.ByteLevel()
    toy.add_special_tokens([END])
    return toy


def write_bundle(directory: Path, *, precision: str = "fp32", seed: int = 0, **changes: Any) -> Path:
    """Writes a toy bundle; `changes` are fields of the contract or the manifest."""
    of_contract = {field.name for field in dataclasses.fields(Contract)}
    contract = contract_of(precision, **{key: value for key, value in changes.items() if key in of_contract})
    (directory / "weights").mkdir(parents=True)
    model = graph(contract, seed)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(
        model,
        directory / "model.onnx",
        save_as_external_data=True,
        location="weights/toy.safetensors",
        size_threshold=256,
    )
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7]}')
    record(directory, contract, precision, **{key: value for key, value in changes.items() if key not in of_contract})
    return directory


def write_engine(
    directory: Path,
    target: str,
    *,
    batch: int = 4,
    capacity: int = 32,
    prefill: int = 16,
    cache_dtype: str | None = None,
    model: onnx.ModelProto | None = None,
    plan: dict[str, Any] | None = None,
    **info: Any,
) -> EngineInfo:
    """Adds a fake engine to a bundle, of the toy or of a model with this capacity and its weights inside.

    `plan` breaks the plan, `info` are other fields of engine.json.
    """
    manifest = Manifest.read(directory)
    contract = manifest.contract
    cache_dtype = cache_dtype or contract.compute_dtype
    model = model or graph(contract, cache_dtype=cache_dtype, capacity=capacity)
    folder = directory / "engines" / target
    folder.mkdir(parents=True, exist_ok=True)
    data = plan_of(model, batch=batch, prefill=prefill, **(plan or {}))
    (folder / "model.plan").write_bytes(data)
    engine = EngineInfo(
        **{
            "target": target,
            "library_version": fake_tensorrt.VERSION,
            "compute_capabilities": ("8.9", "12.0"),
            "gpu": None,
            "compute_dtype": contract.compute_dtype,
            "cache_dtype": cache_dtype,
            "capacity": capacity,
            "batch": batch,
            "prefill": prefill,
            "graph_sha256": manifest.files["model.onnx"].sha256,
            "plan_bytes": len(data),
            "layers": {"attention": L, "kv_cache_update": 2 * L},
            "build_seconds": 1.5,
            "build_peak_bytes": 1 << 20,
        }
        | info
    )
    engine.write(folder)
    record_engine(directory, target)
    return engine


def record_engine(directory: Path, target: str) -> None:
    """Puts the engine's files as they are into the manifest."""
    manifest = Manifest.read(directory)
    paths = tuple(f"engines/{target}/{name}" for name in ("engine.json", "model.plan"))
    files = {
        path: FileRecord(size=(directory / path).stat().st_size, sha256=sha256_of(directory / path)) for path in paths
    }
    engines = {**manifest.engines, target: paths}
    dataclasses.replace(manifest, files={**manifest.files, **files}, engines=engines).write(directory)


def record(directory: Path, contract: Contract, precision: str, **changes: Any) -> Manifest:
    """Writes a manifest of the files that are there."""
    files = {
        path.relative_to(directory).as_posix(): FileRecord(size=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = Manifest(
        **{
            "name": "toy",
            "precision": precision,
            "contract": contract,
            "recipe": {"name": "toy", "limits": {"capacity": 32}},
            "source": {"config_sha256": "0" * 64},
            "versions": {"onnx": onnx.__version__},
            "weights": True,
            "eos_token_ids": (7,),
            "max_position_embeddings": POSITIONS,
            "capacity": 32,
            "batch": 3,
            "files": files,
        }
        | changes
    )
    manifest.write(directory)
    return manifest

"""A toy bundle that honours the contract, and the same model in numpy without a cache: the oracle of these tests.

Two layers of causal grouped-query attention over token plus position embeddings, so that a wrong write index, length,
mask or cache row shows in the logits.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glm_export.runtime.contract import COMPUTE_DTYPES, Contract
from glm_export.runtime.files import FileRecord, sha256_of
from glm_export.runtime.manifest import Manifest

L, H, J, A, D, V, POSITIONS = 2, 4, 2, 8, 16, 61, 64
TYPES = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}
NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
INT64 = TensorProto.INT64
END = "<|end|>"


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


def oracle(ids: list[int], precision: str = "fp32", seed: int = 0) -> np.ndarray:
    """Logits [S,V] of one whole sequence."""
    w = weights(seed)
    dtype = NUMPY[COMPUTE_DTYPES[precision]]
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


def graph(contract: Contract, seed: int = 0) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    constants = {name: value for name, value in weights(seed).items() if name != "embed" or not contract.inputs_embeds}
    constants |= {f"shape.{n}": np.array([0, 0, heads, A]) for n, heads in (("q", H), ("kv", J))}
    constants |= {"flat": np.array([0, 0, H * A]), "zero": np.array(0), "one": np.array(1), "axis1": np.array([1])}
    constants |= {"rows": np.array([-1, 4]), "probability": np.zeros((1, H, 1, 1), np.float32)}
    compute = TYPES[contract.compute_dtype]

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
    hidden = [x]
    for i in range(L):
        op("MatMul", f"{x} q.{i}", f"q2.{i}")
        op("Reshape", f"q2.{i} shape.q", f"q3.{i}")
        q = op("Transpose", f"q3.{i}", f"q4.{i}", perm=[0, 2, 1, 3])
        for n in "kv":
            op("MatMul", f"{x} {n}.{i}", f"{n}2.{i}")
            op("Reshape", f"{n}2.{i} shape.kv", f"{n}3.{i}")
            op("Transpose", f"{n}3.{i}", f"{n}4.{i}", perm=[0, 2, 1, 3])
            op("Cast", f"{n}4.{i}", f"{n}5.{i}", to=compute)
            op("TensorScatter", f"{n}_cache.{i} {n}5.{i} write_index", f"{n}_cache_out.{i}", axis=-2, mode="linear")
            op("Cast", f"{n}_cache_out.{i}", f"{n}6.{i}", to=TensorProto.FLOAT)
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
        kind = {"int64": INT64, **TYPES}[binding.dtype]
        return helper.make_tensor_value_info(binding.name, kind, binding.shape)

    toy = helper.make_graph(
        nodes,
        "toy",
        [info(binding) for binding in contract.inputs()],
        [info(binding) for binding in contract.outputs_of_step()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(toy, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


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

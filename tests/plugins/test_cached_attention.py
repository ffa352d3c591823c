from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import cpu_tools
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb, eager_attention_forward

from glm_export.plugins.library import cpu_library

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose

U32 = 2.0**-24
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The inputs of the op."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    write_index: Tensor
    length: Tensor
    rotary_dim: int
    scale: float

    def inputs(self) -> tuple[Tensor, ...]:
        return (
            *(self.q, self.k, self.v, self.cos, self.sin, self.k_cache, self.v_cache),
            *(self.write_index, self.length),
        )

    def run(self, evaluate: Evaluate, outputs: int = 0) -> list[Tensor]:
        """With as many outputs as the form has, if it is not said."""
        outputs = outputs or (3 if evaluate.form == "tensorrt" else 4)
        return evaluate(
            "CachedAttention", *self.inputs(), outputs=outputs, rotary_dim=self.rotary_dim, scale=self.scale
        )

    def rows(self, rows: slice) -> Step:
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__slots__[:9]})

    def tokens(self, tokens: slice) -> Step:
        cut = {name: getattr(self, name)[:, tokens] for name in ("q", "k", "v", "cos", "sin")}
        return replace(self, **cut)


def make(
    *,
    write_index: tuple[int, ...] = (0,),
    new: tuple[int, ...] = (1,),
    H: int = 4,
    J: int = 2,
    A: int = 8,
    C: int = 16,
    rotary: float = 0.5,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> Step:
    generator = torch.Generator().manual_seed(5)
    B, S = len(write_index), max(new)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    index = torch.tensor(write_index)
    rotary_dim = int(A * rotary)
    inv_freq = theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim).float()
    angle = (index[:, None] + torch.arange(S))[..., None].float() * inv_freq
    return Step(
        q=random(B, S, H, A),
        k=random(B, S, J, A),
        v=random(B, S, J, A),
        cos=angle.cos(),
        sin=angle.sin(),
        # Everything beyond write_index is rubbish that must not be seen.
        k_cache=random(B, J, C, A).to(cache_dtype or dtype),
        v_cache=random(B, J, C, A).to(cache_dtype or dtype),
        write_index=index,
        length=index + torch.tensor(new),
        rotary_dim=rotary_dim,
        scale=A**-0.5,
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """RoPE in float64 by transformers, times factor, rounded to dtype.

    Beside it the error that float32 may make: 0 where no tie is near.
    """
    table = [torch.cat((t, t), dim=-1).double() for t in (cos, sin)]
    value, _ = apply_rotary_pos_emb(x.double(), x.double(), *table, unsqueeze_dim=2)
    # Two products and a sum, of terms not larger than the vector they come from.
    half = table[0].shape[-1] // 2
    size = torch.zeros_like(value)
    pair = x.double()[..., :half].abs() + x.double()[..., half : 2 * half].abs()
    size[..., : 2 * half] = torch.cat((pair, pair), dim=-1)
    error = 3 * U32 * size
    if factor != 1.0:
        value, error = value * factor, (error + 2 * U32 * value.abs()) * factor  # factor and product in float32
    low, middle, high = ((value + sign * error).to(dtype).double() for sign in (-1, 0, 1))
    return middle, torch.maximum(high - middle, middle - low)


def check(got: list[Tensor], step: Step, expect_close: ExpectClose, *, form: str) -> None:
    """Every output against transformers' attention functions in float64, a row and a token at a time.

    TensorRT's form multiplies the queries by the scale, before they are rounded, and not the scores.
    """
    out, k_cache_out, v_cache_out = got[:3]
    dtype, (B, S, H, A), C = step.q.dtype, step.q.shape, step.k_cache.shape[2]
    groups = H // step.k.shape[2]
    q_scale, scale = (step.scale, 1.0) if form == "tensorrt" else (1.0, step.scale)
    q, q_error = rotated(step.q, step.cos, step.sin, dtype, factor=q_scale)
    k, k_error = rotated(step.k, step.cos, step.sin, step.k_cache.dtype)
    v = step.v.to(step.v_cache.dtype)
    for b in range(B):
        start, new = int(step.write_index[b]), int(step.length[b] - step.write_index[b])
        keys, values = step.k_cache[b].double(), step.v_cache[b].double()
        keys_error = torch.zeros_like(keys)
        keys[:, start : start + S], keys_error[:, start : start + S] = k[b].transpose(0, 1), k_error[b].transpose(0, 1)
        values[:, start : start + S] = v[b].double().transpose(0, 1)
        expect_close(k_cache_out[b], keys, keys_error, f"row {b}: k_cache_out")
        expect_close(v_cache_out[b], values, 0.0, f"row {b}: v_cache_out")
        for s in range(new):  # beyond them the output is unspecified
            seen = start + s + 1
            module = SimpleNamespace(num_key_value_groups=groups, training=False)
            query = q[b, s][None, :, None]
            want, probs = eager_attention_forward(
                module,  # type: ignore[arg-type]
                query,
                keys[None, :, :seen],
                values[None, :, :seen],
                None,
                scale,
            )
            size, error = (x.repeat_interleave(groups, 0) for x in (keys.abs(), keys_error))
            query, query_error = q[b, s][:, None], q_error[b, s][:, None]
            # Scores: errors of q and k, A products and sums, the scale (as its root on both sides: 4).
            score_error = query_error @ size[:, :seen].mT + (query.abs() + query_error) @ error[:, :seen].mT
            score_error = scale * (score_error + (A + 4) * U32 * (query.abs() @ size[:, :seen].mT))
            # exp doubles the worst score's error (its own and that of the maximum); exp 2, sum, quotient; transformers'
            # softmax is float32 even here: as much again.
            relative = 2 * score_error.amax(-1, keepdim=True) + 2 * (seen + 4) * U32
            if len(got) == 4:
                padded = torch.zeros(H, C, dtype=torch.float64)
                padded[:, :seen] = probs[0, :, 0].double()
                expect_close(got[3][b, :, s], padded, padded * relative[:, 0], f"row {b}, token {s}: attentions")
            size = probs[0].double() @ values[:, :seen].abs().repeat_interleave(groups, 0)
            inside = ((relative + (seen + 1) * U32) * size)[:, 0]
            want = want[0, 0].double()
            info = torch.finfo(dtype)
            rounding = torch.maximum(want.abs() + inside, torch.tensor(info.smallest_normal)) * info.eps / 2
            expect_close(out[b, s], want, inside + rounding, f"row {b}, token {s}: out")


REGIMES = {
    "first_token": {},
    "prefill": {"new": (5,)},
    "decode": {"write_index": (7,)},
    "chunk": {"write_index": (7,), "new": (4,)},
    "ragged_prefill": {"write_index": (0, 0, 0), "new": (5, 1, 3)},
    "ragged_decode": {"write_index": (0, 9, 4), "new": (1, 1, 1)},
    "ragged_chunk": {"write_index": (6, 0, 11), "new": (2, 5, 1)},
    "idle_row": {"write_index": (3, 8), "new": (0, 1)},
    "full": {"write_index": (12,), "new": (4,)},
    "full_rotary": {"write_index": (2, 6), "new": (3, 2), "rotary": 1.0},
    "one_kv_head": {"write_index": (2, 6), "new": (3, 2), "J": 1},
    "no_groups": {"write_index": (2, 6), "new": (3, 2), "J": 4},
    "wide_groups": {"write_index": (2, 6), "new": (3, 2), "H": 12, "J": 1, "A": 16},
    "capacity_is_needed": {"write_index": (0,), "new": (5,), "C": 5},
    # Around the sizes in which kernels cut heads, tokens and the context.
    "real_heads": {"write_index": (70, 63), "new": (1, 1), "H": 24, "J": 2, "A": 128, "C": 80},
    "ragged_head": {"write_index": (5, 60), "new": (5, 3), "A": 72, "C": 80},
    "long_context": {"write_index": (1151, 575, 96, 1300), "new": (1, 1, 1, 0), "H": 16, "A": 64, "C": 1310},
    "long_context_chunk": {"write_index": (1727, 0), "new": (3, 2), "H": 10, "C": 1740},
    "longest_chunks": {"write_index": (4700,), "new": (1,), "H": 4, "J": 1, "C": 4710},
    "many_tokens": {"write_index": (3, 90), "new": (45, 31), "H": 12, "J": 1, "A": 16, "C": 140},
}


@DTYPES
@pytest.mark.parametrize("outputs", [3, 4], ids=["", "attentions"])
@pytest.mark.parametrize("regime", REGIMES)
def test_transformers(
    evaluate: Evaluate, expect_close: ExpectClose, regime: str, outputs: int, dtype: torch.dtype
) -> None:
    step = make(**REGIMES[regime], dtype=dtype)  # type: ignore[arg-type]
    got = step.run(evaluate, outputs)
    assert [t.dtype for t in got] == [dtype] * 3 + [torch.float32] * (outputs - 3)
    check(got, step, expect_close, form=evaluate.form)


@DTYPES
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: f"cache_{x}")
@pytest.mark.parametrize("regime", ["ragged_chunk", "real_heads", "ragged_head", "long_context", "many_tokens"])
def test_caches_have_a_dtype_of_their_own(
    evaluate: Evaluate, expect_close: ExpectClose, regime: str, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    if evaluate.form == "tensorrt":
        pytest.skip("an engine of TensorRT has caches in the compute dtype or in FP8")
    step = make(**REGIMES[regime], dtype=dtype, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    got = step.run(evaluate)
    assert [t.dtype for t in got] == [dtype, cache_dtype, cache_dtype, torch.float32]
    check(got, step, expect_close, form=evaluate.form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ends_of_the_largest_context(evaluate: Evaluate, expect_close: ExpectClose, dtype: torch.dtype) -> None:
    # Position 131071, and a row at the start beside it; the keys before are alike, so that the new tokens matter.
    step = make(write_index=(131068, 0), new=(4, 2), H=2, J=1, A=4, C=131072, theta=1e6, dtype=dtype)
    step.k_cache[:, :, :131000] = -8 * torch.sign(step.q[:, :1, :1].mean(2, keepdim=True)).transpose(1, 2)
    got = step.run(evaluate)
    assert torch.equal(got[1][:, :, 4:131068], step.k_cache[:, :, 4:131068])
    check(got, step, expect_close, form=evaluate.form)


def test_prefill_is_token_by_token(evaluate: Evaluate, expect_close: ExpectClose) -> None:
    whole = make(write_index=(0, 6), new=(5, 5))
    prefill = whole.run(evaluate)
    caches = (whole.k_cache, whole.v_cache)
    for s in range(5):
        step = replace(
            whole.tokens(slice(s, s + 1)),
            k_cache=caches[0],
            v_cache=caches[1],
            write_index=whole.write_index + s,
            length=whole.write_index + s + 1,
        )
        out, *caches = step.run(evaluate)
        attentions = caches[2:]
        # The same sums over at most 16 positions and 8 elements, maybe in another order: 2 * (16 + 8 + 8) roundings of
        # numbers of which none is above 4.
        tolerance = 64 * U32 * 4
        expect_close(out[:, 0], prefill[0][:, s], tolerance, f"token {s}: out")
        for got, want in zip(attentions, prefill[3:], strict=True):
            expect_close(got[:, :, 0], want[:, :, s], tolerance, f"token {s}: attentions")
    for got, want in zip(caches[:2], prefill[1:3], strict=True):
        expect_close(got, want, 2 * U32 * 4, "caches")


def test_rows_do_not_see_each_other(evaluate: Evaluate, expect_close: ExpectClose) -> None:
    both = make(write_index=(6, 0), new=(2, 5))
    together = both.run(evaluate)
    for b in range(2):
        alone = both.rows(slice(b, b + 1)).run(evaluate)
        new = int(both.length[b] - both.write_index[b])
        expect_close(together[0][b, :new], alone[0][0, :new], 64 * U32 * 4, f"row {b}: out")  # as above
        for i in (1, 2):
            assert torch.equal(together[i][b], alone[i][0])


def test_length_is_only_a_hint(evaluate: Evaluate) -> None:
    # A padding token is computed, and never seen by a valid one: its keys come later.
    step = make(write_index=(4,), new=(3,))
    whole = step.run(evaluate)
    other = replace(step, k=step.k.clone(), v=step.v.clone(), length=step.length - 1)
    other.k[:, 2], other.v[:, 2] = 100, -100
    got = other.run(evaluate)
    assert torch.equal(got[0][:, :2], whole[0][:, :2])
    assert all(t.isfinite().all() for t in got)


def test_later_cache_is_never_seen(evaluate: Evaluate) -> None:
    step = make(write_index=(4, 2), new=(3, 3))
    whole = step.run(evaluate)
    rubbish = replace(step, k_cache=step.k_cache.clone(), v_cache=step.v_cache.clone())
    for b, start in enumerate((4, 2)):
        rubbish.k_cache[b, :, start:], rubbish.v_cache[b, :, start:] = 1e4, -1e4
    assert torch.equal(rubbish.run(evaluate)[0], whole[0])


KERNELS = pytest.mark.parametrize("evaluate", cpu_tools.EVALUATORS, indirect=True)


@KERNELS
@DTYPES
@pytest.mark.parametrize("new", [1, 5, 40])
def test_kernels_read_no_later_cache(evaluate: Evaluate, new: int, dtype: torch.dtype) -> None:
    # Not even to multiply it by zero: a step costs what is in use, not the capacity.
    step = make(write_index=(4, 70), new=(new, new), H=12, C=128, dtype=dtype)
    whole = step.run(evaluate)
    rubbish = replace(step, k_cache=step.k_cache.clone(), v_cache=step.v_cache.clone())
    for b, start in enumerate((4, 70)):
        rubbish.k_cache[b, :, start + new :] = rubbish.v_cache[b, :, start + new :] = torch.nan
    got = rubbish.run(evaluate)
    assert torch.equal(got[0], whole[0])
    assert torch.equal(got[3], whole[3])


@KERNELS
@DTYPES
def test_kernels_take_any_scale(evaluate: Evaluate, dtype: torch.dtype) -> None:
    step = make(write_index=(9,), new=(3,), H=12, dtype=dtype)
    negative = replace(step, scale=-step.scale).run(evaluate)
    assert torch.equal(negative[0], replace(step, q=-step.q).run(evaluate)[0])
    zero = replace(step, scale=0.0).run(evaluate)
    assert torch.equal(zero[3][0, :, 2, :12], torch.full((12, 12), 1 / 12))


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Step], Step]:
    return lambda step: replace(step, **{name: change(getattr(step, name))})


@KERNELS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("write_index", lambda x: x + 100), "room for 16"),
        (_change("write_index", lambda x: x - 100), "room for 16"),
        (_change("write_index", lambda x: x * 0 + 2**63 - 1), "room for 16"),
        (_change("write_index", lambda x: x[:1]), "write_index"),
        (_change("length", lambda x: x[:1]), "length"),
        (_change("q", lambda x: x[:, :, :3]), "multiple"),
        (_change("q", lambda x: x[0]), "q is|input shape"),  # the body's shape inference comes first
        (_change("k", lambda x: x[:, :1]), "k is"),
        (_change("v", lambda x: x[..., :4]), "v is"),
        (_change("cos", lambda x: x[..., :1]), "cos is"),
        (_change("sin", lambda x: x[:1]), "sin is"),
        (_change("k_cache", lambda x: x[:, :0]), "k_cache is"),
        (_change("v_cache", lambda x: x[:, :, :9]), "v_cache is"),
        (lambda step: replace(step, rotary_dim=10), "rotary_dim"),
        (lambda step: replace(step, rotary_dim=-2), "rotary_dim"),
    ],
)
def test_kernels_refuse(evaluate: Evaluate, change: Callable[[Step], Step], message: str) -> None:
    step = make(write_index=(6, 0), new=(2, 3))
    with pytest.raises(Exception, match=message):
        change(step).run(evaluate)


@KERNELS
@pytest.mark.parametrize("new", [1, 40])
def test_not_a_number_stays_in_its_row(evaluate: Evaluate, new: int) -> None:
    step = make(write_index=(6, 30), new=(new, new), H=12, C=80)
    whole = step.run(evaluate)
    cos = step.cos.clone()
    cos[0, 0] = torch.nan  # of the first token's query and key: every later token sees that key
    got = replace(step, cos=cos).run(evaluate)
    assert got[0][0].isnan().all()
    assert all(torch.equal(x[1], y[1]) for x, y in zip(got, whole, strict=True))


@KERNELS
def test_any_length_is_safe(evaluate: Evaluate) -> None:
    step = make(write_index=(6, 0, 3), new=(2, 2, 2))
    whole = step.run(evaluate)
    got = replace(step, length=torch.tensor([2**63 - 1, -(2**63), 0])).run(evaluate)
    assert torch.equal(got[0][0], whole[0][0])
    assert all(t.isfinite().all() for t in got)


def test_kernel_in_place_on_threads(one_node: Callable[..., bytes]) -> None:
    # One buffer for a cache before and after, and the same numbers on any number of threads.
    library = cpu_library()
    assert library is not None
    step = replace(make(write_index=(1500, 700), new=(1, 1), C=1600), rotary_dim=2, scale=2.0)
    step = replace(step, cos=step.cos[..., :1].contiguous(), sin=step.sin[..., :1].contiguous())
    want = torch.ops.glm.cached_attention(*step.inputs(), step.rotary_dim, step.scale)
    found = []
    for threads in (1, 2, 3):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(one_node("CachedAttention", outputs=3), options)
        names = [x.name for x in session.get_inputs()]
        values = {n: ort.OrtValue.ortvalue_from_numpy(x.numpy()) for n, x in zip(names, step.inputs(), strict=True)}
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out")
        for name in ("k_cache", "v_cache"):
            binding.bind_ortvalue_output(f"{name}_out", values[name])
        session.run_with_iobinding(binding)
        found.append(torch.from_numpy(binding.get_outputs()[0].numpy()))
        for name, cache in zip(("k_cache", "v_cache"), want[1:3], strict=True):
            torch.testing.assert_close(torch.from_numpy(values[name].numpy()), cache)
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])

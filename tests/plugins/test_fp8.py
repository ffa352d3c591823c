"""plugins/fp8.py bit for bit against ml_dtypes, and against compressed-tensors' channel and token strategies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from torch import Tensor

from glm_export.plugins.fp8 import E4M3_MAX, dequantize_rows, fake_quantize_rows, quantize_rows

Array = np.ndarray[Any, Any]


def oracle(rows: Array) -> tuple[Array, Array]:
    """Values (as bytes) and scales of float32 rows [N, I], in numpy and ml_dtypes alone."""
    amax = np.abs(rows).max(axis=-1)
    scale = (amax / np.float32(448)).astype(np.float32)
    scale[scale == 0] = 1
    scaled = np.clip(rows / scale[:, None], np.float32(-448), np.float32(448))
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def expect_equal_bits(x: Tensor) -> None:
    values, scale = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert values.shape == x.shape
    assert scale.shape == x.shape[:-1]
    rows = x.float().reshape(-1, x.shape[-1]).numpy()
    want_values, want_scale = oracle(rows)
    got_scale = scale.reshape(-1).numpy()
    assert np.array_equal(got_scale.view(np.uint32), want_scale.view(np.uint32))
    got_values = values.reshape(rows.shape).view(torch.uint8).numpy()
    different = np.argwhere(got_values != want_values)
    assert not len(different), [
        (tuple(at), rows[tuple(at)], want_scale[at[0]], got_values[tuple(at)], want_values[tuple(at)])
        for at in different[:3]
    ]


def all_finite_bfloat16() -> Tensor:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return bits[bits.isfinite()]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [16, 64, 255])
def test_every_finite_bfloat16(width: int) -> None:
    x = all_finite_bfloat16()
    assert len(x) == 65280
    x = x[: len(x) // width * width]
    expect_equal_bits(x.view(-1, width))  # neighbours: rows of one magnitude
    expect_equal_bits(x.view(width, -1).T)  # rows that span all magnitudes
    expect_equal_bits(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))].view(-1, width))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("shape", [(1000, 64), (3, 5, 7, 33), (10, 1), (1, 10000)], ids=str)
def test_random_float32(shape: tuple[int, ...], scale: float) -> None:
    expect_equal_bits(random(*shape) * scale)


def test_float16_rows() -> None:
    expect_equal_bits(random(100, 64).half())


def test_ties_round_to_even() -> None:
    # amax 448 makes the scale 1; halfway between neighbours of E4M3 the even mantissa wins.
    row = torch.tensor([[448.0, 17.0, 19.0, -17.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10]])
    values, scale = quantize_rows(row)
    assert scale.item() == 1
    assert values.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 1.0, 1.25, 0.0, 2 * 2.0**-9]]
    expect_equal_bits(row)


def test_zero_rows_have_scale_one() -> None:
    x = random(4, 8)
    x[1] = 0
    x[2] = -0.0
    values, scale = quantize_rows(x)
    assert scale[1] == scale[2] == 1
    assert values[1:3].float().eq(0).all()
    assert fake_quantize_rows(x)[1:3].eq(0).all()
    expect_equal_bits(x)


@pytest.mark.parametrize("exponent", [-149, -148, -140, -127, -126])
def test_denormal_rows(exponent: int) -> None:
    # amax / 448 itself becomes denormal, or zero: then the row is taken as it is, with scale 1.
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.25, 1.0, 1.0, 1.0]], dtype=torch.float64) * 2.0**exponent
    expect_equal_bits(x.float())
    assert quantize_rows(x.float())[1].gt(0).all()


def test_never_nan_and_saturates() -> None:
    # E4M3 has no infinity: a scaled value that rounding lifts over 448 must stay 448 and not become NaN.
    top = torch.tensor(torch.finfo(torch.float32).max)
    for amax in (top, torch.tensor(3.3e38), *random(1000).abs(), torch.tensor(448.0).nextafter(top)):
        values, scale = quantize_rows(torch.stack([amax, -amax])[None])
        assert values.float().tolist() == [[448.0, -448.0]]
        assert scale.isfinite().all()


def test_row_with_the_smallest_scales_saturates() -> None:
    # A scale rounded down to the smallest denormal leaves values above 448 * scale.
    x = torch.tensor([[600 * 2.0**-149, -600 * 2.0**-149, 2.0**-149]])
    values, _ = quantize_rows(x)
    assert values.float()[0, :2].tolist() == [448.0, -448.0]
    expect_equal_bits(x)


def test_quantizing_again_changes_nothing() -> None:
    x = random(200, 64)
    values, scale = quantize_rows(x)
    again, scale_again = quantize_rows(dequantize_rows(values, scale))
    # 448 * (amax / 448) need not be amax, but it is within one rounding of each.
    assert torch.equal(values.view(torch.uint8), again.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale, rtol=2 * 2.0**-23, atol=0.0)


def test_dequantized_is_near() -> None:
    x = random(100, 64)
    # Half a step of three mantissa bits, or half the smallest denormal 2^-9 of the row's scale.
    bound = torch.maximum(x.abs() * 2.0**-4, quantize_rows(x)[1][:, None] * 2.0**-10) * (1 + 2.0**-20)
    assert (fake_quantize_rows(x) - x).abs().le(bound).all()
    assert torch.finfo(torch.float8_e4m3fn).max == E4M3_MAX


def test_weights_as_compressed_tensors_channel() -> None:
    arguments = QuantizationArgs(
        num_bits=8, type=QuantizationType.FLOAT, symmetric=True, dynamic=False, strategy=QuantizationStrategy.CHANNEL
    )
    weight = random(40, 64, seed=2)
    low, high = weight.aminmax(dim=-1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, arguments)
    theirs = quantize(weight, scale, zero_point, arguments, dtype=torch.float8_e4m3fn)
    values, our_scale = quantize_rows(weight)
    assert torch.equal(our_scale, scale.flatten())
    assert torch.equal(values.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(
        dequantize_rows(values, our_scale), dequantize(theirs, scale, zero_point, arguments, dtype=torch.float32)
    )


def test_activations_as_compressed_tensors_token() -> None:
    arguments = QuantizationArgs(
        num_bits=8, type=QuantizationType.FLOAT, symmetric=True, dynamic=True, strategy=QuantizationStrategy.TOKEN
    )
    x = random(2, 9, 64, seed=3)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(64, 1))
    theirs = quantize(x, scale, zero_point, arguments, dtype=torch.float8_e4m3fn)
    values, our_scale = quantize_rows(x)
    assert torch.equal(our_scale, scale.squeeze(-1))
    assert torch.equal(values.view(torch.uint8), theirs.view(torch.uint8))

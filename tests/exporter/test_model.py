"""Our Glm4MoeForCausalLM against transformers' own, on checkpoints that transformers wrote."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import expect_close
from torch import Tensor, nn

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import parameters
from glm_export.exporter.model import (
    Experts,
    Glm4MoeForCausalLM,
    Linear,
    ModelOutput,
    RotaryEmbedding,
    Router,
)
from glm_export.exporter.precision import storage_dtype
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.weights import reference_of_checkpoint

U32 = 2.0**-24
LOGITS = 2e-5
"""Two float32 models may differ by this much: logits reach 9, and between the two ends lie some ten sums of up to 96
products each, perhaps in another order: 9 * sqrt(10 * 96) * 2^-24 = 1.7e-5 if roundings are random."""

BATCH, TOKENS = 3, 12
SMALL = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "hidden_act": "silu"},
    **{"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0},
    **{"pad_token_id": None, "eos_token_id": [319]},
}
AXES: dict[str, tuple[Any, ...]] = {
    "use_qk_norm": (False, True),
    "attention_bias": (False, True),
    "first_k_dense_replace": (0, 1, 3),
    "groups": ((1, 1), (4, 1), (4, 2), (4, 3)),  # n_group, topk_group
    "norm_topk_prob": (False, True),
    "routed_scaling_factor": (1.0, 2.5),
    "n_routed_experts": (8, 128, 160),
    "num_experts_per_tok": (2, 8),
    "n_shared_experts": (1, 2),
    "partial_rotary_factor": (0.5, 1.0),
    "head_dim": (16, 24),  # hidden size / heads is 16
    "tie_word_embeddings": (False, True),
}
Case = dict[str, Any]


def possible(case: Case) -> bool:
    n_group, topk_group = case["groups"]
    return bool(case["num_experts_per_tok"] <= case["n_routed_experts"] // n_group * topk_group)


def pairs(case: Case) -> set[tuple[object, ...]]:
    return set(itertools.combinations(case.items(), 2))


def grid() -> list[Case]:
    """Few cases in which every two values of two axes meet."""
    everything = (dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values()))
    sample = random.Random(0).sample([case for case in everything if possible(case)], 2000)
    missing = set().union(*map(pairs, sample))
    cases: list[Case] = []
    while missing:
        cases.append(max(sample, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(cases[-1])
    return cases


def name_of(case: Case) -> str:
    return "-".join(f"{value[0]}.{value[1]}" if isinstance(value, tuple) else f"{value:g}" for value in case.values())


GRID = grid()
TYPICAL: Case = {
    **{"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1, "groups": (4, 2)},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_routed_experts": 32, "num_experts_per_tok": 4},
    **{"n_shared_experts": 2, "partial_rotary_factor": 0.5, "head_dim": 24, "tie_word_embeddings": False},
}


def test_grid_has_every_pair_of_values() -> None:
    want = sum(len(a) * len(b) for a, b in itertools.combinations(AXES.values(), 2))
    assert len(set().union(*map(pairs, GRID))) == want
    assert len(GRID) < 30


def transformers_model(case: Case, seed: int = 3) -> Any:
    """Random weights with which nothing is negligible: logits of size 2, spread routing, every bias at work."""
    case = case | dict(zip(("n_group", "topk_group"), case["groups"], strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": case["partial_rotary_factor"]}
    for name in ("groups", "partial_rotary_factor"):
        del case[name]
    config = transformers.Glm4MoeConfig(**SMALL, **case, rope_parameters=rope)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.Glm4MoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            mean, deviation = (1.0, 0.2) if "norm" in name else (0.0, 0.2 if name.endswith("bias") else 1 / 8)
            if "embed_tokens" in name or "lm_head" in name:
                deviation = 0.25
            elif name.endswith("gate.weight"):
                deviation = 0.2
            elif tensor.ndim >= 2:
                deviation = tensor.shape[-1] ** -0.5
            tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))
    return model


def token_ids(batch: int = BATCH, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The same weights in both implementations, and what each makes of the same tokens."""

    theirs: Any
    ours: Glm4MoeForCausalLM
    ids: Tensor
    want: Any
    got: ModelOutput
    their_choice: list[tuple[Tensor, Tensor]]
    our_choice: list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _no_gradients_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = transformers_model(request.param)
    directory = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(directory, max_shard_size="300KB")
    assert len(list(directory.glob("model-*.safetensors"))) >= 2
    ours = reference_of_checkpoint(Checkpoint.open(directory))
    their_choice: list[tuple[Tensor, Tensor]] = []
    our_choice: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, found: their_choice.append((found[2], found[1])))
        for layer in theirs.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    hooks += [
        module.register_forward_hook(lambda _, __, found: our_choice.append((found[0], found[1])))
        for module in ours.modules()
        if isinstance(module, Router)
    ]
    ids = token_ids()
    outputs = dict.fromkeys(("output_hidden_states", "output_attentions", "output_router_logits"), True)
    want, got = theirs(ids, **outputs), ours(ids)
    for hook in hooks:
        hook.remove()
    return Pair(theirs=theirs, ours=ours, ids=ids, want=want, got=got, their_choice=their_choice, our_choice=our_choice)


over_the_grid = pytest.mark.parametrize("pair", GRID, indirect=True, ids=name_of)
typical = pytest.mark.parametrize("pair", [TYPICAL], indirect=True, ids=name_of)


@over_the_grid
def test_weights_make_every_branch_matter(pair: Pair) -> None:
    assert 0.5 < pair.want.logits.std() < 5
    config = pair.ours.config
    for i in config.moe_layers:
        bias = pair.theirs.model.layers[i].mlp.gate.e_score_correction_bias
        assert bias.abs().min() > 0
        assert (bias < 0).any()
        assert closest_decision(pair.want.router_logits[i - config.first_k_dense_replace], bias, config) > LOGITS
    for ids, _ in pair.our_choice:
        assert len(ids.unique()) >= min(config.n_routed_experts // 2, 2 * config.num_experts_per_tok)
    assert len(pair.our_choice) == len(config.moe_layers) == 4 - config.first_k_dense_replace


def closest_decision(logits: Tensor, bias: Tensor, config: Glm4MoeConfig) -> float:
    """How far the closest decision of a router is from a tie, over all tokens, for groups and experts."""
    choice = (logits.sigmoid() + bias).unflatten(-1, (config.n_group, -1))
    score, order = choice.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    keep, K = config.topk_group, config.num_experts_per_tok
    groups = score[:, keep - 1] - score[:, keep] if keep < config.n_group else torch.tensor([torch.inf])
    left = choice.gather(1, order[:, :keep, None].expand(-1, -1, choice.shape[-1])).flatten(1)
    best = left.sort(dim=-1, descending=True).values
    experts = best[:, K - 1] - best[:, K] if best.shape[-1] > K else torch.tensor([torch.inf])
    return min(float(groups.min()), float(experts.min()))


@over_the_grid
def test_logits(pair: Pair) -> None:
    assert pair.got.logits.dtype == torch.float32
    expect_close(pair.got.logits, pair.want.logits, LOGITS, "logits")


@over_the_grid
def test_chosen_experts(pair: Pair) -> None:
    assert len(pair.our_choice) == len(pair.their_choice)
    for layer, ((ids, weights), (their_ids, their_weights)) in enumerate(
        zip(pair.our_choice, pair.their_choice, strict=True)
    ):
        for t in range(len(ids)):
            got = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
            want = dict(zip(their_ids[t].tolist(), their_weights[t].tolist(), strict=True))
            assert set(got) == set(want), f"MoE layer {layer}, token {t}: chose {sorted(got)}, want {sorted(want)}"
            # Router logits are as good as logits; a sigmoid's slope is 1/4, the sum at most doubles it, then scaling.
            assert max(abs(got[e] - want[e]) for e in want) <= LOGITS / 2 * pair.ours.config.routed_scaling_factor


@over_the_grid
def test_hidden_states_router_logits_attentions(pair: Pair) -> None:
    layers = pair.ours.config.num_hidden_layers
    for kind, count in (
        ("hidden_states", layers + 1),
        ("router_logits", len(pair.ours.config.moe_layers)),
        ("attentions", layers),
    ):
        got, want = getattr(pair.got, kind), getattr(pair.want, kind)
        assert len(got) == len(want) == count
        for i in range(count):
            # As good as logits, which are made of them, but of their own size: a residual stream grows to 20.
            expect_close(got[i], want[i], LOGITS * max(1.0, float(want[i].abs().max()) / 5), f"{kind}.{i}")
    # The last one is normed: the head alone makes logits of it.
    assert torch.equal(pair.ours.lm_head(pair.got.hidden_states[-1]), pair.got.logits)


@over_the_grid
def test_prefill_is_token_by_token(pair: Pair) -> None:
    caches = pair.ours.empty_caches(BATCH, TOKENS + 3)
    for s in range(TOKENS):
        step = pair.ours(pair.ids[:, s : s + 1], caches=caches, write_index=torch.full((BATCH,), s))
        caches = step.caches
        expect_close(step.logits[:, 0], pair.want.logits[:, s], LOGITS, f"logits of token {s}")
    for layer, (cached, prefilled) in enumerate(zip(caches, pair.got.caches, strict=True)):
        for got, want in zip(cached, prefilled, strict=True):
            expect_close(got[:, :, :TOKENS], want, LOGITS, f"cache of layer {layer}")
            assert got[:, :, TOKENS:].eq(0).all()


@over_the_grid
def test_ragged_rows_are_solo_rows(pair: Pair) -> None:
    lengths = torch.tensor([TOKENS, 4, 9])
    padded = torch.where(torch.arange(TOKENS) < lengths[:, None], pair.ids, 7)
    prefill = pair.ours(
        padded,
        caches=pair.ours.empty_caches(BATCH, TOKENS + 1),
        length=lengths,
        logits_to_keep=(lengths - 1)[:, None],
    )
    next_ids = pair.ids[:, :1]
    decode = pair.ours(next_ids, caches=prefill.caches, write_index=lengths)
    for b, length in enumerate(lengths.tolist()):
        solo = torch.cat((pair.ids[b, :length], next_ids[b]))[None]
        want = pair.theirs(solo).logits[0]
        expect_close(prefill.logits[b, 0], want[-2], LOGITS, f"row {b}: last token of the prompt")
        expect_close(decode.logits[b, 0], want[-1], LOGITS, f"row {b}: decoded token")


@over_the_grid
def test_loss(pair: Pair) -> None:
    labels = pair.ids.clone()
    labels[0, :5] = -100
    labels[2, 3] = -100
    want = pair.theirs(pair.ids, labels=labels).loss
    got = pair.ours(pair.ids, labels=labels).loss
    assert got is not None
    expect_close(got, want, 2 * LOGITS, "loss")  # a log-softmax moves at most twice as far as its logits
    assert pair.got.loss is None


@typical
def test_inputs_embeds(pair: Pair) -> None:
    embeds = pair.theirs.model.embed_tokens(pair.ids) * 1.5
    got = pair.ours(inputs_embeds=embeds)
    expect_close(got.logits, pair.theirs(inputs_embeds=embeds).logits, LOGITS, "logits")
    assert torch.equal(got.hidden_states[0], embeds)


@typical
@pytest.mark.parametrize(
    "keep",
    [
        *(0, 1, 5, torch.tensor([0, 3, -1]), torch.tensor([[11], [3], [8]]), torch.tensor([[0, 2], [11, 1], [5, 5]])),
        token_ids() % 3 == 0,
    ],
    ids=["all", "last", "last_five", "index", "one_per_row", "two_per_row", "mask"],
)
def test_logits_to_keep(pair: Pair, keep: int | Tensor) -> None:
    got, want = pair.ours(pair.ids, logits_to_keep=keep).logits, pair.theirs(pair.ids, logits_to_keep=keep).logits
    expect_close(got, want, LOGITS, "logits")


@typical
def test_wrong_arguments(pair: Pair) -> None:
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        pair.ours()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        pair.ours(pair.ids, inputs_embeds=torch.zeros(BATCH, TOKENS, 64))
    for keep in (1, torch.tensor([1])):
        with pytest.raises(ValueError, match="logits of all tokens"):
            pair.ours(pair.ids, labels=pair.ids, logits_to_keep=keep)


@typical
def test_streamed_weights_are_the_same(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    streamed = reference_of_checkpoint(Checkpoint.open(tmp_path), stream=True)
    assert torch.equal(streamed(pair.ids).logits, pair.got.logits)
    assert all(parameter.is_meta for parameter in streamed.parameters())


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_rotary_embedding_up_to_the_largest_position(theta: float, factor: float) -> None:
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    case = TYPICAL | {"partial_rotary_factor": factor}
    theirs = transformers.Glm4MoeConfig(**SMALL, head_dim=128, rope_parameters=rope)
    rotary = transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeRotaryEmbedding(theirs)
    config = transformers_model(case | {"n_routed_experts": 8, "num_experts_per_tok": 2}).config.to_dict()
    config |= {"head_dim": 128, "rope_parameters": rope, "architectures": None}
    ours = RotaryEmbedding(Glm4MoeConfig.from_dict(config))
    position = torch.tensor([[0, 1, 2, 1000, 65535, 65536, 131070, 131071], [*range(4000, 4008)]])
    for got, want in zip(ours(position), rotary(torch.zeros(1), position), strict=True):
        assert got.shape == (2, 8, int(128 * factor) // 2)
        assert torch.equal(got, want[..., : got.shape[-1]])
        assert torch.equal(got, want[..., got.shape[-1] :])


def ours_of(theirs: Any, precision: str) -> Glm4MoeForCausalLM:
    """Our model in any precision with transformers' weights; FP8 rows come from ml_dtypes."""
    config = Glm4MoeConfig.from_dict(theirs.config.to_dict() | {"architectures": None})
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(config, precision).eval()
    state, stored = theirs.state_dict(), {}
    for name, parameter in parameters(config).items():
        dtype = storage_dtype(precision, parameter.kind)
        if dtype == torch.float8_e4m3fn:
            values, scale = e4m3_rows(state[name])
            stored[name], stored[f"{name}_scale"] = values, scale
        else:
            stored[name] = state[name].to(dtype)
    model.load_state_dict(stored, assign=True)
    return model


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.detach().float().numpy()
    scale = np.abs(rows).max(axis=-1) / np.float32(448)
    scale = np.where(scale > 0, scale, np.float32(1))
    values = np.clip(rows / scale[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scale)


def rounded_rows(x: Tensor) -> Tensor:
    values, scale = e4m3_rows(x)
    return values.float() * scale[..., None]


def load(directory: Path, dtype: torch.dtype) -> Any:
    """As users load a checkpoint: RoPE's frequencies and the correction bias stay float32."""
    options = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.Glm4MoeForCausalLM.from_pretrained(directory, **options).eval()


def test_bfloat16_is_no_further_from_float32_than_transformers(tmp_path: Path) -> None:
    ours, theirs = [], []
    for seed in range(3):
        directory = tmp_path / str(seed)
        transformers_model(TYPICAL, seed).bfloat16().save_pretrained(directory, max_shard_size="300KB")
        exact = load(directory, torch.float32)
        ids = token_ids(8, 16, seed)
        want = exact(ids).logits
        found = ours_of(exact, "bf16")(ids)
        assert found.hidden_states[1].dtype == found.caches[0][0].dtype == torch.bfloat16
        assert found.logits.dtype == torch.float32
        ours.append((found.logits - want).square().mean(-1).sqrt().flatten())
        theirs.append((load(directory, torch.bfloat16)(ids).logits.float() - want).square().mean(-1).sqrt().flatten())
    # The error of 384 tokens. The median, because either run may now and then choose another expert than float32 did.
    # Both round at the same places, transformers at some more (inside norms, SiluMul, RoPE, softmax, the experts' sum,
    # and the logits): ours should be below 1. A median of 384 numbers that spread by a factor of two is known to 4%.
    our_median, their_median = (float(torch.cat(errors).median()) for errors in (ours, theirs))
    assert our_median <= 1.04 * their_median


class RoundedExperts(nn.Module):
    """Glm4MoeExperts with E4M3 rows wherever a product reads them; loops over tokens."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate_up = rounded_rows(experts.gate_up_proj)
        self.down = rounded_rows(experts.down_proj)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, out = rounded_rows(x), torch.zeros_like(x)
        for t, k in itertools.product(range(len(ids)), range(ids.shape[1])):
            gate, up = (self.gate_up[ids[t, k]] @ x[t]).chunk(2)
            out[t] += weights[t, k] * (self.down[ids[t, k]] @ rounded_rows(F.silu(gate) * up))
        return out


def rounded_model(theirs: Any) -> Any:
    """transformers' float32 model in which every quantized product reads rows rounded by ml_dtypes."""
    model = copy.deepcopy(theirs)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):  # the router is none
                module.weight.copy_(rounded_rows(module.weight))
                module.register_forward_pre_hook(lambda _, x: rounded_rows(x[0]))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = RoundedExperts(layer.mlp.experts)
    return model


def relative_l2(got: Tensor, want: Tensor) -> Tensor:
    """Per token."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def test_fp8_is_float32_with_rounded_rows() -> None:
    theirs = transformers_model(TYPICAL)
    for module in (theirs.model.embed_tokens, theirs.lm_head):  # not quantized, stored in bfloat16
        module.weight.copy_(module.weight.bfloat16())
    ids = token_ids(4, 16)
    ours = ours_of(theirs, "fp8")
    ours.compute_dtype = torch.float32  # activations stay float32, so that quantizing is all there is
    got, want, unquantized = ours(ids).logits, rounded_model(theirs)(ids).logits, theirs(ids).logits
    drift = relative_l2(unquantized, want)
    # Eight bits: 2^-4 / sqrt(3) per number at most, and several such steps one after another.
    assert 0.01 < drift.median() < 0.3
    # Where float32 sums in another order lead past a tie of E4M3, one of 64 numbers moves by a step of at most 1/8, as
    # quantizing moved all of them. That is rare, and reaches the tokens after it through attention: most tokens are as
    # good as float32, and even the others far closer than the unquantized model.
    difference = relative_l2(got, want)
    assert difference.median() < 1e-3
    assert difference.square().mean().sqrt() < 0.1 * drift.square().mean().sqrt()


@pytest.mark.parametrize("precision", ["fp8", "fp8-head"])
def test_fp8_projections_round_what_they_read(precision: str) -> None:
    ours = ours_of(transformers_model(TYPICAL), precision)
    seen: list[str] = []

    def check(name: str, module: Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(name)
        x, weight = inputs[0].float(), module.weight.float()
        assert module.fp8 == (name != "lm_head" or precision == "fp8-head")
        if module.fp8:
            x, weight = rounded_rows(x), weight * module.weight_scale[:, None]
        want, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        if module.bias is not None:
            want, size = want + module.bias, size + module.bias.abs()
        # A float32 sum of the row's products and a bias, in any order; then one rounding.
        inside = (x.shape[-1] + 1) * U32 * size
        half_unit = torch.finfo(output.dtype).eps / 2
        assert output.dtype == (torch.float32 if name == "lm_head" else torch.bfloat16)
        expect_close(output, want, inside + half_unit * (want.abs() + inside), name)

    for name, module in ours.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(partial(check, name))
    ours(token_ids())
    silu_mul = ["gate_proj", "up_proj", "down_proj"]
    want = [f"model.layers.{i}.self_attn.{letter}_proj" for i in range(4) for letter in "qkvo"]
    want += [f"model.layers.0.mlp.{name}" for name in silu_mul]
    want += [f"model.layers.{i}.mlp.shared_experts.{name}" for i in (1, 2, 3) for name in silu_mul]
    assert sorted(seen) == sorted([*want, "lm_head"])
    assert [module.fp8 for module in ours.modules() if isinstance(module, Experts)] == [True] * 3


def test_float32_reference_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    transformers_model(TYPICAL).bfloat16().save_pretrained(tmp_path, max_shard_size="300KB")
    got = reference_of_checkpoint(Checkpoint.open(tmp_path))(token_ids())
    expect_close(got.logits, load(tmp_path, torch.float32)(token_ids()).logits, LOGITS, "logits")
    assert got.hidden_states[0].dtype == torch.float32

"""What a step can not do without: the bytes it must read and write once, and its products and sums.

Weights count once per step, an expert's only if a token chose it; activations, which stay in the CPU's caches, not at
all. Of the embedding a row per token counts, of the KV cache what lies before `length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import parameters
from glm_export.exporter.source.shards import read_shard
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Of one step, or of several."""

    bytes: float
    flops: float
    """Products and sums, each counts as one."""

    def __add__(self, other: Needs) -> Needs:
        return Needs(bytes=self.bytes + other.bytes, flops=self.flops + other.flops)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeeds:
    """The numbers of a bundle and a session that `step` adds up."""

    common_bytes: int
    """Weights that every step reads: all but embedding and routed experts."""
    expert_bytes: int
    """One expert of one layer, with its scales."""
    embedding_row_bytes: int
    cache_token_bytes: int
    """Keys and values of one token in all layers."""
    token_flops: int
    """Of one token, without head and attention."""
    head_flops: int
    """Of one token's logits."""
    pair_flops: int
    """Of one token that attends to one position, in all layers."""
    expert_layers: int
    top_k: int
    all_logits: bool

    @classmethod
    def of(cls, bundle: Bundle, session: Session) -> Self:
        """Reads the config and the headers of the weight files.

        Raises:
            InputError: config.json is of no known model, or a weight file has no header.
            IntegrityError: a file is not what the manifest says.
        """
        config = Glm4MoeConfig.from_file(bundle.file("config.json"))
        sizes = _weight_sizes(bundle, config)
        V, E, K = config.vocab_size, config.n_routed_experts, config.num_experts_per_tok
        numels = {"linear": 0, "router": 0, "experts": 0}
        for parameter in parameters(config).values():
            if parameter.kind in numels:
                numels[parameter.kind] += parameter.numel
        expert_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
        caches = bundle.manifest.contract.caches()
        cache = session.cache(caches[0].name)
        return cls(
            common_bytes=sizes["rest"],
            expert_bytes=sizes["experts"] // max(1, E * expert_layers),
            embedding_row_bytes=sizes["embedding"] // V,
            cache_token_bytes=len(caches) * cache.nbytes // (session.batch * session.capacity),
            token_flops=2 * (numels["linear"] + numels["router"] + numels["experts"] // E * K),
            head_flops=2 * V * config.hidden_size,
            pair_flops=4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers,
            expert_layers=expert_layers,
            top_k=K,
            all_logits=session.contract.logits == "all",
        )

    def step(self, *, batch: int, new: int, held: int, experts: float) -> Needs:
        """What a step needs in which each of `batch` rows, of `held` tokens each, takes `new` ones.

        Args:
            batch: rows.
            new: tokens per row.
            held: tokens per row before.
            experts: whose weights it read, added up over the layers.
        """
        tokens, after = batch * new, held + new
        pairs = batch * (new * held + new * (new + 1) // 2)  # a token sees itself and what is before it
        read = self.common_bytes + self.expert_bytes * experts + self.embedding_row_bytes * tokens
        return Needs(
            bytes=read + self.cache_token_bytes * (batch * after + tokens),
            flops=(
                self.token_flops * tokens
                + self.head_flops * (tokens if self.all_logits else batch)
                + self.pair_flops * pairs
            ),
        )


def _weight_sizes(bundle: Bundle, config: Glm4MoeConfig) -> dict[str, int]:
    """Bytes of the embedding, of the routed experts with their scales, and of the rest, which has the head."""
    sizes = {"embedding": 0, "experts": 0, "rest": 0}
    known = parameters(config)
    for path in bundle.manifest.files:
        if path.endswith(".safetensors"):
            for name, tensor in read_shard(bundle.file(path, hashed=False)).tensors.items():
                parameter = known.get(name.removesuffix("_scale"))
                if parameter:  # not the padding between tensors
                    sizes[parameter.kind if parameter.kind in sizes else "rest"] += tensor.nbytes
    if config.tie_word_embeddings:
        sizes["rest"] += sizes["embedding"]  # which is the head too, and as that is read as a whole
    return sizes

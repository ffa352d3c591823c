"""A checkpoint in Hugging Face transformers, bfloat16: `python bench/peers/transformers_cpu.py CHECKPOINT`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from protocol import arguments, measure
from transformers import AutoModelForCausalLM, DynamicCache


class TransformersModel:
    def __init__(self, directory: str, *, experts: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts
        ).eval()
        self.vocab_size = self._model.config.vocab_size
        self.reset()

    def reset(self) -> None:
        self._cache = DynamicCache(config=self._model.config)

    def feed(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        output = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: npt.NDArray[np.float32] = output.logits[0, -1].float().numpy()
        return logits


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--experts", default="eager", choices=("eager", "batched_mm", "grouped_mm"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        measure(lambda: TransformersModel(options.model, experts=options.experts), options)

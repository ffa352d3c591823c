"""A GGUF file in llama.cpp, through the C interface of llama-cpp-python: `python bench/peers/llamacpp.py MODEL.gguf`.

`pip install llama-cpp-python` compiles it from its sdist for the machine it is on.
"""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import numpy.typing as npt
from protocol import arguments, measure

_SILENT = llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCppModel:
    def __init__(self, path: str, *, capacity: int, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}: expected a GGUF file of write_gguf.py.")
        parameters = llama_cpp.llama_context_default_params()
        # The physical batch is llama.cpp's default, so that a prompt of 512 tokens is one piece.
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = capacity, capacity, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    def feed(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        if status:
            raise SystemExit(f"llama_decode returned {status} for {len(tokens)} tokens, expected 0.")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    capacity = max(options.context + options.steps, options.prompt)
    measure(lambda: LlamaCppModel(options.model, capacity=capacity, threads=options.threads), options)

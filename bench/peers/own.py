"""A bundle in our session: `python bench/peers/own.py BUNDLE`.

With GLM_EXPORT_CPU=portable that is stock onnxruntime on the portable bodies. The weights are not hashed,
as the peers hash nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from protocol import arguments, measure

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session


class OwnSession:
    def __init__(self, directory: str, *, capacity: int, threads: int) -> None:
        bundle = Bundle.open(directory, check="size")
        self.vocab_size = bundle.manifest.contract.vocab_size
        self._session = open_session(bundle, batch=1, capacity=capacity, threads=threads)

    def reset(self) -> None:
        self._session.reset()

    def feed(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        if len(tokens) == 1:
            return decode_step(self._session, tokens)[0]
        return prefill(self._session, [tokens])[0]


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    capacity = max(options.context + options.steps, options.prompt)
    measure(lambda: OwnSession(options.model, capacity=capacity, threads=options.threads), options)

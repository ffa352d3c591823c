"""A bundle's weights in memory: each file is mapped once, and nothing is read or copied until somebody needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import IntegrityError
from glm_export.runtime.large_pages import map_file

if TYPE_CHECKING:  # its module imports onnx
    from glm_export.plugins.external_data import ExternalTensor

Bytes = npt.NDArray[np.uint8]


def mapped_weights(tensors: Iterable[ExternalTensor], bundle: Bundle) -> Iterator[tuple[ExternalTensor, Bytes]]:
    """Yields every tensor with its bytes, which stay mapped as long as somebody refers to them.

    Raises:
        IntegrityError: a file is not as listed (whoever opened the bundle decided about hashes), or a tensor does not
            lie where the graph says.
    """
    files: dict[str, Bytes] = {}
    tensors = list(tensors)
    streamed = {tensor.location for tensor in tensors if not tensor.looked_up}
    for tensor in tensors:
        if tensor.location not in files:
            path = bundle.file(tensor.location, hashed=False)
            files[tensor.location] = np.frombuffer(map_file(path, large=tensor.location in streamed), np.uint8)
        file, end = files[tensor.location], tensor.offset + tensor.length
        if tensor.length != tensor.nbytes or not 0 <= tensor.offset <= end <= len(file):
            raise IntegrityError(
                f"{tensor.name} should be {tensor.nbytes} bytes at {tensor.offset} of {tensor.location}, which has "
                f"{len(file)}: build the bundle again."
            )
        yield tensor, file[tensor.offset : end]

"""A bundle read as a checkpoint: its weight files are safetensors too, with the Hugging Face names."""

from __future__ import annotations

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import QUANTIZED
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.quantized import Names, Quantization, Scheme
from glm_export.exporter.source.shards import read_shard
from glm_export.exporter.weight_file import FOLDER, PADDING
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import UsageError

_PER_CHANNEL = Quantization(
    method="a bundle", groups=((Names(every=True), Scheme(rows=1, columns=None)),), ignored=Names()
)


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """The weights of a bundle, FP8 values with their row scales as they are.

    Raises:
        UsageError: its head is FP8, which other engines do not read.
        InputError: the bundle has no weights, or a file of them is no safetensors file.
        IntegrityError: a file is not what the manifest says.
    """
    if "lm_head" in QUANTIZED.get(bundle.manifest.precision, ()):
        raise UsageError(
            f"{bundle.directory} is {bundle.manifest.precision}, but a checkpoint for other engines has its lm_head in "
            "bf16: start from the original checkpoint, or from a bundle of another precision."
        )
    bundle.require_weights()
    files = [path for path in bundle.manifest.files if path.startswith(f"{FOLDER}/")]
    shards = tuple(read_shard(bundle.file(path, hashed=False)) for path in files)
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    return Checkpoint(
        directory=bundle.directory / FOLDER,
        config=Glm4MoeConfig.from_file(bundle.file("config.json")),
        config_sha256=bundle.manifest.files["config.json"].sha256,
        quantization=_PER_CHANNEL if bundle.manifest.precision == "fp8" else None,
        shards=shards,
        mtp_tensors={},
        mtp=(),
        ignored=(),
        _tensors={name: tensor for name, tensor in tensors.items() if not name.startswith(PADDING)},
        _stamps={shard.file: shard.stamp for shard in shards},
    )

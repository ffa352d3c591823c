"""Where weights come from: a checkpoint in any of its formats (or a bundle), checked as a whole, then read in pieces.

From the bottom: source_file (bytes of one file) -> safetensors_header -> shards (all files together) -> inventory (what
must be there) and quantized, quantization_config (how FP8 is scaled) -> checkpoint.
"""

"""The ops of the `glm` domain, one folder each, in all their forms.

    schema.py      what an op is: names, shapes, dtypes, attributes; every other form is checked against it
    reference.py   the op in plain PyTorch, dull and obviously right
    torch_op.py    the reference as a `torch.library` op, so that it can be traced
    portable.py    an ONNX function body in standard opset-24 ops
    tensorrt.py    another one in what TensorRT does best, where it does not take the portable one or run a plugin
    cpu.cpp        a kernel for ONNX Runtime on a CPU, written against cpu/op.h; it replaces the body where it is there
    <op>.cu        a CUDA kernel behind the C functions of cuda/launch.h, written against cuda/device.cuh

Two rules hold for every op: it computes in float32 inside and rounds once, to its output's dtype; one-dimensional
parameters (norm weights, biases, scales) are float32 in every precision.
"""

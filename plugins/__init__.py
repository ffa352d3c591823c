"""The ops of the `glm` domain, one folder each, in all their forms.

    schema.py      what an op is: names, shapes, dtypes, attributes; every other form is checked against it
    reference.py   the op in plain PyTorch, dull and obviously right
    torch_op.py    the reference as a `torch.library` op, so that it can be traced
    portable.py    an ONNX function body in standard opset-24 ops
    cpu.cpp        a kernel for ONNX Runtime on a CPU, written against cpu/op.h; it replaces the body where it is there

Two rules hold for every op: it computes in float32 inside and rounds once, to its output's dtype; one-dimensional
parameters (norm weights, biases, scales) are float32 in every precision.
"""

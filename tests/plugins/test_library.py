"""The kernels' library in the installed ONNX Runtime: is it found and used, and does its glue hold?

The glue declares ONNX Runtime's ABI by itself. An op of its own, `Probe`, goes through every entry of it: a wrong slot
number would give wrong numbers here, or end the process.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cpu_tools
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from glm_export.plugins.external_data import external_tensors
from glm_export.plugins.library import CPU_VARIABLE, PORTABLE, cpu_kernels
from glm_export.plugins.ops import OPS
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.runtime import ort_session
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import UsageError
from glm_export.runtime.open import open_session

if TYPE_CHECKING:
    from collections.abc import Callable

NOT_GIVEN, FLOAT, INT64, FLOAT16, BFLOAT16, E4M3 = 0, 1, 7, 10, 16, 17


@pytest.fixture(scope="module")
def library() -> Path:
    return cpu_tools.built_library()


@pytest.fixture(scope="module")
def probe(build_probe: Callable[..., Path]) -> Path:
    return build_probe()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the Probe saw."""

    whole: float
    part: float
    x_type: float
    rank: float
    middle_type: float
    last: float
    asked: float
    in_place: float
    sum: float
    aligned: float
    isa: float


def options(library: Path, *, threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the errors of these tests are wanted
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return options


def model(nodes: list[onnx.NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> bytes:
    def infos(types: dict[str, int]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]

    graph = helper.make_graph(nodes, "probe", infos(inputs), infos(outputs))
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    made: bytes = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return made


def probe_session(
    probe: Path,
    *,
    kind: int = FLOAT,
    middle: int = NOT_GIVEN,
    last: bool = False,
    asked: bool = False,
    threads: int = 1,
    **attributes: float,
) -> ort.InferenceSession:
    attributes = {"whole": 0, "part": 0.0, "fail": 0} | attributes
    inputs = {"x": kind} | ({"middle": middle} if middle else {}) | ({"last": FLOAT} if last else {})
    names = [name if name in inputs else "" for name in ("x", "middle", "last")]
    outputs = {"y": kind, "report": FLOAT} | ({"asked": FLOAT} if asked else {})
    node = helper.make_node("Probe", names, list(outputs), domain=DOMAIN, **attributes)
    return ort.InferenceSession(model([node], inputs, outputs), options(probe, threads=threads))


def run(session: ort.InferenceSession, **feeds: Any) -> tuple[np.ndarray[Any, Any], Report]:
    y, report, *_ = session.run(None, {"x": np.arange(6, dtype=np.float32).reshape(2, 3), **feeds})
    return y, Report(**dict(zip(Report.__slots__, report.tolist(), strict=True)))


def test_what_reaches_a_kernel(probe: Path) -> None:
    y, seen = run(probe_session(probe, whole=-7, part=0.25))
    assert y.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (seen.whole, seen.part, seen.x_type, seen.rank, seen.aligned) == (-7, 0.25, FLOAT, 2, 1)
    assert (seen.middle_type, seen.last, seen.asked, seen.in_place) == (0, 0, 0, 0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_task_runs_once(probe: Path, threads: int) -> None:
    session = probe_session(probe, threads=threads)
    assert all(run(session)[1].sum == 99 * 100 / 2 for _ in range(20))


def test_optional_operands(probe: Path) -> None:
    last = np.array([2.5], np.float32)
    _, seen = run(probe_session(probe, last=True), last=last)
    assert (seen.middle_type, seen.last, seen.asked) == (0, 2.5, 0)
    _, seen = run(probe_session(probe, middle=INT64, asked=True), middle=np.array([3]))
    assert (seen.middle_type, seen.last, seen.asked) == (INT64, 0, 1)


@pytest.mark.parametrize("fail", [0, 2])
def test_weights_are_known_before_a_run(probe: Path, fail: int) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    names = ["x", "middle", "last"]
    node = helper.make_node("Probe", names, ["y", "report"], domain=DOMAIN, whole=0, part=0.0, fail=fail)
    made = onnx.load_from_string(model([node], {"last": FLOAT}, {"y": FLOAT, "report": FLOAT}))
    made.graph.initializer.extend(
        [numpy_helper.from_array(x, "x"), numpy_helper.from_array(np.array([4, 5, 6]), "middle")]
    )
    session = ort.InferenceSession(made.SerializeToString(), options(probe))
    if fail:
        with pytest.raises(Exception, match=r"Probe: x is \[2, 3\], expected \[any, 5\]\."):
            session.run(None, {"last": np.array([2.5], np.float32)})
        return
    for last in (2.5, 3.5):  # what is no weight is not kept
        y, report = session.run(None, {"last": np.array([last], np.float32)})
        seen = Report(**dict(zip(Report.__slots__, report.tolist(), strict=True)))
        assert y.tolist() == x.tolist()
        assert (seen.x_type, seen.rank, seen.middle_type, seen.last, seen.in_place) == (FLOAT, 2, INT64, last, 0)


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("middle", [NOT_GIVEN, FLOAT, INT64, E4M3])
@pytest.mark.parametrize("tail", [[], [""], ["last"]], ids=["", "empty_name", "last"])
def test_output_types_follow_inputs(probe: Path, kind: int, middle: int, tail: list[str]) -> None:
    # Nothing in the graph says which type the value between the two nodes has.
    first = ["x", "middle" if middle else "", *tail]
    nodes = [
        helper.make_node("Probe", first, ["between", "unused"], domain=DOMAIN, whole=0, part=0.0, fail=0),
        helper.make_node("Probe", ["between"], ["y", "report"], domain=DOMAIN, whole=0, part=0.0, fail=0),
    ]
    kinds = {"x": kind, "middle": middle, "last": FLOAT}
    made = model(nodes, {name: kinds[name] for name in first if name}, {"y": kind, "report": FLOAT})
    session = ort.InferenceSession(made, options(probe))
    bits = np.arange(4, dtype=np.float32 if kind == FLOAT else np.uint16)
    feeds = {"x": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)}
    if middle:
        other = np.zeros(2, {FLOAT: np.float32, INT64: np.int64, E4M3: np.uint8}[middle])
        feeds["middle"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(other, middle)
    if "last" in tail:
        feeds["last"] = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
    y, report = session.run_with_ort_values(["y", "report"], feeds)
    assert y.element_type() == kind
    assert report.numpy()[2] == kind


def test_input_and_output_in_one_buffer(probe: Path) -> None:
    session = probe_session(probe)
    x, report = np.arange(6, dtype=np.float32), np.zeros(len(Report.__slots__), np.float32)
    other = np.zeros_like(x)
    for target, in_place in ((x, 1.0), (other, 0.0)):
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, FLOAT, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, FLOAT, x.shape, target.ctypes.data)
        binding.bind_output("report", "cpu", 0, FLOAT, report.shape, report.ctypes.data)
        session.run_with_iobinding(binding)
        assert report[Report.__slots__.index("in_place")] == in_place
        assert target.tolist() == [0, 1, 2, 3, 4, 5]


def test_output_is_not_written_where_it_does_not_fit(probe: Path) -> None:
    session = probe_session(probe)
    x, target = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    for shape in ((5,), (7,), (2, 3)):
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, FLOAT, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, FLOAT, shape, target.ctypes.data)
        binding.bind_output("report")
        with pytest.raises(Exception, match=r"Probe: .*shape"):
            session.run_with_iobinding(binding)
        assert not target.any()


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (2, "Probe: x is [2, 3], expected [any, 5]."),
        (3, "Probe: std::bad_alloc"),
        (4, "Probe"),
        (5, "Probe: task 50 gave up."),
    ],
)
def test_errors_are_sentences(probe: Path, fail: int, sentence: str) -> None:
    session = probe_session(probe, fail=fail, threads=2)
    for _ in range(3):
        with pytest.raises(Exception, match="Status Message: ") as caught:
            run(session)
        assert str(caught.value).endswith(sentence)


def test_errors_when_a_kernel_is_made(probe: Path) -> None:
    with pytest.raises(Exception, match=r"Probe: fail is 1, expected anything else\."):
        probe_session(probe, fail=1)
    node = helper.make_node("Probe", ["x"], ["y", "report"], domain=DOMAIN, whole=0, fail=0)
    with pytest.raises(Exception, match=r"Probe: .*part"):
        ort.InferenceSession(model([node], {"x": FLOAT}, {"y": FLOAT, "report": FLOAT}), options(probe))


def test_types_that_no_kernel_takes(probe: Path) -> None:
    node = helper.make_node("Probe", ["x"], ["y", "report"], domain=DOMAIN, whole=0, part=0.0, fail=0)
    with pytest.raises(Exception, match=r"Type Error|INVALID_GRAPH"):
        ort.InferenceSession(model([node], {"x": INT64}, {"y": INT64, "report": FLOAT}), options(probe))


@pytest.mark.parametrize("isa", cpu_tools.ISAS)
def test_isa_is_forced_per_session(probe: Path, library: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, isa)
    try:
        assert cpu_kernels(library).isa == isa
    except ValueError:
        with pytest.raises(Exception, match=f"{CPU_VARIABLE} is {isa}, which this machine can not run"):
            options(probe)
        pytest.skip(f"this machine has no {isa}")
    session = probe_session(probe)
    monkeypatch.setenv(CPU_VARIABLE, "scalar")
    assert run(session)[1].isa == cpu_tools.ISAS.index(isa)


def test_unknown_isa_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, "sse")
    with pytest.raises(Exception, match="GLM_EXPORT_CPU is 'sse': choose one of scalar, avx2, avx512, portable"):
        options(library)
    with pytest.raises(ValueError, match="'sse'"):
        cpu_kernels(library)


def test_kernels_are_ops_of_the_table(library: Path) -> None:
    kernels = cpu_kernels(library)
    assert kernels.ops
    assert set(kernels.ops) <= set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_kernel_replaces_the_body(library: Path, one_node: Callable[..., bytes], name: str, tmp_path: Path) -> None:
    if name not in cpu_kernels(library).ops:
        pytest.skip(f"{name} has no kernel")
    op = OPS[name]
    made = one_node(name, outputs=sum(not output.optional for output in op.outputs))
    left = {}
    for what, chosen in (("kernel", options(library)), ("body", ort.SessionOptions())):
        chosen.optimized_model_filepath = str(tmp_path / f"{what}.onnx")
        chosen.log_severity_level = 3
        ort.InferenceSession(made, chosen)
        left[what] = [node.op_type for node in onnx.load(tmp_path / f"{what}.onnx").graph.node if node.domain == DOMAIN]
    assert left == {"kernel": [name], "body": []}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_session_uses_kernels(
    bundle_of: Callable[[str], Bundle], library: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, ids, logits = bundle_of(precision), np.arange(1, 6)[None], {}
    libraries = {isa: found for isa in cpu_tools.ISAS if (found := cpu_tools.library_for(isa))}
    for cpu, chosen in {PORTABLE: library, **libraries, "": library}.items():
        monkeypatch.setenv(CPU_VARIABLE, cpu)
        monkeypatch.setattr(ort_session, "cpu_library", functools.partial(Path, chosen))
        with open_session(bundle, batch=1) as session:
            assert session.kernels == (None if cpu == PORTABLE else cpu_kernels(chosen))  # type: ignore[attr-defined]
            logits[cpu] = session.step(ids).logits.copy()
    scale = np.abs(logits[PORTABLE]).max()
    # Which kernels are right is told op by op elsewhere; here only that the same model ran.
    for cpu in (*libraries, ""):
        assert np.abs(logits[cpu] - logits[PORTABLE]).max() < 0.05 * scale


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_no_weight_is_copied(bundle_of: Callable[[str], Bundle], precision: str, tmp_path: Path) -> None:
    # Each is overwritten in its file while the session is open: a copy of it would still give the first logits.
    bundle = Bundle.open(shutil.copytree(bundle_of(precision).directory, tmp_path / "bundle"), check="size")
    two = {FLOAT: np.float32(2).tobytes(), BFLOAT16: b"\0\x40", E4M3: b"\x40"}
    with open_session(bundle, batch=1) as session:

        def logits() -> Any:
            session.reset()
            return session.step(np.arange(1, 6)[None]).logits.copy()

        first = logits()
        for tensor in external_tensors(bundle.model_path.read_bytes()):
            if tensor.name.endswith("e_score_correction_bias"):
                continue  # equal ones choose as zeros do
            with (bundle.directory / tensor.location).open("r+b") as file:
                file.seek(tensor.offset)
                old = file.read(tensor.length)
                file.seek(tensor.offset)
                file.write(two[tensor.data_type] * (tensor.length // tensor.itemsize))
                file.flush()
                assert not np.array_equal(logits(), first), tensor.name
                file.seek(tensor.offset)
                file.write(old)
        np.testing.assert_array_equal(logits(), first)


def test_only_the_embedding_is_looked_up(bundle_of: Callable[[str], Bundle]) -> None:
    tensors = external_tensors(bundle_of("fp8").model_path.read_bytes())
    assert [tensor.name for tensor in tensors if tensor.looked_up] == ["model.embed_tokens.weight"]


def test_session_refuses_an_unknown_isa(bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, "sse")
    with pytest.raises(UsageError, match=r"^GLM_EXPORT_CPU is 'sse': choose one of scalar, avx2, avx512, portable\.$"):
        open_session(bundle_of("fp32"))


def test_library_exports_nothing_else(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listing = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    ours = ["glm_finite_logits", "glm_kernels", "glm_meter_multiply", "glm_meter_read", "glm_quantize_rows", "glm_work"]
    assert [line.split()[-1] for line in listing.splitlines()] == ["RegisterCustomOps", *ours]

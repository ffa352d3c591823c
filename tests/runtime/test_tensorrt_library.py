"""Loading TensorRT-RTX: once per process, with our plugins in it; and every reason not to."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from glm_export.runtime import tensorrt_library
from glm_export.runtime.errors import BackendError
from glm_export.runtime.tensorrt_library import MAX_ERRORS, load_library

# One node of a plugin, which makes TensorRT-RTX's parser look for `libtensorrt_rtx.so`.
ONE_PLUGIN = """
import ctypes
from onnx import parser
from glm_export.plugins.tensorrt.registry import registered
from glm_export.runtime.tensorrt_library import load_library

library = load_library("tensorrt-rtx")
assert load_library("tensorrt-rtx") is library
assert library.is_rtx and library.version == library.module.__version__
assert len(registered(library.module)) == 4
model = parser.parse_model('''
    <ir_version: 10, opset_import: ["": 24, "glm": 1]>
    g (float[T,16] logits, float[16] correction_bias) => (int32[T,4] expert_ids, float[T,4] expert_weights) {
        expert_ids, expert_weights = glm.MoERouter <
            plugin_namespace = "glm", plugin_version = "1",
            top_k = 4, n_group = 2, topk_group = 1, norm_topk_prob = 1, routed_scaling_factor = 2.5
        > (logits, correction_bias)
    }''')
network = library.module.Builder(library.logger).create_network()
assert library.module.OnnxParser(network, library.logger).parse(model.SerializeToString())
assert network.get_layer(0).type == library.module.LayerType.PLUGIN_V3
assert library.logger.take_errors() == []
# Nothing of it is seen by the other TensorRT, which has functions of the same names.
assert not hasattr(ctypes.CDLL(None), "getPluginRegistry")
"""


@pytest.mark.parametrize("first", ["", "import tensorrt_rtx"], ids=["alone", "imported_before"])
def test_plugin_layer_can_be_added(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{ONE_PLUGIN}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def refusal(target: str) -> str:
    with pytest.raises(BackendError) as caught:
        load_library.__wrapped__(target)
    return str(caught.value)


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Makes `import tensorrt` run this source."""
    (folder / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # so that what is imported now is forgotten afterwards
    del sys.modules["tensorrt"]


def test_absent_library_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library.importlib.util, "find_spec", lambda name: None)
    assert refusal("tensorrt") == (
        'The target tensorrt needs the library tensorrt: pip install "glm-export[tensorrt]".'
    )
    assert 'pip install "glm-export[tensorrt-rtx]"' in refusal("tensorrt-rtx")


@pytest.mark.parametrize("version", ["10.13.3.9", "12.0.0"])
def test_other_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, f"__version__ = {version!r}")
    assert refusal("tensorrt") == (
        f'The target tensorrt needs tensorrt 11.0 or a newer 11.x, found {version}: pip install "glm-export[tensorrt]".'
    )


def test_library_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, "raise OSError('libcuda.so.1: cannot open shared object file')")
    assert "The library tensorrt does not load (libcuda.so.1: cannot open" in refusal("tensorrt")


def test_installation_without_compiled_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "rtx_name_library", lambda: None)
    assert "installed without its compiled parts" in refusal("tensorrt-rtx")


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_plugins_that_are_refused(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def register(module: object, logger: object) -> None:
        raise error("why")

    monkeypatch.setattr(tensorrt_library, "register", register)
    assert "refuses the plugins (why)" in refusal("tensorrt-rtx")


def test_logger_keeps_errors_until_they_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    logger = load_library("tensorrt-rtx").logger
    severity = load_library("tensorrt-rtx").module.ILogger.Severity
    logger.take_errors()
    with caplog.at_level(logging.DEBUG, "glm_export.tensorrt"):
        for level in (severity.VERBOSE, severity.INFO, severity.WARNING, severity.ERROR, severity.INTERNAL_ERROR):
            logger.log(level, level.name)
    assert logger.take_errors() == ["ERROR", "INTERNAL_ERROR"]
    assert logger.take_errors() == []
    seen = {record.message: record.levelno for record in caplog.records}
    assert seen["VERBOSE"] == seen["INFO"] == logging.DEBUG
    assert max(seen.values()) == seen["WARNING"] == logging.INFO, "nobody sees this unless they ask for it"

    for i in range(2 * MAX_ERRORS):
        logger.log(severity.ERROR, str(i))
    assert logger.take_errors() == [str(i) for i in range(MAX_ERRORS)]

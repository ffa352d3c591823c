import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from cli_tools import ERROR, bundle, call, checkpoint, copied, refused

from glm_export.exporter.cli import cli
from glm_export.exporter.journal import Journal
from glm_export.exporter.layout import parameters
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.files import FileRecord, sha256_of
from glm_export.runtime.manifest import Manifest

COMMANDS = ("make-checkpoint", "plan", "build", "engine", "checkpoint", "run", "bench", "validate", "inspect", "verify")
PROGRAM = (sys.executable, "-m", "glm_export.exporter.cli")


# Help and version


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_instant(command: str) -> None:
    program = (
        "import sys; from glm_export.exporter.cli import execute; code = execute(sys.argv[1:]);"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich', 'tokenizers', 'safetensors'};"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    started = time.monotonic()
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: glm-export {command}".rstrip())
    assert time.monotonic() - started < 2  # 0.1 s when nobody else uses the machine


def test_short_help_and_version() -> None:
    assert call("-h").out == call("--help").out
    assert all(name in call("-h").out for name in COMMANDS)
    assert call("--version").out.startswith("glm-export ")
    assert tuple(cli.commands) == COMMANDS


def test_without_arguments_help_goes_to_stderr() -> None:
    called = call()
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("Usage:")


# make-checkpoint


def test_make_checkpoint(tmp_path: Path) -> None:
    first = call("make-checkpoint", "--recipe", "tiny", "-o", tmp_path / "a", "--seed", 3, "--layers", 2)
    assert first.code == 0
    assert first.out == f"{tmp_path / 'a'}: 2 layers of random weights in bfloat16\n"
    again = call("make-checkpoint", "--config", tmp_path / "a" / "config.json", "-o", tmp_path / "b", "--seed", 3, "-q")
    assert (again.code, again.err) == (0, "")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()
    }


def test_make_checkpoint_packed_in_another_dtype(tmp_path: Path) -> None:
    called = call("make-checkpoint", "--recipe", "tiny", "-o", tmp_path / "a", "--packed", "--dtype", "float32")
    assert called.code == 0
    assert b"mlp.experts.gate_up_proj" in (tmp_path / "a" / "model.safetensors").read_bytes()[:100_000]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float32"


# build


def test_build_prints_one_json_object(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    options = ["--recipe", "tiny", "-p", "bf16", "--layers", 1, "--capacity", 64, "--max-batch", 2, "--logits", "all"]
    more = ["--outputs", "router_logits,hidden_states", "--set", "validate.steps=3", "--set", "validate.prompts=2"]
    called = call("build", checkpoint(), "-o", out, *options, *more, "--json")
    assert called.code == 0, called
    result = json.loads(called.out)
    assert list(result) == ["path", "precision", "bytes", "files", "engines", "seconds"]
    assert result["path"] == str(out)
    assert result["precision"] == "bf16"
    opened = Bundle.open(out, check="full")
    assert (result["bytes"], result["files"]) == (opened.total_bytes, len(opened.manifest.files))
    manifest = opened.manifest
    assert (manifest.capacity, manifest.batch, manifest.contract.num_hidden_layers) == (64, 2, 1)
    assert manifest.contract.logits == "all"
    assert manifest.contract.outputs == ("hidden_states", "router_logits")
    assert manifest.recipe["validate"]["steps"] == 3
    assert manifest.recipe["model"]["num_hidden_layers"] == 1
    assert "tracing 1 layers" in called.err
    assert ERROR not in called.err


def test_build_without_recipe_and_without_weights(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    config = json.loads((checkpoint() / "config.json").read_text()) | {"num_hidden_layers": 1, "curiosity": 7}
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(config))
    options = ["--no-weights", "--inputs-embeds", "--ignore-config-key", "curiosity", "-q"]
    called = call("build", tmp_path / "my-model", "-o", tmp_path / "out", *options)
    assert (called.code, called.err) == (0, "")
    assert called.out.startswith(f"{tmp_path / 'out'}: fp8, ")
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.name, manifest.weights, manifest.contract.inputs_embeds) == ("my-model", False, True)
    assert "was built without weights" in refused(3, "run", tmp_path / "out", "--ids", "1")
    assert call("verify", tmp_path / "out").code == 0


def test_a_recipe_alone_gives_a_graph(tmp_path: Path) -> None:
    called = call("build", "-o", tmp_path / "out", "--recipe", "tiny", "--no-weights", "--layers", 1, "--quiet")
    assert called.code == 0, called
    assert json.loads(call("inspect", tmp_path / "out", "--json").out)["has_weights"] is False


def test_defaults_without_a_recipe() -> None:
    from glm_export.exporter.commands.build import _default_recipe

    recipe = _default_recipe("it", {"runtime.capacity": 99, "runtime.batch": 3, "precision": "bf16"})
    assert (recipe.name, recipe.precision, recipe.runtime.capacity, recipe.runtime.batch) == ("it", "bf16", 99, 3)


# run


def test_run_streams_the_text_of_one_prompt() -> None:
    called = call("run", bundle("fp32"), "--prompt", "the water", "--max-new-tokens", 8, "--quiet")
    assert (called.code, called.err) == (0, "")
    as_json = call("run", bundle("fp32"), "--prompt", "the water", "--max-new-tokens", 8, "--json", "--quiet")
    assert called.out == json.loads(as_json.out)["text"] + "\n"


def test_run_prints_one_object_per_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("of the\nand to\r\n")
    prompts = ["--ids", "1,2,3", "--ids", "5", "--prompt", "the water", "--prompts-file", tmp_path / "prompts"]
    called = call("run", bundle("fp32"), *prompts, "--max-new-tokens", 6, "--json", "--ignore-eos")
    results = [json.loads(line) for line in called.out.splitlines()]
    assert [set(result) for result in results] == [{"prompt_ids", "token_ids", "finish_reason", "text"}] * 5
    assert [result["prompt_ids"] for result in results[3:]] == [[1, 2, 3], [5]]
    assert [len(result["token_ids"]) for result in results] == [6] * 5
    assert {result["finish_reason"] for result in results} == {"length"}
    assert "30 tokens in" in called.err
    alone = call("run", bundle("fp32"), "--ids", "1,2,3", "--max-new-tokens", 6, "--json", "--ignore-eos")
    assert json.loads(alone.out) == results[3]


def test_run_separates_several_texts() -> None:
    called = call("run", bundle("fp32"), "--ids", "1,2", "--ids", "3", "--max-new-tokens", 2, "-q")
    assert called.out.startswith("==> prompt 0 <==\n")
    assert "\n==> prompt 1 <==\n" in called.out


def test_saved_logits_have_one_row_per_chosen_token(tmp_path: Path) -> None:
    options = ["--ids", "1,2,3", "--ids", "5", "--max-new-tokens", 40, "--json", "--save-logits", tmp_path / "logits"]
    results = [json.loads(line) for line in call("run", bundle("fp32"), *options, "--batch", 2).out.splitlines()]
    logits = np.load(tmp_path / "logits")
    rows = [len(result["token_ids"]) + (result["finish_reason"] == "stop") for result in results]
    assert logits.shape == (sum(rows), 512)
    assert logits.dtype == np.float32
    assert logits[: len(results[0]["token_ids"])].argmax(-1).tolist() == results[0]["token_ids"]
    second = logits[rows[0] :][: len(results[1]["token_ids"])]
    assert second.argmax(-1).tolist() == results[1]["token_ids"]


def test_a_stop_token_ends_the_text(tmp_path: Path) -> None:
    path = copied(bundle("fp32"), tmp_path / "bundle")
    options = ["--ids", "1,2,3", "--json", "--max-new-tokens", 5, "--save-logits", tmp_path / "logits.npy"]
    before = json.loads(call("run", path, *options, "--ignore-eos").out)["token_ids"]
    stop = next(token for i, token in enumerate(before) if i > 0 and token not in before[:i])
    dataclasses.replace(Manifest.read(path), eos_token_ids=(stop,)).write(path)
    result = json.loads(call("run", path, *options).out)
    assert result["finish_reason"] == "stop"
    assert result["token_ids"] == before[: before.index(stop)]
    assert len(np.load(tmp_path / "logits.npy")) == before.index(stop) + 1
    assert json.loads(call("run", path, *options, "--ignore-eos").out)["token_ids"] == before


def test_the_cache_dtype_is_an_option_of_run() -> None:
    options = ("--ids", "1,2,3", "--max-new-tokens", 2, "--json", "--threads", 1)
    plain, rounded = (
        json.loads(call("run", bundle("fp32"), *options, *more).out) for more in ((), ("--cache-dtype", "bfloat16"))
    )
    assert rounded.keys() == plain.keys()
    assert "'float33' is not one of" in call("run", bundle("fp32"), *options, "--cache-dtype", "float33").err


def test_a_default_limit_fits_the_capacity() -> None:
    called = call("run", bundle("fp32"), "--ids", "1,2", "--capacity", 10, "--json", "--ignore-eos", "--threads", 1)
    assert len(json.loads(called.out)["token_ids"]) == 8


def test_run_without_tokenizer(tmp_path: Path) -> None:
    path = without_tokenizer(tmp_path)
    called = call("run", path, "--ids", "1,2", "--max-new-tokens", 3, "--ignore-eos", "-q")
    ids = call("run", path, "--ids", "1,2", "--max-new-tokens", 3, "--ignore-eos", "--json").out
    assert called.out == ",".join(map(str, json.loads(ids)["token_ids"])) + "\n"
    assert set(json.loads(ids)) == {"prompt_ids", "token_ids", "finish_reason"}


def without_tokenizer(tmp_path: Path) -> Path:
    path = copied(bundle("fp32"), tmp_path / "no-tokenizer")
    (path / "tokenizer.json").unlink()
    manifest = Manifest.read(path)
    files = {name: record for name, record in manifest.files.items() if name != "tokenizer.json"}
    dataclasses.replace(manifest, files=files).write(path)
    return path


def test_standard_input_is_one_prompt() -> None:
    command = [*PROGRAM, "run", str(bundle("fp32")), "-", "--max-new-tokens", "2", "--json", "--quiet"]
    done = subprocess.run(command, input="the\nwater\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    expected = call("run", bundle("fp32"), "--prompt", "the\nwater", "--max-new-tokens", 2, "--json")
    assert done.stdout == expected.out


# validate, verify


def test_validate(tmp_path: Path) -> None:
    path = copied(bundle("fp8"), tmp_path / "bundle")
    few = ["--prompts", 2, "--prompt-tokens", 4, "--steps", 3, "--seed", 1]
    called = call("validate", path, *few, "--checkpoint", checkpoint(), "--json")
    assert called.code == 0, called
    assert json.loads(called.out) == json.loads((path / "reports" / "validation.json").read_text())
    table = call("validate", path, *few, "--no-drift", "--quiet")
    assert (table.code, table.err) == (0, "")
    assert "drift" not in table.out
    assert call("verify", path).code == 0  # a report is no stranger


def test_validate_fails_with_the_report_on_stdout(tmp_path: Path) -> None:
    path = copied(bundle("fp32"), tmp_path / "bundle")
    graph = (path / "model.onnx").read_bytes()
    # Another epsilon in the norms than the reference has: everything runs, and nothing agrees.
    wrong = np.float32(1e-5).tobytes()
    assert wrong in graph
    (path / "model.onnx").write_bytes(graph.replace(wrong, np.float32(0.5).tobytes()))
    manifest = Manifest.read(path)
    record = FileRecord(size=len(graph), sha256=sha256_of(path / "model.onnx"))
    dataclasses.replace(manifest, files={**manifest.files, "model.onnx": record}).write(path)
    called = call("validate", path, "--prompts", 2, "--prompt-tokens", 4, "--steps", 3, "--no-drift", "--json")
    assert called.code == 4
    assert "further from the reference" in called.error
    assert json.loads(called.out)["passed"] is False


def test_verify(tmp_path: Path) -> None:
    path = copied(bundle("fp32"), tmp_path / "bundle")
    whole = call("verify", path, "--json", "--quiet")
    assert (whole.code, whole.err) == (0, "")
    report = json.loads(whole.out)
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["files"] == len(Bundle.open(path).manifest.files)
    (path / "config.json").unlink()
    (path / "stranger").write_text("?")
    broken = call("verify", path, "--json")
    assert broken.code == 8
    assert "2 files" in broken.error
    kinds = {problem["path"]: problem["kind"] for problem in json.loads(broken.out)["problems"]}
    assert kinds == {"config.json": "missing", "stranger": "unexpected"}
    assert "missing: " in call("verify", path).out


# Failures


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    called = call("--debug", "inspect", tmp_path)
    assert called.code == 3
    assert "Traceback" in called.err
    assert "has no manifest.json" in called.error


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (AssertionError("a\nb"), 1, "This is a bug in glm-export (AssertionError: a b): please report it"),
        (MemoryError(), 5, "There is not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
            5,
            "enough memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/file"), 5, "a/file: No space left on device: free some"),
        (PermissionError(errno.EACCES, "Permission denied", "a/file"), 3, "a/file: Permission denied: check"),
        (click.FileError("a/file", "gone"), 2, "gone"),
    ],
)
def test_everything_that_escapes_is_one_sentence(
    raised: Exception, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(Bundle, "open", fail)
    assert sentence in refused(code, "verify", "bundle")
    if code == 1:
        assert "Traceback" in call("--debug", "verify", "bundle").err


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen([*PROGRAM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# Signals


def unfinished(out: Path) -> Path | None:
    """The directory of an unfinished build, once it has a journal."""
    return next((path.parent for path in out.parent.glob(f"{out.name}.building-*/journal.json")), None)


def wait_for_journal(out: Path) -> None:
    until = time.monotonic() + 60
    while not unfinished(out) and time.monotonic() < until:
        time.sleep(0.01)


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command = ["build", checkpoint(), "-o", out, "--recipe", "tiny", "-p", "fp16", "--layers", 2]
    add, added = Journal.add, []

    def add_and_interrupt(self: Journal, path: str, *arguments: object, **more: object) -> None:
        add(self, path, *arguments, **more)
        added.append(path)
        if len(added) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", add_and_interrupt)
        called = call(*command)
    assert called.code == 130
    assert called.err.endswith("glm-export: stopped by SIGINT\n")
    assert "Traceback" not in called.err
    assert not out.exists()
    staging = unfinished(out)
    assert staging is not None
    assert not (staging / "manifest.json").exists()
    assert "did not finish" in refused(3, "run", staging, "--ids", "1")
    done = {path: (staging / path).stat().st_ino for path in added}
    assert len(done) == 3
    assert call(*command).code == 0
    assert {path: (out / path).stat().st_ino for path in done} == done  # not written again
    assert call("verify", out).code == 0
    assert os.listdir(tmp_path) == ["out"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_from_outside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*PROGRAM, "build", str(checkpoint()), "-o", str(out), "--recipe", "tiny", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_journal(out)
        process.terminate()
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert (printed, err) == ("", "glm-export: stopped by SIGTERM\n")
    assert not out.exists()


def test_a_build_that_the_kernel_kills_is_explained_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["build", str(checkpoint()), "-o", str(out), "--recipe", "tiny", "--layers", "2", "--quiet"]
    with subprocess.Popen([*PROGRAM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_journal(out)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)  # as the kernel does when memory runs out
        printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (5, "")
    assert err.startswith(f"{ERROR}The command ended early")
    assert err.count("\n") == 1
    assert not out.exists()
    assert call(*command).code == 0
    assert call("verify", out).code == 0
    assert os.listdir(tmp_path) == ["out"]


# Plan


def test_plan_says_what_build_will_take_and_writes_nothing(tmp_path: Path) -> None:
    options = [checkpoint(), "--recipe", "tiny", "-p", "bf16", "--quiet"]
    out = tmp_path / "not" / "yet" / "bundle"
    text = call("plan", *options, "-o", out)
    assert (text.code, text.err) == (0, "")
    for word in ("small files", "graph", "weights", "all", "of disk", "of memory", "all together", "H100"):
        assert word in text.out
    planned = json.loads(call("plan", *options, "-o", out, "--json", "--threads", 2).out)
    assert os.listdir(tmp_path) == []
    weights = next(stage for stage in planned["stages"] if stage["name"] == "weights")
    path = bundle("bf16")
    stored = sum(file.stat().st_size for file in (path / "weights").iterdir())
    assert weights["writes"] == planned["gpu_weights"] == stored
    whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert planned["disk"] == pytest.approx(whole, rel=0.05)  # the sizes of graph and manifest are estimates
    assert planned["gpu_cache"] == 2 * 4 * (4 * 2 * 128 * 16) * 2  # k and v, layers, [B, J, C, A] of bfloat16
    assert planned["gpus"]["H100"] == 1
    assert planned["seconds"] == pytest.approx(sum(stage["seconds"] for stage in planned["stages"]))
    assert planned["threads"] == 2


def test_plan_reads_every_weight_once(tmp_path: Path) -> None:
    planned = json.loads(call("plan", checkpoint(), "--layers", 2, "-o", tmp_path / "out", "--json", "--quiet").out)
    reads = next(stage["reads"] for stage in planned["stages"] if stage["name"] == "weights")
    found = Checkpoint.open(checkpoint()).with_layers(2)
    assert reads == sum(p.numel * found.source_dtype(p).itemsize for p in parameters(found.config).values())


def test_plan_of_a_graph_measures_nothing(tmp_path: Path) -> None:
    planned = json.loads(call("plan", "--no-weights", "--recipe", "glm-4.7-fp8", "--json", "--quiet").out)
    assert planned["rates"]["read"] is planned["rates"]["convert"] is None
    assert planned["gpus"]["H100"] >= 5  # 355e9 parameters, a byte each
    assert planned["stages"][-1]["reads"] == 0


@pytest.mark.parametrize("command", ["plan", "build"])
def test_what_can_not_fit_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    options = [command, checkpoint(), "--recipe", "tiny", "-o", tmp_path / "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        sentence = refused(5, *options)
    assert "The bundle needs 0.0 GB" in sentence
    assert "free some space or build elsewhere" in sentence
    with monkeypatch.context() as patch:
        patch.setattr("glm_export.exporter.estimate._memory_free", lambda: 10**8)
        sentence = refused(5, *options)
    assert "The build needs 0.4" in sentence
    assert "0.10 GB are free" in sentence
    assert "fewer --threads" in sentence


# Checks before use


@pytest.mark.parametrize("arguments", [("run", "--ids", "1,2", "--max-new-tokens", 1), ("validate", "--no-drift")])
def test_a_damaged_weight_is_refused_unless_sizes_are_trusted(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    path = copied(bundle("fp32"), tmp_path / "bundle")
    weights = path / "weights/embed.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the sign-free top of one number: nothing but the hash can tell
    weights.write_bytes(data)
    command, *options = arguments
    assert "has sha256" in refused(8, command, path, *options)
    assert call(command, path, *options, "--trust-size").code in (0, 4)


def test_verify_takes_threads(tmp_path: Path) -> None:
    one, three = (call("verify", bundle("fp32"), "--threads", count, "--json") for count in (1, 3))
    assert one.code == three.code == 0
    assert one.out == three.out

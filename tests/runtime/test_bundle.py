import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import contract_of, record, write_bundle

from glm_export.runtime import bundle as bundle_module
from glm_export.runtime.bundle import Bundle, Check, VerifyReport
from glm_export.runtime.errors import InputError, IntegrityError
from glm_export.runtime.open import open_session

WEIGHTS = "weights/toy.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "toy"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_good_bundle(directory: Path) -> None:
    done: list[int] = []
    bundle = Bundle.open(directory, check="full", progress=done.append)
    assert sum(done) == bundle.total_bytes
    assert bundle.model_path == directory / "model.onnx"
    assert bundle.tokenizer_path == directory / "tokenizer.json"
    assert bundle.chat_template_path is None
    assert bundle.generation_config == {"eos_token_id": [7]}
    report = bundle.verify(done.append)
    assert report
    assert (report.files, report.bytes) == (4, bundle.total_bytes)


def test_every_flipped_byte_is_refused(directory: Path) -> None:
    for path in ("model.onnx", "tokenizer.json", "generation_config.json", WEIGHTS):
        flip(directory / path)
        with pytest.raises(IntegrityError, match=f"{path} has sha256"):
            Bundle.open(directory, check="full")
        with pytest.raises(IntegrityError, match="has sha256"):
            Bundle.open(directory)
        if path != WEIGHTS:
            with pytest.raises(IntegrityError, match="has sha256"):
                Bundle.open(directory, check="size")
        flip(directory / path)
    assert Bundle.open(directory, check="full").verify()


def test_weights_can_be_trusted_by_size(directory: Path) -> None:
    flip(directory / WEIGHTS)
    bundle = Bundle.open(directory, check="size")
    report = bundle.verify()
    assert not report
    assert [(problem.path, problem.kind) for problem in report.problems] == [(WEIGHTS, "changed")]
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"1")
    with pytest.raises(IntegrityError, match=r"has \d+ bytes, the manifest says"):
        Bundle.open(directory, check="size")


@pytest.mark.parametrize("check", ["size", "full"])
def test_what_loads_code_gets_a_hashed_file_whatever_was_checked_before(directory: Path, check: Check) -> None:
    bundle = Bundle.open(directory, check=check)
    assert bundle.file(WEIGHTS) == directory / WEIGHTS
    flip(directory / WEIGHTS)
    with pytest.raises(IntegrityError, match="has sha256"):
        bundle.file(WEIGHTS)


def test_a_file_is_hashed_once_per_open_until_it_changes(directory: Path) -> None:
    hashed: list[int] = []
    bundle = Bundle.open(directory, check="full", progress=hashed.append)
    first = sum(hashed)
    bundle.file(WEIGHTS, progress=hashed.append)
    assert sum(hashed) == first == bundle.total_bytes
    copy = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).write_bytes(copy)  # the same bytes, but nobody knows that
    bundle.file(WEIGHTS, progress=hashed.append)
    assert sum(hashed) == first + len(copy)
    assert bundle.verify(hashed.append)  # looks again at everything
    assert sum(hashed) == 2 * first + len(copy)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_nothing_but_the_time(directory: Path, threads: int) -> None:
    assert Bundle.open(directory, threads=threads).verify(threads=threads).files == 4
    for path in ("model.onnx", WEIGHTS):
        flip(directory / path)
    report = Bundle.open(directory, check="manifest").verify(threads=threads)
    assert [problem.path for problem in report.problems] == ["model.onnx", WEIGHTS]
    with pytest.raises(IntegrityError, match=r"model\.onnx has sha256"):
        Bundle.open(directory, threads=threads)


def test_verify_reports_everything_at_once(directory: Path, tmp_path: Path) -> None:
    flip(directory / WEIGHTS)
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (directory / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (directory / "weights" / "extra.tmp").write_text("")
    (directory / "linked").symlink_to(tmp_path)
    (directory / "reports").mkdir()
    (directory / "reports" / "validation.json").write_text("{}")
    (directory / "journal.json").write_text("{}")
    report = Bundle.open(directory, check="manifest").verify()
    assert not report
    assert report.files == 1
    assert {problem.path: problem.kind for problem in report.problems} == {
        WEIGHTS: "changed",
        "generation_config.json": "missing",
        "tokenizer.json": "not plain",
        "weights/extra.tmp": "unexpected",
        "linked": "unexpected",
    }


def test_verify_reads_what_the_disk_has(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spied(name: str) -> Callable[..., Any]:
        call = getattr(bundle_module, name)

        def spy(path: Path, *rest: Any, **choices: Any) -> Any:
            calls.append(f"{name} {path.name}")
            return call(path, *rest, **choices)

        return spy

    for name in ("drop", "read_ahead", "sha256_of"):
        monkeypatch.setattr(bundle_module, name, spied(name))
    bundle = Bundle.open(directory, check="size", threads=1)
    calls.clear()
    assert bundle.verify(threads=1)
    names = [Path(path).name for path in bundle.manifest.files]
    assert calls == [f"{name} {file}" for file in names for name in ("drop", "read_ahead", "sha256_of")]
    monkeypatch.setattr(bundle_module, "fits_page_cache", lambda _: False)
    calls.clear()
    assert bundle.verify(threads=1)
    assert calls == [f"{name} {file}" for file in names for name in ("drop", "sha256_of")]


def test_verifying_nothing_is_not_success(directory: Path) -> None:
    assert not VerifyReport(files=0, bytes=0, problems=())
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()
    record(directory, contract_of(), "fp32")
    assert not Bundle.open(directory, check="manifest").verify()
    with pytest.raises(IntegrityError, match=r"lists no model\.onnx"):
        Bundle.open(directory)


def test_unfinished_build(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        Bundle.open(directory)
    (directory / "journal.json").write_text("{}")
    with pytest.raises(InputError, match="did not finish: run the same `glm-export build` again"):
        Bundle.open(directory)


def test_hard_link_and_missing_file(directory: Path, tmp_path: Path) -> None:
    os.link(directory / WEIGHTS, tmp_path / "other")
    with pytest.raises(IntegrityError, match="hard links"):
        Bundle.open(directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        Bundle.open(directory)


def test_file_outside_the_manifest(directory: Path) -> None:
    with pytest.raises(IntegrityError, match="is not in the manifest"):
        Bundle.open(directory).file("engines/plan")


def test_bad_generation_config(directory: Path) -> None:
    path = directory / "generation_config.json"
    for text, message in (("{", "not valid JSON"), ("[]", "expected an object")):
        path.write_text(text)
        record(directory, contract_of(), "fp32")
        with pytest.raises(InputError, match=message):
            _ = Bundle.open(directory).generation_config
    path.unlink()
    record(directory, contract_of(), "fp32")
    assert Bundle.open(directory).generation_config == {}


def test_bundle_without_weights_opens_but_does_not_run(directory: Path) -> None:
    record(directory, contract_of(), "fp32", weights=False)
    bundle = Bundle.open(directory)
    with pytest.raises(InputError, match="built without weights"):
        open_session(bundle)

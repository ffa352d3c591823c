import random
from pathlib import Path

import pytest
from toy import END, contract_of, record, tokenizer

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError
from glm_export.runtime.text import Text


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(tokenizer())


def bundle_with(directory: Path, content: str | None) -> Bundle:
    (directory / "model.onnx").write_text("")
    if content is not None:
        (directory / "tokenizer.json").write_text(content)
    record(directory, contract_of(), "fp32")
    return Bundle.open(directory)


def test_opens_the_tokenizer_of_a_bundle(tmp_path: Path) -> None:
    text = Text.open(bundle_with(tmp_path, tokenizer().to_str()))
    assert text.decode(text.encode("Grüße 😀")) == "Grüße 😀"


@pytest.mark.parametrize(("content", "message"), [(None, r"has no tokenizer\.json"), ("{}", "is not a tokenizer")])
def test_missing_or_broken_tokenizer(tmp_path: Path, content: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Text.open(bundle_with(tmp_path, content))


def test_special_tokens(text: Text) -> None:
    ids = text.encode(f"a{END}b")
    assert len(ids) == 3
    assert text.decode(ids) == "ab"
    assert text.decode(ids, skip_special_tokens=False) == f"a{END}b"
    assert [text.stream(skip_special_tokens=False).push(ids[1]), text.stream().push(ids[1])] == [END, ""]


def test_stream_never_shows_half_a_character(text: Text) -> None:
    ids = text.encode("é😀z")
    stream = text.stream()
    assert [stream.push(token) for token in ids] == ["", "é", "", "", "", "😀", "z"]
    assert stream.finish() == ""


def test_cut_off_character_appears_at_the_end_as_decode_shows_it(text: Text) -> None:
    ids = text.encode("a😀")[:-1]
    stream = text.stream()
    assert stream.feed(ids) == "a"
    assert stream.finish() == "\ufffd" == text.decode(ids)[1:]
    assert stream.finish() == ""


def test_stream_equals_decode_for_any_tokens(text: Text) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(257) for _ in range(rng.randrange(40))]
        stream = text.stream()
        assert stream.feed(ids) + stream.finish() == text.decode(ids)

"""Text to tokens and back, by the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, InputError


class Text:
    """A bundle's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, bundle: Bundle) -> Text:
        """Loads the tokenizer.

        Raises:
            InputError: the bundle has none, or it can not be read.
            BackendError: the library tokenizers is not installed.
        """
        path = bundle.tokenizer_path
        if path is None:
            raise InputError(
                f"{bundle.directory} has no tokenizer.json: give token ids instead of text, "
                "or build from a checkpoint that has one."
            )
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise BackendError("Text needs the library tokenizers: pip install tokenizers.") from None
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path} is not a tokenizer ({error}): build from a repaired checkpoint.") from error

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; special tokens only where the text spells them out."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> TokenStream:
        """A decoder for tokens that arrive one by one."""
        return TokenStream(self, skip_special_tokens=skip_special_tokens)


class TokenStream:
    """Text from tokens as they arrive. A character whose bytes are spread over tokens appears with its last one."""

    def __init__(self, text: Text, *, skip_special_tokens: bool = True) -> None:
        from tokenizers.decoders import DecodeStream

        self._text = text
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is complete with this token; often empty."""
        text: str | None = self._stream.step(self._text._tokenizer, token)
        if text is None:
            self._waiting.append(token)
            return ""
        self._waiting.clear()
        return text

    def finish(self) -> str:
        """The rest at the end of the tokens: a character cut off by it becomes U+FFFD, as in `Text.decode`."""
        rest = self._text.decode(self._waiting, skip_special_tokens=self._skip)
        self._waiting.clear()
        return rest

    def feed(self, tokens: Iterable[int]) -> str:
        """`push` for several tokens."""
        return "".join(map(self.push, tokens))

"""The null engine's vocabulary: bytes and four control tokens."""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.hooks import NativeError, OptionError

BOS, EOS, EOT, PAD = 256, 257, 258, 259
_SPECIAL = {BOS: b"<|begin|>", EOS: b"<|end|>", EOT: b"<|turn|>", PAD: b"<|pad|>"}
N_VOCAB = 260
DEFAULT_CONTEXT = 4096


class NullVocab:
    """Bytes are tokens 0 to 255; four control tokens follow. It answers all that ``edge_rt.native.llama.Vocab`` does."""

    n_tokens = N_VOCAB
    kind = "bytes"
    train_context = DEFAULT_CONTEXT
    bos: int | None = BOS
    eos: int | None = EOS
    eot: int | None = EOT
    nl: int | None = ord("\n")
    add_bos = True
    add_eos = False
    keep_alive: object = None

    @property
    def pointer(self) -> int:
        """Raises NativeError: there is no libllama vocabulary, so no grammar or DRY sampling."""
        raise NativeError("the null vocabulary is not one of libllama's; use a model file for grammars")

    def tokenize(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """UTF-8 bytes; with ``special``, ``<|end|>`` and its like are one token. ``bos`` None adds the begin-of-text token."""
        tokens: list[int] = []
        data = text.encode()
        i = 0
        while i < len(data):
            found = next((token for token, name in _SPECIAL.items() if special and data.startswith(name, i)), None)
            tokens.append(data[i] if found is None else found)
            i += 1 if found is None else len(_SPECIAL[found])
        add = bos or (bos is None and tokens[:1] != [BOS])
        return [BOS, *tokens] if add else tokens

    def piece(self, token: int, special: bool = False) -> bytes:
        """The byte, or for a control token its name if ``special``, else nothing. Raises OptionError outside the vocabulary."""
        if token in _SPECIAL:
            return _SPECIAL[token] if special else b""
        return bytes((self._check(token),))

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """The bytes of tokens, joined."""
        return b"".join(self.piece(token, special) for token in tokens)

    def is_eog(self, token: int) -> bool:
        """End of text or of turn."""
        return self._check(token) in (EOS, EOT)

    def is_control(self, token: int) -> bool:
        """One of the four after the bytes."""
        return self._check(token) in _SPECIAL

    def eog_tokens(self) -> tuple[int, ...]:
        """End of text and of turn."""
        return (EOS, EOT)

    def control_texts(self) -> tuple[str, ...]:
        """Names of the control tokens, longest first."""
        return tuple(sorted((name.decode() for name in _SPECIAL.values()), key=lambda name: (-len(name), name)))

    def suppressed_tokens(self) -> tuple[int, ...]:
        """None."""
        return ()

    def metadata(self, key: str) -> str | None:
        """None: there is no file."""
        return None

    def chat_template(self, name: str | None = None) -> str | None:
        """Each message's content, closed by the end-of-turn token."""
        return "{% for message in messages %}{{ message['content'] }}<|turn|>{% endfor %}" if name is None else None

    def close(self) -> None:
        """Does nothing."""

    @staticmethod
    def _check(token: int) -> int:
        if not 0 <= token < N_VOCAB:
            raise OptionError(f"token {token} is out of range; this model has tokens 0 to {N_VOCAB - 1}")
        return token

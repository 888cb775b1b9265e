"""Which characters of a Markdown text are code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.postprocess.text_search import CodeSpans


def marks(pieces):
    """The text's characters, c for code."""
    spans = CodeSpans()
    found = [piece for text in pieces for piece in spans.feed(text)]
    return "".join(text for text, _ in found), "".join(("c" if code else ".") * len(text) for text, code in found)


EXAMPLES = {
    "a `b` c": "..ccc..",
    "a ``b` c`` d": "..cccccccc..",
    "`a\nb": "cc..",  # ends with the line
    "```\nx\n```\ny": "ccccccccc..",
    "  ```py\nx\n  ```\ny": "..ccccccccccccc..",
    "    ```\nx": "....ccc..",  # indented by four is no fence, but the line's rest is code
    "```\n``\n````\ny": "ccccccccccc..",
    "a ``` b\nc": "..ccccc..",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.items())
def test_examples(text, expected):
    assert marks([text]) == (text, expected)


@given(st.text("`` \nab", max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_splitting_changes_nothing(text, cuts):
    ends = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert marks(pieces) == marks([text])

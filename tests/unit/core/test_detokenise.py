"""Bytes to text at every way of spreading them over tokens."""

import time

from hypothesis import example, given
from hypothesis import strategies as st

from edge_rt.core.generate.output import Detokeniser


class Pieces:
    """A vocabulary of exactly these pieces: token i is the i-th."""

    def __init__(self, pieces):
        self.pieces = pieces

    def piece(self, token):
        return self.pieces[token]


def run(pieces):
    detokeniser = Detokeniser(Pieces(pieces))
    return [detokeniser.feed(i) for i in range(len(pieces))], detokeniser.flush()


BYTES = [bytes((b,)) for b in b"a\xe4\xbd\xa0\xf0\x9f\x99\x82\xc3\xa9\xed\xff\xc0"]
TRICKY = st.lists(st.sampled_from([*BYTES, b"", b"\xf4\x90"]), max_size=12)


@given(st.one_of(TRICKY, st.lists(st.binary(max_size=4), max_size=10)))
@example([b"\xf0\x9f", b"\x99", b"\x82"])
@example([b"\xe4\xbd", b"x"])
@example([b"\xed\xa0", b"\x80"])
def test_joined_it_equals_decoding_the_whole(pieces):
    parts, rest = run(pieces)
    assert "".join(parts) + rest == b"".join(pieces).decode("utf-8", "replace")


@given(st.text(max_size=20), st.integers(1, 3))
def test_characters_come_as_soon_as_they_are_whole(text, size):
    data = text.encode("utf-8", "replace")
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    detokeniser, out = Detokeniser(Pieces(pieces)), ""
    for i in range(len(pieces)):
        out += detokeniser.feed(i)
        assert out == data[: (i + 1) * size].decode("utf-8", "ignore")
    assert detokeniser.flush() == ""


def test_an_emoji_over_four_tokens_and_a_control_token():
    assert run([b"\xf0", b"\x9f", b"", b"\x99", b"\x82"]) == (["", "", "", "", "🙂"], "")


def test_an_unfinished_character_becomes_a_replacement_at_the_end():
    assert run([b"ok", b"\xe4\xbd"]) == (["ok", ""], "\ufffd")


def test_cost_is_linear():
    def seconds(n):
        detokeniser, start = Detokeniser(Pieces([b"\xe4\xbd"])), time.perf_counter()
        for _ in range(n):
            detokeniser.feed(0)
        return time.perf_counter() - start

    assert min(seconds(40_000) for _ in range(3)) < 40 * min(seconds(4_000) for _ in range(3))

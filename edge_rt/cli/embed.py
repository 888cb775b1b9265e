"""`edge-rt embed`: texts in, embeddings out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing

from edge_rt.cli.generation import opened
from edge_rt.cli.options import ModelOptions, argument, option
from edge_rt.cli.output import say, terminal, write_json
from edge_rt.errors import OptionError
from edge_rt.types import singles

HELP = """Embed texts: numbers that lie close for texts of close meaning.

Each argument is a text, or each line of standard input. For each there is a line of JSON on standard output, as soon as it is made.
A text longer than the context is an error, as an empty line is; nothing is cut off or left out.

\b
Examples:
  edge-rt embed "The cat sleeps." "A kitten naps." | jq -c .embedding
  edge-rt embed -m qwen3-embedding.gguf < lines.txt > embeddings.jsonl
  edge-rt embed --pooling last --no-normalize "Hello"
"""


class Options(ModelOptions):
    """The command's options."""

    texts: tuple[str, ...] = argument((), metavar="TEXT...", help="The texts; lines of standard input if left out.")
    pooling: str | None = option(
        None,
        "--pooling KIND",
        "Of all tokens' hidden states the mean, the first (cls) or the last; as the model's file says if left out, else mean.",
        choices=("mean", "cls", "last"),
    )
    no_normalize: bool = option(False, "--no-normalize", "Leave embeddings as long as they are, and not of length 1.")


def run(options: Options) -> int:
    """Embed and return the exit status."""
    if not options.texts and terminal(sys.stdin):
        raise OptionError('there is no text; give some as arguments or on standard input, as edge-rt embed "Hello"')
    if not options.texts and sys.stdin is None:
        raise OptionError("standard input is closed and there is no text; give some as arguments")
    with opened(options) as model:
        from edge_rt.model import embeddings

        texts, count, tokens, started = iter(options.texts) if options.texts else _lines(), 0, 0, time.perf_counter()
        with closing(embeddings(model, texts, pooling=options.pooling, normalize=not options.no_normalize)) as found:
            for index, one in enumerate(found):
                write_json({"index": index, "embedding": singles(one.vector.tolist()), "tokens": one.tokens})
                count, tokens = count + 1, tokens + one.tokens
        if options.verbose:
            say(f"[{count} texts, {tokens} tokens ({tokens / (time.perf_counter() - started):.0f}/s)]")
    return 0


def _lines() -> Iterator[str]:
    """Lines of standard input, as they come. Raises OptionError."""
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise OptionError(f"line {number} is not UTF-8 (byte {error.start}); convert it first, for example with iconv") from error

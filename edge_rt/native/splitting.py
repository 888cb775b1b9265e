"""Cuts long texts for pre-tokenisers that libllama runs through std::regex, which recurses on the native stack.

One or two calls a character, 325 bytes each: 26,000 letters in a row overflow 8 MiB and kill the process (measured with the
patterns of falcon, deepseek, tekken, gpt-4o, llama4 and the default one). Such texts are tokenised ``CHUNK`` characters at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK = 1000  # characters: less than 1 MiB of stack, which the smallest thread stacks have

ITERATIVE = frozenset((
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4",
    "glm5", "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2", "qwen2", "deepseek-r1-qwen", "kormo",
    "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "qwen35", "grok-2", "kimi-k2", "gemma4", "laguna",
))  # fmt: skip
"""Values of tokenizer.ggml.pre whose patterns libllama matches with loops of its own. All others of kind bpe are cut."""


def chunks(text: str, size: int, names: tuple[str, ...]) -> Iterator[str]:
    """Cut a text into pieces of at most ``size`` characters, where possible before the space between two words.

    There most pre-tokenisers cut too, so that the tokens stay the same. No cut falls inside one of ``names``.
    """
    start = 0
    while len(text) - start > size:
        cut = limit = start + size
        while (cut := text.rfind(" ", start + size // 2, cut)) > 0:
            if text[cut - 1].isalnum() and text[cut + 1].isalnum():
                break
        if cut < 0:
            cut = limit
        for name in names:
            at = text.find(name, max(start + 1, cut - len(name) + 1), cut + len(name) - 1)
            if at >= 0:  # the first name in the way; longer ones come first in ``names``
                cut = at
                break
        yield text[start:cut]
        start = cut
    yield text[start:]

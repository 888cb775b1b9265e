"""Chat templates so common and so plain that they are written out here: loading Jinja costs a first answer 40 ms.

A test holds each to what Jinja makes of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Renderer = Callable[[Sequence[tuple[str, str]], bool], str]
"""(role, content) pairs and whether the assistant's turn is opened -> prompt."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For models without a template whose vocabulary has ``<|im_start|>``."""
_SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + _SMOLLM2_SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chatml(turns: Sequence[tuple[str, str]], open_answer: bool) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" if open_answer else text


def _smollm2(turns: Sequence[tuple[str, str]], open_answer: bool) -> str:
    has_system = turns[0][0] == "system"
    return _chatml(turns if has_system else [("system", _SMOLLM2_SYSTEM), *turns], open_answer)


KNOWN: dict[str, Renderer] = {CHATML: _chatml, SMOLLM2: _smollm2}

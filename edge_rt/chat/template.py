"""Chat templates so common and so plain that they are written out here: loading Jinja costs a first answer 40 ms.

A test holds each to what Jinja makes of the same text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from edge_rt.errors import ConstraintError, OptionError
from edge_rt.types import Message

if TYPE_CHECKING:
    from jinja2 import Template

    from edge_rt.native.llama import Vocab

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


# Messages to a prompt, through the Jinja template of the model's metadata, without letting text pose as control tokens.
#
# A prompt is tokenised with control tokens switched on, or the template's own would not work. So wherever a message, a tool or a
# document holds the name of a control token, a private character takes its place while the template runs; afterwards the prompt is cut
# there, and the name is tokenised as plain text. The end of a text that could be the beginning of such a name is treated likewise, so
# that none can be put together from two texts. What does not look like a name is not touched: the tokens are those of the whole prompt.
# Not guarded: roles and keys that are plain words (templates build control tokens from roles and look keys up) and tokens a vocabulary
# calls user-defined, which are recognised in plain text too.
#
# Templates come with model files and are not trusted: they run in Jinja's sandbox, with bounded ranges, repetitions, steps and output.

PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For all others: a paragraph a message, headed by its role."""

MAX_TEMPLATE = 1 << 20  # characters

_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Names of control tokens hold brackets, bars or the like; only a text that does is worth the 15 ms it takes to list the names.
_HARMLESS = re.compile(r"[\w\s.,?!'\"():;/-]*")
_AT_ONCE = 1 << 16  # characters that are looked through in one call: no other thread runs meanwhile
_PRIVATE = range(0xF0000, 0xFFFFE)


class TemplateSegment(NamedTuple):
    """A part of a prompt. ``special``: names of control tokens in it are control tokens."""

    text: str
    special: bool


class Placed(NamedTuple):
    """What a template is given. ``written``: tool schemas for which it has no place, as they stand in one of the messages."""

    template: str
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    written: str = ""


def tokenize_messages(
    vocab: Vocab,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    extra: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt for some messages, ready for the model. ``extra`` goes to the template.

    Raises what ``placed`` raises, ConstraintError where the template fails or refuses the messages.
    """
    return tokenize_placed(vocab, placed(vocab, messages, tools), add_generation_prompt=add_generation_prompt, extra=extra)


def placed(vocab: Vocab, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Placed:
    """Messages and tools in the form in which the model's template leaves out least (tools.py).

    Raises OptionError for messages and tools that are none, and for tools for which there is no place at all.
    """
    _check_messages(messages)
    template = find_template(vocab, tools=bool(tools))
    if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return Placed(template, messages)
    from edge_rt.chat.tools import place

    bos, eos = _text(vocab, vocab.bos), _text(vocab, vocab.eos)
    native = "tools" in re.sub(r"{#.*?#}", "", template, flags=re.DOTALL)
    return Placed(template, *place(messages, tools, lambda m, t: render(template, m, bos=bos, eos=eos, tools=t), native=native))


def tokenize_placed(
    vocab: Vocab, given: Placed, *, add_generation_prompt: bool = True, extra: Mapping[str, Any] | None = None
) -> list[int]:  # fmt: skip
    """``tokenize_messages`` of what ``placed`` gave."""
    segments = render_segments(
        given.template, given.messages, control=vocab.control_texts, bos=_text(vocab, vocab.bos), eos=_text(vocab, vocab.eos),
        add_generation_prompt=add_generation_prompt, tools=given.tools, extra=extra,
    )  # fmt: skip
    tokens: list[int] = []
    for i, segment in enumerate(segments):
        # The model may want a BOS token, which a template may have written already: the first segment sees to it.
        tokens += vocab.tokenize(segment.text, special=segment.special, bos=None if i == 0 else False)
    return tokens


def render_messages(vocab: Vocab, given: Placed) -> str:
    """The text of ``tokenize_placed``: what its tokens spell."""
    return render(given.template, given.messages, bos=_text(vocab, vocab.bos), eos=_text(vocab, vocab.eos), tools=given.tools)


def find_template(vocab: Vocab, *, tools: bool = False) -> str:
    """The model's template (its variant ``tool_use`` for tools), else ChatML or a plain format."""
    found = (vocab.chat_template("tool_use") if tools else None) or vocab.chat_template()
    if found:
        return found
    return CHATML if len(vocab.tokenize("<|im_start|>", special=True, bos=False)) == 1 else PLAIN


def _text(vocab: Vocab, token: int | None) -> str:
    return "" if token is None else vocab.piece(token, special=True).decode("utf-8", "replace")


def render_segments(
    template: str,
    messages: Sequence[Message],
    *,
    control: Callable[[], Sequence[str]],
    bos: str,
    eos: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[TemplateSegment]:
    """The prompt in segments; joined, they are what ``render`` returns. ``control`` lists names of control tokens, longest first.

    Raises ConstraintError if a message holds such a name and the template rewrites it beyond recognition.
    """

    def run(messages: Any, tools: Any, extra: Any) -> str:
        return render(template, messages, bos=bos, eos=eos, add_generation_prompt=add_generation_prompt, tools=tools, extra=extra)

    _check_messages(messages)
    guard = _Guard(control, [template, bos, eos])
    guarded = guard.replace([list(messages), tools, extra])
    prompt = run(*guarded)
    if not guard.originals:
        return [TemplateSegment(prompt, True)] if prompt else []
    parts = re.split(f"([{''.join(guard.originals)}])", prompt)
    restored = [guard.originals.get(part, part) for part in parts]
    # A name that does not come out was in a text the template left out, or has been rewritten: then the whole differs.
    if set(parts[1::2]) != set(guard.originals) and "".join(restored) != run(messages, tools, extra):
        names = ", ".join(sorted(guard.originals.values()))
        raise ConstraintError(f"the messages hold control tokens ({names}) and the model's chat template rewrites them; take them out")
    segments: list[TemplateSegment] = []
    for part, text in zip(parts, restored, strict=True):
        special = part not in guard.originals
        if text and segments and segments[-1].special == special:
            segments[-1] = TemplateSegment(segments[-1].text + text, special)
        elif text:
            segments.append(TemplateSegment(text, special))
    return segments


class _Guard:
    """Puts private characters in the place of what could become a control token. ``originals``: character -> text."""

    def __init__(self, control: Callable[[], Sequence[str]], others: list[str]) -> None:
        self._control, self._others = control, others
        self._names: re.Pattern[str] | None = None
        self._beginnings: frozenset[str] = frozenset()
        self._longest = 0
        self._free: Iterator[str] = iter(())
        self._chosen: dict[str, str] = {}
        self.originals: dict[str, str] = {}

    def replace(self, value: Any) -> Any:
        """The same structure with every text guarded; roles stay."""
        texts: list[str] = []
        _collect(value, texts)
        if all(_HARMLESS.fullmatch(text, at, at + _AT_ONCE) for text in texts for at in range(0, len(text), _AT_ONCE)):
            return value
        names = [name for name in self._control() if name]
        if not names:
            return value
        self._names = re.compile("|".join(map(re.escape, names)))  # longest first
        self._beginnings = frozenset(name[:n] for name in names for n in range(1, len(name)))
        self._longest = max(map(len, names))
        parts = (text[at : at + _AT_ONCE] for text in (*texts, *self._others) for at in range(0, len(text), _AT_ONCE))
        taken = set[str]().union(*map(set, parts))
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)  # few are needed, and there are 65,000
        return self._walk(value)

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._key(key): item if _is_role(key, item) else self._walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._walk(item) for item in value]
        return value

    def _key(self, key: Any) -> Any:
        """A template looks up words; other keys, such as a tool's parameters may have, can hold whole names."""
        assert self._names is not None, "replace sets it"
        if not isinstance(key, str) or _ROLE.fullmatch(key):
            return key
        return self._names.sub(lambda found: self._character(found.group()), key)

    def _text(self, text: str) -> str:
        assert self._names is not None, "replace sets it"
        text = self._names.sub(lambda found: self._character(found.group()), text)
        for n in range(min(len(text), self._longest), 0, -1):
            if text[-n:] in self._beginnings:
                return text[:-n] + self._character(text[-n:])
        return text

    def _character(self, text: str) -> str:
        if text not in self._chosen:
            free = next(self._free, None)
            if free is None:
                raise ConstraintError("the messages use up all private characters; take some out")
            self._chosen[text] = free
            self.originals[free] = text
        return self._chosen[text]


def _is_role(key: Any, item: Any) -> bool:
    """Templates build control tokens from roles and compare them, so they stay as they are; no word is a control token's name."""
    return key == "role" and isinstance(item, str) and _ROLE.fullmatch(item) is not None


def _collect(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                texts.append(key)
            if not _is_role(key, item):
                _collect(item, texts)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, texts)


# ---- the template ----------------------------------------------------------------------------------------------------


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Run a chat template as transformers does: ``bos_token``, ``eos_token``, ``raise_exception``, ``strftime_now``, ``tojson``.

    With ``add_generation_prompt``, a last message of the assistant begins the answer: its text follows the generation prompt as it is.

    Raises OptionError for messages that are none, ConstraintError naming the template's line.
    """
    _check_messages(messages)
    opening = ""
    if add_generation_prompt and begins_answer(messages):
        messages, opening = messages[:-1], messages[-1]["content"]
    known = KNOWN.get(template)
    if known and not tools and not extra and all(isinstance(message.get("content"), str) for message in messages):
        return known([(message["role"], message["content"]) for message in messages], add_generation_prompt) + opening
    compiled = _compile(template)
    variables = {
        "messages": list(messages), "tools": tools, "documents": None, **(extra or {}), "bos_token": bos, "eos_token": eos,
        "add_generation_prompt": add_generation_prompt,
    }  # fmt: skip
    try:
        text: str = compiled.environment.run(compiled, variables)  # type: ignore[attr-defined]  # our own class
        return text + opening
    except Exception as error:  # a template can make anything go wrong
        _explain(error)


def begins_answer(messages: Sequence[Message]) -> bool:
    """Is the last message the beginning of the answer to those before it? So it is if it is a text of the assistant, without calls."""
    last = messages[-1]
    return len(messages) > 1 and last["role"] == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes)) or not messages:
        raise OptionError("there are no messages; give a list such as [{'role': 'user', 'content': 'Hello'}]")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise OptionError(f"message {i} has no role; give it one such as 'user'")
        if not _ROLE.fullmatch(message["role"]):
            raise OptionError(f"message {i} has the role {message['role']!r}; a role is a word such as 'user'")


def _explain(error: Exception) -> NoReturn:
    """Raise what went wrong in a template, with its line."""
    import traceback

    line = getattr(error, "lineno", None)
    if line is None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        line = lines[-1] if lines else None
    where = f" at line {line}" if line else ""
    if type(error).__name__ == "Refusal":  # of template_sandbox, which imports Jinja
        raise ConstraintError(f"the model's chat template refuses these messages{where}: {error}") from None
    message = str(error) or type(error).__name__
    raise ConstraintError(f"the model's chat template fails{where}: {message}; use --raw, or a model with a sound template") from error


def prepare(template: str) -> None:
    """Compile a template ahead of its use; a bad one is an error only when it is used."""
    if template not in KNOWN:
        with suppress(ConstraintError):
            _compile(template)


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    if len(template) > MAX_TEMPLATE:
        raise ConstraintError(f"the chat template has {len(template):,} characters; at most {MAX_TEMPLATE:,} are run")
    from edge_rt.chat.sandbox import environment

    try:
        return environment().from_string(template)
    except Exception as error:  # whatever Jinja, or a filter it runs on constants, makes of a file we do not trust
        _explain(error)

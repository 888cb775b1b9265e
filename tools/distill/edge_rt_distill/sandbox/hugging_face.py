"""A model in transformers, as a teacher is published: a folder with its weights, its tokeniser and its chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edge_rt.hooks import OptionError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.sandbox.engines import Facts
from edge_rt_distill.sandbox.items import Message
from edge_rt_distill.sandbox.torch_scores import option_nats


class HuggingFace:
    """See ``Engine``. Runs on a GPU if there is one."""

    scores = True

    def __init__(self, folder: Path) -> None:
        """Raises OptionError for a folder that holds no model, or without the package transformers."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise OptionError("a folder of Hugging Face's needs transformers; pip install 'transformers>=4.45', or name a GGUF") from error
        self._folder = folder
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokeniser: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder).to(self._device).eval()
        except (OSError, ValueError) as error:
            raise OptionError(f"transformers cannot open {folder} ({error}); name a folder with a causal language model") from error
        if self._tokeniser.chat_template is None:
            raise OptionError(f"{folder} has no chat template, so messages cannot be asked; name a model that has one")

    @property
    def facts(self) -> Facts:
        """See Engine."""
        return Facts(self._folder.name, "transformers", hashlib.sha256(self._tokeniser.chat_template.encode()).hexdigest()[:12])

    @torch.inference_mode()
    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """See Engine."""
        prompt = torch.tensor([self._prompt(messages)], device=self._device)
        found = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)[0]
        written = found[prompt.shape[1] :].tolist()
        ended = bool(written) and written[-1] in self._ends()
        return Answer(self._tokeniser.decode(written[: len(written) - ended], skip_special_tokens=False), ended)

    def _ends(self) -> set[int]:
        known = self._model.generation_config.eos_token_id
        return set(known if isinstance(known, list) else [known]) | {self._tokeniser.eos_token_id}

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._tokeniser.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self._tokeniser(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """See Engine."""
        return option_nats(
            before, options, chat=self._prompt, tokens=self._tokens, start=self._start(),
            logits=lambda row, first: self._model(torch.tensor([row], device=self._device)).logits[0, first:],
        )  # fmt: skip

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokeniser(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> list[int]:
        """What a text's first token is told from."""
        return list(self._tokeniser("")["input_ids"]) or self._tokens("\n")

    def close(self) -> None:
        """Let go of the model."""
        del self._model

"""Runs tasks of lm-evaluation-harness against a daemon over HTTP, or against llama-cpp-python in this process; needs lm_eval.

``harness.py FOLDER OUT URL|FILE TASK...``: ``FOLDER`` has the tasks' files, ``OUT`` gets JSON of values and of what each document got.
"""

import json
import sys

import lm_eval
import numpy as np
import requests
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

CONTEXT = 2048


class Served(LocalCompletionsAPI):
    """A daemon, whose tokens and template the harness asks it for; it only leaves messages as they are where options are compared."""

    def __init__(self, url):
        name = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        super().__init__(base_url=f"{url}/v1/completions", model=name, tokenizer_backend="remote", max_length=CONTEXT, max_retries=1)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)


class LlamaCpp(TemplateLM):
    """llama-cpp-python: tokens and template of the file, logits of all tokens."""

    def __init__(self, path):
        super().__init__()
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._llama = llama_cpp.Llama(path, n_ctx=CONTEXT, logits_all=True, verbose=False)
        names = [self._llama.detokenize([token], special=True).decode() for token in (self._llama.token_eos(), self._llama.token_bos())]
        self._chat = Jinja2ChatFormatter(self._llama.metadata["tokenizer.chat_template"], *names)

    @property
    def tokenizer_name(self):
        return "gguf"

    @property
    def eot_token_id(self):
        return self._llama.token_eos()

    def tok_encode(self, string, **_):
        return self._llama.tokenize(string.encode(), add_bos=False, special=True)

    def chat_template(self, *_, **__):
        return ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self._chat(messages=chat_history).prompt

    def _loglikelihood_tokens(self, requests, **_):
        found = []
        for _, context, continuation in requests:
            self._llama.reset()
            self._llama.eval([*context, *continuation])
            rows = np.array(self._llama.scores[len(context) - 1 : len(context) + len(continuation) - 1], np.float64)
            rows -= rows.max(1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(1, keepdims=True))
            chosen = rows[np.arange(len(continuation)), continuation]
            found.append((float(chosen.sum()), bool((rows.argmax(1) == continuation).all())))
        return found

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError("no task here asks for it")

    def generate_until(self, requests, **_):
        found = []
        for one in requests:
            text, how = one.args
            stop = [word for word in how.get("until", []) if word]
            told = self._llama.create_completion(self.tok_encode(text), max_tokens=how["max_gen_toks"], temperature=0.0, stop=stop)
            found.append(told["choices"][0]["text"])
        return found


def main(folder, out, target, *tasks):
    manager = TaskManager(include_path=folder, include_defaults=False)
    model = Served(target) if target.startswith("http") else LlamaCpp(target)
    found = {}
    for chat in (False, True):
        some = [task for task in tasks if task.endswith("_text") != chat]
        if not some:
            continue
        told = lm_eval.simple_evaluate(model, tasks=some, task_manager=manager, apply_chat_template=chat, bootstrap_iters=0)
        for task in some:
            metric = next(name for name in ("acc_bytes,none", "acc,none", "checks,none") if name in told["results"][task])
            name = metric.split(",")[0]
            documents = {one["doc"]["id"]: one[name] for one in told["samples"][task]}
            found[task] = {"metric": name, "value": told["results"][task][metric], "documents": documents}
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Events of a generation as OpenAI's answers: chunks of a stream, or one answer in the end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from edge_rt import __version__
from edge_rt.daemon.http.errors import from_protocol
from edge_rt.daemon.http.request import Asked
from edge_rt.daemon.http.tool_calls import Call, ToolCalls

Json = dict[str, Any]

REASONS = {"end_of_generation": "stop", "stop_string": "stop", "max_tokens": "length", "context_full": "length"}
IMPOSSIBLE = -9999.0
"""What OpenAI says for minus infinity, which JSON has not."""


class Answer:
    """One answer. ``event`` for each event of the generation in order; ``whole`` after the last."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._calls = ToolCalls(asked.tools)
        self._kind = ("chat.completion" if asked.chat else "text_completion") + (".chunk" if asked.stream and asked.chat else "")
        self._head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12), "object": self._kind,
            "created": int(time.time()), "model": model, "system_fingerprint": f"edge-rt-{__version__}",
        }  # fmt: skip
        self._text: list[str] = []
        self._called: list[Json] = []
        self._logprobs: list[Json] = []
        self._offset = 0
        self._notices: list[str] = []
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}
        """So far."""
        self._done: Json = {}

    def begin(self) -> list[Json]:
        """Chunks before the first event."""
        return [self._chunk({"role": "assistant", "content": ""})] if self._asked.chat else []

    def event(self, message: Mapping[str, Any]) -> list[Json]:
        """Take an event; the chunks it makes. Raises ApiError if the generation was broken off."""
        kind = message["event"]
        if kind == "prompt":
            self._tokens["prompt_tokens"] = message["total"]
        elif kind == "notice":
            self._notices.append(message["message"])
        elif kind == "delta":
            self._tokens["completion_tokens"] += len(message["tokens"]) + message.get("concealed", 0)
            return list(self._delta(message))
        elif kind == "done":
            return self._end(dict(message))
        return []

    def whole(self) -> Json:
        """The answer, after the event ``done``."""
        text, reason = "".join(self._text), self._reason
        logprobs = self._shown(self._logprobs) if self._asked.rivals is not None else None
        choice: Json = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        if self._asked.chat:
            message: Json = {"role": "assistant", "content": text if text or not self._called else None, "refusal": None}
            if self._called:
                message["tool_calls"] = self._called
            choice["message"] = message
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], "usage": self._usage(), "edge_rt": self._extensions()}

    # ---- events ------------------------------------------------------------------------------------------------------

    def _delta(self, message: Mapping[str, Any]) -> Iterator[Json]:
        entries = [self._entry(entry) for entry in message.get("logprobs", ())] if self._asked.rivals is not None else []
        if not self._asked.stream:
            self._logprobs += entries
            entries = []
        for piece in self._calls.feed(message["text"]):
            yield self._piece(piece, entries)
            entries = []  # once
        if entries:
            yield self._piece("", entries)

    def _piece(self, piece: str | Call, entries: list[Json]) -> Json:
        if isinstance(piece, str):
            if not self._asked.stream:
                self._text.append(piece)
            return self._chunk({"content": piece}, entries)
        function = {"name": piece.name, "arguments": piece.arguments}
        call: Json = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        index = len(self._called)
        self._called.append(call)
        return self._chunk({"tool_calls": [{"index": index, **call}]}, entries)

    def _end(self, done: Json) -> list[Json]:
        if done["reason"] == "cancelled":  # not by the client, who would not be there to be told
            raise from_protocol({"code": "draining", "message": "the daemon is about to end; ask again when it is back"})
        self._done = done
        chunks = [self._piece(piece, []) for piece in self._calls.flush()]
        chunks.append({**self._chunk({}, reason=self._reason), "edge_rt": self._extensions()})
        if self._asked.include_usage:
            chunks.append({**self._head, "choices": [], "usage": self._usage()})
        return chunks

    def _chunk(self, delta: Json, entries: list[Json] | None = None, reason: str | None = None) -> Json:
        choice: Json = {"index": 0, "logprobs": self._shown(entries) if entries else None, "finish_reason": reason}
        if self._asked.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        chunk = {**self._head, "choices": [choice]}
        if not self._asked.include_usage:
            return chunk
        return {**chunk, "usage": {**self._tokens, "total_tokens": sum(self._tokens.values())} if self._asked.usage_so_far else None}

    # ---- parts -------------------------------------------------------------------------------------------------------

    @property
    def _reason(self) -> str:
        return "tool_calls" if self._called and self._done["reason"] == "end_of_generation" else REASONS[self._done["reason"]]

    def _usage(self) -> Json:
        usage = self._done["usage"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": usage["reused_tokens"]},
        }  # fmt: skip

    def _extensions(self) -> Json:
        """What OpenAI's answer has no place for."""
        found = {name: self._done[name] for name in ("reason", "stop", "seed", "timings", "context", "post", "rules", "answer")}
        return {**found, "usage": self._done["usage"], "notices": self._notices}

    def _entry(self, given: Mapping[str, Any]) -> Json:
        rivals = self._asked.rivals or 0
        top = [_scored(piece, logprob) for piece, (_, logprob) in zip(given["top_pieces"], given["top"], strict=True)]
        return {**_scored(given["piece"], given["logprob"]), "top_logprobs": top[:rivals]}

    def _shown(self, entries: list[Json]) -> Json:
        if self._asked.chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


def _scored(piece: bytes, logprob: float | None) -> Json:
    return {"token": piece.decode(errors="replace"), "logprob": IMPOSSIBLE if logprob is None else logprob, "bytes": list(piece)}

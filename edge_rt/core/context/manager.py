"""The context of one request: what of its prompt is in the cells, how many cells it may use, and what leaves them when they get short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from edge_rt.core.engine import Engine, RemovesCells
from edge_rt.core.kv.prefix_cache import cut
from edge_rt.core.weights.units import available_memory
from edge_rt.errors import ContextError, ContextOverflow
from edge_rt.types import ContextUse

if TYPE_CHECKING:
    from edge_rt.chat.transcript import Span
    from edge_rt.core.context.eviction import Candidate
    from edge_rt.core.context.grading import Grade
    from edge_rt.core.context.history import Evicted, Segment, SequenceState
    from edge_rt.core.context.recall import Passage, Recall
    from edge_rt.core.kv.pruning import Pruner
    from edge_rt.types import Pruning

# How many cells a request may use: what was asked for, or fewer where memory is short.

SHARE = 0.75
"""Of the memory that is free: growing moves a cache, and others live here too."""


def max_tokens_in_memory(engine: Engine, cells: int) -> int | None:
    """Cells that a sequence of ``cells`` cells may have in free memory; None where nobody can say, or the engine has it already."""
    config = getattr(engine, "config", None)
    free = available_memory()
    if config is None or free is None:
        return None
    cell_bytes: int = config.n_layer * 4 * config.kv_width  # a key and a value, of at most two bytes a number
    return cells + int(SHARE * free) // cell_bytes


def spare(cells: int) -> int:
    """An eighth, at least one: so many become free at once, so that not every token makes something leave."""
    return max(1, cells // 8)


# The window of one request: what of its prompt is in the cells, and what leaves them when they get short.
#
# Which segments leave, a policy decides (policies.py); here it is done. Cells are taken out of the middle of the sequence where the
# engine can; elsewhere the sequence is cut where the first of them was, and the decode loop feeds again what stays.

_SHOWN, _EXAMPLES = 40, 3  # characters of a segment, and segments, that a notice quotes


class ContextManager:
    """Cells of one sequence. (No dataclass: making one costs a millisecond of every start.)

    ``segments``, ``tokens`` and ``released`` count what left during this request: segments, their tokens, bytes given back;
    ``recalled`` counts segments that came back.
    """

    def __init__(
        self,
        engine: Engine,
        lock: AbstractContextManager[object],
        sequence: int,
        history: SequenceState,
        *,
        allowed: int,
        policy: str,
        keep: Callable[[Sequence[Candidate], int], Sequence[int]],
        answer: int | None,
        pieces: Callable[[], list[Span]],
        grader: Callable[[], Callable[[Segment], Grade]],
        text: Callable[[Sequence[int]], str],
        recall: Callable[[], Recall] | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        """``lock`` is held for each call of the engine and no longer. ``history`` is what is known of the sequence's cells.

        ``allowed``: cells. ``answer``: tokens the request may want for its answer (None: unknown). ``keep`` is the function of the
        policy called ``policy``. ``pieces`` of the prompt, ``grader`` and ``text`` (of tokens) are asked only when something has to
        leave: most requests fit. ``recall`` remembers what leaves and knows what a question is about; None: what left stays away.
        ``pruning``: cells are pruned, and so no segment has to leave. Raises OptionError for a budget that cannot be counted.
        """
        self.engine, self.lock, self.sequence, self.history = engine, lock, sequence, history
        self.allowed, self.policy, self.answer = allowed, policy, answer
        self._keep, self._ask_pieces, self._grader, self._text = keep, pieces, grader, text
        self.prompt = self.segments = self.tokens = self.released = self.recalled = self.recalled_tokens = 0
        self._left: list[Candidate] = []  # since the last notice
        self._returned: list[Evicted] = []
        self._recall = recall
        self._ended = False  # pruning did, and nobody was told yet
        self._question: int | None = None
        self._sought = False  # the question is about something that stayed
        self._pieces: list[Span] | None = None
        self._remover = engine if isinstance(engine, RemovesCells) else None  # asking takes a while
        self._pruner = self._passes = self._start_pruning(pruning) if pruning else None

    def start(self, tokens: Sequence[int], shared: int) -> None:
        """The prompt is ``tokens``, of which the history knows the first ``shared``: forget the rest; one at least is left to feed."""
        shared = self.history.boundary(min(shared, len(tokens) - 1))
        self.forget(shared)
        self.history.tokens += tokens[shared:]
        self.prompt = len(tokens)

    def forget(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        with self.lock:
            self._cut(length)
        self.history.truncate(length)

    def fit(self) -> None:
        """Make the prompt fit, with room for the answer: at most a quarter of the context. Raises ContextOverflow, PluginError."""
        least = 1 if self.answer is None else max(1, min(self.answer, self.allowed // 4))
        self._bring_back(min(self.allowed - least, self.held))
        asked_for = self._asked_for()
        if self._pruner:
            self._return(asked_for)
            start = self._pruner.start()
            with self.lock:
                self._cut(start)
            return
        more = sum(gone.end - gone.start for gone in asked_for)
        condensed = self.history.condensed
        apart = all(gone.start >= condensed.tokens for gone in asked_for)  # else the pruned cells go, and all their tokens are fed again
        if self.history.cell(self.prompt) + more + (0 if apart else condensed.missing) > self.allowed - least:
            wanted = self.allowed - (spare(self.allowed) if self.answer is None else least)
            try:
                self._leave(wanted - more, more)
            except ContextOverflow:
                if not asked_for:
                    raise
                asked_for = []  # what must stay leaves no room for it
                if self.history.cell(self.prompt) > self.allowed - least:
                    self._leave(wanted)
        self._return(asked_for)

    def make_room(self) -> bool:
        """The cells are full in the middle of an answer: let something leave. False if nothing can. Raises PluginError."""
        if self._pruner:
            self._pruner.prune(None)
            return self.history.cells < self.allowed
        try:
            self._leave(self.allowed - spare(self.allowed))
        except ContextOverflow:
            return False
        return True

    def room(self) -> int:
        """Tokens that may follow before anything has to leave or to move."""
        return min(self.allowed - self.history.cells, self._positions())

    def ready(self, coming: int, answered: int | None = None) -> int:
        """Prune if it is time, and say how many of ``coming`` tokens there is room for; ``answered``: tokens of the answer, if it began."""
        return self._pruner.ready(coming, answered) if self._pruner else coming

    def settle(self, tokens: int) -> None:
        """See to it that ``tokens`` more get positions the model was trained for, or that were asked for: gaps close.

        Where keys cannot be rotated, the tokens after the first gap are to be fed again. Raises ContextOverflow where that is too many.
        """
        if self._positions() >= tokens:
            return
        with self.lock:
            if not self._close_gaps() and not self.history.condensed.tokens:
                self._cut(self.history.evicted[0].start)
                return
        if self._positions() < tokens:  # pruned cells leave none, so segments have to leave instead
            if self._pruner:
                self._pruner = None
                self._ended = True
            self._leave(self.allowed - spare(self.allowed))

    def use(self) -> ContextUse:
        """What became of the context."""
        history = self.history
        absent = len(history.tokens) - history.kept(len(history.tokens))
        return ContextUse(
            history.cells, self.allowed, self.policy, self.segments, self.tokens, absent, self.recalled, self.recalled_tokens,
            self._passes.cells if self._passes else 0, history.condensed.missing,
            self.released + (self._passes.released if self._passes else 0),
        )  # fmt: skip

    def notice(self, *, quote: bool) -> str | None:
        """What left and what came back since the last call, in words; ``quote``: with the first of theirs."""
        left, self._left = self._left, []
        returned, self._returned = self._returned, []
        said = []
        if left:
            what = _counted(len(left), sum(one.tokens for one in left))
            quoted = _quoted([one.segment.text for one in left]) if quote else ""
            said.append(f"{what} left the context of {self.allowed:,} ({self.policy}){quoted}")
        if returned:
            what = _counted(len(returned), sum(gone.end - gone.start for gone in returned))
            said.append(f"{what} came back for the question{_quoted([gone.text for gone in returned]) if quote else ''}")
        if self._passes and (pruned := self._passes.notice()):
            said.append(pruned)
        if self._ended:
            self._ended = False
            said.append("pruning ended: no positions are left, and this model's keys cannot be moved to others")
        return "; ".join(said) or None

    # ---- how it is done ----------------------------------------------------------------------------------------------

    def _start_pruning(self, pruning: Pruning) -> Pruner:
        from edge_rt.core.kv.pruning import Pruner

        return Pruner(
            pruning, self.engine, self.lock, self.sequence, self.history, allowed=self.allowed, pieces=self._prompt_pieces,
            evict=self._take_out_tokens,
        )  # fmt: skip

    @property
    def held(self) -> int:
        """Cells for what was said before: all that are allowed, or those that pruning leaves."""
        return self._pruner.keep if self._pruner else self.allowed

    def _positions(self) -> int:
        """Positions left up to the last one for which the model was trained, or that was asked for; gaps use them up."""
        info = self.engine.info
        last = max(info.train_context, info.max_context)
        gaps = self.history.evicted or self.history.condensed.missing
        if not gaps or self._remover is None:
            return last - self.history.kept(self.history.fed)
        with self.lock:
            return last - self._remover.next_position(self.sequence)

    def _close_gaps(self) -> bool:
        """Number the cells one after the other, where keys can be rotated. The lock is held."""
        if self._remover is None:
            return True  # others have no gaps
        try:
            self._remover.renumber(self.sequence)
        except ContextError:
            return False
        return True

    def _leave(self, wanted: int, returning: int = 0) -> None:
        """Let the policy choose what stays, within ``wanted`` cells, or if that is too little with one free. Raises ContextOverflow.

        ``returning``: cells that will be filled by what comes back.
        """
        found = self._candidates()
        try:
            kept = self._keep(found, wanted)
        except ContextOverflow:
            if sum(candidate.tokens for candidate in found) < self.allowed - returning:
                return  # it fits, if barely
            kept = self._keep(found, self.allowed - returning - 1)
        staying = frozenset(kept)
        self._evict([candidate for i, candidate in enumerate(found) if i not in staying])

    def _candidates(self) -> list[Candidate]:
        from edge_rt.chat.transcript import answer_start
        from edge_rt.core.context.eviction import answer_pieces, candidates, must_stay

        history = self.history
        pieces = self._prompt_pieces()
        answer = answer_start(pieces)
        pieces = pieces + answer_pieces(pieces, len(history.tokens), lambda start, end: self._text(history.tokens[start:end]))
        found = candidates(pieces, history.evicted, fed=history.fed, allowed=self.allowed, grade=self._grader(), answer=answer)
        if self._recall is None or len(history.tokens) > self.prompt or all(map(self._of_question, pieces)):
            return found
        if must_stay(found) > self.allowed:  # no score would change that
            return found
        from edge_rt.core.context.recall import RELEVANT, Passage

        # What the question is about must not leave just when it is asked.
        near = self._relevances(
            [Passage([t for start, end in one.spans for t in history.tokens[start:end]], one.segment.text) for one in found]
        )
        return [one._replace(score=max(one.score, r)) if r >= RELEVANT else one for one, r in zip(found, near, strict=True)]

    def _relevances(self, segments: Sequence[Passage]) -> list[float]:
        """How close each is to the current question."""
        from edge_rt.core.context.recall import Passage

        assert self._recall is not None, "asked only where something is remembered"
        asked = [piece for piece in self._prompt_pieces() if self._of_question(piece)]
        question = [t for piece in asked for t in self.history.tokens[piece.start : piece.end]]
        return self._recall().relevances(Passage(question, "".join(piece.segment.text for piece in asked)), segments)

    def _of_question(self, piece: Span) -> bool:
        """Whether a piece belongs to the user's last message."""
        if self._question is None:
            from edge_rt.chat.transcript import question

            self._question = question(self._prompt_pieces())
        return piece.segment.message == self._question

    def _asked_for(self) -> list[Evicted]:
        """What left earlier and is closer to the question than anything that stayed: the closest first, within a quarter of the context."""
        if self._recall is None or not self.history.evicted:
            return []
        from edge_rt.chat.transcript import answer_start
        from edge_rt.core.context.history import overlapping
        from edge_rt.core.context.recall import RELEVANT, SHARE, Passage

        evicted, tokens = self.history.evicted, self.history.tokens
        answer = answer_start(self._prompt_pieces())  # its beginning repeats the question, and tells nothing of it
        pieces = [piece for piece in self._prompt_pieces() if piece.start < answer and not self._of_question(piece)]
        pieces = [piece for piece in pieces if piece.segment.kind != "schema"]  # it is close to many questions, and answers none
        stayed = [piece for piece in pieces if next(overlapping(evicted, piece.start, piece.end), None) is None]
        spans = [(one.start, one.end, one.text) for one in evicted] + [(piece.start, piece.end, piece.segment.text) for piece in stayed]
        near = self._relevances([Passage(tokens[start:end], text) for start, end, text in spans])
        least = max([RELEVANT, *near[len(evicted) :]])
        self._sought = least > RELEVANT
        room, chosen = self.allowed // SHARE, []
        for relevance, gone in sorted(zip(near, evicted, strict=False), reverse=True):
            if relevance > least and gone.end - gone.start <= room:
                room -= gone.end - gone.start
                chosen.append(gone)
        return chosen

    def _return(self, gone: Sequence[Evicted]) -> None:
        """These come back: with the cells they left with, or by being fed again with all that follows.

        Then gaps close if what the question is about is in the cells: positions are counted within the cache, as by StreamingLLM (Xiao
        and others, 2023). A small model finds a fact in a whole cache, and often overlooks it behind a gap of hundreds of positions.
        """
        if not (gone or self._sought) or self._recall is None:
            return
        history, recall = self.history, self._recall()
        again: list[Evicted] = []
        with self.lock:
            for one in sorted(gone):
                apart = history.condensed.tokens <= one.start < history.fed
                if not apart or not recall.bring_back(self.sequence, history, one):
                    again.append(one)
            if again and again[0].start < history.fed:
                self._cut(again[0].start)
            for one in again:
                history.restore(one)
            self._close_gaps()
        self._returned += gone
        self.recalled += len(gone)
        self.recalled_tokens += sum(one.end - one.start for one in gone)

    def _prompt_pieces(self) -> list[Span]:
        if self._pieces is None:
            self._pieces = self._ask_pieces()
        return self._pieces

    def _evict(self, gone: Sequence[Candidate]) -> None:
        """These leave, or are never fed."""
        from edge_rt.core.context.history import Evicted

        if gone and self.history.condensed.tokens:  # no segment has cells of its own there
            with self.lock:
                self._cut(0)
        evicted = [Evicted(start, end, one.segment.text, one.score) for one in gone for start, end in one.spans]
        if self._recall and any(one.start < self.history.fed for one in evicted):
            with self.lock:
                self._recall().keep(self.sequence, self.history, evicted)
        self._take_out(evicted)
        self.segments += len(gone)
        self.tokens += sum(one.tokens for one in gone)
        self._left += gone

    def _take_out(self, evicted: Sequence[Evicted]) -> None:
        history = self.history
        if cells := history.cell_spans(evicted):
            with self.lock:
                if not self._remove(cells):
                    self._cut(min(evicted).start)
        history.evict(evicted)

    def _take_out_tokens(self, spans: Sequence[tuple[int, int]]) -> None:
        """These tokens leave, whatever segments they are of."""
        from edge_rt.core.context.history import Evicted

        self._take_out([Evicted(start, end, self._text(self.history.tokens[start:end]), 0.0) for start, end in spans])

    def _remove(self, cells: Sequence[tuple[int, int]]) -> bool:
        """Take cells out of the middle, if the engine and the model can."""
        if self._remover is None:
            return False
        try:
            self.released += self._remover.remove_cells(self.sequence, cells)
        except ContextError:
            return False
        return True

    def _cut(self, at: int) -> None:
        """Forget the cells from token ``at`` on, or more where the engine needs that: they are fed again."""
        history = self.history
        at = min(at, history.fed) if at >= history.condensed.tokens else 0
        cells, gaps = history.cell(at), bool(at and history.condensed.tokens) or any(gone.start < at for gone in history.evicted[:1])
        left = cut(self.engine, self.sequence, cells, gaps=gaps)
        history.rewind(at - (cells - left) if left else 0)

    def _bring_back(self, room: int) -> None:
        """What left earlier is fed again, with all that follows it, if the whole prompt fits, or if it is protected now.

        That is so when a conversation goes back to an earlier point, or a request is allowed more cells than those before.
        """
        history = self.history
        if not history.evicted:
            return
        from edge_rt.core.context.eviction import parts
        from edge_rt.core.context.history import overlapping

        needed = [gone.start for gone in history.evicted[:1] if len(history.tokens) <= room]
        if not needed:
            protected = [part for part in parts(self._prompt_pieces(), min(self.allowed, self.held)) if part.protections]
            needed = [gone.start for part in protected for gone in overlapping(history.evicted, part.start, part.end)]
        if needed:
            back = min(needed)
            with self.lock:
                self._cut(back)
            history.evicted = [gone for gone in history.evicted if gone.end <= back]


def _counted(segments: int, tokens: int) -> str:
    """How many segments."""
    return f"{segments} segment{'s' if segments != 1 else ''} ({tokens:,} tokens)"


def _quoted(texts: Sequence[str]) -> str:
    """How the first of some segments begin."""
    quoted = [repr(" ".join(text.split())[:_SHOWN]) for text in texts[:_EXAMPLES]]
    return f": {', '.join(quoted)}{', ...' if len(texts) > _EXAMPLES else ''}"

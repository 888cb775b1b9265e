"""Writes docs/performance.md, docs/quality.md, docs/postprocessing-quality.md, docs/adaptation.md, docs/int4.md and
docs/serving.md from the stored results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.processes import PROGRAMS
from bench.results import OURS, Result, from_json
from bench.timing import spread

DOCS = Path(__file__).parent.parent / "docs"

SPEED_HEAD = """# Performance

Measured with `python -m bench` and written by `python -m bench report`; `make bench` does both.

Every figure is a ratio to another program on the same machine, measured in the same run: the contenders take turns, every other
round runs backwards, the ratio is the median over the rounds, and the spread is its inter-quartile range over the median. Where a
ratio is a matter of memory or start-up, each sample is a fresh process. Absolute figures are medians and hold for this machine alone.

The peer is llama-cpp-python, through its low-level bindings and so without its Python overhead: the *default* is libllama's own
parameters with a thread for each CPU; the *best* is the fastest that a sweep finds at the start of the same run: flash attention on
and off, repacked weights on and off, every number of threads, then mapped against read. edge-rt runs with its own defaults.

`python -m bench decode cold` measures only those, `--quick` only proves that everything runs, and
`--memory-group DIRECTORY` names a memory cgroup in which `limited` may make a group of its own for stock libllama and edge-rt alike.
Each benchmark waits for a quiet machine, repeats while ratios spread more than 5 %, and ends within ten minutes.

Two benches compare edge-rt with itself: `python -m bench.before_after OLD NEW` says which figures of one checkout are more than 2 % worse
than another's, and `python -m bench.walks` lists the files and functions that a token, an opening, a run and a request execute.

What is left of answers when the context is short has [a page of its own](quality.md).

Models: SmolLM2-135M-Instruct in several types, made from one file; for memory and disk a random llama of 1.3 GB in Q4_0.
"""
QUALITY_HEAD = """# What is left when the context is short

Measured with `python -m bench` and written by `python -m bench report`. What it is about is in [context](context.md).

Each score stands with its 95 % interval (bootstrap over texts). Every method may keep the same number of tokens or cells and has the
same ones protected; `full` has all of the text, `blind` none. Tasks are retrieval in the style of RULER from real prose (one and
several needles, variables, common words), scripted conversations, and perplexity on prose. The model is SmolLM2-135M-Instruct, which
is small: what it answers with its whole cache bounds everything here.
"""
POST_HEAD = """# What post-processing finds, misses and costs

Measured with `python -m bench` and written by `python -m bench report`.

Secrets and texts are generated, in Chinese, English and both, and their places are known. A *leak* is any three digits of a number, or
any four letters or digits of another secret, that come out and stand nowhere else in the text: full-width, with separators or without.
Texts come in tokens of one to eight characters, in pieces of characters, and in the tokens of SmolLM2, to their end or cut off by the
token limit, a stop string or a cancel close to a secret. Of a secret that was cut off nothing may come out once four of its digits or
letters had come (an e-mail: the @; an address: its house number or street). Names are those of a list, which Presidio is given too.
"""
SERVE_HEAD = """# What the daemon stands

Measured with `python -m bench` and written by `python -m bench report`. What it is about is in [the daemon](daemon.md).

Each benchmark starts the real `edge-rt serve` with SmolLM2-135M-Instruct (Q4_1) and comes to it as clients do, over its sockets. What is
required stands beside what was measured.

- `serve-start`: from the start of the process until the socket answers `status`, until the model is open, until the first token of who
  asked at once. `--peer-python` names a Python with the package xllamacpp, whose llama-server then takes turns with the daemon.
- `serve-idle`: a model that has cooled down gave its weights back: they left the process, and stay in the system's page cache until
  somebody needs the memory. The first token after that stands against a warm one; each prompt is another from its first token on.
  When the system has taken the weights, they are read from disk, and that takes what the disk takes.
- `serve-faults`: the worker is ended by a signal while streams are under way, `--items` times. Who was answered by it is told so, and
  what came before is the beginning of the right answer; the next answer is the same as ever; a saved session goes on. A client that
  vanishes is measured by another's tokens, as each is a step that has ended.
- `serve-isolation`: eight conversations of three users, each with a word that no other may hear, in `--items` turns, several at a time,
  with clones, saves, pruning, eviction, cancels and deaths. All that anybody is told is searched for the others' words. Each user also asks
  with the others' words: no token of them may be there already. A fresh process then looks at every token of answers whose conversation
  was whole in the context.
- `serve-hostile`: attacks from another process, at the lowest priority and as another user where that may be, while a client that does no
  harm is answered all the time: its gaps between tokens are judged, and the daemon's memory, descriptors and life.
- `serve-throughput`: one to eight clients each ask for 128 tokens at once, with other prompts of about 80 tokens in each round; what counts
  is the tokens a second of all together. The clients are one thread of one process, which costs every server the same.
- `serve-fairness`: three sessions decode when a fourth brings a prompt of 2,000 tokens. Their waits until it has its first token stand
  against the median of those before it came.
- both beside llama.cpp's server (`--llama-server PROGRAM`, `--peer-python`), with the same threads, file, context and greedy sampling, in
  the best setting of those that are tried at the start: flash attention, one buffer of cells or one for each session, repacked weights.
- `serve-soak`: a mixed load for `--minutes`. Once a minute everybody pauses; what is held then is compared between the first and the last
  third of the time after the warm-up.
"""
ADAPTATION_HEAD = """# How well a model and its threads fit the machine

Measured with `python -m bench` and written by `python -m bench report`. What it is about is in [the compiler](compiler.md).

- `contention`: decoding SmolLM2-135M-Instruct alone, beside a plain busy loop, and beside a second OpenMP program: libllama, which
  decodes or reads prompts with a thread for each CPU. Contenders take turns of three seconds in one process. *default* is libllama with a
  thread for each CPU, as llama.cpp's programs have it; *one thread* is what it would have to be told, and what llama-cpp-python's class
  takes on two CPUs; *best* is the fastest of a sweep of settings. The reaction is counted in tokens from the moment a busy loop begins or
  ends.
- `predictions`: what the cost model says of this machine against what is measured, for three models, two types, each number of threads,
  three lengths of context and three of prompts. SmolLM2 is real, the others have random weights.
- `compiled`: a directory that `edge-rt compile --target auto` wrote against the file it was made of, both with packed weights.
- `compiled-quality`: files of the same bytes, made of one with half-precision weights: types chosen by sensitivity, measured on the
  compiler's own calibration text, against one type for all. What is measured is the KL divergence of the next token on other prose. The
  half-precision file was made of one in Q4_1, so its weights lie on that type's grid; without Q4_1 and Q5_1 among the choices the mean
  was 0.227 nats (one run).
"""
INT4_HEAD = """# What INT4 costs, and what makes good for it

Measured with `python -m bench` and written by `python -m bench report`. What it is about is in [distilling](distill.md) and
[compensation](compensation.md).

- `quantised`: SmolLM2-135M-Instruct with its matrices in INT4, the embedding F16 in every file, against the same model in F16: KL
  divergence of the next token in the running product. Everything was calibrated with English technical text (8,192 tokens of the pages
  that Python ships, 20,480 for training the corrections); measured is prose that has nothing to do with it. The file that was quantised
  is in Q4_1, so its weights lie on that type's grid, and Q4_1 loses nothing.
- `saturation`: the same after other numbers of tokens of calibration; the corrections are fitted to them and not trained after that.
- `compensation`: decoding with the corrections against decoding without, in turns, with all threads. The model of a billion weights is
  random, its corrections are of rank 32 at ten matrices.
- `student`: what the demo run made ([report](distill-report.md)) against its teacher as llama.cpp's quantiser makes it in Q4_0, both in
  edge-rt, in turns.
"""
SPEED_WHY_NOT = """## What the published run does not meet, and why

- *Three times the default at 4,000 cells*: the requirement dates from a CPU on which ggml's flash attention took seven times as long as
  matmuls for one query. Where it does not, libllama's default is no longer slow. (Both layouts are timed once for each machine, and the
  faster one is used.) What is ahead here comes from cells that lie head by head and from fewer meetings of threads.
- *Decoding Q8_0 at short context* is level with libllama: llama.cpp's quantiser puts a norm between the gate and up matrices, so they
  cannot be read as one, and this CPU has no packed kernel for Q8_0, so nothing is written anew.
- *Speculation*: one step of two tokens costs 2.2 steps of one in Q8_0 and 1.9 in Q4_0, one of eight 4.1 and 3.6: these kernels are bound
  by computing. The ratio also falls as plain decoding gets faster.
"""
QUALITY_WHY_NOT = """## What the published run does not meet, and why

- *Perplexity of half the cells* rises by 1.003 %. One of the 20 texts carries half of it; after the others it rises by 0.5 %. In the worst
  texts of those for tuning, what is lost is the copying of what was said before: heads of several layers look at nothing until something
  is repeated, so no query that was asked before tells which cells they will need.
"""
ADAPTATION_WHY_NOT = """## What the published run does not meet, and why

- *Twenty times libllama beside an OpenMP program*: how far two threads fall depends on whether the system happens to run both at once.
  Where the requirement comes from, they fell to 0.3 tokens/s. Here libllama's turns spread over more than ten times, with single tokens
  that take half a second to one and a half; its median was 9 to 33 tokens/s in six runs. What edge-rt keeps is what one thread gets of
  CPUs that are shared.
- *The reaction*: one of twenty neighbours that left was noticed after 41 tokens, as patience with those before it had grown. It wears off
  since; in three runs of twenty after that at most 6, 11 and 6 tokens passed.
- *Predictions*: three of 72, each time others: what this machine gives its guests changes by a quarter within minutes.
- *Prompts of a compiled Q4_0 model*: a hundredth less than before, where rounds spread by four.
"""
EMPTY = "Nothing has been measured yet: run `make bench`.\n"
TAIL = """## The programs

Opening, cold starts and the memory limit are measured by these two programs, start-up by `edge-rt run -n 1 --temp 0 "…"` and the
two scripts after them.
"""


class Page(NamedTuple):
    """A page of results: of which ``benchmarks``, and what stands around them."""

    file: str
    benchmarks: Sequence[str]
    head: str
    why_not: str
    tail: str


def table(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def number(value: float) -> str:
    """Three significant digits, in full."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def rows(results: Iterable[Result]) -> list[list[str]]:
    """One row for each result and peer."""
    lines = [["what", "against", "ratio", "spread", "edge-rt", "peer", "required", "met"]]
    for result in results:
        met = {None: "", True: "yes", False: "**no**"}[result.ok]
        if not result.ratios:
            shown = result.shown or f"{number(spread(result.ours).median)} {result.unit}"
            lines.append([result.name, "", "", "", shown, "", result.requirement, met])
            continue
        for i, (peer, ratio) in enumerate(result.ratios.items()):
            ours, theirs = number(spread(result.ours).median), number(spread(result.peers[peer]).median)
            first = [result.requirement, met] if i == 0 else ["", ""]
            name = result.name if i == 0 else ""
            lines.append([name, peer, number(ratio.median), f"{ratio.spread:.0%}", f"{ours} {result.unit}", theirs, *first])
    return lines


class Kinds(NamedTuple):
    """Which benchmarks are on which page."""

    quality: Sequence[str]
    post: Sequence[str]
    speed: Sequence[str]
    serve: Sequence[str] = ()
    adaptation: Sequence[str] = ()
    int4: Sequence[str] = ()


def pages(kinds: Kinds) -> list[Page]:
    """All pages, each with its benchmarks."""
    return [
        Page("performance.md", kinds.speed, SPEED_HEAD, SPEED_WHY_NOT, "\n".join([TAIL, *_programs()])),
        Page("quality.md", kinds.quality, QUALITY_HEAD, QUALITY_WHY_NOT, ""),
        Page("postprocessing-quality.md", kinds.post, POST_HEAD, "", ""),
        Page("adaptation.md", kinds.adaptation, ADAPTATION_HEAD, ADAPTATION_WHY_NOT, ""),
        Page("int4.md", kinds.int4, INT4_HEAD, "", ""),
        Page("serving.md", kinds.serve, SERVE_HEAD, "", ""),
    ]


def render(stored: Mapping[str, Mapping[str, Any]], page: Page) -> str:
    """A page. Raises ValueError for quick results and for results of several machines."""
    order = page.benchmarks
    measured = [name for name in order if name in stored]
    if quick := [name for name in measured if stored[name]["quick"]]:
        raise ValueError(f"the results of {', '.join(quick)} are from --quick and mean nothing; measure again without it")
    machines = {tuple(stored[name]["machine"].items()) for name in measured}
    if len(machines) > 1:
        raise ValueError("the results are from several machines or versions; remove the old ones from bench/results and measure again")
    results = {name: from_json(stored[name]) for name in measured}
    parts = [page.head, "## Results\n", table(rows(r for name in measured for r in results[name])) if measured else EMPTY]
    if missing := [name for name in order if name not in stored]:
        parts.append(f"Not measured: {', '.join(missing)}.\n" if measured else "")
    if measured:
        parts += ["## Notes\n", _notes(results), "## Machine\n", _machine(stored, measured)]
    parts += [page.why_not, page.tail]
    return "\n".join(part for part in parts if part)


def _notes(results: Mapping[str, Sequence[Result]]) -> str:
    lines = [f"- {result.name}: {note}" for found in results.values() for result in found for note in result.notes]
    return "\n".join(lines) + "\n" if lines else "None.\n"


def _machine(stored: Mapping[str, Mapping[str, Any]], measured: Sequence[str]) -> str:
    days = sorted({str(stored[name]["when"])[:10] for name in measured})
    facts = {**stored[measured[0]]["machine"], "measured": " to ".join(dict.fromkeys((days[0], days[-1])))}
    return table([["", ""], *([key, value] for key, value in facts.items())])


def _programs() -> list[str]:
    names = ("ours.py", "peer.py", "answer_high_level.py", "answer_low_level.py")
    return [f"`bench/programs/{name}`\n\n```python\n{(PROGRAMS / name).read_text(encoding='utf-8')}```\n" for name in names]


def plain(results: Iterable[Result]) -> str:
    """Results for a terminal."""
    lines = []
    for result in results:
        met = {None: "    ", True: "ok  ", False: "FAIL"}[result.ok]
        lines.append(f"{met} {result.name}" + (f" [{result.requirement}]" if result.requirement else ""))
        if not result.ratios:
            lines.append(f"       {result.shown or f'{number(spread(result.ours).median)} {result.unit}'}")
        for peer, ratio in result.ratios.items():
            ours, theirs = number(spread(result.ours).median), number(spread(result.peers[peer]).median)
            certainty = f"spread {ratio.spread:.0%}, {len(result.ours)} rounds"
            lines.append(f"       {number(ratio.median)} × {peer} ({certainty}): {OURS} {ours}, {theirs} {result.unit}")
        lines += [f"       {note}" for note in result.notes]
    return "\n".join(lines)

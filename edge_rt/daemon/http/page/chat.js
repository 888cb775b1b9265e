// The conversation: turns of a question and an answer, which is written while it comes, and says what it cost.

import { ApiError, ask, events } from "./api.js";
import { number, say, size } from "./words.js";

const $ = (id) => document.getElementById(id);
const CHAT = "v1/chat/completions";
const TRIES = 4; // of a request that the daemon is too busy for
const SESSION = "edge-rt-session";

/** One tab is one session: what was computed for its conversation is not computed again. */
export const session = sessionStorage.getItem(SESSION) ?? `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
sessionStorage.setItem(SESSION, session);

let turns = [];
let running = null; // the AbortController of the answer that is being written

/** Make an element; `text` can only become text. */
export function element(name, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function body(question) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (turn.kept === null) continue; // nothing was answered
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.kept });
  }
  messages.push({ role: "user", content: question });
  const found = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, edge_rt: { session } };
  if ($("model").value) found.model = $("model").value;
  if ($("temperature").value !== "") found.temperature = $("temperature").valueAsNumber;
  if ($("max-tokens").value !== "") found.max_tokens = $("max-tokens").valueAsNumber;
  return found;
}

/** Ask; a daemon that is too busy for it is asked again a few times, as OpenAI's clients do. */
async function begin(asked, signal, busy) {
  for (let tried = 1; ; tried++) {
    try {
      return await ask(CHAT, asked, signal);
    } catch (error) {
      if (error.status !== 429 || tried === TRIES) throw error;
      busy();
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.wait || 1)));
      signal.throwIfAborted();
    }
  }
}

/** Ask the model, and write its answer. Nothing happens while another is being written. */
export async function send(question) {
  if (running || !question.trim()) return;
  running = new AbortController();
  const { signal } = running;
  const asked = body(question);
  const turn = { question, text: "", kept: null, error: null, stopped: false, busy: false, tokens: 0, prompt: 0, began: performance.now(),
    first: 0, last: 0, end: null };
  turns.push(turn);
  draw(turn);
  showRunning(true);
  try {
    const response = await begin(asked, signal, () => change(turn, { busy: true }));
    for await (const event of events(response)) take(turn, event);
    turn.kept = turn.end?.answer ?? turn.text;
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else if (error instanceof ApiError) turn.error = error.message;
    else throw error;
    if (turn.text) turn.kept = turn.text;
  } finally {
    running = null;
    change(turn, { over: true });
    showRunning(false);
    window.dispatchEvent(new Event("answered")); // and the daemon's facts are others
  }
}

function take(turn, event) {
  if (event.queued) {
    change(turn, { busy: false, queued: true });
    return;
  }
  turn.queued = false;
  const choice = event.choices[0];
  const text = choice?.delta.content;
  turn.busy = false;
  if (event.usage) {
    turn.prompt = event.usage.prompt_tokens;
    turn.tokens = event.usage.completion_tokens;
  }
  if (text) {
    turn.last = performance.now();
    turn.first ||= turn.last;
    turn.text += text;
  }
  if (event.edge_rt) turn.end = event.edge_rt;
  change(turn);
}

/** End the answer that is being written: the daemon stops with its next step. */
export const stop = () => running?.abort();

/** Forget the conversation. */
export function clear() {
  stop();
  turns = [];
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
}

// ---- what is shown ----------------------------------------------------------------------------------------------

function showRunning(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("live").setAttribute("aria-busy", on); // read aloud once it is whole
}

function draw(turn) {
  $("empty").hidden = true;
  turn.written = document.createTextNode("");
  turn.view = element("article", { className: "answer writing" }, element("h3", { className: "unseen" }));
  turn.view.append(element("div", { className: "text" }, turn.written), element("p", { className: "meta" }), element("ul", { className: "chips" }));
  turn.item = element("li", { className: "turn" });
  turn.item.append(element("article", { className: "question" }, element("h3", { className: "unseen" }), element("div", { className: "text", text: turn.question })));
  turn.item.append(turn.view);
  $("log").append(turn.item);
  write(turn);
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** Write at the next frame, however many tokens come until then. */
function change(turn, more) {
  Object.assign(turn, more);
  turn.frame ||= requestAnimationFrame(() => write(turn));
  if (turn.over && document.hidden) write(turn); // there are no frames then
}

function write(turn) {
  cancelAnimationFrame(turn.frame);
  turn.frame = 0;
  const scroll = $("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  turn.written.appendData(turn.text.slice(turn.written.length));
  const [asked, answered] = turn.item.querySelectorAll("h3");
  [asked.textContent, answered.textContent] = [say("you"), say("answer")];
  turn.view.classList.toggle("writing", !turn.over);
  turn.view.querySelector(".meta").textContent = meta(turn).join(" · ");
  turn.view.querySelector(".chips").replaceChildren(...chips(turn));
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

/** Write all again, in another language. */
export const rewrite = () => turns.forEach(write);

function speed(turn) {
  if (turn.end?.timings.tokens_per_second) return turn.end.timings.tokens_per_second;
  const seconds = ((turn.over ? turn.last : performance.now()) - turn.first) / 1000;
  return turn.first && seconds > 0.2 ? (turn.tokens - 1) / seconds : 0;
}

function meta(turn) {
  const found = [];
  const first = turn.end?.timings.first_token ?? (turn.first && (turn.first - turn.began) / 1000);
  if (turn.busy) found.push(say("busy"));
  else if (turn.queued && !turn.over) found.push(say("queued"));
  else if (!turn.over && !turn.first) found.push(say("reading"));
  if (turn.tokens) found.push(say("tokens", { n: number(turn.tokens) }));
  if (speed(turn)) found.push(say("rate", { n: number(speed(turn), 1) }));
  if (first) found.push(say("first_token", { n: number(first, 2) }));
  if (turn.end) {
    const { usage, context } = turn.end;
    found.push(say("prompt_used", { n: number(usage.prompt_tokens), reused: number(usage.reused_tokens) }));
    found.push(say("context_used", { used: number(context.used), allowed: number(context.allowed) }));
  }
  return found;
}

/** What happened beside the writing: what left the context and came back, why it ended, what rules did, errors. */
function chips(turn) {
  const found = [];
  const add = (text, className = "") => found.push(element("li", { text, className }));
  if (turn.end) {
    const { context, reason, post, notices } = turn.end;
    if (context.evicted_tokens) add(say("evicted", { n: number(context.evicted_tokens), segments: number(context.evicted_segments) }), "moved");
    if (context.recalled_tokens) add(say("recalled", { n: number(context.recalled_tokens), segments: number(context.recalled_segments) }), "moved");
    if (context.pruned_cells) add(say("pruned", { n: number(context.pruned_cells) }), "moved");
    if (context.released_bytes) add(say("released", { n: size(context.released_bytes) }), "moved");
    if (reason === "max_tokens") add(say("at_limit"));
    if (reason === "context_full") add(say("context_full"));
    for (const one of post) {
      const times = Object.values(one.counts).reduce((sum, count) => sum + count, 0);
      if (one.left_out) add(say("left_out", { name: one.name }), "bad");
      else if (times) add(say("processed", { name: one.name, n: number(times) }));
    }
    for (const notice of notices) add(notice, "note");
  }
  if (turn.stopped) add(say("stopped"));
  if (turn.error) add(turn.error, "bad");
  if (turn.over && (turn.error || turn.stopped) && turn === turns.at(-1)) {
    found.push(element("li", { className: "act" }, element("button", { type: "button", text: say("again"), onclick: () => again(turn) })));
  }
  return found;
}

function again(turn) {
  if (running) return;
  turns = turns.filter((one) => one !== turn);
  turn.item.remove();
  send(turn.question);
}

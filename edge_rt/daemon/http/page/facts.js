// What the daemon is at: its answer to edge-rt/status, once a second, as numbers, a line and bars.

import { element, session } from "./chat.js";
import { duration, known, number, part, say, size, translate } from "./words.js";

const $ = (id) => document.getElementById(id);
const OWNERS = ["cache", "compute", "allowance", "held", "reserved", "taken"];

/** The model that answers: the chosen one, of which an adapter may be meant too, else the daemon's default; undefined without any. */
function answering({ models }) {
  const chosen = $("model").value;
  return models.find(({ name }) => chosen === name || chosen.startsWith(`${name}:`)) ?? models.find((one) => one.default) ?? models[0];
}

/** Show it all; what is not there is left out. */
export function show(facts) {
  const hosted = answering(facts);
  showState(facts, hosted);
  showThroughput(facts);
  showModels(facts);
  showContext(facts.counts.context);
  showSessions(facts.sessions);
  showRules(facts.rules);
  showDaemon(facts, hosted);
}

/** Nobody answers, or nobody is let in: say so instead of the state. */
export function showAway(word) {
  $("state").dataset.state = word;
  write($("state"), say(word));
}

/** Write only what is another, so that nothing is selected anew, or read aloud twice. */
function write(one, text) {
  if (one.textContent !== text) one.textContent = text;
}

/** The entries of a list of definitions: [word, value, class], those without a value left out. */
function define(list, entries) {
  const there = entries.filter(([, value]) => value !== undefined && value !== null);
  while (list.children.length > there.length) list.lastChild.remove();
  while (list.children.length < there.length) list.append(element("div", {}, element("dt"), element("dd")));
  there.forEach(([word, value, className = ""], i) => {
    const [term, data] = list.children[i].children;
    write(term, say(word));
    write(data, value);
    list.children[i].className = className;
  });
}

function share(worker) {
  return worker.total ? `${number(Math.floor((100 * worker.done) / worker.total))} %` : "";
}

function showState({ server }, hosted) {
  const worker = hosted?.worker ?? {};
  const state = server.draining ? "draining" : (worker.state ?? "no_model");
  const phase = known(worker.phase) ? say(worker.phase) : (worker.phase ?? say("starting"));
  $("state").dataset.state = state;
  const ahead = state === "ready" && worker.total && worker.done < worker.total;
  const said = state === "starting" ? phase : say(state);
  write($("state"), ahead ? `${said}, ${say("read_ahead", { n: share(worker) })}` : said);
  write($("model-name"), hosted?.name ?? "");
  const why = (state === "waiting" || state === "failed") && worker.reason;
  $("opening").hidden = state !== "starting" && !why;
  $("opening").classList.toggle("bad", state === "failed");
  write($("opening-text"), why ? `${say(state)}: ${worker.reason}` : `${say("opening", { phase })} ${share(worker)}`);
  $("opening-bar").hidden = Boolean(why);
  if (worker.total) $("opening-bar").value = worker.done / worker.total;
  else $("opening-bar").removeAttribute("value");
}

function showThroughput({ throughput, counts, server, memory }) {
  const values = [...throughput.by_second, throughput.tokens_per_second];
  const peak = Math.max(...values);
  const top = Math.max(peak, 1);
  const points = values.map((value, i) => `${((240 * i) / (values.length - 1)).toFixed(1)} ${(58 - (54 * value) / top).toFixed(1)}`);
  $("spark").querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  $("spark").querySelector(".area").setAttribute("d", `M0 60L${points.join("L")}L240 60Z`);
  const now = number(throughput.tokens_per_second, throughput.tokens_per_second ? 1 : 0);
  $("spark").setAttribute("aria-label", say("spark", { now, peak: number(peak) }));
  write($("rate"), now);
  write($("peak"), peak ? say("peak", { n: number(peak) }) : "");
  define($("traffic"), [
    ["answered", number(counts.tokens.completion_tokens ?? 0)],
    ["read", number(counts.tokens.prompt_tokens ?? 0)],
    ["under_way", number(server.requests)],
    ["queued_requests", number(Object.values(memory).reduce((sum, one) => sum + one.queued, 0))],
    ["clients", number(server.connections)],
  ]);
}

/** A card for each model: how it stands, and what of it is in memory, if its worker says so. */
function showModels({ models, memory, server }) {
  const list = $("models");
  if ([...list.children].map((card) => card.dataset.model).join() !== models.map((model) => model.name).join()) {
    list.replaceChildren(...models.map(({ name }) => {
      const card = $("model-card").content.firstElementChild.cloneNode(true);
      card.dataset.model = name;
      card.querySelector(".name").textContent = name;
      return card;
    }));
    translate(list);
  }
  models.forEach((model, i) => {
    const { worker, cooled } = model;
    const stands = worker.state === "ready" ? (cooled ? "cooled" : "ready") : worker.state;
    write(list.children[i].querySelector("h3 .soft"), say(stands));
    list.children[i].querySelector("h3").hidden = models.length === 1;
    list.children[i].querySelector(".weights").hidden = worker.state !== "ready" || !memory[model.name];
    if (memory[model.name]) showMemory(list.children[i], memory[model.name], model);
  });
  const told = server.memory < 1e15; // else the system cannot say how much there is
  define($("budget"), told ? [["budget", size(server.memory)], ["budget_free", size(Math.max(0, server.memory_free))]] : []);
}

function showMemory(card, memory, model) {
  const { weights_resident: resident, weights_mapped: mapped } = memory;
  write(card.querySelector(".big span"), size(resident ?? mapped));
  write(card.querySelector(".big small"), resident === null ? say("unknown_mapped") : say("of_mapped", { n: size(mapped) }));
  const found = { ...model.memory, ...memory };
  define(card.querySelector(".facts"), OWNERS.map((owner) => [owner, Number.isFinite(found[owner]) ? size(found[owner]) : null]));
  showUnits(card, memory.units ?? []);
}

/** A column for each unit, as wide as it is large and as full as it is in memory; and a row with its numbers. */
function showUnits(card, units) {
  const [columns, rows] = [card.querySelector(".strip"), card.querySelector(".units")];
  columns.hidden = card.querySelector("details").hidden = card.querySelector(".legend").hidden = !units.length;
  write(card.querySelector("summary"), say("units", { n: number(units.length) }));
  if ([...rows.children].map((row) => row.dataset.unit).join() !== units.map((unit) => unit.name).join()) {
    rows.replaceChildren(...units.map((unit) => row(unit.name)));
    columns.replaceChildren(...units.map(() => element("div", { className: "unit" }, element("div", { className: "full" }))));
  }
  units.forEach(({ name, nbytes, resident }, i) => {
    const filled = nbytes && resident !== null ? `${(100 * resident) / nbytes}%` : "0";
    const [, bar, text] = rows.children[i].children;
    rows.children[i].dataset.bytes = nbytes;
    bar.firstChild.firstChild.style.width = filled;
    write(text, resident === null ? size(nbytes) : part(resident, nbytes));
    columns.children[i].style.flexGrow = nbytes;
    columns.children[i].firstChild.style.height = filled;
    columns.children[i].title = `${name}: ${text.textContent}`;
  });
}

function row(name) {
  const bar = element("div", { className: "track" }, element("div", { className: "full" }));
  const made = element("tr", {}, element("th", { scope: "row", text: name }), element("td", {}, bar), element("td"));
  made.dataset.unit = name;
  return made;
}

function showContext(counts) {
  const passages = (n) => (n ? say("passages", { n: number(n) }) : "");
  const tiles = [
    ["evicted_tokens", number(counts.evicted_tokens), passages(counts.evicted_segments)],
    ["recalled_tokens", number(counts.recalled_tokens), passages(counts.recalled_segments)],
    ["pruned_cells", number(counts.pruned_cells), ""],
    ["released_bytes", size(counts.released_bytes), ""],
  ];
  const list = $("context");
  if (!list.children.length) list.append(...tiles.map(() => element("div", {}, element("dt"), element("dd"), element("dd", { className: "soft" }))));
  tiles.forEach(([word, value, more], i) => {
    const [term, data, rest] = list.children[i].children;
    write(term, say(word));
    write(data, value);
    write(rest, more);
  });
}

function showSessions(sessions) {
  const list = $("sessions");
  while (list.children.length > sessions.own.length) list.lastChild.remove();
  while (list.children.length < sessions.own.length) list.append(element("li", {}, element("span", { className: "name" }), element("span")));
  sessions.own.forEach((one, i) => {
    const [name, held] = list.children[i].children;
    list.children[i].classList.toggle("busy", one.busy);
    write(name, one.name === session ? say("this_page") : (one.name ?? say("unnamed")));
    const more = [one.cells === null ? "–" : say("cells", { n: number(one.cells) })];
    if (one.parked) more.push(say("parked"));
    else if (one.bytes) more.push(size(one.bytes));
    write(held, more.join(" · "));
  });
  write($("sessions-all"), say("all_sessions", { n: number(sessions.open) }));
}

function showRules(rules) {
  $("no-rules").hidden = Boolean(rules);
  $("rules-found").hidden = !rules;
  if (!rules) return;
  write($("rules-version"), rules.version);
  if ($("rules-order").dataset.order !== rules.order.join()) {
    $("rules-order").dataset.order = rules.order.join();
    $("rules-order").replaceChildren(...rules.order.map((text) => element("li", { text })));
  }
  $("rules-error").hidden = !rules.error;
  write($("rules-error"), rules.error ?? "");
}

function showDaemon({ server, counts }, hosted) {
  const { worker, model } = hosted ?? {};
  define($("daemon"), [
    ["evictions", counts.evictions ? number(counts.evictions) : null],
    ["architecture", model?.architecture],
    ["engine", model && `${model.engine}, ${model.device}`],
    ["max_context", model && say("tokens", { n: number(model.context) })],
    ["worker", worker?.pid && `PID ${worker.pid}`],
    ["deaths", number(counts.worker_deaths), counts.worker_deaths ? "bad" : ""],
    ["uptime", duration(server.uptime)],
    ["server_version", server.version],
  ]);
  const notices = model?.notices ?? [];
  if (notices.join() !== $("notices").dataset.said) {
    $("notices").dataset.said = notices.join();
    $("notices").replaceChildren(...notices.map((text) => element("li", { text })));
  }
}

// The page's beginning: who is there, what is pressed, and the daemon's facts once a second while somebody looks.

import { ask, setKey } from "./api.js";
import { clear, rewrite, send, stop } from "./chat.js";
import { show, showAway } from "./facts.js";
import { switchLanguage, translate } from "./words.js";

const $ = (id) => document.getElementById(id);
const EVERY = 1000;
let timer = 0;
let facts = null;
let listed = "";
let polling = false;

/** Ask for the facts, and again a second later, as long as the page is seen. */
async function poll() {
  clearTimeout(timer);
  if (document.hidden || polling || $("door").open) return;
  polling = true;
  try {
    facts = await (await ask("edge-rt/status")).json();
    await listModels(facts.models);
    show(facts);
  } catch (error) {
    if (error.status === undefined) throw error; // a mistake of ours, for the console
    if (error.status !== 401) showAway("offline");
  } finally {
    polling = false;
    timer = setTimeout(poll, EVERY);
  }
}

/** What may be chosen, asked for when it may be another than before: each model, and each with an adapter. */
async function listModels(models) {
  const now = JSON.stringify(models.map(({ name, model }) => [name, model?.adapters]));
  if (now === listed) return;
  const { data } = await (await ask("v1/models")).json();
  const before = $("model").value || models.find((one) => one.default)?.name;
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === before)));
  listed = now;
}

// ---- the key ----------------------------------------------------------------------------------------------------

window.addEventListener("locked", ({ detail }) => {
  showAway("locked");
  $("door-error").hidden = !detail;
  $("door-error").textContent = detail;
  if (!$("door").open) $("door").showModal();
  $("key").select();
});

$("door").addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
$("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("door").close();
  poll();
});

// ---- what is pressed --------------------------------------------------------------------------------------------

function submit() {
  const question = $("prompt").value;
  if (!question.trim() || !$("stop").hidden) return;
  $("prompt").value = "";
  fit();
  send(question);
}

/** As high as what is written in it. */
function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function view(name) {
  document.body.dataset.view = name;
  for (const tab of document.querySelectorAll(".tabs button")) tab.setAttribute("aria-pressed", tab.dataset.view === name);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method takes Enter for itself
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
document.addEventListener("visibilitychange", poll);
window.addEventListener("answered", poll);
$("stop").addEventListener("click", () => {
  stop();
  $("prompt").focus();
});
$("new").addEventListener("click", () => {
  view("chat");
  clear();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("language").addEventListener("click", () => {
  switchLanguage();
  rewrite();
  if (facts) show(facts);
});
for (const tab of document.querySelectorAll(".tabs button")) tab.addEventListener("click", () => view(tab.dataset.view));
for (const one of document.querySelectorAll("#examples button")) {
  one.addEventListener("click", () => {
    send(one.textContent);
    $("prompt").focus();
  });
}

translate();
$("prompt").focus();
poll();

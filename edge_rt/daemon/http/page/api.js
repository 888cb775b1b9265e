// Asking the daemon: the key, errors as its API tells them, and streams of events.

import { say } from "./words.js";

const STORE = "edge-rt-key";
const QUEUED = ": queued: ";
let key = sessionStorage.getItem(STORE) ?? "";

/** Use this key from now on, until the tab is closed. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem(STORE, value);
}

/** What the API says is wrong. `status` is 0 if there was no answer at all; `wait`: seconds until it makes sense to ask again. */
export class ApiError extends Error {
  constructor(status, { message, code = null }, wait = 0) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

/** Ask, with a body as JSON if there is one. Throws ApiError; who is not let in is told of by the event "locked" of the window, too. */
export async function ask(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`; // a header is bytes
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: say("no_connection") });
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const error = new ApiError(response.status, found.error ?? { message: `HTTP ${response.status}` }, +response.headers.get("Retry-After"));
  if (error.status === 401) window.dispatchEvent(new CustomEvent("locked", { detail: key ? error.message : "" }));
  throw error;
}

/** The events of a stream, as they come, up to its end; `{ queued: why }` while the request waits for memory. Throws ApiError if it ends with an error, or not at all. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ApiError(0, { message: say("broken_off") });
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) { // a comment, which is no event of the API
        if (part.startsWith(QUEUED)) yield { queued: part.slice(QUEUED.length) };
        continue;
      }
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(response.status, event.error);
      yield event;
    }
  }
}

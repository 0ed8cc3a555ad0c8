// The chat page: conversations in localStorage, answers from /v1/chat/completions.

import { codeCard, copyButton, el, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 800px)");
const PREFIX = "llama/";
const chats = new Map(); // id -> {id, title, changed, model, settings, messages}
const running = new Map(); // conversation -> AbortController
const faults = new Map(); // conversation -> [message, what "Retry" does]
let current; // conversation
let pinned = true; // whether the end is in view, and kept there
let afterKey; // what goes on when it has been entered
let tipped; // token whose alternatives are shown

// Conversations.

function load(key) {
  const chat = key.startsWith(PREFIX) && JSON.parse(localStorage.getItem(key));
  if (chat && !running.has(chats.get(chat.id))) chats.set(chat.id, chat);
  else if (!chat) chats.delete(key.slice(PREFIX.length));
}

function save(chat) {
  chats.set(chat.id, chat);
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    const said = "The browser's storage is full: export and delete conversations.";
    faults.set(chat, [said, () => save(chat) || show()]);
  }
  listChats();
}

function listChats() {
  const sorted = [...chats.values()].sort((a, b) => b.changed - a.changed);
  $("list").replaceChildren(...sorted.map((chat) => {
    const here = chat === current ? "page" : undefined;
    return el("li", {}, el("a", { href: `#${chat.id}`, "aria-current": here }, chat.title));
  }));
}

function open() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  const { settings = {}, model } = current ?? {};
  current = chats.get(location.hash.slice(1)) ??
    { id, title: "", model, settings: { ...settings }, messages: [] };
  for (const field of $("settings").elements) {
    if (field.type === "checkbox") field.checked = Boolean(current.settings[field.name]);
    else if (field.name) field.value = current.settings[field.name] ?? "";
  }
  chooseModel();
  if (narrow.matches) panel("chats", false);
  pinned = true;
  listChats();
  show();
  $("text").focus();
}

function exported(kind) {
  if (kind === "json") return JSON.stringify(current, null, 2);
  const parts = current.messages.map((message) => [
    `## ${who(message)}`,
    message.content,
    ...(message.tool_calls ?? []).map((call) => "```json\n" + JSON.stringify(call) + "\n```"),
  ].filter(Boolean).join("\n\n"));
  return [`# ${current.title}`, ...parts].join("\n\n") + "\n";
}

function download(kind) {
  const href = URL.createObjectURL(new Blob([exported(kind)]));
  el("a", { href, download: `${current.title || "conversation"}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

// The server.

async function call(path, options, retry) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server can't be reached.");
  });
  if (response.ok) return response;
  if (response.status === 401) askKey(retry);
  const text = await response.text();
  const said = parsed(text)?.error?.message ?? text.slice(0, 500);
  throw new Error(`${said || response.statusText} (status ${response.status})`);
}

async function loadModels() {
  const chat = current;
  faults.delete(chat);
  try {
    const { data } = await (await call("v1/models", {}, loadModels)).json();
    $("model").replaceChildren(...data.map(({ id }) => el("option", {}, id)));
    chooseModel();
  } catch (error) {
    faults.set(chat, [error.message, loadModels]);
  }
  show();
}

function chooseModel() {
  const names = [...$("model").options].map((option) => option.value);
  if (names.includes(current.model)) $("model").value = current.model;
}

function request(chat) {
  const { system, probabilities, ...settings } = chat.settings;
  const messages = chat.messages.map(({ role, content, tool_calls, tool_call_id }) =>
    ({ role, content, tool_calls, tool_call_id }));
  if (system?.trim()) messages.unshift({ role: "system", content: system });
  const body = { model: chat.model, messages, stream: true };
  body.stream_options = { include_usage: true };
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  for (const [name, value] of Object.entries(settings)) {
    const { kind } = $("settings").elements[name].dataset;
    if (!value.trim()) continue;
    if (kind === "lines") body[name] = value.split("\n").filter(Boolean);
    else body[name] = kind === "json" ? JSON.parse(value) : Number(value);
  }
  return JSON.stringify(body);
}

/** Data of server-sent events; comments and other fields are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trim());
      else if (!line && data.length) {
        const text = data.join("\n");
        if (text === "[DONE]") return;
        data = [];
        yield JSON.parse(text);
      }
    }
  }
}

function absorb(message, { choices, error, usage }) {
  if (error) throw new Error(error.message);
  if (usage) message.usage = usage;
  const { delta = {}, logprobs, finish_reason } = choices?.[0] ?? {};
  message.content += delta.content ?? "";
  for (const { index, id, function: part } of delta.tool_calls ?? []) {
    const calls = (message.tool_calls ??= []);
    const whole = (calls[index] ??= { type: "function", function: { name: "", arguments: "" } });
    whole.id ??= id;
    whole.function.name += part?.name ?? "";
    whole.function.arguments += part?.arguments ?? "";
  }
  for (const { token, logprob, top_logprobs = [] } of logprobs?.content ?? []) {
    const top = top_logprobs.map((other) => [other.token, other.logprob]);
    (message.logprobs ??= []).push([token, logprob, top]);
  }
  message.finish = finish_reason ?? message.finish;
}

async function answer(chat) {
  const controller = new AbortController();
  const message = { role: "assistant", content: "", model: $("model").value };
  const again = () => regenerate(chat);
  Object.assign(chat, { model: message.model, changed: Date.now() });
  chat.title ||= chat.messages[0].content.slice(0, 80);
  $("title").value = chat.title;
  history.replaceState(null, "", `#${chat.id}`);
  faults.delete(chat);
  running.set(chat, controller);
  pinned = true;
  try {
    const wrong = $("settings").querySelector(":invalid:not(fieldset)");
    if (wrong) throw new Error(`${wrong.labels[0].innerText.trim()}: ${wrong.validationMessage}`);
    const options = { method: "POST", body: request(chat), signal: controller.signal };
    chat.messages.push(message);
    save(chat);
    show();
    $("text").focus();
    $("status").textContent = "Answering";
    const { body } = await call("v1/chat/completions", options, again);
    let first;
    for await (const data of events(body)) {
      absorb(message, data);
      message.seconds = (performance.now() - (first ??= performance.now())) / 1000;
      redraw(chat);
    }
    if (!message.finish) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else faults.set(chat, [error.message, again]);
  }
  running.delete(chat);
  if (!message.content && !message.tool_calls && message === chat.messages.at(-1)) {
    chat.messages.pop();
  }
  if (chats.has(chat.id)) save(chat);
  if (chat !== current) return;
  show();
  $("status").textContent = $("turns").querySelector("article:last-of-type .body").textContent;
}

function regenerate(chat) {
  if (chat.messages.at(-1).role === "assistant") chat.messages.pop();
  answer(chat);
}

// What is shown.

const parsed = (text) => {
  try {
    return JSON.parse(text);
  } catch {} // it isn't JSON, or not yet
};
const pretty = (text) => {
  const value = parsed(text);
  return value && typeof value === "object" ? JSON.stringify(value, null, 2) : undefined;
};
const who = ({ role }) => ({ user: "You", assistant: "Assistant", tool: "Result of a tool" })[role];
const button = (text, onclick) => el("button", { type: "button", onclick }, text);

function show() {
  const turns = $("turns");
  const fault = faults.get(current);
  const busy = running.has(current);
  turns.replaceChildren(...current.messages.map(turn));
  if (fault) {
    turns.append(el("div", { class: "error", role: "alert" }, el("p", {}, fault[0]),
      button("Retry", fault[1])));
  } else if (!current.messages.length) {
    turns.append(el("div", { class: "empty" }, el("h2", {}, "Ask the model something"),
      el("p", {}, "Conversations are kept in this browser.")));
  }
  turns.classList.toggle("busy", busy);
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  document.title = current.title || "Llama";
  if (pinned) turns.scrollTop = turns.scrollHeight;
}

let frame;
function redraw(chat) { // the last turn, at most once a frame
  if (chat !== current) return;
  frame ??= requestAnimationFrame(() => {
    frame = undefined;
    $("turns").querySelector("article:last-of-type")?.fill();
    if (pinned) $("turns").scrollTop = $("turns").scrollHeight;
  });
}

function turn(message, index, { length }) {
  const { role, content, tool_calls: calls = [] } = message;
  const last = index === length - 1;
  const body = el("div", { class: "body" });
  const cards = el("div");
  const footer = el("footer", {}, copyButton(() => message.content));
  const article = el("article", { class: role }, el("h2", {}, who(message)), body, cards, footer);
  const send = (texts) => {
    const results = texts.map((text, i) => ({ role: "tool", tool_call_id: calls[i].id, content: text }));
    current.messages.push(...results);
    answer(current);
  };
  const change = ([text]) => {
    current.messages.splice(index, length, { role, content: text });
    answer(current);
  };
  const edit = () => {
    const form = fields("Send", change, [["Edit the message: later turns are removed", content]]);
    form.append(button("Cancel", show));
    article.replaceChildren(form);
    form.querySelector("textarea").focus();
  };
  article.fill = () => fill(body, cards, message);
  article.fill();
  if (role === "user") footer.append(button("Edit", edit));
  if (role === "assistant" && last) footer.append(button("Regenerate", () => regenerate(current)));
  if (role === "assistant") footer.append(el("span", {}, summary(message)));
  if (calls.length && last && !running.has(current)) {
    const asked = calls.map((call) => [`Result of ${call.function.name}`, ""]);
    article.append(fields("Send results", send, asked));
  }
  return article;
}

/** A form of labelled text areas, as [label, text]; `done` is called with the texts. */
function fields(action, done, labelled) {
  const areas = labelled.map(([label, text]) => [label, el("textarea", { rows: 2 }, text)]);
  const onsubmit = (event) => {
    event.preventDefault();
    done(areas.map(([, area]) => area.value));
  };
  return el("form", { class: "fields", onsubmit },
    ...areas.map(([label, area]) => el("label", {}, label, area)),
    el("button", { class: "main" }, action));
}

function fill(body, cards, { role, content, tool_calls = [], logprobs }) {
  const json = pretty(content);
  if (role === "user") body.textContent = content;
  else if (logprobs && current.settings.probabilities) showTokens(body, logprobs);
  else if (json) body.replaceChildren(codeCard("json", json, role === "tool" ? "JSON" : "JSON answer"));
  else if (role === "tool") body.textContent = content;
  else markdown(body, content);
  cards.replaceChildren(...tool_calls.map(({ function: { name, arguments: text } }) =>
    codeCard("json", pretty(text) ?? text, `Tool call: ${name}`)));
}

function summary({ model, usage, seconds, finish }) {
  const tokens = usage?.completion_tokens;
  const ends = { stopped: "stopped", length: "cut off at max tokens" };
  return [
    model,
    tokens && `${tokens} token${tokens > 1 ? "s" : ""}`,
    tokens > 1 && seconds && `${((tokens - 1) / seconds).toPrecision(3)} tokens/s`,
    ends[finish],
  ].filter(Boolean).join(" · ");
}

function showTokens(body, logprobs) {
  let tokens = body.querySelector(".tokens");
  if (!tokens) {
    const label = "Tokens; the arrow keys move between them";
    tokens = el("div", { class: "tokens", role: "group", "aria-label": label, onkeydown: moveToken });
    body.replaceChildren(tokens);
  }
  for (const entry of logprobs.slice(tokens.children.length)) {
    const shade = [0.9, 0.5, 0.2, 0.05].filter((p) => Math.exp(entry[1]) < p).length;
    const tabindex = tokens.firstChild ? -1 : 0;
    const token = el("span", { "data-shade": shade, tabindex, "aria-describedby": "tip" }, entry[0]);
    tokens.append(Object.assign(token, { entry }));
  }
}

function moveToken(event) {
  const way = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
  if (!way) return;
  event.preventDefault();
  event.target[way]?.focus();
}

function showTip({ target }) {
  const token = (tipped = target.closest(".tokens span"));
  const tip = $("tip");
  tip.hidden = !token;
  if (!token) return;
  const [text, logprob, top] = token.entry;
  const rows = top.some(([other]) => other === text) ? top : [[text, logprob], ...top];
  tip.replaceChildren(...rows.map(([other, value]) =>
    el("div", { class: other === text ? "chosen" : "other" }, el("code", {}, JSON.stringify(other)),
      `${(100 * Math.exp(value)).toPrecision(3)}%`)));
  const box = token.getBoundingClientRect();
  const below = box.bottom + 6;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${fits ? below : box.top - tip.offsetHeight - 6}px`;
}

function panel(name, on) {
  $(name).hidden = !on;
  document.querySelector(`[data-panel=${name}]`).setAttribute("aria-expanded", on);
}

function askKey(retry) {
  afterKey = retry;
  $("key").returnValue = "";
  $("key-value").value = sessionStorage.getItem("key") ?? "";
  if (!$("key").open) $("key").showModal();
}

// Events.

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("text").value;
  if (!content.trim() || running.has(current)) return;
  $("text").value = "";
  current.messages.push({ role: "user", content });
  answer(current);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => {
  running.get(current).abort();
  $("text").focus();
});
$("title").addEventListener("change", () => {
  current.title = $("title").value.trim() || current.title;
  if (chats.has(current.id)) save(current);
});
$("delete").addEventListener("click", () => {
  if (!confirm(`Delete "${current.title}"?`)) return;
  running.get(current)?.abort();
  chats.delete(current.id);
  localStorage.removeItem(PREFIX + current.id);
  history.replaceState(null, "", "#");
  open();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", ({ target }) => {
  const bad = target.dataset.kind === "json" && target.value.trim() && !parsed(target.value);
  target.setCustomValidity(bad ? "This isn't JSON." : "");
  current.settings = Object.fromEntries(new FormData($("settings")));
  if (chats.has(current.id)) save(current);
  if (target.type === "checkbox") show();
});
$("change-key").addEventListener("click", () => askKey(loadModels));
$("key").addEventListener("close", () => {
  if ($("key").returnValue !== "save") return;
  sessionStorage.setItem("key", $("key-value").value);
  afterKey();
});
$("turns").addEventListener("scroll", ({ target }) => {
  pinned = target.scrollHeight - target.scrollTop - target.clientHeight < 60;
  if (!$("tip").hidden) showTip({ target: tipped });
});
for (const name of ["mouseover", "focusin"]) $("turns").addEventListener(name, showTip);
for (const name of ["mouseleave", "focusout"]) {
  $("turns").addEventListener(name, () => ($("tip").hidden = true));
}
for (const toggle of document.querySelectorAll("[data-panel]")) {
  const { panel: name } = toggle.dataset;
  toggle.addEventListener("click", () => {
    const on = $(name).hidden;
    if (narrow.matches) for (const other of ["chats", "settings"]) panel(other, false);
    panel(name, on);
  });
}
for (const item of document.querySelectorAll("[data-export]")) {
  item.addEventListener("click", () => download(item.dataset.export));
}
addEventListener("keydown", ({ key }) => {
  if (key === "Escape") $("tip").hidden = true;
  if (key === "Escape" && narrow.matches) for (const name of ["chats", "settings"]) panel(name, false);
});
addEventListener("hashchange", open);
addEventListener("storage", ({ key }) => { // another tab has changed a conversation
  load(key ?? "");
  key === PREFIX + current.id && !running.has(current) ? open() : listChats();
});
addEventListener("pagehide", () => [...running.keys()].forEach(save));

Object.keys(localStorage).forEach(load);
for (const name of ["chats", "settings"]) panel(name, name === "chats" && !narrow.matches);
open();
loadModels();

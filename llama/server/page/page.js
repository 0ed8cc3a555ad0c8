// The chat page: conversations in localStorage, answers from /v1/chat/completions.

import { codeCard, copyButton, el, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const PREFIX = "llama/";
const chats = new Map(); // id -> {id, title, changed, model, settings, messages}
const running = new Map(); // conversation -> AbortController
const faults = new Map(); // conversation -> [message, what "Retry" does]
const ARROWS = { ArrowLeft: "previousSibling", ArrowRight: "nextSibling" };
let current; // conversation
let pinned = true; // whether the end is in view, and kept there
let afterKey; // what goes on when a key has been entered
let tipped; // token whose alternatives are shown
let frame; // in which the last turn is drawn
let attached = []; // images of the next message, as data URIs

const parsed = (text) => {
  try {
    return JSON.parse(text);
  } catch {} // it isn't JSON, or not yet
};
const pretty = (text) => {
  const value = parsed(text);
  return value && typeof value === "object" && JSON.stringify(value, null, 2);
};
const isBad = ({ dataset: { kind }, value }) => kind === "json" && value.trim() && !parsed(value);
const check = (field) => field.setCustomValidity(isBad(field) ? "This isn't JSON." : "");
const who = ({ role, name }) => ({ user: "You", tool: `Result of ${name}` })[role] ?? "Assistant";
const focus = () => matchMedia("(pointer: fine)").matches && $("text").focus(); // no touch keyboard
const update = (parts) => [Object.assign(current, parts), chats.has(current.id) && save(current)];
const button = (text, onclick) => el("button", { type: "button", onclick }, text);

function save(chat) {
  chats.set(chat.id, chat);
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    const said = "The browser's storage is full: export and delete conversations.";
    faults.set(chat, [said, () => [faults.delete(chat), save(chat), show()]]);
  }
  listChats();
}

function listChats() {
  const sorted = [...chats.values()].sort((a, b) => b.changed - a.changed);
  $("list").replaceChildren(...sorted.map((chat) => el("li", {},
    el("a", { href: `#${chat.id}`, "aria-current": chat === current }, chat.title))));
}

function open() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  const { settings, model } = current ?? {};
  const fresh = { id, title: "", model, settings: { ...settings }, messages: [] };
  current = chats.get(location.hash.slice(1)) ?? fresh;
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.type === "checkbox") field.checked = field.name in current.settings;
    else field.value = current.settings[field.name] ?? "";
    check(field);
  }
  $("title").value = current.title;
  $("chats").hidePopover();
  pinned = true;
  listChats();
  show();
  focus();
}

function download(kind) {
  const calls = ({ tool_calls = [] }) => tool_calls.map(({ function: asked }) =>
    `\`\`\`json\n${JSON.stringify(asked)}\n\`\`\``);
  const parts = current.messages.flatMap((m) => [`## ${who(m)}`, m.content, ...calls(m)]);
  const text = kind === "json" ? JSON.stringify(current, null, 2)
    : [`# ${current.title}`, ...parts.filter(Boolean)].join("\n\n") + "\n";
  const href = URL.createObjectURL(new Blob([text]));
  el("a", { href, download: `${current.title || "conversation"}.${kind}` }).click();
}

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
  faults.delete(current);
  try {
    const { data } = await (await call("v1/models", {}, loadModels)).json();
    $("model").replaceChildren(...data.map(({ id }) => el("option", {}, id)));
  } catch (error) {
    faults.set(current, [error.message, loadModels]);
  }
  show();
}

function request({ model, settings: { system, probabilities, ...settings }, messages }) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  body.messages = messages.map(({ role, content, images = [], tool_calls, tool_call_id }) => {
    const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
    const whole = parts.length ? [...parts, { type: "text", text: content }] : content;
    return { role, content: whole, tool_calls, tool_call_id };
  });
  if (system?.trim()) body.messages.unshift({ role: "system", content: system });
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  for (const [name, value] of Object.entries(settings).filter(([, value]) => value.trim())) {
    const { kind } = $("settings").elements[name].dataset;
    if (kind === "lines") body[name] = value.split("\n").filter(Boolean);
    else body[name] = kind === "json" ? JSON.parse(value) : Number(value);
  }
  return JSON.stringify(body);
}

/** Data of server-sent events; comments and other fields are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value.replaceAll("\r", "")).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function absorb(message, { choices, error, usage }) {
  if (error) throw new Error(error.message ?? error);
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

/** Asks for the next turn, in place of the assistant's last one if the conversation ends so. */
async function answer(chat) {
  const old = chat.messages.at(-1).role === "assistant" && chat.messages.pop();
  const { signal } = running.set(chat, new AbortController()).get(chat);
  const again = () => answer(chat);
  Object.assign(chat, { model: $("model").value || undefined, changed: Date.now() });
  const message = { role: "assistant", content: "", model: chat.model };
  $("title").value = chat.title ||= chat.messages[0].content.slice(0, 80);
  history.replaceState(null, "", `#${chat.id}`);
  faults.delete(chat);
  pinned = true;
  save(chat);
  try {
    const wrong = $("settings").querySelector(":invalid:not(fieldset)");
    if (wrong) throw new Error(`${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}`);
    const options = { method: "POST", body: request(chat), signal };
    chat.messages.push(message);
    show();
    focus();
    $("status").textContent = "Answering";
    const { body } = await call("v1/chat/completions", options, again);
    if (!$("model").length) loadModels(); // the list had failed
    let first;
    for await (const data of events(body)) {
      absorb(message, data);
      const now = performance.now();
      if (message.content || message.tool_calls) message.seconds = (now - (first ??= now)) / 1000;
      redraw(chat);
    }
    if (!message.finish) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else faults.set(chat, [error.message, again]);
  }
  running.delete(chat);
  const empty = !message.content && !message.tool_calls;
  if (empty && chat.messages.at(-1) === message) chat.messages.pop();
  if (empty && old) chat.messages.push(old);
  if (chats.has(chat.id)) save(chat);
  if (chat !== current) return;
  show();
  $("status").textContent = $("turns").querySelector("article:last-of-type .body").textContent;
}

function show() {
  const [turns, busy] = [$("turns"), running.has(current)];
  turns.replaceChildren(...current.messages.map(turn));
  const [said, again] = faults.get(current) ?? [];
  if (said) turns.append(el("div", { class: "error", role: "alert" }, el("p", {}, said),
    again ? button("Retry", again) : ""));
  turns.classList.toggle("busy", busy);
  [$("stop").hidden, $("send").hidden] = [!busy, busy];
  $("model").value = current.model;
  if ($("model").selectedIndex < 0) $("model").selectedIndex = 0;
  document.title = current.title || "Llama";
  toEnd();
}

function toEnd() {
  if (pinned) $("turns").scrollTop = $("turns").scrollHeight;
}

function redraw(chat) { // the last turn, at most once a frame
  if (chat !== current) return;
  frame ??= requestAnimationFrame(() => {
    frame = undefined;
    $("turns").querySelector("article:last-of-type")?.fill();
    toEnd();
  });
}

function turn(message, index, { length }) {
  const { role, content, images = [], tool_calls: calls = [] } = message;
  const last = index === length - 1;
  const live = last && running.has(current);
  const [body, cards] = [el("div", { class: "body" }), el("div")];
  const footer = el("footer", {}, copyButton(content));
  const article = el("article", { class: live ? `${role} live` : role },
    el("h2", {}, who(message)), ...pictures(images), body, cards, footer);
  const goOn = (from, messages) =>
    [current.messages.splice(from, length, ...messages), answer(current)];
  const kept = [...images];
  const change = ([text]) => goOn(index, [{ role, content: text, images: kept }]);
  const send = (texts) => goOn(length, calls.map(({ id, function: { name } }, i) =>
    ({ role: "tool", tool_call_id: id, name, content: texts[i] })));
  const edit = () => {
    article.replaceChildren(fields("Send", change, [["Edit: later turns are removed", content]]));
    article.firstChild.append(button("Cancel", show), removable(el("div"), kept));
    article.querySelector("textarea").focus();
  };
  article.fill = () => fill(body, cards, message);
  article.fill();
  if (role === "user") footer.append(button("Edit", edit));
  if (role === "assistant" && last) footer.append(button("Regenerate", () => answer(current)));
  if (role === "assistant") footer.append(el("span", {}, summary(message)));
  if (calls.length && last && !live) article.append(fields("Send results", send,
    calls.map((call) => [`Result of ${call.function.name}`, ""])));
  return article;
}

const pictures = (images) => images.map((src, i) =>
  el("img", { src, alt: `Image ${i + 1}`, onload: toEnd }));

/** Files of a drop or a paste: images, no larger than the model's tiles and storage allow. */
async function attach(event) {
  const files = [...(event.dataTransfer ?? event.clipboardData).files];
  if (!files.length) return;
  event.preventDefault();
  for (const file of files) {
    try {
      const image = await createImageBitmap(file);
      const scale = Math.min(1, 1120 / Math.max(image.width, image.height));
      const [width, height] = [image.width, image.height].map((n) => Math.ceil(n * scale));
      const canvas = el("canvas", { width, height });
      const context = Object.assign(canvas.getContext("2d"), { fillStyle: "white" });
      context.fillRect(0, 0, width, height); // JPEG knows no transparency
      context.drawImage(image, 0, 0, width, height);
      attached.push(canvas.toDataURL("image/jpeg", 0.9));
    } catch {
      faults.set(current, [`${file.name} isn't an image.`]);
      show();
    }
  }
  removable($("attached"), attached);
}

/** Shows images in a node, as buttons that take them back. */
function removable(node, images) {
  const remove = (i) => () => [images.splice(i, 1), removable(node, images)];
  node.replaceChildren(...pictures(images).map((image, i) =>
    el("button", { type: "button", title: "Remove", onclick: remove(i) }, image)));
  return node;
}

/** A form of text areas, given as [label, text]; `done` is called with the texts. */
function fields(action, done, labelled) {
  const areas = labelled.map(([, text]) => el("textarea", {}, text));
  const onsubmit = () => done(areas.map((area) => area.value));
  return el("form", { class: "fields", method: "dialog", onsubmit },
    ...areas.map((area, i) => el("label", {}, labelled[i][0], area)),
    el("button", { class: "main" }, action));
}

function fill(body, cards, { role, content, tool_calls = [], logprobs }) {
  const json = role !== "user" && pretty(content);
  if (logprobs && current.settings.probabilities) showTokens(body, logprobs);
  else if (json) body.replaceChildren(codeCard("json", json, "JSON"));
  else if (role === "assistant") markdown(body, content);
  else body.textContent = content;
  cards.replaceChildren(...tool_calls.map(({ function: { name, arguments: text } }) =>
    codeCard("json", pretty(text) || text, `Tool call: ${name}`)));
}

function summary({ model, usage: { completion_tokens: tokens } = {}, seconds, finish }) {
  const rate = Number(((tokens - 1) / seconds).toPrecision(3));
  const ends = { stopped: "stopped", length: "cut off at max tokens" };
  return [model, tokens && `${tokens} token${tokens > 1 ? "s" : ""}`,
    tokens > 1 && seconds && `${rate} tokens/s`, ends[finish]].filter(Boolean).join(" · ");
}

function showTokens(body, logprobs) {
  const label = "Tokens; the arrow keys move between them";
  const onkeydown = ({ key, target }) => target[ARROWS[key]]?.focus();
  const group = { class: "tokens", role: "group", "aria-label": label, onkeydown };
  if (!body.querySelector(".tokens")) body.replaceChildren(el("div", group));
  const tokens = body.firstChild;
  for (const entry of logprobs.slice(tokens.children.length)) {
    const shade = [0.9, 0.5, 0.2, 0.05].filter((p) => Math.exp(entry[1]) < p).length;
    const described = { "data-shade": shade, "aria-describedby": "tip" };
    const tabindex = tokens.firstChild ? -1 : 0;
    tokens.append(Object.assign(el("span", { tabindex, ...described }, entry[0]), { entry }));
  }
}

function showTip({ target }) {
  tipped?.classList.remove("tipped");
  tipped = target.closest(".tokens span");
  $("tip").hidden = !tipped;
  if (!tipped) return;
  tipped.classList.add("tipped");
  const [text, logprob, top] = tipped.entry;
  const rows = top.some(([other]) => other === text) ? top : [[text, logprob], ...top];
  $("tip").replaceChildren(...rows.map(([other, value]) => el("div", {},
    el(other === text ? "strong" : "span", {}, JSON.stringify(other)),
    `${(100 * Math.exp(value)).toPrecision(3)}%`)));
}

function askKey(retry) {
  afterKey = retry;
  if (!$("key").open) $("key").showModal();
}

$("composer").onsubmit = () => {
  const content = $("text").value;
  if (!content.trim() || running.has(current)) return;
  $("text").value = "";
  current.messages.push({ role: "user", content, ...(attached.length && { images: attached }) });
  attached = [];
  removable($("attached"), attached);
  answer(current);
};
$("text").onkeydown = (event) => {
  const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (enter) $("composer").requestSubmit();
  return !enter;
};
$("text").onpaste = document.ondrop = attach;
document.ondragover = (event) => event.preventDefault();
$("stop").onclick = () => [running.get(current).abort(), focus()];
$("title").onchange = () => update({ title: $("title").value.trim() || current.title });
$("model").onchange = () => update({ model: $("model").value });
$("export-md").onclick = () => download("md");
$("export-json").onclick = () => download("json");
$("delete").onclick = () => {
  if (!confirm(`Delete "${current.title}"?`)) return;
  running.get(current)?.abort();
  chats.delete(current.id);
  localStorage.removeItem(PREFIX + current.id);
  history.replaceState(null, "", "#");
  open();
};
$("settings").oninput = ({ target }) => {
  check(target);
  update({ settings: Object.fromEntries(new FormData($("settings"))) });
  if (target.type === "checkbox") show();
};
$("change-key").onclick = () => askKey(loadModels);
$("key-form").onsubmit = () => {
  sessionStorage.setItem("key", $("key-value").value);
  afterKey();
};
$("turns").onscroll = ({ target }) => {
  pinned = target.scrollHeight - target.scrollTop - target.clientHeight < 60;
};
$("turns").onmouseover = showTip;
$("turns").addEventListener("focusin", showTip);
onkeydown = ({ key }) => void ($("tip").hidden ||= key === "Escape");
onhashchange = open;
onpagehide = () => [...running.keys()].forEach(save);
for (const [key, text] of Object.entries(localStorage)) {
  if (key.startsWith(PREFIX) && parsed(text)) chats.set(key.slice(PREFIX.length), parsed(text));
}
open();
loadModels();

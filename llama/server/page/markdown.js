// Markdown as elements. Text becomes text nodes only, never HTML; links are http(s). Repetitions in
// patterns are bounded, so that no text takes quadratic time.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node[name] = value;
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const INLINE = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<ticks>`+)(?<code>[^]{1,2000}?)(?<!`)\k<ticks>(?!`)/,
  /(?<strong>\*\*|(?<!\w)__)(?=\S)(?<bold>[^]{1,2000}?)(?<=\S)\k<strong>(?![*_])/,
  /\*(?=[^\s*])(?<star>(?:[^*]|\*\*[^*]{1,500}\*\*){1,2000}?)(?<=\S)\*(?!\*)/,
  /(?<!\w)_(?=[^\s_])(?<line>[^_]{1,2000}?)(?<=\S)_(?!\w)/,
  /~~(?=\S)(?<struck>[^~]{1,2000}?)(?<=\S)~~/,
  /!?\[(?<label>[^[\]]{1,1000})\]\((?<href>https?:\/\/(?:[^\s()]|\([^\s()]{0,200}\)){1,2000})\)/,
  /(?<url>https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,:;!?*_])/,
].map((part) => part.source).join("|"), "g");

function inline(text, depth = 0) {
  const inner = (part) => (depth < 8 ? inline(part, depth + 1) : [part]);
  return pieces(text, INLINE, ({ groups: g }) => {
    const href = g.href ?? g.url;
    const link = { href, rel: "noopener noreferrer", target: "_blank" };
    if (g.escaped) return g.escaped;
    if (g.code) return el("code", {}, g.code.replace(/^ (.*\S.*) $/s, "$1"));
    if (href) return el("a", link, ...(g.label ? inner(g.label) : [href]));
    const tag = g.bold ? "strong" : g.struck ? "del" : "em";
    return el(tag, {}, ...inner(g.bold ?? g.struck ?? g.star ?? g.line));
  });
}

/** A text with each match of a pattern replaced by what `make` makes of it, as a list. */
function pieces(text, pattern, make) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    found.push(text.slice(end, match.index), make(match));
    end = match.index + match[0].length;
  }
  return [...found, text.slice(end)];
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const starts = (line) => [FENCE, HEADING, RULE, ITEM, /^>/].some((pattern) => pattern.test(line));
const elements = (lines, depth) => blocks(lines, depth + 1).map(([, make]) => make());

/** Blocks of Markdown as [source, function that makes the element]. */
function blocks(lines, depth = 0) {
  const found = [];
  let at = 0;
  let level = 2; // of the last heading: none is skipped, for those who navigate by them
  const take = (test) => {
    const from = at;
    while (at < lines.length && test(lines[at])) at++;
    return lines.slice(from, at);
  };
  const tabular = (i) => lines[i].includes("|") && lines[i + 1]?.includes("|")
    && /^[\s|:-]*-[\s|:-]*$/.test(lines[i + 1]);
  while (at < lines.length) {
    const from = at;
    const line = lines[at++];
    let match, make;
    if (!line.trim()) continue;
    if ((match = FENCE.exec(line))) {
      const [, fence, language] = match;
      const code = take((l) => l.trim() !== fence).join("\n");
      at++;
      make = () => codeCard(language.trim().split(/\s/)[0], code);
    } else if ((match = HEADING.exec(line))) {
      const [, { length }, text] = match;
      const tag = `h${(level = Math.min(length + 2, level + 1, 6))}`;
      make = () => el(tag, {}, ...inline(text.replace(/ #+ *$/, "")));
    } else if (RULE.test(line)) make = () => el("hr");
    else if (line[0] === ">" && depth < 8) {
      const body = [line, ...take((l) => l[0] === ">")].map((l) => l.replace(/^> ?/, ""));
      make = () => el("blockquote", {}, ...elements(body, depth));
    } else if ((match = ITEM.exec(line)) && depth < 8) make = list(match);
    else if (tabular(from)) make = table([line, ...take((l) => l.includes("|"))]);
    else {
      const text = [line, ...take((l) => l.trim() && !starts(l) && !tabular(at))].join("\n").trim();
      make = () => el("p", {}, ...inline(text));
    }
    found.push([level + lines.slice(from, at).join("\n"), make]);
  }
  return found;

  function list([whole, { length: indent }, marker, first]) {
    const items = [[first]];
    const width = whole.length - first.length;
    for (; at < lines.length; at++) {
      const line = lines[at];
      const item = ITEM.exec(line);
      const deep = line.search(/\S/);
      if (deep < 0) { // a blank line: the list goes on if what follows belongs to it
        const next = lines[at + 1] ?? "";
        if (!(next.search(/\S/) > indent || ITEM.test(next))) break;
        items.at(-1).push("");
      } else if (item && deep < indent + 2) {
        if (/\d/.test(item[2]) !== /\d/.test(marker)) break;
        items.push([item[3]]);
      } else if (deep > indent || (lines[at - 1].trim() && !starts(line))) {
        items.at(-1).push(line.slice(Math.min(deep, width)));
      } else break;
    }
    const kind = /\d/.test(marker) ? ["ol", { start: parseInt(marker) }] : ["ul", {}];
    return () => el(...kind, ...items.map((item) => el("li", {}, ...elements(item, depth))));
  }
}

function table([head, columns, ...rows]) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/);
  const right = cells(columns).map((column) => (/-:\s*$/.test(column) ? "right" : "left"));
  const row = (tag, line, own = cells(line)) => el("tr", {}, ...right.map((side, i) =>
    el(tag, { class: side }, ...inline((own[i] ?? "").replaceAll("\\|", "|").trim()))));
  return () => el("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, row("th", head), ...rows.map((line) => row("td", line))));
}

const HASHES = /^(py|python\d?|sh|bash|shell|zsh|yaml|yml|toml|rb|ruby|r|make|dockerfile)$/i;
const KEYWORDS = `and async await break case catch class const continue def do elif else except
 false False finally fn for from function if impl import in let match new None not null or public
 raise return self static struct then throw true True try while with yield`.replace(/\s+/g, "|");

function highlighted(code, language) {
  if (!language || language === "text" || code.length > 20000) return [code];
  const comment = HASHES.test(language) ? "(?<![\\w$&])#.*" : "//.*|/\\*[^]*?\\*/";
  const string = /"""[^]*?"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'/.source;
  const words = RegExp(`(${string})|(${comment})|\\b(\\d[\\w.]*)\\b|\\b(${KEYWORDS})\\b`, "g");
  const kinds = ["string", "comment", "number", "keyword"];
  return pieces(code, words, ([text, ...groups]) =>
    el("span", { class: kinds[groups.findIndex(Boolean)] }, text));
}

export function copyButton(text) { // without https or localhost, browsers have no clipboard
  const onclick = ({ target }) =>
    navigator.clipboard.writeText(text).then(() => (target.textContent = "Copied"));
  return text && navigator.clipboard ? el("button", { type: "button", onclick }, "Copy") : "";
}

export function codeCard(language, code, title = language || "code") {
  return el("div", { class: "card" }, el("div", {}, el("strong", {}, title), copyButton(code)),
    el("pre", { tabindex: 0 }, el("code", {}, ...highlighted(code, language))));
}

/** Brings an element up to date with a text; blocks that haven't changed stay as they are. */
export function markdown(node, text) {
  const found = blocks(text.split("\n"));
  found.forEach(([source, make], i) => {
    const old = node.children[i] ?? node.appendChild(el("p"));
    if (old.source !== source) old.replaceWith(Object.assign(make(), { source }));
  });
  while (node.children.length > found.length) node.lastChild.remove();
}

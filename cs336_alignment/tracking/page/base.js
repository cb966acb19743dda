"use strict";
// What comes from a run enters the page as text alone: textContent, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1;
const $ = id => document.getElementById(id);
// Kept the same as VISIBLE in token_view.py: what would be seen as nothing or turn the reading.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]/g;

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return node;
}

function button(text, className, action) {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

const plural = (n, one, many = one + "s") => `${whole(n)} ${n === 1 ? one : many}`;
const whole = n => n.toLocaleString("en", { maximumFractionDigits: 0 });
const fixed = (n, digits) => n.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function compact(n) {
  const size = Math.abs(n);
  if (size >= 1e9) return fixed(n / 1e9, 2) + " G";
  if (size >= 1e6) return fixed(n / 1e6, 2) + " M";
  if (size >= 1e4) return fixed(n / 1e3, 1) + " k";
  return n.toLocaleString("en", { maximumFractionDigits: size < 1000 ? 1 : 0 });
}

function duration(seconds) {
  if (seconds < 1) return whole(1000 * seconds) + " ms";
  if (seconds < 60) return fixed(seconds, seconds < 10 ? 2 : 1) + " s";
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes >= 10 && minutes < 60) return `${Math.round(seconds / 60)} min`;
  if (!hours) return `${minutes} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  return hours < 100 ? `${hours} h ${String(minutes % 60).padStart(2, "0")} min` : `${whole(hours)} h`;
}

function plainNumber(n) {
  const size = Math.abs(n);
  if (n !== 0 && size < 1e-4) return n.toExponential(2);
  if (n !== 0 && size < .1) return n.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
  if (size >= 1e6) return compact(n);
  return n === 0 ? "0" : fixed(n, size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 4);
}

const FORMATS = {
  number: plainNumber, count: compact, seconds: duration, duration,
  share: n => fixed(100 * n, 1) + " %",
  rate: n => n === 0 ? "0" : n.toExponential(2),
  length: n => fixed(n, 1),
  gib: n => fixed(n, n < 10 ? 2 : 1) + " GiB",
};
const format = (kind, n) => n === null || n === undefined ? "–" : FORMATS[kind](n);
const short = n => n === null ? "–" : n.toLocaleString("en", { maximumFractionDigits: 3 });
const when = seconds => new Date(1000 * seconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
const colorOf = index => `var(--c${index % 8})`;

function resolved(color) {  // a canvas knows no custom properties
  const probe = make("i");
  probe.style.color = color;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const sameNames = new Set(runs.map(run => run.name)).size < runs.length;
const labelOf = run => sameNames ? run.folder : run.name;

function dotOf(index) {
  const dot = make("i", "dot");
  dot.style.setProperty("--c", colorOf(index));
  return dot;
}

function write(parent, text, query = null) {
  // Text with what would be unseen as signs, and what was searched for marked.
  let last = 0;
  const plain = (node, part) => {
    let from = 0;
    for (const found of part.matchAll(UNSEEN)) {
      node.append(part.slice(from, found.index));
      const sign = found[0], code = sign.codePointAt(0);
      if (sign === "\n" || sign === "\t") node.append(sign);
      else node.append(make("span", "code", code < 32 ? String.fromCodePoint(0x2400 + code) : "U+" + code.toString(16).toUpperCase().padStart(4, "0")));
      from = found.index + sign.length;
    }
    node.append(part.slice(from));
  };
  if (query) for (const found of text.matchAll(query)) {
    plain(parent, text.slice(last, found.index));
    const mark = make("mark");
    plain(mark, found[0]);
    parent.append(mark);
    last = found.index + found[0].length;
  }
  plain(parent, text.slice(last));
}

const searchFor = words => words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi") : null;

function select(label, options, value, change) {
  const node = make("select");
  node.setAttribute("aria-label", label);
  for (const [key, text] of options) {
    const option = make("option", "", text);
    option.value = key;
    node.append(option);
  }
  node.value = value;
  node.addEventListener("change", () => change(node.value));
  return node;
}

function table(label, className, head, rows) {
  const body = make("tbody"), top = make("tr");
  for (const cell of head) { const th = make("th", "", ...[cell].flat()); th.scope = "col"; top.append(th); }
  for (const row of rows) body.append(row);
  const scroll = make("div", "scroll", make("table", className, make("thead", "", top), body));
  scroll.tabIndex = 0;  // it may scroll sideways
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label);
  return scroll;
}

function tableRow(name, cells, className = "") {
  const th = make("th", "key", name);
  th.scope = "row";
  return make("tr", className, th, ...cells.map(cell => cell instanceof Node ? cell : make("td", "", cell)));
}

const empty = text => make("p", "empty", text);

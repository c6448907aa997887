// SPDX-License-Identifier: Apache-2.0
// What pages consist of. Texts of the data become text nodes, never markup.

const D = JSON.parse(document.getElementById("data").textContent);

// -- Elements. Texts of the data become text nodes, never markup.

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  fill(element, children);
  return element;
}
function fill(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}
const SVG = "http://www.w3.org/2000/svg";
function s(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
const byId = (id) => document.getElementById(id);
function replace(element, ...children) { element.replaceChildren(); return fill(element, children); }

// -- Numbers and words.

const whole = new Intl.NumberFormat("en");
const count = (n) => whole.format(n);
const counted = (n, one, many) => `${count(n)} ${n === 1 ? one : many || one + "s"}`;
const percent = (part, all) => all ? `${(100 * part / all).toFixed(1)} %` : "–";
function time(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 2 : seconds < 0.1 ? 1 : 0)} ms`;
  if (seconds < 60) return `${seconds.toFixed(2)} s`;
  seconds = Math.round(seconds);
  if (seconds >= 3600) return `${count(Math.floor(seconds / 3600))} h ${Math.floor(seconds / 60) % 60} min`;
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

// -- A long list, of which only the visible rows exist. A grid for assistive programs; one stop of
// the tab key, arrows move the selection.

const lists = [];
class List {
  constructor({ id, label, columns, heads, rowHeight = 28, render, select, empty }) {
    Object.assign(this, { columns, rowHeight, render, select, emptyText: empty || "Nothing matches." });
    this.id = id; this.rows = []; this.current = -1; this.drawn = new Map(); this.limit = 0;
    this.head = h("div", { class: "lhead", role: "row", "aria-rowindex": 1 });
    this.body = h("div", { role: "rowgroup" });
    this.inner = h("div", { class: "inner", role: "presentation" },
      heads ? h("div", { role: "rowgroup", class: "lheadgroup" }, this.head) : null, this.body);
    this.element = h("div", { class: "list", id, role: "grid", tabindex: 0, "aria-label": label, "aria-readonly": "true" }, this.inner);
    this.note = h("p", { class: "print-only quiet" });
    this.headed = Boolean(heads);
    if (heads) { this.setColumns(columns, heads); this.head.parentNode.style.display = "contents"; }
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("[data-at]");
      if (row) this.go(Number(row.dataset.at), true);
    });
    new ResizeObserver(() => this.draw()).observe(this.element);
    lists.push(this);
  }
  setColumns(columns, heads) {
    this.columns = columns;
    this.head.style.gridTemplateColumns = columns;
    replace(this.head, heads.map((text) => text instanceof Node ? text
      : h("span", { role: "columnheader", class: text.startsWith(">") ? "num" : text.startsWith("-") ? "low" : "" }, text.replace(/^[>-]+/, ""))));
    this.element.setAttribute("aria-colcount", heads.length);
  }
  get top() { return this.headed ? this.head.offsetHeight : 0; }
  set(rows, keep) {
    const before = keep && this.current >= 0 ? this.rows[this.current] : undefined;
    this.rows = rows;
    this.current = before === undefined ? -1 : rows.indexOf(before);
    this.element.setAttribute("aria-rowcount", rows.length + (this.headed ? 1 : 0));
    if (!keep) this.element.scrollTop = 0;
    this.redraw();
  }
  redraw() { this.body.replaceChildren(); this.drawn.clear(); this.draw(); }
  draw() {
    const view = this.limit ? this.limit * this.rowHeight : this.element.clientHeight;
    const shown = this.limit ? Math.min(this.limit, this.rows.length) : this.rows.length;
    this.inner.style.height = `${this.top + shown * this.rowHeight}px`;
    // A short list takes no more room than it needs; 20 pixels for its edges and a scroll bar.
    this.element.style.setProperty("--content", `${this.top + Math.max(3, shown) * this.rowHeight + 20}px`);
    if (!view) return;
    if (!this.rows.length) {
      if (!this.body.firstChild) this.body.append(h("div", { class: "empty", role: "row" }, h("span", { role: "gridcell" }, this.emptyText)));
      return;
    }
    const from = this.limit ? 0 : Math.max(0, Math.floor(this.element.scrollTop / this.rowHeight) - 6);
    const to = Math.min(shown, Math.ceil((this.element.scrollTop * !this.limit + view) / this.rowHeight) + 6);
    for (const [at, row] of this.drawn) if (at < from || at >= to) { row.remove(); this.drawn.delete(at); }
    for (let at = from; at < to; at++) {
      if (this.drawn.has(at)) continue;
      const row = this.render(this.rows[at], at);
      row.classList.add("lrow");
      row.id = `${this.id}-${at}`;
      row.dataset.at = at;
      row.setAttribute("role", "row");
      row.setAttribute("aria-rowindex", at + 1 + (this.headed ? 1 : 0));
      row.setAttribute("aria-selected", at === this.current);
      row.style.gridTemplateColumns = this.columns;
      row.style.height = `${this.rowHeight}px`;
      row.style.top = `${this.top + at * this.rowHeight}px`;
      for (const cell of row.children) if (!cell.hasAttribute("role")) cell.setAttribute("role", "gridcell");
      this.drawn.set(at, row);
      this.body.append(row);
    }
  }
  go(at, tell, center) {
    if (!this.rows.length) return;
    at = Math.max(0, Math.min(this.rows.length - 1, at));
    const before = this.drawn.get(this.current);
    if (before) before.setAttribute("aria-selected", "false");
    this.current = at;
    const y = at * this.rowHeight, room = this.element.clientHeight - this.top;
    if (room > 0) {
      if (center) this.element.scrollTop = y - room / 3;
      else if (y < this.element.scrollTop) this.element.scrollTop = y;
      else if (y + this.rowHeight > this.element.scrollTop + room) this.element.scrollTop = y + this.rowHeight - room;
    }
    this.draw();
    const row = this.drawn.get(at);
    if (row) { row.setAttribute("aria-selected", "true"); this.element.setAttribute("aria-activedescendant", row.id); }
    if (tell && this.select) this.select(this.rows[at], at);
  }
  key(event) {
    const page = Math.max(1, Math.floor((this.element.clientHeight - this.top) / this.rowHeight) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in moves) {
      event.preventDefault();
      const from = this.current < 0 ? (moves[event.key] > 0 ? -1 : 0) : this.current;
      this.go(Math.max(0, Math.min(this.rows.length - 1, from + moves[event.key])), true);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.go(this.current < 0 ? 0 : this.current, true);
    }
  }
}

// A figure that several parts need, computed when it is first asked for.

function once(make) { let made; return () => made === undefined ? made = make() : made; }

// -- Tabs.

const main = byId("main"), tabs = byId("tabs");
const parts = [];
function part(key, name, number, build) {
  const panel = h("section", { role: "tabpanel", id: `panel-${key}`, "aria-labelledby": `tab-${key}`, hidden: true });
  const tab = h("button", { role: "tab", type: "button", id: `tab-${key}`, "aria-controls": panel.id, "aria-selected": "false", tabindex: -1,
    onclick: () => open(key) }, name, number === null ? null : h("span", { class: "count" }, count(number)));
  parts.push({ key, tab, panel, build, built: false });
  tabs.append(tab); main.append(panel);
}
function open(key, keepHash) {
  const wanted = parts.find((each) => each.key === key) || parts[0];
  for (const each of parts) {
    const on = each === wanted;
    each.tab.setAttribute("aria-selected", on);
    each.tab.tabIndex = on ? 0 : -1;
    each.panel.hidden = !on;
  }
  if (!wanted.built) { wanted.built = true; wanted.build(wanted.panel); }
  if (!keepHash && location.hash.slice(1) !== wanted.key) history.replaceState(null, "", `#${wanted.key}`);
  wanted.tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  for (const list of lists) if (wanted.panel.contains(list.element)) list.draw();
  if (wanted.shown) wanted.shown();
  return wanted;
}
tabs.addEventListener("keydown", (event) => {
  const at = parts.findIndex((each) => each.tab === document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: parts.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  const next = parts[(to + parts.length) % parts.length];
  open(next.key); next.tab.focus();
});
addEventListener("hashchange", () => { const key = location.hash.slice(1); if (parts.some((each) => each.key === key)) open(key, true); });
// On paper all parts are shown, and of a long list its first rows.
const PRINTED = 120;
addEventListener("beforeprint", () => {
  for (const each of parts) {
    if (!each.built) { each.built = true; each.build(each.panel); }
    each.hid = each.panel.hidden; each.panel.hidden = false;
  }
  for (const list of lists) {
    list.limit = PRINTED;
    list.note.textContent = list.rows.length > PRINTED ? `The first ${PRINTED} of ${count(list.rows.length)} rows.` : "";
    list.redraw();
  }
});
addEventListener("afterprint", () => {
  for (const list of lists) { list.limit = 0; list.redraw(); }
  for (const each of parts) each.panel.hidden = each.hid;
});
// The last thing that a page's program does.
function start() {
  open(location.hash.slice(1), true);
  document.documentElement.dataset.ready = "1";
}
const box = (title, note, ...body) => h("section", { class: "box" }, h("div", { class: "head" }, h("h2", {}, title), note ? h("span", { class: "quiet" }, note) : null), h("div", { class: "body" }, body));
const link = (text, action, extra) => h("button", { type: "button", class: "link", onclick: action, ...extra }, text);
const meter = (share, kind) => { const bar = h("i", { class: kind || "" }); bar.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`; return h("span", { class: "meter", "aria-hidden": "true" }, bar); };
const scroll = (label, content, kind) => h("div", { class: `scroll ${kind || ""}`, tabindex: 0, role: "region", "aria-label": label }, content);
function table(heads, rows) {
  return h("table", {}, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col", class: (text.includes(">") ? "num " : "") + (text.includes("~") ? "low" : "") }, text.replace(/[>~]/g, ""))))), h("tbody", {}, rows));
}

// -- Head and banners.

byId("title").textContent = D.title;
byId("made").textContent = `made ${new Date(D.made * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC by ${D.program}`;
replace(byId("links"), D.links.map((each) => [h("a", { href: each.href }, each.text), " "]));
const banner = (kind, sign, title, items) => h("div", { class: `banner ${kind}`, role: kind === "bad" ? "alert" : "status", id: `banner-${kind}` },
  h("span", { class: "sign", "aria-hidden": "true" }, sign), h("div", {}, title, items && items.length ? h("ul", {}, items.slice(0, 20).map((text) => h("li", {}, text)), items.length > 20 ? h("li", {}, `and ${count(items.length - 20)} more`) : null) : null));

// -- Figures: a number in a card, a curve.

function card(id, name, value, small, more, bar) {
  return h("div", { class: "card", id: `card-${id}` }, h("div", { class: "name" }, name), h("div", { class: "value" }, value, small ? h("small", {}, ` ${small}`) : null), bar, more ? h("div", { class: "more" }, more) : null);
}
function niceStep(range, wanted) {
  const rough = range / wanted, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((n) => n * power >= rough);
}
let charts = 0;
// A curve of points [x, y]: title, units x and y, points; `line` joins the points directly, else each
// value holds until the next one; `marks` are [x, text] of single moments.
function chart(series) {
  const { points, marks = [] } = series, last = points[points.length - 1];
  const xMax = Math.max(last[0], 1e-6), yMax = points.reduce((most, [, y]) => Math.max(most, y), 1);
  const [unit, unitName] = series.x !== "seconds" ? [1, ""] : xMax >= 7200 ? [3600, "h"] : xMax >= 300 ? [60, "min"] : [1, "s"];
  const what = `${series.title}: ${count(last[1])} ${series.y} after ${series.x === "seconds" ? time(last[0]) : `${count(last[0])} ${series.x}`}`;
  const svg = s("svg", { role: "img", "aria-label": what, tabindex: 0, class: "chart", id: `chart-${charts++}` });
  const readout = h("span", { class: "quiet", "aria-live": "polite" }, `${count(last[1])} ${series.y}`);
  const left = 50, right = 14, top = 10, bottom = 24, height = 200;
  const xText = (x) => series.x === "seconds" ? `${+(x / unit).toFixed(6)} ${unitName}` : x >= 1e6 ? `${+(x / 1e6).toFixed(2)} M` : count(x);
  let width = 0, cursor = -1;
  const px = (x) => left + (width - left - right) * x / xMax, py = (y) => height - bottom - (height - top - bottom) * y / yMax;
  const dot = s("circle", { class: "dot", r: 4.5 }), rule = s("line", { class: "cursor", y1: top, y2: height - bottom });
  function draw() {
    width = svg.clientWidth; if (!width) return;
    svg.replaceChildren(); svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const yStep = Math.max(1, niceStep(yMax, 4));
    for (let y = 0; y <= yMax; y += yStep) { svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }), s("text", { x: left - 7, y: py(y) + 4, "text-anchor": "end" }, count(y))); }
    const xStep = series.x === "seconds" ? unit * niceStep(xMax / unit, width / 110) : Math.max(1, niceStep(xMax, width / 110));
    for (let x = 0; x <= xMax * 1.0001; x += xStep) svg.append(s("text", { x: px(x), y: height - 7, "text-anchor": x === 0 ? "start" : px(x) > width - 40 ? "end" : "middle" }, xText(x)));
    const from = series.line ? px(points[0][0]) : px(0);
    let path = `M${from} ${series.line ? py(points[0][1]) : py(0)}`;
    for (const [x, y] of points) path += series.line ? `L${px(x).toFixed(1)} ${py(y).toFixed(1)}` : `H${px(x).toFixed(1)}V${py(y).toFixed(1)}`;
    svg.append(s("path", { class: "area", d: `${path}${series.line ? "" : `H${px(xMax)}`}V${py(0)}H${from}Z` }), s("path", { class: "curve", d: path }));
    for (const [x, text] of marks) { const mark = s("path", { class: "mark", d: `M${px(x)} ${top}l-5 -9h10z` }); mark.append(s("title", {}, text)); svg.append(s("line", { class: "mark", x1: px(x), x2: px(x), y1: top, y2: height - bottom }), mark); }
    svg.append(rule, dot);
    show(cursor);
  }
  function show(at) {
    cursor = at;
    const [x, y] = at < 0 ? last : points[at];
    dot.setAttribute("cx", px(x)); dot.setAttribute("cy", py(y));
    rule.setAttribute("x1", px(x)); rule.setAttribute("x2", px(x)); rule.style.display = at < 0 ? "none" : "";
    readout.textContent = at < 0 ? `${count(y)} ${series.y}` : `${count(y)} ${series.y} at ${series.x === "seconds" ? time(x) : `${count(x)} ${series.x}`}`;
  }
  svg.addEventListener("pointermove", (event) => {
    const x = (event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right) * xMax;
    let at = points.findIndex((point) => point[0] > x); at = at < 0 ? points.length - 1 : Math.max(0, at - 1);
    show(at);
  });
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const step = Math.max(1, Math.round(points.length / 40));
    const to = { ArrowRight: Math.min(points.length - 1, cursor + step), ArrowLeft: cursor < 0 ? points.length - 1 : Math.max(0, cursor - step), Home: 0, End: points.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); show(to); }
  });
  new ResizeObserver(draw).observe(svg);
  return h("figure", { class: "box" }, h("figcaption", { class: "head" }, h("h2", {}, series.title), readout), h("div", { class: "body" }, svg));
}

// SPDX-License-Identifier: Apache-2.0
// The page of runs.

const T = D.trace;

function expand(ranges) {
  const found = [];
  for (let i = 0; i < ranges.length; i += 2) for (let n = ranges[i]; n <= ranges[i + 1]; n++) found.push(n);
  return found;
}
function size(ranges) {
  let n = 0;
  for (let i = 0; i < ranges.length; i += 2) n += ranges[i + 1] - ranges[i] + 1;
  return n;
}
function within(ranges, first, last) {
  let n = 0;
  for (let i = 0; i < ranges.length; i += 2) n += Math.max(0, Math.min(last, ranges[i + 1]) - Math.max(first, ranges[i]) + 1);
  return n;
}
function words(numbers) {
  const parts = [];
  for (const n of numbers) {
    const last = parts[parts.length - 1];
    if (last && n === last[1] + 1) last[1] = n; else parts.push([n, n]);
  }
  return parts.map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(", ");
}
function parseWords(text) {
  return expand(text ? text.split(", ").flatMap((part) => {
    const [a, b] = part.split("-").map(Number);
    return [a, b === undefined ? a : b];
  }) : []);
}

// -- Figures that several parts need, each computed when first asked for.

const firstLines = D.files.map((file) => once(() => new Map(file.more)));
const linesOf = (test, number) => { const found = test.lines.find(([file]) => file === number); return found ? found[1] : []; };
for (const test of D.tests) test.count = test.lines.reduce((n, [, ranges]) => n + size(ranges), 0);
{
  const seen = D.files.map(() => new Set());
  for (const test of D.tests) {
    test.fresh = 0;
    for (const [file, ranges] of test.lines) for (const line of expand(ranges)) if (!seen[file].has(line)) { seen[file].add(line); test.fresh++; }
  }
}
const codeFirst = T.codes.map(() => null);
function codeLines(code) {
  if (codeFirst[code]) return codeFirst[code];
  const [file, , text] = T.codes[code];
  const more = file >= 0 ? firstLines[file]() : new Map();
  return codeFirst[code] = [...new Set(parseWords(text).map((n) => more.has(n) ? more.get(n) : n))];
}
// For each set of host code: how many calls of each name.
const hostUse = once(() => {
  const use = T.hostSets.map(() => new Map());
  T.host.forEach((set, call) => { if (set >= 0) { const names = use[set], name = T.name[call]; names.set(name, (names.get(name) || 0) + 1); } });
  return use;
});
// For each line of a file: calls by the number of their name.
const lineCalls = D.files.map((_, number) => once(() => {
  const found = new Map();
  hostUse().forEach((names, set) => {
    const lines = new Set();
    for (const code of T.hostSets[set]) if (T.codes[code][0] === number) for (const line of codeLines(code)) lines.add(line);
    for (const line of lines) {
      if (!found.has(line)) found.set(line, new Map());
      const into = found.get(line);
      for (const [name, n] of names) into.set(name, (into.get(name) || 0) + n);
    }
  });
  return found;
}));
const sum = (map) => { let n = 0; for (const value of map.values()) n += value; return n; };
const lineTests = D.files.map((_, number) => once(() => {
  const found = new Map();
  D.tests.forEach((test, at) => { for (const line of expand(linesOf(test, number))) { if (!found.has(line)) found.set(line, []); found.get(line).push(at); } });
  return found;
}));
const reachedSet = D.files.map((file) => once(() => new Set(expand(file.reached))));
const statementSet = D.files.map((file) => once(() => new Set(expand(file.statements))));
const fileName = (number) => number >= 0 ? D.files[number].name : "(another file)";

// -- Head and banners.

const fact = (name) => (D.facts.find(([each]) => each === name) || [])[1];
byId("where").textContent = ["Kernel", "Accelerator", "Image", "Target"].map((name) => fact(name) && (name === "Kernel" ? `Linux ${fact(name)}` : name === "Accelerator" ? fact(name).split(" ")[0].toUpperCase() : `${name.toLowerCase()} ${fact(name)}`)).filter(Boolean).join(" · ");
if (D.losses.length) byId("banners").append(banner("bad", "!", "Something was lost: the coverage below is incomplete.", D.losses));
else if (D.lossKnown) byId("banners").append(banner("good", "✓", `Nothing was lost${!D.totals.pcs ? "" : `: all ${count(D.totals.pcs)} PCs were kept`}.`));
if (D.problems.length) byId("banners").append(banner("warn", "!", "This report is not complete.", D.problems));

// -- Overview.

const totals = D.totals, outcomes = totals.outcomes;
const failures = (outcomes.failed || 0) + (outcomes.error || 0);
function cards() {
  const found = [];
  if (totals.tests) {
    const bar = h("div", { class: "meter", "aria-hidden": "true" }, [["passed", "good"], ["failed", "bad"], ["error", "bad"], ["skipped", "warn"]].map(([key, kind]) => { const i = h("i", { class: kind }); i.style.width = `${100 * (outcomes[key] || 0) / totals.tests}%`; return i; }));
    const rest = [failures ? `${count(failures)} failed` : "", totals.machine ? `${count(totals.machine)} of the machine` : "", outcomes.skipped ? `${count(outcomes.skipped)} skipped` : ""].filter(Boolean).join(", ") || "none failed";
    found.push(card("tests", "Tests passed", count(outcomes.passed || 0), `of ${count(totals.tests)}`, rest, bar));
  }
  if (totals.statements) found.push(card("lines", "Host lines reached", count(totals.reached), `of ${count(totals.statements)}`, `${percent(totals.reached, totals.statements)} in ${counted(D.files.length, "file")}`, meter(totals.reached / totals.statements)));
  if (totals.nativeBlocks) found.push(card("native", "Native blocks covered", count(totals.nativeCovered), `of ${count(totals.nativeBlocks)}`, percent(totals.nativeCovered, totals.nativeBlocks), meter(totals.nativeCovered / totals.nativeBlocks)));
  if (totals.calls) found.push(card("calls", "System calls", count(totals.calls), "", D.syscalls.length ? `${counted(D.syscalls.length, "kind")}, ${count(D.syscalls.reduce((n, each) => n + each.hostCalls, 0))} reached the host` : "returns that were traced"));
  if (totals.pcs !== null) found.push(card("pcs", "PCs", count(totals.pcs), "", totals.pcsDifferent ? `${count(totals.pcsDifferent)} different` : "recorded by the tests"));
  if (D.kernel.length) found.push(card("kernel", "Kernel functions", count(D.kernel.length), "", totals.kernelBlocks ? `${count(totals.kernelBlocks)} basic blocks` : "named by the trace"));
  if (totals.seconds !== null) found.push(card("time", "Time", time(totals.seconds), "", totals.tests && totals.resetSeconds ? `${time(totals.resetSeconds)} of it resets` : "of the workload"));
  return h("div", { class: "cards" }, found);
}
function overview(panel) {
  panel.append(cards());
  const bad = D.tests.map((test, at) => [test, at]).filter(([test]) => test.outcome === "failed" || test.outcome === "error");
  const boxes = [];
  if (bad.length) boxes.push(box("Failed tests", counted(bad.length, "test"), scroll("Failed tests", table(["Test", "Why"], bad.slice(0, 200).map(([test, at]) => h("tr", {}, h("td", {}, link(test.id, () => showTest(at), { class: "link mono" })), h("td", {}, `${test.kind ? `${test.kind}: ` : ""}${test.message.split("\n")[0].slice(0, 300)}`)))), "halves")));
  // Curves stand in pairs; one that is left over joins the boxes.
  const curves = D.series.map(chart);
  if (curves.length % 2) boxes.push(curves.pop());
  if (curves.length) panel.append(h("div", { class: "two" }, curves));
  if (D.files.length) boxes.push(box("Files", "lines reached of those that count", scroll("Files", table(["File", "~", ">Lines", ">Share"], D.files.map((file, number) => { const all = size(file.statements), hit = size(file.reached); return h("tr", {}, h("td", { class: "wide" }, link(file.name, () => showSource(number), { class: "link mono" })), h("td", { class: "low" }, meter(all ? hit / all : 0)), h("td", { class: "num" }, `${count(hit)} / ${count(all)}`), h("td", { class: "num" }, percent(hit, all))); })))));
  if (D.syscalls.length) boxes.push(box("System calls", "the most frequent first", scroll("System calls", table(["Name", ">Calls", ">Failed", "~>Time", ">Lines", "~>Kernel functions"], D.syscalls.map((each) => h("tr", {}, h("td", { class: "wide" }, link(each.name, () => showTrace(`name:${each.name}`), { class: "link mono" })), h("td", { class: "num" }, count(each.calls)), h("td", { class: "num", title: each.errors.map(([name, n]) => `${name} ${n}`).join(", ") }, count(each.failed)), h("td", { class: "num low" }, time(each.seconds)), h("td", { class: "num" }, count(each.lines)), h("td", { class: "num low" }, count(each.kernel))))))));
  if (D.hot.host.length) boxes.push(box("Hot host code", `${D.hot.unit === "PCs" ? "blocks" : "lines"} by number of ${D.hot.unit}`, scroll("Hot host code", table(["Lines", `>${D.hot.unit === "PCs" ? "PCs" : "Calls"}`], D.hot.host.map(([file, line, place, detail, n]) => h("tr", {}, h("td", { class: "wide" }, file >= 0 ? link(`${place}:${detail}`, () => showSource(file, line), { class: "link mono" }) : h("span", { class: "mono" }, `${place}:${detail}`), file >= 0 && D.files[file].text[line - 1] !== undefined ? h("div", { class: "mono quiet" }, D.files[file].text[line - 1].trim().slice(0, 90)) : null), h("td", { class: "num" }, count(n))))))));
  if (D.hot.kernel.length) boxes.push(box("Hot kernel code", "blocks by number of PCs", scroll("Hot kernel code", table(["Block", ">PCs"], D.hot.kernel.map(([name, detail, n]) => h("tr", {}, h("td", { class: "wide" }, link(name, () => showKernel(name), { class: "link mono" }), h("span", { class: "mono quiet" }, detail)), h("td", { class: "num" }, count(n))))))));
  if (D.facts.length) boxes.push(box("Machine", "", h("dl", { class: "facts" }, D.facts.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]))));
  panel.append(h("div", { class: "columns" }, boxes));
  const lacking = [];
  if (!D.lossKnown && !D.losses.length) lacking.push("whether PCs were lost");
  if (!T.start.length) lacking.push(`the system calls one by one (${D.tests.length ? "commands that tests run with the fixture kcov" : "kcov-bridge run --trace"})`);
  if (!D.kernel.length) lacking.push("functions of the guest's kernel (--source python,kernel)");
  if (lacking.length) panel.append(h("p", { class: "foot" }, `Not recorded: ${lacking.join("; ")}.`));
}

// -- Tests, with a matrix of the files or functions that each one reached.

let showTest;
function tests(panel) {
  // What all names begin with says nothing; on a narrow screen the file does not fit either.
  const places = D.tests.map((test) => test.id.split("::")[0].split("/").slice(0, -1));
  let same = 0;
  while (places.every((each) => same < each.length && each[same] === places[0][same])) same++;
  const shortId = (test) => innerWidth <= 700 && test.id.includes("::") ? test.id.slice(test.id.indexOf("::") + 2) : test.id.split("/").slice(same).join("/");
  const search = h("input", { type: "search", placeholder: "Search tests", "aria-label": "Search tests", id: "tests-search" });
  const kinds = ["passed", "failed", "error", "skipped"].filter((kind) => outcomes[kind]);
  const chosen = new Set();
  const buttons = kinds.map((kind) => h("button", { type: "button", class: "button", "aria-pressed": "false", "data-kind": kind, onclick: (event) => {
    if (!chosen.delete(kind)) chosen.add(kind);
    event.currentTarget.setAttribute("aria-pressed", chosen.has(kind)); update();
  } }, `${kind} ${count(outcomes[kind])}`));
  const order = h("select", { "aria-label": "Order", onchange: () => update() }, [["run", "in order of time"], ["slow", "slowest first"], ["lines", "most lines first"], ["fresh", "most new lines first"], ["name", "by name"]].map(([key, text]) => h("option", { value: key }, text)));
  const columns = h("select", { "aria-label": "Columns of the matrix", id: "tests-columns", onchange: () => { layout(); update(true); } },
    h("option", { value: -1 }, "columns: files"), D.files.map((file, number) => file.functions.length ? h("option", { value: number }, `functions of ${file.name}`) : null));
  const status = h("span", { class: "count-line", "aria-live": "polite", id: "tests-count" });
  const detail = h("aside", { class: "box detail", "aria-label": "The selected test", id: "tests-detail", tabindex: 0 }, h("p", { class: "quiet" }, "Select a test to see what it reached."));
  let cells = [];
  const list = new List({ id: "tests-list", label: "Tests and the lines that each of them reached", columns: "", heads: [], rowHeight: 30, select: (at) => show(at),
    render: (at) => {
      const test = D.tests[at];
      return h("div", {}, h("span", { class: "stick" }, h("span", { class: `chip ${test.outcome}` }, test.outcome), h("span", { class: "tname mono", title: test.id }, shortId(test))),
        h("span", { class: "num" }, time(test.seconds)), h("span", { class: "num" }, count(test.count)), h("span", { class: "num" }, test.fresh ? `+${count(test.fresh)}` : "–"),
        cells.map((cell) => {
          const n = cell.of(test), element = h("span", { class: n ? "cell hit" : "cell", title: `${cell.name}: ${n} of ${cell.all} lines` }, n || "");
          if (n) element.style.setProperty("--f", Math.min(1, n / cell.all));
          return element;
        }));
    } });
  function layout() {
    const number = Number(columns.value);
    if (number < 0) cells = D.files.map((file, at) => ({ name: file.name, all: size(file.statements), of: (test) => size(linesOf(test, at)) }));
    else cells = D.files[number].functions.map(([name, first, last]) => ({ name, all: within(D.files[number].statements, first, last), of: (test) => within(linesOf(test, number), first, last) }));
    if (number < 0) cells = cells.filter((cell, at) => D.tests.some((test) => cell.of(test)));
    const wide = innerWidth > 700 ? "minmax(330px, 1fr)" : "210px";
    list.setColumns(`${wide} 76px 60px 60px${cells.length ? ` repeat(${cells.length}, 34px)` : ""}`, [h("span", { role: "columnheader", class: "stick" }, "Test"), ">Time", ">Lines", ">New", ...cells.map((cell) => h("span", { role: "columnheader", class: "col", title: cell.name }, number < 0 ? cell.name.split("/").slice(-2).join("/") : cell.name))]);
  }
  function update(keep) {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = D.tests.map((_, at) => at).filter((at) => {
      const test = D.tests[at], text = `${test.id}\n${test.message}\n${test.machine}`.toLowerCase();
      return (!chosen.size || chosen.has(test.outcome)) && terms.every((term) => text.includes(term));
    });
    const by = { slow: (t) => -t.seconds, lines: (t) => -t.count, fresh: (t) => -t.fresh }[order.value];
    if (by) rows.sort((a, b) => by(D.tests[a]) - by(D.tests[b]) || a - b);
    if (order.value === "name") rows.sort((a, b) => D.tests[a].id < D.tests[b].id ? -1 : D.tests[a].id > D.tests[b].id ? 1 : a - b);
    status.textContent = rows.length === D.tests.length ? counted(rows.length, "test") : `${count(rows.length)} of ${counted(D.tests.length, "test")}`;
    list.set(rows, keep);
  }
  function show(at) {
    const test = D.tests[at];
    replace(detail, h("h2", { class: "mono" }, test.id), h("p", {}, h("span", { class: `chip ${test.outcome}` }, test.outcome), test.kind ? ` ${test.kind === "machine" ? "a failure of the machine" : "an assertion of the test"};` : "", ` ${time(test.seconds)}, reset ${time(test.reset)}`),
      test.machine ? h("p", { class: "quiet" }, test.machine) : null,
      test.message ? h("pre", { tabindex: 0, "aria-label": "Message" }, test.message) : null,
      test.evidence ? h("p", {}, h("a", { href: test.evidence }, "Evidence: console, kernel log, last calls")) : null,
      h("h3", {}, `Lines: ${count(test.count)}, ${count(test.fresh)} of them new`),
      h("ul", {}, test.lines.map(([file, ranges]) => h("li", {}, link(fileName(file), () => showSource(file, ranges[0], at), { class: "link mono" }), h("span", { class: "num" }, `${count(size(ranges))} of ${count(size(D.files[file].statements))}`))), test.lines.length ? null : h("li", { class: "quiet" }, "none of the target's")),
      test.calls !== null || test.pcs !== null ? h("h3", {}, "Recorded") : null,
      h("ul", {}, test.calls !== null ? h("li", {}, T.test.includes(at) ? link("System calls", () => showTrace(test.id)) : "System calls", h("span", { class: "num" }, count(test.calls))) : null, test.pcs !== null ? h("li", {}, "PCs", h("span", { class: "num" }, count(test.pcs))) : null, test.lost !== null ? h("li", {}, "Lost", h("span", { class: "num" }, count(test.lost))) : null));
    detail.scrollTop = 0;
  }
  search.addEventListener("input", () => update());
  panel.append(h("div", { class: "toolbar" }, search, buttons, order, D.files.length ? columns : null, status), h("div", { class: "split" }, h("div", {}, list.element, list.note), detail));
  layout(); update();
  showTestIn = (at) => { if (!list.rows.includes(at)) { search.value = ""; chosen.clear(); buttons.forEach((each) => each.setAttribute("aria-pressed", "false")); update(); } list.go(list.rows.indexOf(at), true, true); list.element.focus(); };
}
let showTestIn;
showTest = (at) => { open("tests"); showTestIn(at); };

// -- Source.

let showSourceIn;
const showSource = (file, line, test) => { open("source"); showSourceIn(file, line, test); };
function source(panel) {
  let number = 0, chosen = -1;
  const files = h("select", { "aria-label": "File", id: "source-file", onchange: () => load(Number(files.value)) }, D.files.map((file, at) => h("option", { value: at }, `${file.name} (${percent(size(file.reached), size(file.statements))})`)));
  const testSelect = h("select", { "aria-label": "Test", id: "source-test", onchange: () => { chosen = Number(testSelect.value); list.redraw(); about(); } }, h("option", { value: -1 }, "all that ran"), D.tests.map((test, at) => test.lines.length ? h("option", { value: at }, test.id) : null));
  const functions = h("select", { "aria-label": "Go to a function", onchange: () => { if (functions.value) jump(Number(functions.value)); } });
  const next = h("button", { type: "button", class: "button", onclick: () => {
    const missed = expand(D.files[number].statements).filter((line) => !reachedSet[number]().has(line)), after = list.current + 1;
    if (missed.length) jump(missed.find((line) => line > after) || missed[0]);
  } }, "Next line not reached");
  const legend = h("div", { class: "legend" });
  const status = h("p", { class: "count-line", id: "source-count" });
  const detail = h("aside", { class: "box detail", "aria-label": "The selected line", id: "source-detail", tabindex: 0 });
  const list = new List({ id: "source-list", label: "Source with the lines that were reached", columns: `52px 24px ${D.tests.length || T.start.length ? 84 : 8}px max-content`, rowHeight: 20, select: (line) => show(line), empty: "The text of this file is not here.",
    render: (line) => {
      const file = D.files[number], first = firstLines[number]().get(line) || line;
      const isStatement = statementSet[number]().has(first), ran = reachedSet[number]().has(first);
      const mine = chosen >= 0 && inTest().has(first);
      const kind = !isStatement ? "" : chosen >= 0 ? (mine ? "hit" : ran ? "other" : "miss") : ran ? "hit" : "miss";
      const own = first === line, by = (lineTests[number]().get(line) || []).length, calls = own && T.start.length ? sum(lineCalls[number]().get(line) || new Map()) : 0;
      return h("div", { class: mine && isStatement ? "hit mine" : kind }, h("span", { class: "no gut" }, line), h("span", { class: "mark gut", "aria-label": kind === "hit" ? "reached" : kind === "other" ? "reached by others" : kind === "miss" ? "not reached" : null }, !own ? "" : kind === "hit" ? "✓" : kind === "other" ? "·" : kind === "miss" ? "✗" : ""),
        h("span", { class: "by" }, own && by ? counted(by, "test") : calls ? counted(calls, "call") : ""), h("span", { class: "code" }, colored(line)));
    } });
  // Words, strings and comments of Python, for the eye only. A string over several lines is found
  // by what each line begins in.
  const WORDS = new Set("False None True and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield".split(" "));
  const TOKEN = /(#.*)|([rbfuRBFU]{0,2}(?:"""|\'\'\'))|([rbfuRBFU]{0,2}(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?))|([A-Za-z_]\w*)|([^#"'A-Za-z_]+|.)/g;
  let opens = [];
  function split(text, quotes, emit) {
    let at = 0;
    while (at < text.length || quotes) {
      if (quotes) {
        const stop = text.indexOf(quotes, at);
        emit("string", stop < 0 ? text.slice(at) : text.slice(at, stop + 3));
        if (stop < 0) return quotes;
        at = stop + 3; quotes = "";
        continue;
      }
      TOKEN.lastIndex = at;
      const found = TOKEN.exec(text);
      at = TOKEN.lastIndex;
      if (found[2]) { emit("string", found[2]); quotes = found[2].slice(-3); }
      else emit(found[1] ? "comment" : found[3] ? "string" : WORDS.has(found[4]) ? "word" : "", found[0]);
    }
    return "";
  }
  function colored(line) {
    const text = D.files[number].text;
    for (let at = opens.length; at < line; at++) opens.push(at ? split(text[at - 1], opens[at - 1], () => {}) : "");
    if (!text[line - 1]) return " ";
    // The words of other languages are others.
    if (!D.files[number].path.endsWith(".py")) return text[line - 1];
    const spans = [];
    split(text[line - 1], opens[line - 1], (kind, part) => spans.push(kind ? h("span", { class: kind }, part) : part));
    return spans;
  }
  let cached = "", cachedSet = new Set();
  function inTest() { const key = `${number} ${chosen}`; if (key !== cached) { cached = key; cachedSet = new Set(expand(linesOf(D.tests[chosen], number))); } return cachedSet; }
  function about() {
    const file = D.files[number], all = size(file.statements);
    status.title = file.path;
    status.textContent = `${file.name}: ${count(size(file.reached))} of ${count(all)} lines reached${chosen >= 0 ? `, ${count(inTest().size)} by the chosen test` : ""}${file.problem ? `. Note: ${file.problem}` : ""}`;
    const sign = (kind, mark, text) => h("span", {}, h("b", { class: kind }, mark), text);
    replace(legend, chosen >= 0 ? [sign("hit", "✓", "reached by the test"), sign("other", "·", "reached, not by it")] : sign("hit", "✓", "reached"), sign("miss", "✗", "not reached"));
  }
  function load(at) {
    number = at; files.value = at; opens = [];
    const file = D.files[at];
    replace(functions, h("option", { value: "" }, "go to a function"), file.functions.map(([name, first]) => h("option", { value: first }, `${name} (${first})`)));
    list.set(file.text.length && !(file.text.length === 1 && !file.text[0]) ? file.text.map((_, i) => i + 1) : []);
    about(); replace(detail, h("p", { class: "quiet" }, "Select a line to see which tests and system calls reached it."));
  }
  function jump(line) { list.go(line - 1, true, true); }
  function show(line) {
    const first = firstLines[number]().get(line) || line;
    const found = lineTests[number]().get(first) || [], calls = [...(lineCalls[number]().get(first) || new Map())].sort((a, b) => b[1] - a[1]);
    const known = statementSet[number]().has(first);
    replace(detail, h("h2", { class: "mono" }, `${D.files[number].name}:${first}`),
      h("pre", {}, (D.files[number].text[first - 1] || "").trim() || " "),
      h("p", {}, !known ? "No statement begins here." : reachedSet[number]().has(first) ? "Reached." : "Not reached."),
      found.length ? [h("h3", {}, `Reached by ${counted(found.length, "test")}`), h("ul", {}, found.slice(0, 300).map((at) => h("li", {}, link(D.tests[at].id, () => showTest(at), { class: "link mono" }), h("span", { class: `chip ${D.tests[at].outcome}` }, D.tests[at].outcome))))] : null,
      calls.length ? [h("h3", {}, `Reached by ${counted(calls.reduce((n, each) => n + each[1], 0), "system call")}`), h("ul", {}, calls.map(([name, n]) => h("li", {}, link(T.names[name], () => showTrace(`name:${T.names[name]}`), { class: "link mono" }), h("span", { class: "num" }, count(n)))))] : null,
      known && reachedSet[number]().has(first) && !found.length && !calls.length ? h("p", { class: "quiet" }, "When the target was loaded, or outside of what was traced.") : null);
    detail.scrollTop = 0;
  }
  panel.append(h("div", { class: "toolbar" }, h("label", {}, "File ", files), D.tests.length ? h("label", {}, "Reached by ", testSelect) : null, functions, next), h("div", { class: "toolbar" }, legend, status), h("div", { class: "split" }, h("div", {}, list.element, list.note), detail));
  const least = D.files.map((file, at) => [file.text.length ? size(file.reached) : -1, at]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  load(least[0][1]);
  showSourceIn = (file, line, test) => { if (test !== undefined) { chosen = test; testSelect.value = test; } load(file); if (line) jump(line); list.element.focus(); };
}

// -- Kernel functions beside host lines.

let showKernelIn;
const showKernel = (name) => { open("kernel"); showKernelIn(name); };
function kernel(panel) {
  // Calls of each set of kernel functions, by what they reached on the host and by their name.
  const setsOf = once(() => { const found = new Map(); T.kernelSets.forEach((set, at) => { for (const f of set) { if (!found.has(f)) found.set(f, []); found.get(f).push(at); } }); return found; });
  const callsOfSet = once(() => { const found = T.kernelSets.map(() => []); T.kernel.forEach((set, call) => { if (set >= 0) found[set].push(call); }); return found; });
  const numberOf = new Map(T.functions.map((name, at) => [name, at]));
  const callsOf = (name) => numberOf.has(name) ? (setsOf().get(numberOf.get(name)) || []).flatMap((set) => callsOfSet()[set]) : [];
  const callCount = new Map();
  { const sizes = callsOfSet().map((each) => each.length); for (const [f, sets] of setsOf()) callCount.set(T.functions[f], sets.reduce((n, set) => n + sizes[set], 0)); }
  const traced = T.functions.length > 0, counted_ = D.kernel.some((row) => row[3]);
  const search = h("input", { type: "search", placeholder: "Search kernel functions and modules", "aria-label": "Search kernel functions and modules", id: "kernel-search" });
  const order = h("select", { "aria-label": "Order" }, [counted_ ? ["pcs", "most PCs first"] : null, traced ? ["calls", "most calls first"] : null, ["name", "by name"]].filter(Boolean).map(([key, text]) => h("option", { value: key }, text)));
  const status = h("span", { class: "count-line", "aria-live": "polite", id: "kernel-count" });
  const detail = h("aside", { class: "box detail", "aria-label": "The selected kernel function", id: "kernel-detail", tabindex: 0 }, h("p", { class: "quiet" }, traced ? "Select a kernel function to see the host lines that ran for the same system calls." : "A trace (kcov-bridge run --trace) shows which host lines ran for the same system calls."));
  const list = new List({ id: "kernel-list", label: "Functions of the guest's kernel", columns: `minmax(170px, 1fr) minmax(70px, 120px)${counted_ ? " 70px 90px" : ""}${traced ? " 70px" : ""}`, heads: ["Function", "Module", ...(counted_ ? [">Blocks", ">PCs"] : []), ...(traced ? [">Calls"] : [])], select: (at) => show(at),
    render: (at) => { const [name, module, blocks, pcs] = D.kernel[at]; return h("div", {}, h("span", { class: "mono", title: name }, name), h("span", { class: "quiet" }, module || "kernel"), counted_ ? [h("span", { class: "num" }, blocks ? count(blocks) : "–"), h("span", { class: "num" }, pcs ? count(pcs) : "–")] : null, traced ? h("span", { class: "num" }, callCount.has(name) ? count(callCount.get(name)) : "–") : null); } });
  function update() {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = D.kernel.map((_, at) => at).filter((at) => terms.every((term) => `${D.kernel[at][0]} ${D.kernel[at][1]}`.toLowerCase().includes(term)));
    const name = (at) => D.kernel[at][0];
    if (order.value === "pcs") rows.sort((a, b) => D.kernel[b][3] - D.kernel[a][3] || (name(a) < name(b) ? -1 : 1));
    else if (order.value === "calls") rows.sort((a, b) => (callCount.get(name(b)) || 0) - (callCount.get(name(a)) || 0) || (name(a) < name(b) ? -1 : 1));
    else rows.sort((a, b) => name(a) < name(b) ? -1 : 1);
    status.textContent = rows.length === D.kernel.length ? counted(rows.length, "function") : `${count(rows.length)} of ${counted(D.kernel.length, "function")}`;
    list.set(rows);
  }
  function show(at) {
    const [name, module, blocks, pcs] = D.kernel[at], calls = callsOf(name);
    const names = new Map(), codes = new Map();
    for (const call of calls) {
      names.set(T.name[call], (names.get(T.name[call]) || 0) + 1);
      if (T.host[call] >= 0) for (const code of T.hostSets[T.host[call]]) { const key = `${T.codes[code][0]} ${T.codes[code][1]}`; if (!codes.has(key)) codes.set(key, { file: T.codes[code][0], name: T.codes[code][1], calls: 0, last: -1, lines: new Set() }); const into = codes.get(key); if (into.last !== call) { into.calls++; into.last = call; } for (const line of codeLines(code)) into.lines.add(line); }
    }
    const most = (map) => [...map].sort((a, b) => b[1] - a[1]);
    replace(detail, h("h2", { class: "mono" }, name), h("p", { class: "quiet" }, module ? `module ${module}` : "the kernel itself", blocks ? `, ${counted(blocks, "block")} covered` : "", pcs ? `, ${counted(pcs, "PC")}` : ""),
      traced ? [h("h3", {}, "Host code in the same system calls"), codes.size ? h("ul", {}, [...codes.values()].sort((a, b) => b.calls - a.calls).slice(0, 100).map((each) => h("li", {}, link(`${fileName(each.file).split("/").pop()}: ${each.name || "module"} ${words([...each.lines].sort((a, b) => a - b))}`, () => { if (each.file >= 0) showSource(each.file, Math.min(...each.lines)); }, { class: "link mono" }), h("span", { class: "num" }, counted(each.calls, "call"))))) : h("p", { class: "quiet" }, "none"),
        h("h3", {}, "System calls"), names.size ? h("ul", {}, most(names).map(([each, n]) => h("li", {}, link(T.names[each], () => showTrace(`name:${T.names[each]} kernel:${name}`), { class: "link mono" }), h("span", { class: "num" }, count(n))))) : h("p", { class: "quiet" }, "none that was traced")] : h("p", { class: "quiet" }, "A trace (kcov-bridge run --trace) shows which host lines ran for the same system calls."));
    detail.scrollTop = 0;
  }
  search.addEventListener("input", update); order.addEventListener("change", update);
  panel.append(h("div", { class: "toolbar" }, search, order, status), h("div", { class: "split" }, h("div", {}, list.element, list.note), detail));
  update();
  showKernelIn = (name) => { search.value = ""; update(); list.go(list.rows.findIndex((at) => D.kernel[at][0] === name), true, true); list.element.focus(); };
}

// -- The trace.

let showTraceIn;
const showTrace = (query) => { if (!T.start.length) return; open("trace"); showTraceIn(query); };
function callText(call) {
  const args = T.arguments[call] < 0 ? "" : T.texts[T.arguments[call]];
  return [`${T.names[T.name[call]]}(${args})`, T.error[call] >= 0 ? T.texts[T.error[call]] : T.result[call] === null ? "?" : String(T.result[call])];
}
function hostText(call) {
  if (T.host[call] < 0) return "";
  let last = -2;
  return T.hostSets[T.host[call]].map((code) => { const [file, name, lines] = T.codes[code]; const before = file === last ? "" : `${fileName(file).split("/").pop()}: `; last = file; return `${before}${name ? `${name} ` : ""}${lines}`; }).join(", ");
}
function trace(panel) {
  // A call that did not return lasts until its thread enters the next one; that of a thread which
  // ends has no length.
  const ends = new Set(["exit", "exit_group"]);
  const calls = T.start.length, until = new Float64Array(calls), next = new Map();
  for (let call = calls - 1; call >= 0; call--) { until[call] = T.seconds[call] < 0 ? ends.has(T.names[T.name[call]]) ? T.start[call] : next.has(T.thread[call]) ? next.get(T.thread[call]) : Infinity : T.start[call] + T.seconds[call]; next.set(T.thread[call], T.start[call]); }
  const end = T.start.reduce((most, start, call) => Math.max(most, start + Math.max(0, T.seconds[call])), 0) || 1;
  const search = h("input", { type: "search", placeholder: "Search; name:read and kernel:vfs_read also work", title: "Words narrow the list together. They look at names, arguments, errors, host code, threads of guest and target, and tests; name:read finds calls of that name alone, kernel:vfs_read those that reached a kernel function.", "aria-label": "Search the trace", id: "trace-search" });
  const errors = h("input", { type: "checkbox", id: "trace-errors" }), hosts = h("input", { type: "checkbox", id: "trace-hosts" });
  const use = T.threads.map(() => 0); T.thread.forEach((thread) => use[thread]++);
  const busiest = T.threads.map((_, at) => at).sort((a, b) => use[b] - use[a]);
  const threadName = (at) => `${T.threads[at][1] || "thread"} ${T.threads[at][0]}`;
  const thread = h("select", { "aria-label": "Thread", id: "trace-thread" }, h("option", { value: -1 }, "all threads"), busiest.slice(0, 500).map((at) => h("option", { value: at }, `${threadName(at)} (${count(use[at])})`)));
  const status = h("span", { class: "count-line", "aria-live": "polite", id: "trace-count" });
  const detail = h("aside", { class: "box detail", "aria-label": "The selected call", id: "trace-detail", tabindex: 0 }, h("p", { class: "quiet" }, "Select a call to see the host code and the kernel functions that it reached."));
  const list = new List({ id: "trace-list", label: "System calls", columns: innerWidth > 560 ? "86px minmax(220px, 3fr) 76px minmax(150px, 2fr)" : "66px minmax(190px, 1fr) 78px", heads: innerWidth > 560 ? [">Time", "Call", ">Took", "Host code"] : [">Time", "Call", ">Took"], select: (call) => show(call),
    render: (call) => { const [text, result] = callText(call); return h("div", {}, h("span", { class: "num quiet" }, T.start[call].toFixed(4)), h("span", { class: "mono call", title: text }, h("span", {}, text), h("span", {}, " = ", h("span", { class: T.error[call] >= 0 ? "bad" : "" }, result))), h("span", { class: "num" }, T.seconds[call] < 0 ? "–" : time(T.seconds[call])), innerWidth > 560 ? h("span", { class: "mono quiet" }, hostText(call)) : null); } });

  // The time line: one track for each thread, the busiest first; calls as bars.
  const SHOWN = 14, ROW = 17;
  const tracks = busiest.slice(0, SHOWN).sort((a, b) => T.thread.indexOf(a) - T.thread.indexOf(b));
  const trackOf = new Map(tracks.map((at, row) => [at, row]));
  const others = busiest.length > SHOWN, rows = tracks.length + (others ? 1 : 0), GUTTER = () => canvas.clientWidth > 560 ? 130 : 84;
  const canvas = h("canvas", { tabindex: 0, role: "img", id: "trace-timeline", "aria-label": `Time line of ${counted(calls, "call")} of ${counted(T.threads.length, "thread")} in ${time(end)}. Plus and minus zoom, arrows move.` });
  canvas.style.height = `${rows * ROW + 22}px`;
  let from = 0, to = end;
  const range = h("span", { class: "count-line", id: "trace-range" });
  function zoom(factor, center) { const middle = center === undefined ? (from + to) / 2 : center, span = Math.max(end / 1e6, Math.min(end, (to - from) * factor)), share = (middle - from) / (to - from); from = Math.max(0, Math.min(end - span, middle - span * share)); to = from + span; update(true); }
  function move(share) { const span = to - from; from = Math.max(0, Math.min(end - span, from + span * share)); to = from + span; update(true); }
  const buttons = [["+", "Zoom in", () => zoom(0.5)], ["−", "Zoom out", () => zoom(2)], ["All", "Show all", () => { from = 0; to = end; update(true); }]].map(([text, label, action]) => h("button", { type: "button", class: "button", "aria-label": label, onclick: action }, text));
  function paint() {
    const width = canvas.clientWidth, height = rows * ROW + 22, ratio = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const c = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
    c.scale(ratio, ratio); c.font = "11px " + getComputedStyle(document.body).fontFamily; c.textBaseline = "middle";
    const gutter = GUTTER(), room = width - gutter - 4, x = (at) => gutter + room * (at - from) / (to - from);
    for (let row = 0; row < rows; row++) {
      c.fillStyle = row % 2 ? color("--panel") : color("--sunk"); c.fillRect(0, row * ROW, width, ROW);
      c.fillStyle = color("--muted"); c.fillText(row < tracks.length ? threadName(tracks[row]).slice(0, gutter > 100 ? 20 : 12) : `${count(busiest.length - SHOWN)} more`, 4, row * ROW + ROW / 2, gutter - 10);
    }
    const colors = [color("--muted"), color("--accent"), color("--bad")];
    // Plain calls first, so that what reached the host or failed lies on top.
    for (const kind of [0, 1, 2]) {
      c.fillStyle = colors[kind]; c.globalAlpha = kind ? 1 : 0.55;
      for (let call = 0; call < calls; call++) {
        if ((T.error[call] >= 0 ? 2 : T.host[call] >= 0 ? 1 : 0) !== kind) continue;
        const start = T.start[call], stop = Math.min(end, until[call]);
        if (stop < from || start > to) continue;
        const left = Math.max(gutter, x(start)), row = trackOf.has(T.thread[call]) ? trackOf.get(T.thread[call]) : tracks.length;
        c.fillRect(left, row * ROW + 3, Math.max(1, Math.min(width - 4, x(stop)) - left), ROW - 6);
      }
    }
    c.globalAlpha = 1; c.fillStyle = color("--muted");
    const step = niceStep(to - from, Math.max(2, room / 120));
    for (let at = Math.ceil(from / step) * step; at <= to; at += step) { c.fillRect(x(at), rows * ROW, 1, 4); c.textAlign = x(at) > width - 40 ? "right" : "center"; c.fillText(`${+at.toFixed(7)} s`, x(at), rows * ROW + 13); }
    c.textAlign = "left";
    const call = list.current >= 0 ? list.rows[list.current] : -1;
    if (call >= 0 && T.start[call] >= from && T.start[call] <= to) { c.fillStyle = color("--text"); c.fillRect(x(T.start[call]) - 1, 0, 2, rows * ROW); }
  }
  canvas.addEventListener("keydown", (event) => {
    const action = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => move(-0.25), ArrowRight: () => move(0.25), Home: () => move(-1e9), End: () => move(1e9), "0": () => { from = 0; to = end; update(true); } }[event.key];
    if (action && !event.ctrlKey && !event.metaKey) { event.preventDefault(); action(); }
  });
  let drag = null;
  const timeAt = (event) => from + (event.clientX - canvas.getBoundingClientRect().left - GUTTER()) / (canvas.clientWidth - GUTTER() - 4) * (to - from);
  canvas.addEventListener("wheel", (event) => { if (event.ctrlKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, timeAt(event)); } }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, from, moved: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => { if (!drag) return; const by = (event.clientX - drag.x) / (canvas.clientWidth - GUTTER()); if (Math.abs(event.clientX - drag.x) > 3) drag.moved = true; if (drag.moved) { const span = to - from; from = Math.max(0, Math.min(end - span, drag.from - by * span)); to = from + span; paint(); } });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && drag.moved) update(true);
    else if (drag) {
      const at = timeAt(event), row = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / ROW);
      let best = -1, distance = Infinity;
      list.rows.forEach((call, index) => { if ((trackOf.has(T.thread[call]) ? trackOf.get(T.thread[call]) : tracks.length) !== row) return; const d = at < T.start[call] ? T.start[call] - at : Math.max(0, at - until[call]); if (d < distance) { distance = d; best = index; } });
      if (best >= 0) list.go(best, true, true);
    }
    drag = null;
  });
  new ResizeObserver(paint).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  const low = (values) => once(() => values.map((value) => value.toLowerCase()));
  const lowNames = low(T.names), lowTexts = low(T.texts), lowFunctions = low(T.functions), lowTests = low(D.tests.map((test) => test.id)), lowCodes = low(T.codes.map(([file, name, , at]) => `${file >= 0 ? D.files[file].name : ""} ${name} ${at >= 0 ? T.hostThreads[at] : ""}`)), lowThreads = low(T.threads.map((_, at) => threadName(at)));
  function matcher(term) {
    const flag = (values) => Uint8Array.from(values, (value) => value.includes(term) ? 1 : 0);
    const any = (sets, flags) => Uint8Array.from(sets, (set) => set.some((each) => flags[each]) ? 1 : 0);
    const [, key, wanted] = /^(name|kernel):(.+)/.exec(term) || [];
    if (key === "name") { const equal = lowNames().map((name) => name === wanted); return (call) => equal[T.name[call]]; }
    if (key === "kernel") {
      // Not among what a plain word finds: nearly each call is in functions with common names.
      const found = any(T.kernelSets, Uint8Array.from(lowFunctions(), (name) => name.includes(wanted) ? 1 : 0));
      return (call) => found[T.kernel[call]];
    }
    const names = flag(lowNames()), texts = flag(lowTexts()), tests = flag(lowTests()), threads = flag(lowThreads());
    const host = any(T.hostSets, flag(lowCodes()));
    return (call) => names[T.name[call]] || texts[T.arguments[call]] || texts[T.error[call]] || host[T.host[call]] || tests[T.test[call]] || threads[T.thread[call]] || String(T.result[call]) === term;
  }
  function update(keep) {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean).map(matcher), wanted = Number(thread.value);
    const all = from <= 0 && to >= end, found = [];
    for (let call = 0; call < calls; call++) {
      if (errors.checked && T.error[call] < 0 || hosts.checked && T.host[call] < 0 || wanted >= 0 && T.thread[call] !== wanted) continue;
      if (!all && (T.start[call] > to || until[call] < from)) continue;
      if (terms.every((matches) => matches(call))) found.push(call);
    }
    status.textContent = found.length === calls ? counted(calls, "call") : `${count(found.length)} of ${counted(calls, "call")}`;
    range.textContent = all ? `0 to ${time(end)}` : `${time(from)} to ${time(to)}`;
    list.set(found, keep); paint();
  }
  function show(call) {
    const [text, result] = callText(call), host = T.host[call] < 0 ? [] : T.hostSets[T.host[call]], functions = T.kernel[call] < 0 ? [] : T.kernelSets[T.kernel[call]];
    replace(detail, h("h2", { class: "mono" }, T.names[T.name[call]]), h("pre", {}, `${text} = ${result}`),
      h("p", { class: "quiet" }, `at ${T.start[call].toFixed(6)} s, ${T.seconds[call] < 0 ? "did not return" : `took ${time(T.seconds[call])}`}, ${threadName(T.thread[call])}`),
      T.test[call] >= 0 ? h("p", {}, link(D.tests[T.test[call]].id, () => showTest(T.test[call]), { class: "link mono" })) : null,
      h("h3", {}, "Host code"), host.length ? h("ul", {}, host.map((code) => { const [file, name, lines, at] = T.codes[code]; return h("li", {}, link(`${fileName(file)}: ${name || "module"} ${lines}`, () => { if (file >= 0) showSource(file, parseWords(lines)[0]); }, { class: "link mono" }), at >= 0 ? h("span", { class: "quiet" }, ` in ${T.hostThreads[at]}`) : null); })) : h("p", { class: "quiet" }, "none"),
      h("h3", {}, `Kernel functions${functions.length ? `: ${count(functions.length)}` : ""}`), functions.length ? h("ul", {}, functions.slice(0, 400).map((each) => h("li", {}, link(T.functions[each], () => showKernel(T.functions[each]), { class: "link mono" }))), functions.length > 400 ? h("li", { class: "quiet" }, `and ${count(functions.length - 400)} more`) : null) : h("p", { class: "quiet" }, T.kernel[call] === -2 ? "left out here for want of room; trace.jsonl has them" : "none"));
    detail.scrollTop = 0; paint();
  }
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 120); });
  for (const each of [errors, hosts, thread]) each.addEventListener("change", () => update());
  panel.append(h("div", { class: "toolbar" }, search, h("label", { class: "check" }, errors, "failed"), h("label", { class: "check" }, hosts, "with host code"), thread, status),
    h("div", { class: "box timeline" }, h("div", { class: "bar" }, h("div", { class: "keys" }, h("span", {}, h("i", { class: "k-host" }), "reached the host"), h("span", {}, h("i", { class: "k-error" }), "failed"), h("span", {}, h("i", { class: "k-other" }), "others")), h("div", { class: "toolbar" }, range, buttons)), canvas),
    h("div", { class: "split" }, h("div", {}, list.element, list.note), detail));
  update();
  showTraceIn = (query) => { search.value = query; errors.checked = hosts.checked = false; thread.value = -1; from = 0; to = end; update(); list.element.focus(); };
}

part("overview", "Overview", null, overview);
if (D.tests.length) part("tests", "Tests", D.tests.length, tests);
if (D.files.length) part("source", "Source", D.files.length, source);
if (D.kernel.length) part("kernel", "Kernel", D.kernel.length, kernel);
if (T.start.length) part("trace", "Trace", T.start.length, trace);
start();

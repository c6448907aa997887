// SPDX-License-Identifier: Apache-2.0
// The page of a campaign.

const totals = D.totals;
const rate = (n) => n === null || n === undefined ? "–" : n < 10 ? n.toFixed(2) : count(Math.round(n));
const at = (seconds) => seconds === null || seconds === undefined ? "–" : time(seconds);

// -- Head and banners.

byId("where").textContent = ["Target", "Harness", "Sources", "Engine"].map((name) => D.facts.find(([each]) => each === name)).filter(Boolean).map(([name, text]) => `${name.toLowerCase()} ${text}`).join(" · ");
if (D.findings.length) byId("banners").append(banner("bad", "!", `${counted(D.findings.length, "finding")}, seen ${counted(totals.seen, "time")}.`, D.findings.map((each) => each.title)));
else byId("banners").append(banner("good", "✓", `No finding in ${counted(totals.executions, "execution")}.`));
if (D.problems.length) byId("banners").append(banner("warn", "!", "This report is not complete.", D.problems));

// -- Overview.

function overview(panel) {
  const cards = [
    card("executions", "Executions", count(totals.executions), "", `${rate(totals.rate)} a second on average`),
    card("blocks", "Blocks", count(totals.blocks), "", `${count(totals.newBlocks)} more than the seeds reached`),
    card("corpus", "Corpus", count(totals.corpus), counted(totals.corpus, "case").replace(/^\S+ /, ""), `${counted(totals.cases, "case")} with something new`),
    card("findings", "Findings", count(totals.findings), "", totals.findings ? `seen ${counted(totals.seen, "time")}` : "none"),
    card("frontier", "Frontier", count(totals.frontier), "", "ways from a covered block to one that was not reached"),
    card("time", "Time", time(totals.seconds), "", totals.mostVms ? `${counted(totals.mostVms, "VM")} at most, ${count(totals.vms)} at the end` : "of the campaign"),
  ];
  if (totals.stability !== null) cards.push(card("stability", "Stability", `${(100 * totals.stability).toFixed(1)} %`, "", "the same case gave the same map", meter(totals.stability)));
  if (D.against !== null) cards.push(card("against", `Against ${D.against}`, `+${count(totals.onlyHere)}`, `−${count(totals.onlyThere)}`, "blocks only here, and only there"));
  panel.append(h("div", { class: "cards" }, cards));
  const boxes = [], curves = D.series.map(chart);
  if (curves.length % 2) boxes.push(curves.pop());
  if (curves.length) panel.append(h("div", { class: "two" }, curves));
  if (D.findings.length) boxes.push(box("Findings", "the first seen comes first", scroll("Findings", table(["Title", ">Times", ">First seen"], D.findings.map((each, number) => h("tr", {}, h("td", { class: "wide" }, link(each.title, () => showRow.findings(number), { class: "link mono" })), h("td", { class: "num" }, count(each.times)), h("td", { class: "num" }, at(each.seconds))))))));
  const files = new Map();
  for (const [, place, symbol, , , , seed] of D.blocks) {
    const name = place.replace(/:[\d-]+$/, ""), key = name === place ? symbol || place : name;
    if (!files.has(key)) files.set(key, [0, 0]);
    files.get(key)[seed ? 0 : 1]++;
  }
  if (files.size) boxes.push(box("Where it went", "files, or functions of the kernel, by blocks that no seed reached", scroll("Where it went", table(["Place", ">Seeds", ">New"], [...files].sort((a, b) => b[1][1] - a[1][1] || b[1][0] - a[1][0] || (a[0] < b[0] ? -1 : 1)).slice(0, 200).map(([name, [seeds, fresh]]) => h("tr", {}, h("td", { class: "wide" }, link(name, () => searchFor("blocks", name), { class: "link mono" })), h("td", { class: "num" }, count(seeds)), h("td", { class: "num" }, count(fresh))))))));
  if (D.facts.length) boxes.push(box("Campaign", "", h("dl", { class: "facts" }, D.facts.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]))));
  panel.append(h("div", { class: "columns" }, boxes));
}

// -- A list with a search, a select and what is known of the selected row.

const showRow = {}, searchIn = {};
const searchFor = (key, text) => { open(key); searchIn[key](text); };
function listing(key, { one, label, rows, filters, text, columns, heads, cells, about, hint }) {
  return (panel) => {
    const search = h("input", { type: "search", placeholder: `Search ${label.toLowerCase()}`, "aria-label": `Search ${label.toLowerCase()}`, id: `${key}-search` });
    const filter = h("select", { "aria-label": "Which", id: `${key}-filter` }, filters.map(([name], number) => h("option", { value: number }, name)));
    const status = h("span", { class: "count-line", "aria-live": "polite", id: `${key}-count` });
    const detail = h("aside", { class: "box detail", "aria-label": `The selected ${one}`, id: `${key}-detail`, tabindex: 0 }, h("p", { class: "quiet" }, hint));
    const list = new List({ id: `${key}-list`, label, columns, heads, select: (number) => { replace(detail, about(rows[number], number)); detail.scrollTop = 0; }, render: (number) => h("div", {}, cells(rows[number])) });
    const low = once(() => rows.map((row) => text(row).toLowerCase()));
    function update() {
      const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean), wanted = filters[filter.value][1];
      const found = rows.map((_, number) => number).filter((number) => wanted(rows[number]) && terms.every((term) => low()[number].includes(term)));
      status.textContent = found.length === rows.length ? counted(rows.length, one) : `${count(found.length)} of ${counted(rows.length, one)}`;
      list.set(found);
    }
    search.addEventListener("input", update); filter.addEventListener("change", update);
    panel.append(h("div", { class: "toolbar" }, search, filters.length > 1 ? filter : null, status), h("div", { class: "split" }, h("div", {}, list.element, list.note), detail));
    update();
    searchIn[key] = (query) => { search.value = query; filter.value = 0; update(); list.element.focus(); };
    showRowIn[key] = (number) => { searchIn[key](""); list.go(number, true, true); };
  };
}
const showRowIn = {};
const all = ["all", () => true];
const wide = innerWidth > 560;
function source(place, symbol, line) {
  return [h("p", { class: "mono" }, place), symbol ? h("p", { class: "quiet" }, symbol) : null, line ? h("pre", { tabindex: 0, "aria-label": "Source" }, line) : null];
}

part("overview", "Overview", null, overview);

if (D.findings.length) {
  showRow.findings = (number) => { open("findings"); showRowIn.findings(number); };
  part("findings", "Findings", D.findings.length, listing("findings", {
    one: "finding", label: "Findings", rows: D.findings,
    filters: [all, ...[...new Set(D.findings.map((each) => each.kind).filter(Boolean))].sort().map((kind) => [kind, (each) => each.kind === kind])],
    text: (each) => `${each.title}\n${each.kind}\n${each.case}\n${each.evidence}`,
    columns: wide ? "minmax(200px, 1fr) 120px 76px 96px" : "minmax(150px, 1fr) 60px 84px",
    heads: wide ? ["Title", "Kind", ">Times", ">First seen"] : ["Title", ">Times", ">First"],
    cells: (each) => [h("span", { class: "mono", title: each.title }, each.title), wide ? h("span", { class: "quiet" }, each.kind) : null, h("span", { class: "num" }, count(each.times)), h("span", { class: "num" }, at(each.seconds))],
    about: (each) => [h("h2", { class: "mono" }, each.title), h("p", {}, each.kind ? h("span", { class: "chip failed" }, each.kind) : null, ` seen ${counted(each.times, "time")}, first after ${at(each.seconds)} and ${counted(each.executions, "execution")}`),
      h("p", { class: "quiet" }, each.href ? h("a", { href: each.href }, each.directory) : each.directory),
      h("h3", {}, "Case"), h("pre", { tabindex: 0, "aria-label": "Case" }, each.case || "no readable form"),
      each.stack.length ? [h("h3", {}, "Stack"), h("ul", {}, each.stack.map((name) => h("li", { class: "mono" }, name)))] : null,
      each.others.length ? [h("h3", {}, "Besides"), h("ul", {}, each.others.map((title) => h("li", { class: "mono" }, title)))] : null,
      each.evidence ? [h("h3", {}, "Evidence"), h("pre", { tabindex: 0, "aria-label": "Evidence" }, each.evidence)] : null],
    hint: "Select a finding to see its case and its evidence.",
  }));
}

if (D.blocks.length || D.missed.length) {
  const rows = [...D.blocks.map((row) => [...row, "here"]), ...D.missed.map((row) => [...row, null, "", false, true, "there"])];
  const SEED = 6, THERE = 7, WHERE = 8;
  part("blocks", "Blocks", rows.length, listing("blocks", {
    one: "block", label: "Blocks", rows,
    filters: [all, ["only the campaign, no seed", (row) => row[WHERE] === "here" && !row[SEED]], ["reached by seeds", (row) => row[SEED]],
      ...(D.against === null ? [] : [[`only here, not in ${D.against}`, (row) => row[WHERE] === "here" && !row[THERE]], [`only in ${D.against}`, (row) => row[WHERE] === "there"]])],
    text: (row) => `${row[0]} ${row[1]} ${row[2]} ${row[3]} ${row[5]}`,
    columns: wide ? "minmax(200px, 2fr) minmax(140px, 2fr) 90px" : "minmax(190px, 1fr) 84px",
    heads: wide ? ["Block", "Source", ">First after"] : ["Block", ">First after"],
    cells: (row) => [h("span", { class: "mono", title: row[1] }, row[1]), wide ? h("span", { class: "mono quiet" }, row[3] || row[2]) : null, h("span", { class: "num" }, row[SEED] ? "seed" : row[WHERE] === "there" ? "–" : at(row[4]))],
    about: (row) => [h("h2", {}, "Block"), source(row[1], row[2], row[3]), h("p", {}, row[WHERE] === "there" ? `Only reached in ${D.against}.` : `First reached by a ${row[SEED] ? "seed" : "case of the campaign"}, after ${at(row[4])}.`),
      D.against !== null && row[WHERE] === "here" ? h("p", {}, row[THERE] ? `Also reached in ${D.against}.` : `Not reached in ${D.against}.`) : null,
      row[5] ? [h("h3", {}, "Case"), h("p", { class: "mono" }, row[5])] : null, h("h3", {}, "PC"), h("p", { class: "mono" }, row[0])],
    hint: "Select a block to see the case that reached it first.",
  }));
}

if (D.frontier.length) {
  const KIND = 8, BEHIND = 9, OTHERS = 10;
  part("frontier", "Frontier", totals.frontier, listing("frontier", {
    one: "edge", label: "Frontier", rows: D.frontier,
    filters: [all, ...[["branch", "branches"], ["exception", "exceptions"], ["call", "calls and functions"]].map(([kind, name]) => [name, (row) => row[KIND] === kind])],
    text: (row) => row.slice(0, KIND + 1).join(" "),
    columns: wide ? "minmax(170px, 2fr) minmax(170px, 2fr) 84px 80px" : "minmax(190px, 1fr) 72px",
    heads: wide ? ["Not reached", "Beside", "Way", ">Behind"] : ["Not reached", ">Behind"],
    cells: (row) => [h("span", { class: "mono", title: row[7] || row[6] }, row[5]), wide ? [h("span", { class: "mono quiet" }, row[1]), h("span", {}, row[KIND])] : null, h("span", { class: "num" }, row[BEHIND] ? count(row[BEHIND]) : "–")],
    about: (row) => [h("h2", {}, "Not reached"), source(row[5], row[6], row[7]), h("h3", {}, `Covered, by a ${row[KIND] === "call" ? "call or a definition" : row[KIND]}`), source(row[1], row[2], row[3]),
      row[OTHERS] ? h("p", {}, `${counted(row[OTHERS], "further covered block")} beside it.`) : null, row[BEHIND] ? h("p", {}, `${counted(row[BEHIND], "block")} that nothing reached, this one included, ${row[BEHIND] === 1 ? "lies" : "lie"} behind.`) : null],
    hint: "Select an edge to see both of its ends. Behind: how many blocks that nothing reached follow from there.",
  }));
}

start();

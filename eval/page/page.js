"use strict";
// The sample browser. Texts stand in compressed blocks; a block is unpacked when one of its
// items is opened. Everything is written with textContent, so no sample can become markup.
(() => {
  const index = JSON.parse(document.getElementById("index").textContent);
  const byId = (id) => document.getElementById(id);
  const packed = new Map();
  for (const block of document.querySelectorAll("script[data-block]")) packed.set(block.dataset.block, block);
  const unpacked = new Map();
  const PAGE = 40, SAMPLES = 8;
  const OUTCOMES = {
    c: ["✓", "correct"], i: ["✗", "incorrect"], n: ["∅", "no answer"], t: ["⧖", "timed out"],
    g: ["?", "gold unparseable"], e: ["!", "error"],
  };

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const options = (select, values, chosen) => {
    select.replaceChildren(...values.map(([value, label]) => {
      const option = make("option", "", label);
      option.value = value;
      return option;
    }));
    if (values.some(([value]) => value === chosen)) select.value = chosen;
  };

  // Filters: name, label, test(result, position, other result, n); null where not offered.
  const FILTERS = [
    ["all", "everything", () => true],
    ["greedy-right", "greedy correct", (r, p) => r.greedy[p] === "c"],
    ["greedy-wrong", "greedy not correct", (r, p) => r.greedy[p] !== "c"],
    ["mixed", "some samples correct", (r, p, o, n) => r.right[p] > 0 && r.right[p] < n],
    ["none", "no sample correct", (r, p) => r.right[p] === 0],
    ["cut", "with truncated samples", (r, p) => r.cut[p] > 0],
    ["silent", "with samples without answer", (r, p) => r.silent[p] > 0],
    ["gained", "gained (greedy)", (r, p, o) => o && r.greedy[p] === "c" && o.greedy[p] !== "c"],
    ["lost", "lost (greedy)", (r, p, o) => o && r.greedy[p] !== "c" && o.greedy[p] === "c"],
    ["changed", "changed (greedy)", (r, p, o) => o && (r.greedy[p] === "c") !== (o.greedy[p] === "c")],
  ];
  const DISPUTED = "disputed";
  FILTERS.push([DISPUTED, "two graders disagree", (r, p) => r.disputed && r.disputed[p] > 0]);
  const PAIRED = new Set(["gained", "lost", "changed"]);

  const unpack = async (name) => {
    if (!unpacked.has(name)) {
      const bytes = Uint8Array.from(atob(packed.get(name).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(name, JSON.parse(await new Response(stream).text()));
    }
    return unpacked.get(name);
  };

  let found = [], shown = 0;
  const current = () => {
    const suite = index.suites[byId("suite").value];
    const checkpoint = byId("checkpoint").value, beside = byId("beside").value;
    return { suite, name: byId("suite").value, checkpoint, beside,
             result: suite.results[checkpoint], other: suite.results[beside] || null };
  };

  const chooseSuite = () => {
    const suite = index.suites[byId("suite").value];
    const names = index.checkpoints.filter((c) => suite.results[c]);
    options(byId("checkpoint"), names.map((c) => [c, c]), byId("checkpoint").value || names[names.length - 1]);
    if (!suite.results[byId("checkpoint").value]) byId("checkpoint").value = names[names.length - 1];
    options(byId("beside"), [["", "nothing"], ...names.map((c) => [c, c])], byId("beside").value || (names.length > 1 ? names[0] : ""));
    apply();
  };

  const apply = () => {
    const { suite, result, other } = current();
    const search = byId("search").value.trim().toLowerCase();
    const matches = (item) => !search || item.some((text) => text.toLowerCase().includes(search));
    const positions = suite.items.map((_, p) => p).filter((p) => matches(suite.items[p]));
    const test = (filter) => positions.filter((p) => filter[2](result, p, other, suite.n));
    const counts = new Map(FILTERS.map((f) => [f[0], test(f).length]));
    options(byId("filter"), FILTERS.filter((f) => (other || !PAIRED.has(f[0])) && (result.disputed || f[0] !== DISPUTED))
      .map((f) => [f[0], `${f[1]} (${counts.get(f[0]).toLocaleString("en")})`]), byId("filter").value);
    found = test(FILTERS.find((f) => f[0] === byId("filter").value));
    shown = 0;
    byId("items").replaceChildren();
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${suite.items.length.toLocaleString("en")} questions`;
    more();
  };

  const more = () => {
    const next = found.slice(shown, shown + PAGE);
    byId("items").append(...next.map(row));
    shown += next.length;
    byId("more").hidden = shown >= found.length;
  };

  const row = (position) => {
    const { suite, result, other, checkpoint, beside } = current();
    const [id, question, gold, level, subject] = suite.items[position];
    const entry = make("li");
    const button = make("button", "item");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.append(make("span", "question", question));
    const score = make("span", "score");
    for (const [name, r] of [[checkpoint, result], ...(other && beside !== checkpoint ? [[beside, other]] : [])]) {
      const line = make("span", "", `${name} ${OUTCOMES[r.greedy[position]][0]} ${r.right[position]}/${suite.n}`);
      line.title = `greedy ${OUTCOMES[r.greedy[position]][1]}, ${r.right[position]} of ${suite.n} samples correct`;
      const bar = make("span", "bar"), fill = make("i");
      fill.style.width = `${100 * r.right[position] / suite.n}%`;
      bar.append(fill);
      line.append(bar);
      score.append(line);
    }
    button.append(score);
    const meta = make("span", "meta", "gold ");
    meta.append(make("b", "", gold), ` · ${[subject, level && `level ${level}`, id].filter(Boolean).join(" · ")}`);
    button.append(meta);
    entry.append(button);
    button.addEventListener("click", async () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) entry.lastChild.remove();
      else entry.append(await details(position));
    });
    return entry;
  };

  const details = async (position) => {
    const { suite, name, checkpoint, beside, other } = current();
    const columns = make("div", "columns");
    for (const who of [checkpoint, ...(other && beside !== checkpoint ? [beside] : [])]) {
      const column = make("div");
      column.append(make("h4", "", who));
      let items;
      try {
        items = await unpack(`${name}/${who}/${Math.floor(position / suite.block)}`);
      } catch (error) {
        column.append(make("p", "note", `These samples could not be unpacked: ${error}`));
        columns.append(column);
        continue;
      }
      const samples = items[position % suite.block];
      column.append(...samples.slice(0, SAMPLES + 1).map(card));
      if (samples.length > SAMPLES + 1) {
        const rest = make("button", "", `Show all ${samples.length - 1} samples`);
        rest.type = "button";
        rest.addEventListener("click", () => {
          rest.replaceWith(...samples.slice(SAMPLES + 1).map((s, i) => card(s, i + SAMPLES + 1)));
        });
        column.append(rest);
      }
      columns.append(column);
    }
    return columns;
  };

  const card = ([text, outcome, extracted, rule, kind, tokens, finish, detail, second, score], number) => {
    const sample = make("article", `sample ${outcome}`);
    const head = make("p");
    head.append(make("span", "badge", OUTCOMES[outcome].join(" ")));
    head.append(make("span", "", number === 0 ? "greedy" : `sample ${number}`));
    if (extracted !== null) {
      const answer = make("span", "", "answer ");
      answer.append(make("b", "", extracted));
      head.append(answer);
    }
    if (rule) head.append(make("span", "", `rule ${rule}`));
    if (kind !== null && number > 0) head.append(make("span", "", `class ${kind + 1}`));
    head.append(make("span", "", `${tokens} tokens`));
    if (score !== null) head.append(make("span", "", `score ${score.toFixed(2)}`));
    if (finish === "length") head.append(make("span", "", "truncated"));
    if (second && (second === "c") !== (outcome === "c")) {
      head.append(make("span", "badge", `second grader: ${OUTCOMES[second][1]}`));
    }
    if (detail) head.append(make("span", "", detail));
    sample.append(head, make("pre", "", text));
    return sample;
  };

  options(byId("suite"), Object.keys(index.suites).map((s) => [s, s]));
  byId("suite").addEventListener("change", chooseSuite);
  for (const id of ["checkpoint", "beside", "filter"]) byId(id).addEventListener("change", apply);
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 150); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", more);
  chooseSuite();
})();

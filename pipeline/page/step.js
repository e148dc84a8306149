(() => {
  "use strict";
  const BATCH = 40;
  const byId = (id) => document.getElementById(id);
  const groups = JSON.parse(byId("data").textContent);
  const make = (tag, name, text) => {
    const e = document.createElement(tag);
    if (name) e.className = name;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const number = (x) => (x === null || x === undefined ? "–" : Number(x).toPrecision(3).replaceAll("-", "−"));
  const COLOURS = {
    coefficient: ["coefficient", "Blue tokens were made more likely, orange ones less, in proportion to the colour: the gradient coefficient, times the weight of the correction, over the normaliser, before the first update."],
    last: ["coefficient, last update", "Coefficients before the last update on the batch: clipped tokens have none."],
    advantage: ["advantage", "Advantages, before ratio, clip and normaliser."],
    logp: ["log-prob of the sampler", "How unlikely each token was to the policy that sampled it."],
  };
  const has = (key) => groups.some((g) => g.samples.some((s) => s[key] !== null && s[key] !== undefined));
  for (const [key, [label]] of Object.entries(COLOURS)) {
    if (!has(key)) continue;
    const option = make("option", "", label);
    option.value = key;
    byId("colour").append(option);
  }
  const values = (sample, key) => {
    const v = sample[key];
    if (v === null || v === undefined) return null;
    return Array.isArray(v) ? v : sample.tokens.map(() => v);
  };
  const largest = (samples, key) => {
    let top = 0;
    for (const s of samples) for (const v of values(s, key) || []) top = Math.max(top, Math.abs(v || 0));
    return top;
  };
  const tops = {};
  for (const key of Object.keys(COLOURS)) tops[key] = largest(groups.flatMap((g) => g.samples), key);

  const KEEP = {
    all: () => true,
    mixed: (g) => new Set(g.samples.map((s) => s.reward).filter((r) => r !== null)).size > 1,
    solved: (g) => g.samples.length > 0 && g.samples.every((s) => s.outcome === "correct"),
    failed: (g) => g.samples.length > 0 && !g.samples.some((s) => s.outcome === "correct"),
    cut: (g) => g.samples.some((s) => s.finish === "length"),
  };

  const tokens = (sample, key, top) => {
    const pre = make("pre");
    if (sample.prefix) pre.append(make("span", "prefix", sample.prefix));
    const shown = values(sample, key);
    const c = values(sample, "coefficient"), last = values(sample, "last"), a = values(sample, "advantage");
    sample.tokens.forEach((text, t) => {
      const span = make("span", "token", text === "" ? "\u2027" : text);
      const v = shown ? shown[t] : null;
      if (v === null && shown) span.classList.add("unmasked");
      if (v && top) {
        span.dataset.sign = key !== "logp" && v > 0 ? "+" : "-";
        span.style.setProperty("--a", Math.sqrt(Math.min(1, Math.abs(v) / top)).toFixed(3));
      }
      const words = [`token ${t}: ${JSON.stringify(text)}`];
      if (c) words.push(`coefficient ${number(c[t])}`);
      if (last) words.push(`last update ${number(last[t])}`);
      if (a) words.push(`advantage ${number(a[t])}`);
      words.push(`log-prob ${number(sample.logp[t])}`);
      span.title = words.join(" · ");
      pre.append(span);
    });
    return pre;
  };

  const card = (group, sample, key, top) => {
    const box = make("article", `sample ${sample.outcome || ""}`);
    const head = make("p");
    head.append(make("span", "badge", (sample.outcome || "no verdict").replace("_", " ")));
    head.append(make("span", "", `sample ${sample.index}`));
    const answer = make("span", "", "answer ");
    answer.append(make("b", "", sample.answer === null || sample.answer === undefined ? "none" : sample.answer));
    head.append(answer);
    head.append(make("span", "", sample.reward === null ? "no reward" : `reward ${number(sample.reward)}`));
    if (typeof sample.advantage === "number") head.append(make("span", "", `advantage ${number(sample.advantage)}`));
    else if (Array.isArray(sample.advantage)) head.append(make("span", "", "advantage a token"));
    else head.append(make("span", "", "no signal"));
    head.append(make("span", "", `${sample.tokens.length} tokens`));
    if (sample.finish === "length") head.append(make("span", "", "truncated"));
    box.append(head, tokens({ ...sample, prefix: group.prefix }, key, top));
    return box;
  };

  const entry = (group, key, open) => {
    const box = make("details");
    const head = make("summary");
    head.append(make("span", "question", group.question || group.problem));
    const right = group.samples.filter((s) => s.outcome === "correct").length;
    const facts = [group.problem, `${right} of ${group.samples.length} correct`];
    if (group.gold) facts.push(`gold ${group.gold}`);
    if (group.level) facts.push(`level ${group.level}`);
    if (group.prefix) facts.push("from a prefix");
    if (group.error) facts.push(group.error);
    head.append(make("span", "meta", facts.join(" · ")));
    box.append(head);
    const fill = () => {
      if (!box.open || box.dataset.filled) return;
      box.dataset.filled = "1";
      const top = byId("scale").value === "group" ? largest(group.samples, key) : tops[key];
      const inside = make("div", "inside");
      for (const sample of group.samples) inside.append(card(group, sample, key, top));
      box.append(inside);
    };
    box.addEventListener("toggle", fill);
    if (open) { box.open = true; fill(); }
    return box;
  };

  let found = [], shown = 0;
  const more = () => {
    const key = byId("colour").value;
    for (const group of found.slice(shown, shown + BATCH)) byId("groups").append(entry(group, key, shown++ < 2));
    byId("more").hidden = shown >= found.length;
  };
  const apply = () => {
    const key = byId("colour").value, words = byId("search").value.trim().toLowerCase();
    byId("meaning").textContent = COLOURS[key] ? COLOURS[key][1] : "";
    const text = (g) => [g.problem, g.question, g.gold, ...g.samples.flatMap((s) => [s.answer || "", s.tokens.join("")])].join("\n").toLowerCase();
    found = groups.filter((g) => KEEP[byId("filter").value](g) && (!words || text(g).includes(words)));
    byId("count").textContent = `${found.length} of ${groups.length} groups`;
    byId("groups").replaceChildren();
    shown = 0;
    more();
  };
  for (const id of ["filter", "colour", "scale"]) byId(id).addEventListener("change", apply);
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 150); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", more);
  apply();
})();

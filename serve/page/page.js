"use strict";

/* The page of d2llm: one search in two orders, with the reasons. All weighing happens here: the answer has every part of
   every candidate, so a slider needs no new search. */

const DEPTH = 10; // of nDCG
const PARTS = {
  cosine: "The cosine of the two vectors",
  words: "BM25 over the words that both have",
  vectors: "The nearest of the passage's vectors to each of the query's",
  mlp: "The network that reads both texts' features",
  bm25: "The BM25 score of a hybrid search, on the scale of the other parts",
};
const LOOSEST = { cosine: 40, words: 1, vectors: 20, mlp: 2, bm25: 1 }; // a slider's end where the weight is 0

const state = {
  info: null,
  answer: null, // of the query that is shown
  weights: {}, // by part
  answers: new Map(), // by query: those of judged queries, so that nDCG follows the sliders
  judgements: {}, // {query: {id: relevance}}
  kept: false, // whether the server keeps them
  saved: [],
  open: new Set(), // ids of hits whose text is shown whole
};

// ---- small helpers

const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const mean = (numbers) => (numbers.length ? sum(numbers) / numbers.length : 0);
const deviation = (numbers) => Math.sqrt(mean(numbers.map((number) => (number - mean(numbers)) ** 2)));
const fixed = (number, digits = 2) => number.toFixed(digits).replace("-", "−");
const ratio = (number) => number.toFixed(3).replace(/^0/, "");
const plural = (count, noun, many = `${noun}s`) => `${count.toLocaleString("en")} ${count === 1 ? noun : many}`;

// The browser's storage may be closed to us (private windows): the page then forgets, and works.
const remembered = (name, missing) => {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? missing;
  } catch {
    return missing;
  }
};
const remember = (name, value) => {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    /* see above */
  }
};
const key = (value) => {
  try {
    if (value !== undefined) sessionStorage.setItem("d2llm.key", value);
    return sessionStorage.getItem("d2llm.key") ?? "";
  } catch {
    return (key.value = value ?? key.value ?? "");
  }
};
const place = (name) => `d2llm.${name}.${state.info?.collection?.name ?? ""}`;

// ---- the server

class Problem extends Error {}

async function call(path, body) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  const request = body === undefined ? { headers } : {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Problem("The server cannot be reached. Is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  if (response.status === 401 || answer?.error?.type === "key") {
    $("open-key").hidden = false;
    const judging = path === "judgements" && body !== undefined;
    await askKey(judging ? "Judging writes a file of the server: it needs the key for writing." : key() && answer?.error?.message);
    return call(path, body);
  }
  if (answer?.error?.type === "not_ready") {
    $("problem").textContent = "The model is being loaded.";
    $("problem").hidden = false;
    await new Promise((done) => setTimeout(done, 1000));
    $("problem").hidden = true;
    return call(path, body);
  }
  const busy = response.status === 429 ? " Try again in a moment." : "";
  throw new Problem((answer?.error?.message ?? `The server answered ${response.status}.`) + busy);
}

let asking = null; // several requests may lack the key at once: ask once
function askKey(reason = "") {
  asking ??= new Promise((done, refuse) => {
    $("key-problem").textContent = reason;
    $("key-input").value = "";
    $("key").returnValue = "";
    $("key").showModal();
    $("key").addEventListener("close", () => {
      asking = null;
      if ($("key").returnValue !== "use") refuse(new Problem("This server needs a key: press Key above to give it."));
      key($("key-input").value.trim());
      done();
    }, { once: true });
  });
  return asking;
}

async function attempt(work) {
  try {
    $("problem").hidden = true;
    $("filter").removeAttribute("aria-invalid");
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

// ---- scores: recall order and rescored order of an answer, with any weights

function weighed(answer, weights) {
  const parts = answer.hits.map((hit) => {
    const entries = Object.keys(answer.scales).map((name) => [name, weights[name] * hit.values[name]]);
    return Object.fromEntries(entries);
  });
  if ("bm25" in answer.scales) {
    // BM25 has no scale of its own: it is measured by the spread of the other parts.
    const spread = deviation(parts.map(({ bm25, ...others }) => sum(Object.values(others))));
    for (const each of parts) each.bm25 *= spread;
  }
  return answer.hits.map((hit, row) => ({ hit, parts: parts[row], score: sum(Object.values(parts[row])) }));
}

function documents(rows) {
  const seen = new Set();
  return rows.filter(({ hit }) => !seen.has(hit.id) && seen.add(hit.id));
}

function orders(answer, weights) {
  const rows = weighed(answer, weights);
  const recall = documents([...rows].sort((a, b) => a.hit.recall_rank - b.hit.recall_rank));
  const rescored = documents([...rows].sort((a, b) => b.score - a.score || a.hit.recall_rank - b.hit.recall_rank));
  return { recall, rescored };
}

function ndcg(order, judged) {
  const gain = (grade, place) => Math.max(grade, 0) / Math.log2(place + 2);
  const found = sum(order.slice(0, DEPTH).map(({ hit }, place) => gain(judged[hit.id] ?? 0, place)));
  const best = Object.values(judged).sort((a, b) => b - a).slice(0, DEPTH);
  const ideal = sum(best.map(gain));
  return ideal ? found / ideal : null; // without a right document there is nothing to measure
}

function measured(answer, query) {
  const judged = state.judgements[query];
  if (!answer || !judged) return null;
  const { recall, rescored } = orders(answer, { ...answer.scales, ...changedWeights() });
  const pair = [ndcg(recall, judged), ndcg(rescored, judged)];
  return pair[0] === null ? null : pair;
}

const changedWeights = () => Object.fromEntries(
  Object.entries(state.weights).filter(([name, weight]) => weight !== state.answer?.scales[name]),
);

// ---- searching

function readFilter() {
  const text = $("filter").value.trim();
  if (!text) return null;
  try {
    if (text.startsWith("{")) return JSON.parse(text);
    return Object.fromEntries(text.split(/\s*,\s*/).map((each) => {
      const [, name, value] = /^([^=]+)=(.*)$/.exec(each);
      let read = value.trim();
      try {
        read = JSON.parse(read);
      } catch {
        /* a word without quotes */
      }
      return [name.trim(), read];
    }));
  } catch {
    $("filter").setAttribute("aria-invalid", "true");
    throw new Problem('The filter is not JSON. Write {"lang": "en", "year": {"gte": 2024}}, or lang=en.');
  }
}

function readOptions() {
  const options = { k: Number($("k").value), candidates: Number($("candidates").value) };
  if ($("hybrid").value) options.hybrid = $("hybrid").value;
  if ($("task").value !== "asymmetric") options.task = $("task").value;
  const filter = readFilter();
  if (filter) options.filter = filter;
  return options;
}

let latest = 0; // answers that come late, after a newer search, are left out
function search() {
  return attempt(async () => {
    const query = $("query").value.trim();
    if (!query) return;
    const number = ++latest, options = readOptions(), start = performance.now();
    writeAddress();
    document.body.classList.add("busy");
    try {
      const answer = await call("search", { query, ...options, explain: true });
      if (number !== latest) return;
      const same = JSON.stringify(answer.scales) === JSON.stringify(state.answer?.scales);
      state.answer = { ...answer, query, k: options.k, whole: (performance.now() - start) / 1000 };
      if (!same) state.weights = { ...answer.scales };
      if (state.judgements[query]) state.answers.set(query, state.answer);
      state.open.clear();
      showAll();
    } finally {
      if (number === latest) document.body.classList.remove("busy");
    }
  });
}

function writeAddress() {
  const fields = ["query", "k", "candidates", "hybrid", "task", "filter"];
  const pairs = fields.map((name) => [name, $(name).value.trim()]).filter(([name, value]) => value !== $(name).defaultValue
    && value !== "" && !(name === "task" && value === "asymmetric"));
  history.replaceState(null, "", `#${new URLSearchParams(pairs)}`);
}

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (["query", "k", "candidates", "hybrid", "task", "filter"].includes(name)) $(name).value = value;
  }
  return Boolean($("query").value.trim());
}

// ---- showing

function showAll() {
  const { answer } = state;
  $("empty").hidden = true;
  $("figures").hidden = $("results").hidden = false;
  $("save").setAttribute("aria-pressed", String(state.saved.includes(answer.query)));
  $("save").textContent = state.saved.includes(answer.query) ? "★" : "☆";
  showTimes();
  showWeights();
  showOrders();
  const cut = answer.truncated ? " The query was longer than the model reads, and was cut." : "";
  $("status").textContent = answer.hits.length
    ? `${plural(Math.min(answer.k, answer.hits.length), "hit")} of ${plural(answer.candidates, "candidate")}.${cut}`
    : `${answer.warnings.join("; ") || "Nothing passes the filter"}.`;
  if (cut || !answer.hits.length) {
    $("problem").textContent = cut.trim() || $("status").textContent;
    $("problem").hidden = false;
  }
}

function showTimes() {
  const { seconds, whole } = state.answer;
  const total = sum(Object.values(seconds)) || 1;
  $("stages").replaceChildren(...Object.entries(seconds).map(([stage, time]) => {
    const bar = el("span", { title: `${stage} ${fixed(time * 1e3)} ms` });
    bar.style.flexGrow = time / total;
    return bar;
  }));
  const stages = Object.entries(seconds).map(([stage, time]) => el("span", {}, `${stage} `, el("b", {}, fixed(time * 1e3, 1))));
  $("times").replaceChildren(
    ...stages.flatMap((stage) => [stage, " "]),
    el("span", { class: "muted" }, `together ${fixed(total * 1e3, 1)}, round trip ${fixed(whole * 1e3, 0)}`),
  );
}

function showWeights() {
  const rows = Object.entries(state.answer.scales).map(([name, served]) => {
    const most = served ? 3 * Math.abs(served) : LOOSEST[name] ?? 1;
    const number = el("output", { for: `weight-${name}` });
    const slider = el("input", {
      type: "range", id: `weight-${name}`, class: `part-${name}`, min: Math.min(0, 3 * served), max: most, step: most / 300,
      oninput: () => change(name, Number(slider.value)),
      ondblclick: () => change(name, served),
    });
    return el("div", { class: "weight" },
      el("label", { for: `weight-${name}`, title: PARTS[name] }, el("i", { class: `swatch part-${name}` }), name),
      slider, number);
  });
  $("weights").replaceChildren(...rows);
  placeSliders();
}

function placeSliders() {
  for (const [name, weight] of Object.entries(state.weights)) {
    const slider = $(`weight-${name}`);
    if (!slider) continue;
    if (document.activeElement !== slider || Number(slider.value) !== weight) slider.value = weight;
    slider.style.setProperty("--fill", `${(100 * (slider.value - slider.min)) / (slider.max - slider.min || 1)}%`);
    slider.nextSibling.textContent = fixed(weight, Math.abs(weight) >= 10 ? 1 : 2);
  }
  $("reset").disabled = Object.keys(changedWeights()).length === 0;
}

function change(name, weight) {
  state.weights[name] = weight;
  placeSliders();
  showOrders();
}

function resetWeights() {
  if (!state.answer) return;
  state.weights = { ...state.answer.scales };
  placeSliders();
  showOrders();
}

function showOrders() {
  const { answer } = state;
  const { recall, rescored } = orders(answer, state.weights);
  const places = (order) => new Map(order.map(({ hit }, place) => [hit.id, place + 1]));
  const recallPlaces = places(recall), rescoredPlaces = places(rescored);
  const focused = document.activeElement?.closest?.("li[data-id]");
  const [list, id] = [focused?.parentNode.id, focused?.dataset.id];
  const shownRecall = recall.slice(0, answer.k), shown = rescored.slice(0, answer.k);
  const scale = barScale(shown, rescored);
  const strongest = Math.max(...answer.hits.flatMap((hit) => Object.values(hit.words ?? {})), 1e-9);
  $("recall").replaceChildren(...shownRecall.map((row, at) =>
    recallHit(row, at + 1, rescoredPlaces.get(row.hit.id), answer.k)));
  $("rescored").replaceChildren(...shown.map((row, at) =>
    rescoredHit(row, at + 1, recallPlaces.get(row.hit.id), answer.k, scale, strongest)));
  const rows = Math.max(shownRecall.length, shown.length, 1);
  $("columns").style.setProperty("--rows", rows);
  for (const [name, order] of [["recall", shownRecall], ["rescored", shown]]) {
    $(name).style.setProperty("--rows", rows);
    $(name).hidden = !order.length;
  }
  if (id) document.querySelector(`#${list} > li[data-id="${CSS.escape(id)}"]`)?.focus({ preventScroll: true });
  drawMoves(shownRecall, shown, recallPlaces, rescoredPlaces);
  showNdcg();
}

const nameOf = (hit) => String(hit.payload.title || "") || hit.id;

function snippet(field, hit, strongest) {
  const text = String(hit.payload[field] ?? "");
  const marks = strongest ? hit.marks?.[field] ?? [] : [];
  if (!marks.length) return [text];
  const characters = Array.from(text); // places count characters, not UTF-16 units
  const pieces = [];
  let at = 0;
  for (const [start, end, weight] of marks) {
    if (start < at) continue;
    pieces.push(characters.slice(at, start).join(""));
    const strength = Math.min(5, Math.max(1, Math.ceil((5 * weight) / strongest)));
    pieces.push(el("mark", { class: `strength-${strength}`, title: `adds ${fixed(weight)}` }, characters.slice(start, end).join("")));
    at = end;
  }
  pieces.push(characters.slice(at).join(""));
  return pieces;
}

function move(from, to, k) {
  if (from === undefined) return null;
  const [sign, kind, words] = from > to ? ["▲", "up", `up from ${from}`] : from < to ? ["▼", "down", `down from ${from}`]
    : ["=", "same", "same place as in recall"];
  const outside = from > k ? ` from ${from}` : from === to ? "" : ` ${Math.abs(from - to)}`;
  return el("span", { class: `move ${kind}`, title: words, "aria-label": words }, sign + outside);
}

function recallHit({ hit }, place, now, k) {
  const gone = now > k;
  const fate = gone ? el("span", { class: "move gone", title: `fell to ${now}` }, `✕ now ${now}`)
    : el("span", { class: "muted", title: `place ${now} in the rescored order` }, `→ ${now}`);
  return el("li", { "data-id": hit.id, class: gone ? "gone" : "", tabindex: "-1", ...pairing(hit.id) },
    el("div", { class: "head" }, el("span", { class: "place" }, place),
      el("h3", { dir: "auto" }, nameOf(hit)), fate),
    el("p", { class: "text", dir: "auto" }, String(hit.payload.text ?? "").slice(0, 400)),
    el("p", { class: "foot muted" }, `cosine ${ratio(hit.recall_score)}`));
}

function rescoredHit(row, place, before, k, scale, strongest) {
  const { hit, parts, score } = row;
  const judged = state.judgements[state.answer.query]?.[hit.id];
  const words = Object.entries(hit.words ?? {}).sort(([, a], [, b]) => b - a);
  const fields = Object.entries(hit.payload).filter(([name]) => !["text", "title"].includes(name));
  const passage = hit.passage ? [hit.passage.heading, `passage ${hit.passage.number + 1} of ${hit.passage.of}`] : [];
  const thumb = (relevance, label) => el("button", {
    class: `thumb ${relevance ? "right" : "wrong"}`, "aria-pressed": String(judged === relevance), "aria-label": label, title: label,
    onclick: () => judge(hit.id, relevance),
  }, thumbIcon());
  return el("li", {
    "data-id": hit.id, tabindex: "0", class: state.open.has(hit.id) ? "open" : "", ...pairing(hit.id),
    onclick: (event) => event.target.closest("button") ?? (String(getSelection()) || toggle(hit.id)),
  },
  el("div", { class: "head" }, el("span", { class: "place" }, place),
    el("h3", { dir: "auto" }, ...(hit.payload.title ? snippet("title", hit, strongest) : [hit.id])), move(before, place, k),
    el("span", { class: "score", title: "score" }, fixed(score)),
    thumb(1, "Right (u)"), thumb(0, "Wrong (d)")),
  el("p", { class: "text", dir: "auto" }, ...snippet("text", hit, strongest)),
  bar(parts, scale),
  el("p", { class: "legend" }, ...Object.entries(parts).map(([name, part]) =>
    el("span", { title: PARTS[name] }, el("i", { class: `swatch part-${name}` }), `${name} `, el("b", {}, fixed(part))))),
  el("p", { class: "chips" },
    ...words.map(([word, weight]) => el("span", { class: "word", dir: "auto", title: `adds ${fixed(weight)} to the score` },
      word, el("small", {}, ` ${fixed(weight)}`))),
    ...passage.filter(Boolean).map((text) => el("span", { class: "field", dir: "auto" }, text)),
    hit.payload.title ? el("span", { class: "field", title: "id" }, hit.id) : null,
    ...fields.map(([name, value]) => fieldChip(name, value))));
}

function thumbIcon() {
  const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" });
  icon.append(svg("path", { d: "M1.5 7h2.6v6.5H1.5z M4.1 7.4 7 1.6c1.2 0 1.9.9 1.7 2L8.2 6h4.6c1 0 1.7.9 1.5 1.8l-1 4.4c-.2.8-.8 1.3-1.6 1.3H6.3L4.1 12.4" }));
  return icon;
}

function fieldChip(name, value) {
  const simple = ["string", "number", "boolean"].includes(typeof value);
  const text = `${name}: ${simple ? value : JSON.stringify(value)}`;
  if (!simple || text.length > 60) return el("span", { class: "field", dir: "auto" }, text.slice(0, 80));
  return el("button", { class: "field", dir: "auto", title: "Filter by this", onclick: () => addToFilter(name, value) }, text);
}

function addToFilter(name, value) {
  attempt(async () => {
    const path = name.includes(".") ? null : name;
    if (path) $("filter").value = JSON.stringify({ ...readFilter(), [path]: value });
    await search();
  });
}

// ---- bars: what lowers the score is left of the line

function barScale(shown, all) {
  const relative = $("relative").checked;
  const names = Object.keys(state.answer.scales);
  const base = Object.fromEntries(names.map((name) => [name, relative ? mean(all.map(({ parts }) => parts[name])) : 0]));
  const sides = shown.map(({ parts }) => {
    const values = names.map((name) => parts[name] - base[name]);
    return [sum(values.filter((value) => value < 0)), sum(values.filter((value) => value > 0))];
  });
  const low = Math.min(0, ...sides.map(([below]) => below)), high = Math.max(0, ...sides.map(([, above]) => above));
  return { base, low, width: high - low || 1 };
}

function bar(parts, { base, low, width }) {
  const share = (value) => `${(100 * value) / width}%`;
  const holder = el("div", { class: "bar", "aria-hidden": "true" });
  const ends = { below: -low, above: -low };
  for (const [name, part] of Object.entries(parts)) {
    const value = part - base[name];
    const piece = el("span", { class: `part-${name}`, title: `${name} ${fixed(part)}` });
    piece.style.insetInlineStart = share(value < 0 ? ends.below + value : ends.above);
    piece.style.width = share(Math.abs(value));
    ends[value < 0 ? "below" : "above"] += value;
    holder.append(piece);
  }
  if (low < 0) {
    const line = el("i", {});
    line.style.insetInlineStart = share(-low);
    holder.append(line);
  }
  return holder;
}

// ---- arrows between the columns

const svg = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

function drawMoves(recall, rescored, recallPlaces, rescoredPlaces) {
  const box = $("moves").getBoundingClientRect();
  const middle = (list, id) => {
    const head = document.querySelector(`#${list} > li[data-id="${CSS.escape(id)}"] > .head`);
    if (!head) return null;
    const { top, height } = head.getBoundingClientRect();
    return top + height / 2 - box.top;
  };
  const lines = [];
  const draw = (id, kind, path, [x, y], lead) => {
    const group = svg("g", { class: `arrow ${kind}`, "data-id": id });
    group.append(svg("path", { d: path }));
    group.append(lead === "end" ? svg("circle", { cx: x, cy: y, r: 3 })
      : svg("path", { class: "tip", d: `M${x - 7},${y - 4} L${x},${y} L${x - 7},${y + 4}` }));
    lines.push(group);
  };
  const w = box.width, half = w / 2;
  for (const { hit: { id } } of recall) {
    const from = middle("recall", id), to = middle("rescored", id);
    if (from === null) continue;
    if (to === null) { // it fell out: the line ends between the columns
      draw(id, "gone", `M0,${from} C${half * 0.6},${from} ${half * 0.6},${from + 30} ${half},${from + 34}`, [half, from + 34], "end");
      continue;
    }
    const [a, b] = [recallPlaces.get(id), rescoredPlaces.get(id)];
    const kind = a > b ? "up" : a < b ? "down" : "same";
    draw(id, kind, `M0,${from} C${half},${from} ${half},${to} ${w - 2},${to}`, [w - 2, to]);
  }
  for (const { hit: { id } } of rescored) {
    const to = middle("rescored", id);
    if (to === null || recallPlaces.get(id) <= recall.length) continue;
    draw(id, "up", `M${half},${to + 34} C${half * 1.4},${to + 30} ${half * 1.4},${to} ${w - 2},${to}`, [w - 2, to]);
  }
  $("moves").replaceChildren(...lines);
  pair(document.activeElement?.closest?.("li[data-id]")?.dataset.id);
}

function redraw() {
  if (!state.answer) return;
  const { recall, rescored } = orders(state.answer, state.weights), { k } = state.answer;
  const places = (order) => new Map(order.map(({ hit }, place) => [hit.id, place + 1]));
  drawMoves(recall.slice(0, k), rescored.slice(0, k), places(recall), places(rescored));
}

function pair(id) {
  for (const each of document.querySelectorAll("[data-id]")) each.classList.toggle("paired", each.dataset.id === id);
  $("columns").classList.toggle("pairing", id !== undefined);
}

function pairing(id) {
  return { onmouseenter: () => pair(id), onmouseleave: () => pair(), onfocusin: () => pair(id), onfocusout: () => pair() };
}

function toggle(id) {
  if (!state.open.delete(id)) state.open.add(id);
  document.querySelector(`#rescored > li[data-id="${CSS.escape(id)}"]`)?.classList.toggle("open", state.open.has(id));
  redraw();
}

// ---- judgements

function judge(id, relevance) {
  return attempt(async () => {
    const { query } = state.answer;
    const before = state.judgements[query]?.[id];
    const now = before === relevance ? null : relevance;
    if (state.kept) {
      state.judgements = (await call("judgements", { query, id, relevance: now })).queries;
    } else {
      const judged = { ...state.judgements[query] };
      if (now === null) delete judged[id];
      else judged[id] = now;
      state.judgements = { ...state.judgements, [query]: judged };
      if (!Object.keys(judged).length) delete state.judgements[query];
      remember(place("judgements"), state.judgements);
    }
    state.answers.set(query, state.answer);
    showOrders();
    showQueryCount();
  });
}

function showNdcg() {
  const { query } = state.answer;
  const judged = Object.keys(state.judgements[query] ?? {}).length;
  const pair = measured(state.answer, query);
  const arrow = ([recall, rescored]) => [
    el("span", { title: "recall order" }, ratio(recall)), el("span", { class: "muted" }, " → "),
    el("b", { title: "rescored order", class: rescored > recall ? "better" : rescored < recall ? "worse" : "" }, ratio(rescored)),
  ];
  $("ndcg").replaceChildren(...(pair ? arrow(pair) : [el("span", { class: "muted" }, "–")]));
  const queries = Object.keys(state.judgements);
  const pairs = queries.map((each) => measured(each === query ? state.answer : state.answers.get(each), each)).filter(Boolean);
  const missing = queries.filter((each) => !state.answers.has(each) && each !== query);
  const here = judged ? `${plural(judged, "judgement")} here` : "Judge hits with the thumbs";
  const all = [mean(pairs.map(([recall]) => recall)), mean(pairs.map(([, rescored]) => rescored))];
  $("ndcg-all").replaceChildren(here, ...(pairs.length > (pair ? 1 : 0)
    ? [` · ${plural(pairs.length, "query", "queries")}: `, ...arrow(all)] : []));
  $("rerun").hidden = !missing.length;
  $("rerun").textContent = `Search ${plural(missing.length, "more judged query", "more judged queries")}`;
  $("download").hidden = state.kept || !queries.length;
}

function rerun() {
  return attempt(async () => {
    const options = readOptions();
    for (const query of Object.keys(state.judgements)) {
      if (state.answers.has(query) || query === state.answer.query) continue;
      state.answers.set(query, { ...(await call("search", { query, ...options, explain: true })), query });
      showNdcg();
    }
  });
}

async function idOf(query) {
  const digest = await crypto.subtle?.digest("SHA-256", new TextEncoder().encode(query));
  if (!digest) return `q${[...query].reduce((hash, letter) => (hash * 31 + letter.codePointAt(0)) >>> 0, 7).toString(16)}`;
  return `q${[...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("").slice(0, 12)}`;
}

async function download() {
  const queries = [], qrels = ["query-id\tcorpus-id\tscore"];
  for (const [query, judged] of Object.entries(state.judgements)) {
    const id = await idOf(query);
    queries.push(JSON.stringify({ _id: id, text: query }));
    qrels.push(...Object.entries(judged).map(([document_, relevance]) => `${id}\t${document_}\t${relevance}`));
  }
  for (const [name, lines] of [["queries.jsonl", queries], ["qrels.tsv", qrels]]) {
    const address = URL.createObjectURL(new Blob([lines.map((line) => `${line}\n`).join("")], { type: "text/plain" }));
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1e4);
  }
}

// ---- queries: saved and judged

const listed = () => [...new Set([...state.saved, ...Object.keys(state.judgements)])];

function showQueryCount() {
  $("query-count").hidden = !listed().length;
  $("query-count").textContent = listed().length;
}

function save() {
  const query = $("query").value.trim();
  if (!query) return;
  const there = state.saved.includes(query);
  state.saved = there ? state.saved.filter((other) => other !== query) : [...state.saved, query];
  remember(place("queries"), state.saved);
  $("save").setAttribute("aria-pressed", String(!there));
  $("save").textContent = there ? "☆" : "★";
  showQueryCount();
}

function showQueries() {
  const rows = listed().map((query) => {
    const pair = measured(state.answers.get(query), query);
    const judged = Object.keys(state.judgements[query] ?? {}).length;
    const figures = pair ? `${ratio(pair[0])} → ${ratio(pair[1])}` : judged ? plural(judged, "judgement") : "";
    return el("li", {},
      el("button", { class: "pick", dir: "auto", onclick: () => pick(query) }, query),
      el("span", { class: pair && pair[1] < pair[0] ? "worse" : "muted" }, figures),
      state.saved.includes(query)
        ? el("button", { class: "icon", "aria-label": `Forget ${query}`, onclick: () => forget(query) }, "×") : el("span"));
  });
  $("query-list").replaceChildren(...(rows.length ? rows : [el("li", { class: "muted" }, "None yet: save one with the star.")]));
  if (!$("queries").open) $("queries").showModal();
}

function pick(query) {
  $("queries").close();
  $("query").value = query;
  search();
}

function forget(query) {
  state.saved = state.saved.filter((other) => other !== query);
  remember(place("queries"), state.saved);
  if (state.answer?.query === query) showAll();
  showQueryCount();
  showQueries();
}

// ---- facts

function showFacts() {
  const rows = [];
  const walk = (value, path) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [name, inner] of Object.entries(value)) walk(inner, [...path, name]);
      return;
    }
    const text = Array.isArray(value) ? value.map((each) => (typeof each === "number" ? +each.toFixed(4) : each)).join(", ") : value;
    const name = path.slice(1).join(" ").replaceAll("_", " ");
    rows.push([path.length > 1 ? path[0] : "server", name || path[0].replaceAll("_", " "),
      typeof text === "number" ? text.toLocaleString("en") : String(text ?? "–")]);
  };
  walk(state.info ?? {}, []);
  const first = ["collection", "model"];
  const groups = [...new Set([...first, ...rows.map(([group]) => group)])];
  $("facts-list").replaceChildren(...groups.flatMap((group) => {
    const facts = rows.filter(([other]) => other === group);
    return facts.length ? [el("dt", { class: "group" }, group), ...facts.flatMap(([, name, value]) =>
      [el("dt", {}, name), el("dd", { dir: "auto" }, value)])] : [];
  }));
  $("facts").showModal();
}

async function start() {
  state.info = await call("info");
  const { collection, model } = state.info;
  $("collection").textContent = [collection?.name, collection?.documents != null && plural(collection.documents, "document"),
    model?.name].filter(Boolean).join(" · ") || "collection";
  document.title = `${collection?.name ?? "search"} · d2llm`;
  for (const field of state.info.limits?.max_k ? [$("candidates"), $("k")] : []) {
    field.max = state.info.limits.max_k;
    if (Number(field.value) > Number(field.max)) field.value = field.max;
  }
  const answer = await call("judgements").catch((error) => {
    if (error instanceof Problem) return { kept: false, queries: {} };
    throw error;
  });
  state.kept = answer.kept;
  state.judgements = answer.kept ? answer.queries : remembered(place("judgements"), {});
  state.saved = remembered(place("queries"), []);
  showQueryCount();
  if (readAddress()) await search();
}

// ---- keys and buttons

function step(by) {
  const list = $("columns").dataset.tab === "recall" && getComputedStyle($("rescored")).display === "none" ? "recall" : "rescored";
  const hits = [...$(list).children];
  const at = hits.indexOf(document.activeElement?.closest("li[data-id]"));
  const next = hits[at < 0 ? (by > 0 ? 0 : hits.length - 1) : Math.min(hits.length - 1, Math.max(0, at + by))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function showTab(name) {
  $("columns").dataset.tab = name;
  for (const each of ["recall", "rescored"]) {
    $(`tab-${each}`).setAttribute("aria-selected", String(each === name));
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  redraw();
}

function shortcut(event) {
  const typing = event.target.closest("input:not([type=range], [type=checkbox]), select, textarea");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const hit = event.target.closest("li[data-id]")?.dataset.id;
  const actions = {
    "/": () => $("query").select(),
    "?": () => $("help").showModal(),
    j: () => step(1),
    k: () => step(-1),
    u: () => hit && judge(hit, 1),
    d: () => hit && judge(hit, 0),
    Enter: () => hit && event.target.matches("li") && toggle(hit),
    1: () => showTab("recall"),
    2: () => showTab("rescored"),
    s: save,
    l: showQueries,
    r: resetWeights,
  };
  const action = actions[event.key];
  if (!action || (event.key === "Enter" && !event.target.matches("li"))) return;
  event.preventDefault();
  action();
}

document.addEventListener("keydown", shortcut);
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
for (const name of ["k", "candidates", "hybrid", "task"]) {
  $(name).addEventListener("change", () => {
    state.answers.clear(); // they were searched with other options
    if (state.answer) search();
  });
}
$("filter").addEventListener("change", () => state.answers.clear());
$("query").addEventListener("input", () => {
  const there = state.saved.includes($("query").value.trim());
  $("save").setAttribute("aria-pressed", String(there));
  $("save").textContent = there ? "★" : "☆";
});
$("save").addEventListener("click", save);
$("reset").addEventListener("click", resetWeights);
$("copy").addEventListener("click", async () => {
  const { bm25, ...scales } = state.weights;
  const text = JSON.stringify({ [$("task").value]: scales, ...(bm25 === undefined ? {} : { bm25_weight: bm25 }) });
  await navigator.clipboard?.writeText(text).then(() => ($("status").textContent = "Copied."), () => {});
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
});
$("relative").addEventListener("change", showOrders);
$("rerun").addEventListener("click", rerun);
$("download").addEventListener("click", download);
$("open-facts").addEventListener("click", showFacts);
$("open-queries").addEventListener("click", showQueries);
$("open-help").addEventListener("click", () => $("help").showModal());
$("open-key").addEventListener("click", () => attempt(() => askKey().then(start)));
for (const name of ["recall", "rescored"]) {
  $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = name === "recall" ? "rescored" : "recall";
    showTab(other);
    $(`tab-${other}`).focus();
  });
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // on the backdrop
}
new ResizeObserver(redraw).observe($("columns"));
if (matchMedia("(max-width: 760px)").matches) $("weights-box").open = false;
attempt(start);

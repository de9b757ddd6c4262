"use strict";
// The page of `scoreact rate`. What is shown comes from the server; an answer is kept in the browser until the server has it,
// so neither a reload nor a server that went away loses one.

const part = (id) => document.getElementById(id);
const ANSWERS = {
  pair: [
    { answer: "left", label: "Left", keys: ["ArrowLeft", "1"], hint: "←", sample: 0 },
    { answer: "tie", label: "Tie", keys: ["ArrowDown"], hint: "↓" },
    { answer: "both_bad", label: "Both bad", keys: ["ArrowUp"], hint: "↑" },
    { answer: "right", label: "Right", keys: ["ArrowRight", "2"], hint: "→", sample: 1 },
  ],
  thumbs: [
    { answer: "down", label: "Thumb down", keys: ["ArrowDown", "ArrowLeft", "1"], hint: "↓" },
    { answer: "up", label: "Thumb up", keys: ["ArrowUp", "ArrowRight", "2"], hint: "↑" },
  ],
  scores: ["1", "2", "3", "4", "5"].map((n) => ({ answer: n, label: n, keys: [n], hint: "" })),
  rank: [],
};
const PLACES = { 1: ["The sample"], 2: ["Left", "Right"] };
const DOWN = "The server does not answer.";
const OUTBOX = "scoreact-outbox", RATER = "scoreact-rater";

let queue = [];       // what this rater holds, as the server said, less what is answered
let state = {};
let current = null;   // the entry of `queue` on the screen
let shownAt = 0;
let order = [];       // of a ranking: groups of places, the best first
let joins = false;    // of a ranking: the next one chosen is as good as the last
let undoing = false;
const elements = new Map();  // number of a sample -> promise of its element

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
}

function rater() {
  let name = localStorage.getItem(RATER);
  if (!name) {
    name = "rater-" + random().slice(0, 4);
    localStorage.setItem(RATER, name);
  }
  return name;
}

function say(text) {
  part("said").textContent = text;
}

// --- the server ------------------------------------------------------------------------------------------------------

async function ask(what, body) {
  const answer = await fetch("/api/" + what, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ rater: rater(), ...body }),
  });
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error), { status: answer.status });
  return content;
}

const pending = () => JSON.parse(localStorage.getItem(OUTBOX) || "[]");
const keep = (list) => localStorage.setItem(OUTBOX, JSON.stringify(list));
const drop = (sent) => keep(pending().filter((answer) => answer.key !== sent.key));  // another tab may have added some
const same = (a, b) => a && b && a.task === b.task && a.question === b.question;

function take(found) {
  state = found;
  if (part("said").textContent.startsWith(DOWN)) say("");
  const sent = pending();
  queue = found.tasks.filter((entry) => !sent.some((answer) => same(answer, entry)));
  for (const entry of queue) for (const sample of entry.samples) elementOf(sample);
  if (!same(current, queue[0])) show();
  count();
}

let flushing = null;

function flush() {
  flushing = flushing || send().finally(() => { flushing = null; });
  return flushing;
}

async function send() {
  while (pending().length) {
    const first = pending()[0];
    try {
      const found = await ask("answer", first);
      drop(first);
      take(found);
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 401) {  // it will never be taken
        drop(first);
        say(error.message);
        continue;
      }
      say(error.status === 401 ? error.message : DOWN + " Your answers are kept here until it does.");
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

async function refresh(body = {}) {
  await flush();
  try {
    take(await ask("state", body));
  } catch (error) {
    say(error.status ? error.message : DOWN);
  }
}

async function summary() {
  const found = await ask("summary", {}).catch(() => ({}));
  const share = (s) => `${s.hits} of ${s.count} (95 %: ${s.interval.map((x) => Math.round(100 * x)).join(" to ")} %)`;
  const lines = [];
  if (found.agreement) lines.push(`You repeat yourself in ${share(found.agreement)}.`);
  if (found.left) lines.push(`Left won ${share(found.left)}.`);
  part("sure").textContent = lines.join(" ");
}

// --- samples ---------------------------------------------------------------------------------------------------------

function elementOf(sample) {
  if (!elements.has(sample.number)) {
    elements.set(sample.number, sample.form === "png" ? picture(sample) : values(sample));
    if (elements.size > 40) elements.delete(elements.keys().next().value);
  }
  return elements.get(sample.number);
}

async function picture(sample) {
  const image = new Image();
  image.alt = "";
  image.src = sample.url;
  await image.decode().catch(() => say("A picture could not be loaded. Reload the page, or skip."));
  if (image.naturalWidth < 160) image.classList.add("small");
  return image;
}

async function values(sample) {
  const answer = await fetch(sample.url);
  return answer.json();
}

function drawn(content, lowest, highest) {
  const make = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const plot = make("svg", { viewBox: "0 0 100 100", "aria-hidden": "true" });
  const high = (y) => 98 - (96 * (y - lowest)) / (highest - lowest || 1);
  const line = (x1, y1, x2, y2) => plot.append(make("line", { x1, y1, x2, y2 }));
  if (content.point) {
    const [[x, y]] = content.lines;
    line(0, high(0), 100, high(0));
    line(100 - high(0), 0, 100 - high(0), 100);
    plot.append(make("circle", { cx: 100 - high(x), cy: high(y), r: 2 }));
    return plot;
  }
  plot.setAttribute("preserveAspectRatio", "none");
  if (lowest < 0 && highest > 0) line(0, high(0), 100, high(0));
  for (const y of content.lines) {
    const points = y.map((value, i) => `${(100 * i) / Math.max(1, y.length - 1)},${high(value)}`);
    plot.append(make("polyline", { points: points.join(" ") }));
  }
  return plot;
}

function onOneScale(contents) {
  if (contents.every((content) => content instanceof Element)) return contents;
  const all = contents.flatMap((content) => content.lines.flat());
  const far = Math.max(...all.map(Math.abs)) * 1.1 || 1;
  const [low, high] = contents[0].point ? [-far, far] : [Math.min(...all), Math.max(...all)];
  return contents.map((content) => drawn(content, low, high));
}

// --- the screen ------------------------------------------------------------------------------------------------------

function place(i, count) {
  return (PLACES[count] || [])[i] || `Sample ${i + 1}`;
}

async function show() {
  current = queue[0] || null;
  const entry = current;
  order = [];
  joins = false;
  if (!entry) {
    const text = pending().length ? "One moment" : state.drawing ? "More are being drawn"
      : state.left ? "The last ones are with other people" : "Nothing left to answer. Thank you.";
    if (part("prompt").textContent === text) return;
    part("prompt").textContent = text;
    part("asks").textContent = "";
    part("samples").replaceChildren();
    part("samples").dataset.ready = "";
    offer(null);
    document.body.classList.remove("zoomed");
    if (!pending().length) summary();
    return;
  }
  offer(entry.kind);
  part("samples").dataset.ready = "";
  let contents;
  try {
    contents = onOneScale(await Promise.all(entry.samples.map(elementOf)));
  } catch (error) {
    contents = entry.samples.map(() => document.createTextNode("This sample could not be loaded. Reload the page, or skip."));
    for (const sample of entry.samples) elements.delete(sample.number);
  }
  if (entry !== current) return;
  part("asks").textContent = entry.asks;
  part("prompt").textContent = entry.prompt || "(no prompt)";
  part("samples").className = contents.length > 2 ? "four" : "";
  const focused = [...part("samples").querySelectorAll("button")].indexOf(document.activeElement);
  part("samples").replaceChildren(...contents.map((content, i) => framed(content, i, entry)));
  if (focused >= 0) part("samples").querySelectorAll("button")[focused]?.focus();
  part("samples").dataset.ready = `${entry.task}-${entry.question}`;
  shownAt = performance.now();
}

function framed(content, i, entry) {
  const figure = document.createElement("figure");
  const choose = document.createElement("button");
  choose.className = "sample";
  choose.type = "button";
  const name = place(i, entry.samples.length);
  choose.setAttribute("aria-label", `${name}: ${entry.prompt || "no prompt"}`);
  choose.append(content);
  choose.addEventListener("click", () => chosen(i));
  const zoom = document.createElement("button");
  zoom.className = "zoom";
  zoom.type = "button";
  zoom.textContent = "⤢";
  zoom.setAttribute("aria-label", "Enlarge or reduce");
  zoom.setAttribute("aria-keyshortcuts", "f");
  zoom.addEventListener("click", enlarge);
  figure.append(choose, zoom);
  return figure;
}

let offered;

function offer(kind) {  // anew only for another kind: the one that has the focus keeps it
  if (kind === offered) return;
  offered = kind;
  part("actions").replaceChildren(...buttons(kind));
}

function buttons(kind) {
  const button = (label, hint, keys, act) => {
    const node = document.createElement("button");
    node.type = "button";
    node.append(label);
    if (hint) {
      const key = document.createElement("kbd");
      key.textContent = hint;
      key.setAttribute("aria-hidden", "true");
      node.append(key);
    }
    node.setAttribute("aria-keyshortcuts", keys.join(" "));
    node.addEventListener("click", act);
    return node;
  };
  const undoes = button("Undo", "z", ["z", "Backspace"], undo);
  if (!kind) return [undoes];
  const list = ANSWERS[kind].map((a) => button(a.label, a.hint, a.keys, () => give(a.answer, a.label)));
  if (kind === "rank") list.push(button("The next is as good", "↓", ["ArrowDown"], join));
  return [...list, button("Skip", "s", ["s"], () => give("skip", "Skipped")), undoes];
}

function count() {
  const left = state.left, minutes = (left * (state.seconds || 0)) / 60;
  const pace = state.seconds ? `, ${state.seconds.toFixed(1)} s an answer` : "";
  const time = state.seconds && left ? `, about ${minutes < 1 ? "1 minute" : Math.round(minutes) + " minutes"} left` : "";
  part("counts").textContent = `${state.answered} answered, ${left} left${state.drawing ? " and more being drawn" : ""}${pace}${time}`;
  part("bar").max = state.answered + left || 1;
  part("bar").value = state.answered;
}

function enlarge() {
  document.body.classList.toggle("zoomed");
}

// --- answering -------------------------------------------------------------------------------------------------------

function chosen(i) {
  if (!current) return;
  if (current.kind === "rank") return ranked(i);
  const found = ANSWERS[current.kind].find((a) => a.sample === i);
  if (found) give(found.answer, found.label);
}

function give(answer, label) {
  if (!current || undoing || !part("samples").dataset.ready) return;  // nobody answers what is not on the screen yet
  const entry = current;
  const spent = Math.round(performance.now() - shownAt);
  keep([...pending(), {
    task: entry.task, question: entry.question, answer, milliseconds: spent, key: random(), rater: rater(),
  }]);
  queue.shift();
  state.answered += 1;
  if (!same(entry, queue[0]) && entry.task !== (queue[0] || {}).task) state.left = Math.max(0, state.left - 1);
  say(`${label}.${queue[0] ? ` Next: ${queue[0].prompt || "no prompt"}.` : ""}`);
  show();
  count();
  flush().then(() => { if (state.answered % 10 === 0) summary(); });
}

function ranked(i) {
  if (order.flat().includes(i)) return;
  if (joins && order.length) order[order.length - 1].push(i);
  else order.push([i]);
  joins = false;
  marks();
  if (order.flat().length === current.samples.length) give(JSON.stringify(ranks()), "Ranked");
  else say(`${place(i, 4)} is number ${ranks()[i]}.`);
}

function ranks() {
  const found = [];
  let before = 0;
  for (const group of order) {
    for (const i of group) found[i] = before + 1;
    before += group.length;
  }
  return found;
}

function marks() {
  const found = ranks();
  part("samples").querySelectorAll("figure").forEach((figure, i) => {
    figure.querySelector(".rank")?.remove();
    if (found[i] === undefined) return;
    const mark = document.createElement("span");
    mark.className = "rank";
    mark.textContent = found[i];
    figure.append(mark);
  });
}

function join() {
  if (!current || !order.length) return;
  joins = !joins;
  say(joins ? "The next one that you choose is as good as the last." : "The next one that you choose is worse than the last.");
}

async function undo() {
  if (undoing) return;
  if (order.length) {  // of a ranking that is not finished
    order[order.length - 1].pop();
    order = order.filter((group) => group.length);
    marks();
    say("Taken back.");
    return;
  }
  undoing = true;
  try {
    await flush();
    const found = await ask("undo", {});
    current = null;
    take(found);
    say(found.undone ? `Undone. Again: ${queue[0]?.prompt || "no prompt"}.` : "There is nothing to undo.");
  } catch (error) {
    say(error.status ? error.message : DOWN + " Nothing was undone.");
  } finally {
    undoing = false;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const own = current ? ANSWERS[current.kind].find((a) => a.keys.includes(key)) : null;
  if (own) give(own.answer, own.label);
  else if (current?.kind === "rank" && /^[1-9]$/.test(key) && Number(key) <= current.samples.length) chosen(Number(key) - 1);
  else if (current?.kind === "rank" && key === "ArrowDown") join();
  else if (key === "s") give("skip", "Skipped");
  else if (key === "z" || key === "Backspace") undo();
  else if (key === "f") enlarge();
  else if (key === "Escape") document.body.classList.remove("zoomed");
  else return;
  event.preventDefault();
});

part("rater").addEventListener("change", async () => {
  await flush();  // what was answered is the name's that answered it
  const before = rater(), name = part("rater").value.trim();
  if (name) localStorage.setItem(RATER, name);
  part("rater").value = rater();
  if (rater() === before) return;
  current = null;
  await refresh({ before });
  summary();
});

part("rater").value = rater();
refresh().then(summary);
setInterval(() => { if (!queue.length && !undoing && !flushing) refresh(); }, 1500);

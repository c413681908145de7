"use strict";
// Canvases of masked and committed cells on one clock, the step. The page of `unmask view` has all steps from the start; that
// of `unmask serve` gets them one by one.

const byId = (id) => document.getElementById(id);

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

// A token's text; signs that stand for a blank are fainter.
function signed(tag, text) {
  const made = element(tag);
  for (const part of text.split(/([␣⏎␍⇥])/).filter(Boolean)) {
    made.append(/^[␣⏎␍⇥]$/.test(part) ? element("i", "blank", part) : part);
  }
  return made;
}

// A line of a panel's <dl>; returns where the value stands.
function addFact(list, name, value) {
  const pair = element("div");
  const shown = element("dd", "", value);
  pair.append(element("dt", "", name), shown);
  list.append(pair);
  return shown;
}

const NEVER = -1; // the step of a cell that no step committed
const FIXED = -2; // and of one that was there before the first

// Candidates that `find(step)` promises, {cell: candidates}: each step once, one at a time. Until they are here: null.
function findOnce(find, redraw) {
  const known = new Map();
  let busy = false;
  async function add(step) {
    busy = true;
    known.set(step, await find(step));
    busy = false;
    redraw();
  }
  return (i, step) => {
    if (known.has(step)) return known.get(step)[i] ?? [];
    if (!busy) add(step);
    return null;
  };
}

// The viewer of the panels that are added to it. A panel has
//   name, and rows, how many candidates a cell shows;
//   live: more steps are to come; stopped: it ended before its plan did;
//   steps: how many are known; planned: an upper bound of them, while it is live;
//   token, text, step and logprob of each cell, horizon of each step (cells from there on were not open);
//   candidates(i, step): the likeliest tokens of a masked cell before a step, [{token, text, title, share}], or null;
//   likeliest(i, step): the share of the first of them, null if nobody knows;
//   progress: the element that says how many cells are committed.
// `drawn` and `settled` hear of every change of the view, and of those that do not just play.
function createViewer({ drawn = () => {}, settled = () => {} } = {}) {
  const panels = [];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  // Ever lighter from dark violet over blue to pale green: the order can be seen without telling hues apart.
  const STOPS = ["#2e1e3b", "#413d7b", "#37659e", "#348fa7", "#40b7ad", "#8ad9b1", "#d5f2df"];
  const RGB = STOPS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

  // What is shown: steps done, what the colors mean, the cell that was chosen and the one under the pointer (null: none).
  const view = { step: 0, color: "step", cell: null, hover: null };
  let last = 0;
  let timer = null;

  const maskedBefore = (p, i, step) => p.step[i] === NEVER || p.step[i] >= step;

  function color(share) {
    const at = Math.min(Math.max(share, 0), 1) * (RGB.length - 1);
    const low = Math.min(Math.floor(at), RGB.length - 2);
    return RGB[low].map((c, k) => Math.round(c + (RGB[low + 1][k] - c) * (at - low)));
  }

  // Black or white, whichever contrasts more (WCAG's relative luminance; at least 4.5 to 1).
  function inkOn(rgb) {
    const [r, g, b] = rgb.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  const percent = (share) => (share < 0.0005 ? "< 0.1 %" : share >= 0.9995 ? "> 99.9 %" : `${(100 * share).toFixed(1)} %`);
  const howCommitted = (p, i) =>
    p.step[i] === FIXED ? "given" : `committed in step ${p.step[i] + 1} at ${percent(Math.exp(p.logprob[i]))}`;

  // ---- panels ----------------------------------------------------------------------------------------------------------

  function addPanel(p) {
    const part = byId("panel").content.cloneNode(true).querySelector("article");
    part.setAttribute("aria-label", p.name);
    part.querySelector("h2").textContent = p.name;
    p.inspector = part.querySelector(".inspector");
    p.inspector.style.setProperty("--rows", p.rows);
    p.canvas = part.querySelector(".canvas");
    p.canvas.setAttribute("aria-label", `Canvas of ${p.name}, ${p.token.length} cells`);
    p.before = 0; // the pointer may be on a cell before the first draw
    buildCells(p);
    listenTo(p);
    panels.push(p);
    byId("panels").append(part);
    return part;
  }

  function buildCells(p) {
    p.looks = [];
    p.canvas.replaceChildren();
    p.cells = p.text.map((text, i) => {
      const cell = element("button", "cell");
      cell.type = "button";
      cell.dataset.cell = i;
      cell.append(signed("span", text));
      p.canvas.append(cell);
      if (text.endsWith("⏎")) p.canvas.append(element("br"));
      return cell;
    });
  }

  function clear() {
    pause();
    panels.length = 0;
    byId("panels").replaceChildren();
    Object.assign(view, { step: 0, cell: null, hover: null });
    speak("off");
  }

  // What a step of a live panel committed, [[cell, token, text, logprob], …]; drawn with the next frame.
  function commit(p, step, cells, horizon) {
    p.steps = step + 1;
    p.horizon[step] = horizon;
    setCells(p, step, cells);
    redraw();
  }

  function setCells(p, step, cells) {
    for (const [i, token, text, logprob] of cells) {
      p.token[i] = token;
      p.text[i] = text;
      p.step[i] = step;
      p.logprob[i] = logprob;
      p.cells[i].replaceChildren(signed("span", text));
      p.cells[i].title = text;
    }
  }

  let frame = 0;
  function redraw() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  }

  // A live panel gets no more steps.
  function finish(p) {
    p.live = false;
    view.step = Math.max(...panels.map((other) => other.steps));
    draw();
    if (!panels.some((other) => other.live)) pause();
  }

  // ---- what moves ------------------------------------------------------------------------------------------------------

  function drawCell(p, cell, i, masked, open, clock) {
    const step = p.step[i];
    const byConfidence = view.color === "confidence";
    const byStep = masked ? null : step / Math.max(1, (p.live ? p.planned : p.steps) - 1);
    const share = !byConfidence ? byStep : masked ? p.likeliest(i, p.before) : Math.exp(p.logprob[i]);
    const rgb = share === null || step === FIXED ? null : color(share);
    const kinds = { masked, closed: masked && i >= open, fresh: !masked && step === clock - 1, fixed: step === FIXED };
    const names = ["cell", ...Object.keys(kinds).filter((kind) => kinds[kind])].join(" ");
    const first = i === Math.min(view.cell ?? 0, p.cells.length - 1); // Tab leads to the chosen cell
    const look = `${names} ${rgb} ${i === view.cell} ${first}`;
    if (p.looks[i] === look) return;
    p.looks[i] = look;
    cell.className = names;
    cell.style.setProperty("--paint", rgb ? `rgb(${rgb})` : "");
    cell.style.setProperty("--over", masked || !rgb ? "" : inkOn(rgb));
    cell.setAttribute("aria-label", `cell ${i + 1}: ${masked ? "masked" : `${p.text[i]} ${howCommitted(p, i)}`}`);
    cell.setAttribute("aria-pressed", i === view.cell);
    cell.tabIndex = first ? 0 : -1;
  }

  function drawPanel(p) {
    const clock = p.live ? p.steps : view.step;
    const done = Math.min(clock, p.steps);
    p.before = p.live ? done : Math.max(Math.min(done, p.steps - 1), 0);
    const open = p.horizon[Math.min(p.before, p.horizon.length - 1)] ?? p.cells.length;
    let committed = 0;
    p.cells.forEach((cell, i) => {
      const masked = maskedBefore(p, i, done);
      committed += !masked && p.step[i] !== FIXED;
      drawCell(p, cell, i, masked, open, clock);
    });
    const ended = `, ${p.stopped ? "stopped after" : "done in"} ${p.steps} ${p.steps === 1 ? "step" : "steps"}`;
    const over = !p.live && p.steps && clock >= p.steps ? ended : "";
    p.progress.textContent = `${committed} of ${p.step.filter((step) => step !== FIXED).length}${over}`;
  }

  // What the model held at a cell: before the next step where it is masked, else before the step that committed it.
  function drawInspector(p) {
    const i = view.hover ?? view.cell;
    const known = i !== null && i < p.token.length;
    const masked = known && maskedBefore(p, i, p.live ? p.steps : view.step);
    const before = masked ? p.before : known ? p.step[i] : 0;
    const candidates = !known || before === FIXED ? [] : p.candidates(i, before);
    const shown = known ? `${i} ${before} ${masked} ${candidates !== null}` : i === null ? "none" : "beyond";
    if (p.shown === shown) return;
    p.shown = shown;
    if (!known) {
      const hint = i === null ? "Point at a cell, or tap it, to see what the model held there." : "This canvas ends before that cell.";
      p.inspector.replaceChildren(element("p", "", hint));
      return;
    }
    const line = element("p", "", `Cell ${i + 1}: `);
    if (masked) line.append(`masked. Held before step ${before + 1}:`);
    else line.append(element("b", "", p.text[i]), ` ${howCommitted(p, i)}. ${before === FIXED ? "" : "Held before it:"}`);
    const list = element("ol");
    for (const { token, text, title, share } of candidates ?? []) {
      const row = element("li", !masked && token === p.token[i] ? "taken" : "");
      const name = signed("b", text);
      name.title = title;
      const bar = element("i");
      bar.style.width = `${100 * share}%`;
      row.append(name, bar, element("span", "", percent(share)));
      list.append(row);
    }
    p.inspector.replaceChildren(line, list);
  }

  // The cell under the pointer, or else the chosen one.
  function drawChoice() {
    for (const p of panels) {
      p.chosen?.classList.remove("chosen");
      p.chosen = p.cells[view.hover ?? view.cell];
      p.chosen?.classList.add("chosen");
      drawInspector(p);
    }
  }

  function draw() {
    const live = panels.some((p) => p.live);
    last = Math.max(0, ...panels.map((p) => (p.live ? p.planned : p.steps)));
    view.step = live ? Math.max(...panels.map((p) => p.steps)) : Math.min(view.step, last);
    const words = last ? `step ${view.step} of ${last}` : "";
    byId("play").disabled = byId("step").disabled = live || last === 0;
    byId("step").max = last;
    byId("step").value = view.step;
    byId("step").setAttribute("aria-valuetext", words);
    byId("now").textContent = words;
    const byStep = view.color === "step";
    byId("low").textContent = byStep ? "first step" : "0 %";
    byId("high").textContent = byStep ? (panels.length > 1 ? "last step of each" : "last step") : "100 %";
    for (const choice of document.getElementsByName("color")) choice.checked = choice.value === view.color;
    panels.forEach(drawPanel);
    drawChoice();
    drawn(view);
  }

  function change(changes) {
    Object.assign(view, changes);
    view.step = Math.max(view.step, 0);
    draw();
    if (timer === null) settled(view);
  }

  function restore(moment) {
    pause();
    Object.assign(view, moment);
    draw();
  }

  function hover(cell) {
    view.hover = cell;
    drawChoice();
  }

  // ---- time ------------------------------------------------------------------------------------------------------------

  // Screen readers hear what a hand changed, not what plays.
  function speak(kind) {
    for (const part of [byId("now"), ...panels.map((p) => p.inspector)]) part.setAttribute("aria-live", kind);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    byId("play").textContent = "▶ Play";
    speak("polite");
  }

  function play() {
    speak("off");
    if (view.step >= last) change({ step: 0 });
    byId("play").textContent = "❚❚ Pause";
    timer = setInterval(() => {
      change({ step: view.step + 1 });
      if (view.step >= last) go(last);
    }, Math.min(Math.max(9000 / last, still ? 400 : 60), 700));
  }

  // To a step, by hand: what plays stops.
  function go(step) {
    pause();
    change({ step });
  }

  const toggle = () => (timer === null ? play() : go(view.step));

  // ---- hands -----------------------------------------------------------------------------------------------------------

  const MOVES = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  const combined = (event) => event.ctrlKey || event.metaKey || event.altKey;

  // Where an arrow leads inside a canvas: to the next cell, or to the one above or below.
  function neighbor(p, cell, key) {
    const i = Number(cell.dataset.cell);
    if (key in MOVES) return p.cells[Math.min(Math.max(i + MOVES[key], 0), p.cells.length - 1)];
    const box = cell.getBoundingClientRect();
    const y = key === "ArrowUp" ? box.top - box.height / 2 : box.bottom + box.height / 2;
    return document.elementFromPoint(box.left + box.width / 2, y)?.closest(".cell") ?? cell;
  }

  function choose(i) {
    change({ cell: i, hover: null });
  }

  function listenTo(p) {
    const at = (event) => event.target.closest(".cell")?.dataset.cell;
    const on = (kind, act) => p.canvas.addEventListener(kind, (event) => at(event) !== undefined && act(event, Number(at(event))));
    on("pointerover", (event, i) => event.pointerType === "mouse" && hover(i));
    on("mousedown", (event) => event.preventDefault()); // no focus: the arrows stay with the steps
    on("click", (_, i) => choose(i));
    on("focusin", (_, i) => choose(i));
    on("keydown", (event) => {
      if (combined(event) || !(event.key in MOVES || event.key === "ArrowUp" || event.key === "ArrowDown")) return;
      event.preventDefault();
      event.stopPropagation();
      neighbor(p, event.target, event.key).focus();
    });
    p.canvas.addEventListener("pointerleave", () => hover(null));
  }

  document.addEventListener("keydown", (event) => {
    if (combined(event)) return;
    const at = event.target;
    const ownKeys = at.matches("input:not(#step), select, textarea") || (at.matches("pre") && at.scrollHeight > at.clientHeight);
    if (event.key === "Escape") change({ cell: null, hover: null });
    else if (ownKeys || byId("step").disabled) return;
    else if (event.key === " " && !at.closest("button, summary")) toggle();
    else if (event.key in MOVES) go(view.step + MOVES[event.key]);
    else return;
    event.preventDefault();
  });

  byId("step").addEventListener("input", (event) => go(Number(event.target.value)));
  byId("play").addEventListener("click", toggle);
  byId("color").addEventListener("change", (event) => change({ color: event.target.value }));
  document.documentElement.style.setProperty("--scale", `linear-gradient(to right, ${STOPS.join(", ")})`);

  return { addPanel, buildCells, clear, commit, setCells, finish, redraw, restore };
}

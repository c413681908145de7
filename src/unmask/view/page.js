"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const panels = data.panels;
  const last = Math.max(...panels.map((p) => p.steps));
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  // Ever lighter from dark violet over blue to pale green: the order can be seen without telling hues apart.
  const STOPS = ["#2e1e3b", "#413d7b", "#37659e", "#348fa7", "#40b7ad", "#8ad9b1", "#d5f2df"];
  const RGB = STOPS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

  // What is shown: steps done, what the colors mean, the cell that was chosen and the one under the pointer (null: none).
  const view = { step: last, color: "step", cell: null, hover: null };
  let timer = null;

  // ---- the data ----------------------------------------------------------------------------------------------------

  function integers(text, wide) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return wide ? new Uint32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
  }

  const maskedBefore = (p, i, step) => p.step[i] < 0 || p.step[i] >= step;

  // Where a panel's candidates lie: of the masked cells from `first[step]` on, of a committed one at `rank`.
  function unpack(p) {
    p.top = integers(p.top, data.wide);
    p.probs = integers(p.probs, false);
    let count = 0;
    p.rank = p.step.map(() => -1);
    p.first = [];
    for (let step = 0; step < p.steps; step++) {
      p.first.push(count);
      p.step.forEach((at, i) => {
        if (at === step) p.rank[i] = count;
        count += maskedBefore(p, i, step);
      });
    }
    p.place = [];
  }

  const prob = (p, place, n) => p.probs[place * p.candidates + n] / 65535;

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

  const percent = (share) => (share < 0.0005 ? "< 0.1 %" : share >= 0.9995 ? "> 99.9 %" : `${(100 * share).toFixed(1)} %`);
  const howCommitted = (p, i) => `committed in step ${p.step[i] + 1} at ${percent(Math.exp(p.logprob[i]))}`;
  const textOf = (token) => data.vocabulary.texts[token];

  // ---- what does not move -----------------------------------------------------------------------------------------------

  function fact(list, name, value) {
    const pair = element("div");
    const shown = element("dd", "", value);
    pair.append(element("dt", "", name), shown);
    list.append(pair);
    return shown;
  }

  function buildPanel(p) {
    const part = byId("panel").content.cloneNode(true).querySelector("article");
    part.setAttribute("aria-label", p.decoder);
    part.querySelector("h2").textContent = p.decoder;
    const facts = part.querySelector("dl");
    fact(facts, "forward passes", p.nfe);
    p.progress = fact(facts, "committed", "");
    if (p.solved !== null) fact(facts, "graded", p.solved ? "✓ solved" : "✗ not solved");
    if (p.recorded !== null) fact(facts, "the record", p.recorded === p.text ? "✓ same text" : "✗ another text");
    part.querySelector("pre").textContent = p.text;
    if (p.recorded !== null && p.recorded !== p.text) {
      const text = part.querySelector("pre").cloneNode();
      text.setAttribute("aria-label", "Text in the record");
      text.textContent = p.recorded;
      part.append(element("h3", "", "Text in the record"), text);
    }
    p.inspector = part.querySelector(".inspector");
    p.inspector.style.setProperty("--rows", p.candidates);
    p.canvas = part.querySelector(".canvas");
    p.canvas.setAttribute("aria-label", `Canvas of ${p.decoder}, ${p.token.length} cells`);
    p.cells = p.token.map((token, i) => {
      const cell = element("button", "cell");
      cell.type = "button";
      cell.dataset.cell = i;
      cell.append(signed("span", textOf(token)));
      p.canvas.append(cell);
      if (textOf(token).endsWith("⏎")) p.canvas.append(element("br"));
      return cell;
    });
    byId("panels").append(part);
  }

  function shape(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // Tokens a step as bars over the slider's own axis, end tokens at their feet.
  function buildChart(p) {
    const all = new Array(p.steps).fill(0);
    const end = new Array(p.steps).fill(0);
    p.step.forEach((step, i) => {
      if (step < 0) return;
      all[step] += 1;
      if (p.token[i] in data.ends) end[step] += 1;
    });
    const most = Math.max(...all);
    const gap = last > 100 ? 0 : 0.06; // on either side of a bar
    const words = element("p");
    words.append(element("b", "", p.decoder), `: up to ${most} a step, ${end.reduce((a, b) => a + b)} end tokens`);
    const svg = shape("svg", { viewBox: `0 0 ${last} ${most}`, preserveAspectRatio: "none", role: "img", "aria-label": "tokens a step" });
    all.forEach((n, s) => {
      const size = { x: s + gap, width: 1 - 2 * gap };
      svg.append(shape("rect", { ...size, y: most - end[s], height: end[s], class: "end" }));
      svg.append(shape("rect", { ...size, y: most - n, height: n - end[s], class: "other" }));
    });
    p.cursor = shape("line", { y1: 0, y2: most, class: "cursor", "vector-effect": "non-scaling-stroke" });
    svg.append(p.cursor);
    byId("charts").append(svg, words);
  }

  function buildNotes() {
    const notes = [
      ["The clock is the step: one forward pass, or two with guidance.", true],
      ["All canvases share the clock; one that needs fewer steps stays as it is after its last.", panels.length > 1],
      ["Confidence is a token's probability when it was committed; the lower edge of a masked cell shows its likeliest token's.", true],
      ["The bars under a canvas show what the model itself held at a cell (temperature 1, guidance included): before the next step where "
        + "the cell is masked, else before the step that committed it.", true],
      ["A decoder with a cache saw an approximation; the bars are those of whole forward passes.", panels.some((p) => p.cache)],
      ["A canvas stops once its text is finished; what is masked then is never committed.", panels.some((p) => p.step.includes(-1))],
      [`Model: ${data.model}, weights ${data.weights}.`, true],
    ];
    byId("notes").append(...notes.filter(([, holds]) => holds).map(([text]) => element("li", "", text)));
  }

  // ---- what moves ------------------------------------------------------------------------------------------------------

  function drawCell(p, cell, i, masked, place, open) {
    const step = p.step[i];
    const byConfidence = view.color === "confidence";
    const share = byConfidence ? (masked ? prob(p, place, 0) : Math.exp(p.logprob[i])) : step / Math.max(1, p.steps - 1);
    const rgb = masked && !byConfidence ? null : color(share);
    const fresh = !masked && step === view.step - 1;
    const kinds = { masked, closed: masked && i >= open, fresh };
    cell.className = ["cell", ...Object.keys(kinds).filter((kind) => kinds[kind])].join(" ");
    cell.style.setProperty("--paint", rgb ? `rgb(${rgb})` : "");
    cell.style.setProperty("--over", masked ? "" : inkOn(rgb));
    cell.setAttribute("aria-label", `cell ${i + 1}: ${masked ? "masked" : `${textOf(p.token[i])} ${howCommitted(p, i)}`}`);
    cell.setAttribute("aria-pressed", i === view.cell);
    cell.tabIndex = i === Math.min(view.cell ?? 0, p.cells.length - 1) ? 0 : -1; // Tab leads to the chosen cell
  }

  function drawPanel(p) {
    const done = Math.min(view.step, p.steps);
    p.before = Math.min(done, p.steps - 1);
    const open = p.horizon[p.before];
    let place = p.first[p.before];
    let committed = 0;
    p.cells.forEach((cell, i) => {
      const here = maskedBefore(p, i, p.before) ? place++ : -1;
      const masked = maskedBefore(p, i, done);
      p.place[i] = masked ? here : p.rank[i];
      committed += !masked;
      drawCell(p, cell, i, masked, p.place[i], open);
    });
    const over = view.step >= p.steps ? `, done in ${p.steps} ${p.steps === 1 ? "step" : "steps"}` : "";
    p.progress.textContent = `${committed} of ${p.token.length}${over}`;
    p.cursor.setAttribute("transform", `translate(${view.step})`);
  }

  function drawInspector(p) {
    const i = view.hover ?? view.cell;
    const masked = i !== null && maskedBefore(p, i, view.step);
    const shown = i === null ? "none" : i in p.place ? `${p.place[i]} ${masked}` : "beyond";
    if (p.shown === shown) return;
    p.shown = shown;
    if (i === null || i >= p.token.length) {
      const hint = i === null ? "Point at a cell, or tap it, to see what the model held there." : "This canvas ends before that cell.";
      p.inspector.replaceChildren(element("p", "", hint));
      return;
    }
    const line = element("p", "", `Cell ${i + 1}: `);
    if (masked) line.append(`masked. Held before step ${p.before + 1}:`);
    else line.append(element("b", "", textOf(p.token[i])), ` ${howCommitted(p, i)}. Held before it:`);
    const list = element("ol");
    for (let n = 0; n < p.candidates; n++) {
      const token = p.top[p.place[i] * p.candidates + n];
      const row = element("li", !masked && token === p.token[i] ? "taken" : "");
      const name = signed("b", [textOf(token), data.ends[token]].join(" ").trim());
      name.title = `${textOf(token)} (token ${data.vocabulary.ids[token]})`;
      const share = prob(p, p.place[i], n);
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
    byId("step").value = view.step;
    byId("step").setAttribute("aria-valuetext", `step ${view.step} of ${last}`);
    byId("now").textContent = `step ${view.step} of ${last}`;
    const byStep = view.color === "step";
    byId("low").textContent = byStep ? "first step" : "0 %";
    byId("high").textContent = byStep ? (panels.length > 1 ? "last step of each" : "last step") : "100 %";
    for (const choice of document.getElementsByName("color")) choice.checked = choice.value === view.color;
    panels.forEach(drawPanel);
    drawChoice();
  }

  function change(changes) {
    Object.assign(view, changes);
    view.step = Math.min(Math.max(view.step, 0), last);
    draw();
    if (timer === null) keep();
  }

  function hover(cell) {
    view.hover = cell;
    drawChoice();
  }

  // ---- the address -----------------------------------------------------------------------------------------------------

  let keeping = 0;
  function keep() {
    clearTimeout(keeping); // browsers allow few changes of the address a second
    keeping = setTimeout(() => {
      const cell = view.cell === null ? "" : `&cell=${view.cell + 1}`;
      history.replaceState(null, "", `#step=${view.step}&color=${view.color}${cell}`);
    }, 200);
  }

  function restore() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const number = (key, other) => (/^\d+$/.test(wanted.get(key)) ? Number(wanted.get(key)) : other);
    pause();
    view.color = wanted.get("color") === "confidence" ? "confidence" : "step";
    view.step = Math.min(number("step", last), last);
    view.cell = number("cell", 0) ? number("cell", 0) - 1 : null;
    draw();
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
    const ownKeys = at.matches("input:not(#step)") || (at.matches("pre") && at.scrollHeight > at.clientHeight);
    if (event.key === "Escape") change({ cell: null, hover: null });
    else if (ownKeys) return;
    else if (event.key === " " && !at.closest("button, summary")) toggle();
    else if (event.key in MOVES) go(view.step + MOVES[event.key]);
    else return;
    event.preventDefault();
  });

  panels.forEach((p) => {
    unpack(p);
    buildPanel(p);
    buildChart(p);
    listenTo(p);
  });
  buildNotes();
  byId("prompt").querySelector("pre").textContent = data.prompt;
  byId("step").max = last;
  byId("step").addEventListener("input", (event) => go(Number(event.target.value)));
  byId("play").addEventListener("click", toggle);
  byId("color").addEventListener("change", (event) => change({ color: event.target.value }));
  document.documentElement.style.setProperty("--scale", `linear-gradient(to right, ${STOPS.join(", ")})`);
  addEventListener("hashchange", restore);
  restore();
})();

(() => {
  const data = JSON.parse(byId("data").textContent);
  const panels = data.panels.map(unpack);
  const last = Math.max(...panels.map((p) => p.steps));

  // ---- the data ----------------------------------------------------------------------------------------------------

  function integers(text, wide) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return wide ? new Uint32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
  }

  // A panel for the viewer. Its candidates lie in order of steps, and within a step those of the masked cells from left to right.
  function unpack(p) {
    const top = integers(p.top, data.wide);
    const probs = integers(p.probs, false);
    const masked = (step) => p.step.flatMap((at, i) => (at === NEVER || at >= step ? [i] : []));
    const first = [0];
    for (let step = 0; step < p.steps; step++) first.push(first[step] + masked(step).length);
    let latest = null; // the step that was asked for last, and the places of its cells
    function place(i, step) {
      if (latest?.step !== step) latest = { step, places: new Map(masked(step).map((cell, n) => [cell, first[step] + n])) };
      return latest.places.get(i) * p.candidates;
    }
    const share = (at) => probs[at] / 65535;
    function candidate(at) {
      const token = top[at];
      const text = data.vocabulary.texts[token];
      const title = `${text} (token ${data.vocabulary.ids[token]})`;
      return { token, text: [text, data.ends[token]].join(" ").trim(), title, share: share(at) };
    }
    return {
      ...p,
      name: p.decoder,
      final: p.text,
      text: p.token.map((token) => data.vocabulary.texts[token]),
      rows: p.candidates,
      candidates: (i, step) => Array.from({ length: p.candidates }, (_, n) => candidate(place(i, step) + n)),
      likeliest: (i, step) => share(place(i, step)),
    };
  }

  // ---- what does not move -----------------------------------------------------------------------------------------------

  function buildPanel(p) {
    const part = viewer.addPanel(p);
    const facts = part.querySelector("dl");
    addFact(facts, "forward passes", p.nfe);
    p.progress = addFact(facts, "committed", "");
    if (p.solved !== null) addFact(facts, "graded", p.solved ? "✓ solved" : "✗ not solved");
    if (p.recorded !== null) addFact(facts, "the record", p.recorded === p.final ? "✓ same text" : "✗ another text");
    part.querySelector("pre").textContent = p.final;
    if (p.recorded !== null && p.recorded !== p.final) {
      const text = part.querySelector("pre").cloneNode();
      text.setAttribute("aria-label", "Text in the record");
      text.textContent = p.recorded;
      part.append(element("h3", "", "Text in the record"), text);
    }
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
    words.append(element("b", "", p.name), `: up to ${most} a step, ${end.reduce((a, b) => a + b)} end tokens`);
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
      ["A canvas stops once its text is finished; what is masked then is never committed.", panels.some((p) => p.step.includes(NEVER))],
      [`Model: ${data.model}, weights ${data.weights}.`, true],
    ];
    byId("notes").append(...notes.filter(([, holds]) => holds).map(([text]) => element("li", "", text)));
  }

  // ---- the address -----------------------------------------------------------------------------------------------------

  let keeping = 0;
  function keep(view) {
    clearTimeout(keeping); // browsers allow few changes of the address a second
    keeping = setTimeout(() => {
      const cell = view.cell === null ? "" : `&cell=${view.cell + 1}`;
      history.replaceState(null, "", `#step=${view.step}&color=${view.color}${cell}`);
    }, 200);
  }

  function restore() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const number = (key, other) => (/^\d+$/.test(wanted.get(key)) ? Number(wanted.get(key)) : other);
    const color = wanted.get("color") === "confidence" ? "confidence" : "step";
    viewer.restore({ step: number("step", last), color, cell: number("cell", 0) ? number("cell", 0) - 1 : null });
  }

  function moveCursors(view) {
    for (const p of panels) p.cursor.setAttribute("transform", `translate(${view.step})`);
  }

  const viewer = createViewer({ drawn: moveCursors, settled: keep });
  panels.forEach((p) => {
    buildPanel(p);
    buildChart(p);
  });
  buildNotes();
  byId("prompt").querySelector("pre").textContent = data.prompt;
  addEventListener("hashchange", restore);
  restore();
})();

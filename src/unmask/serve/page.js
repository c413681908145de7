"use strict";
(() => {
  const ROWS = 5; // candidates of a cell
  const viewer = createViewer();
  let info = null; // what /unmask/info says
  const turns = []; // of the conversation: {role, content, shown}
  let runs = []; // the last turn's decodes, each a panel of the viewer
  let running = null; // aborts them

  // ---- the server ------------------------------------------------------------------------------------------------------

  // Waits for a key if the server wants one. Throws an Error with the server's sentence.
  async function call(path, body = null, signal = null) {
    const key = sessionStorage.getItem("key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) });
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const message = said?.error?.message ?? `The server answered with status ${response.status}.`;
    if (response.status !== 401) throw new Error(message);
    say("", message);
    await readKey(signal);
    return call(path, body, signal);
  }

  // The events of a stream, as objects.
  async function* readEvents(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") return;
        if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
      }
    }
    throw new Error("The connection to the server ended early.");
  }

  function say(state, error = "") {
    byId("state").textContent = state;
    byId("error").textContent = error;
  }

  // Shows the field for the key; ends when one was typed, or the signal aborts.
  async function readKey(signal) {
    const form = byId("access");
    form.hidden = false;
    byId("key").focus();
    await new Promise((resolve) => {
      form.addEventListener("submit", resolve, { once: true });
      signal?.addEventListener("abort", resolve, { once: true });
    });
    sessionStorage.setItem("key", byId("key").value);
    form.hidden = true;
    say("");
  }

  // ---- the conversation ------------------------------------------------------------------------------------------------

  const isCompletion = () => byId("mode").querySelector(":checked").value === "completion";

  function addTurn(role, content) {
    const names = { user: isCompletion() ? "Prompt" : "You", assistant: info.model, system: "System" };
    const item = element("li", role);
    const shown = element("p", "", content);
    item.append(element("h3", "", names[role]), shown);
    byId("turns").append(item);
    turns.push({ role, content, shown });
    scrollDown(byId("turns"));
  }

  function dropTurns(from = 0) {
    for (const turn of turns.splice(from)) turn.shown.parentElement.remove();
  }

  const scrollDown = (box) => box.scrollTo(0, box.scrollHeight);

  // The conversation goes on with this decode's text.
  function pick(run) {
    for (const other of runs) {
      other.picked = other === run;
      other.button.setAttribute("aria-pressed", other.picked);
      other.button.textContent = other.picked ? "✓ Continues with this answer" : "Continue with this answer";
    }
    showText(run);
  }

  function showText(run) {
    run.box.textContent = run.said;
    scrollDown(run.box);
    const turn = turns.at(-1);
    if (!run.picked || turn?.role !== "assistant") return;
    turn.content = turn.shown.textContent = (run.request.prefill ?? "") + run.said;
    scrollDown(byId("turns"));
  }

  function restart() {
    running?.abort();
    dropTurns();
    buildPanels();
    setRunning(null);
    say("");
  }

  // ---- decoders --------------------------------------------------------------------------------------------------------

  const rows = () => [...byId("decoders").children];

  function specOf(row) {
    const parameters = row.querySelector("input").value.replace(/\s/g, "");
    return row.querySelector("select").value + (parameters && `:${parameters}`);
  }

  function addDecoder(spec) {
    const presets = Object.keys(info.decoders);
    const preset = presets.find((name) => spec.split(":")[0] === name); // none: the server's own, from a file
    const row = byId("decoder").content.cloneNode(true).firstElementChild;
    const [select, input, remove] = ["select", "input", "button"].map((tag) => row.querySelector(tag));
    select.append(...(preset ? presets : [spec, ...presets]).map((name) => new Option(name)));
    select.value = preset ?? spec;
    input.value = preset ? spec.slice(preset.length + 1) : "";
    for (const kind of ["input", "focusin", "focusout", "keyup"]) row.addEventListener(kind, () => describe(row));
    row.addEventListener("change", previewPanels);
    input.addEventListener("focus", () => rows().forEach((other) => other.classList.toggle("current", other === row)));
    remove.addEventListener("click", () => {
      row.remove();
      changeDecoders();
      byId("compare").focus();
    });
    byId("decoders").append(row);
    describe(row);
    changeDecoders();
    return select;
  }

  function compare() {
    const first = rows()[0].querySelector("select").value;
    addDecoder(Object.keys(info.decoders).find((name) => name !== first)).focus();
  }

  function changeDecoders() {
    byId("compare").hidden = rows().length > 1;
    rows().forEach((row) => (row.querySelector("button").hidden = rows().length === 1));
    previewPanels();
  }

  // What the parameter at the caret does, or what the preset sets.
  function describe(row) {
    const input = row.querySelector("input");
    const typed = input.value.slice(0, input.selectionStart).split(",").pop().split("=")[0].trim();
    const field = input === document.activeElement && info.fields.find(({ name }) => name === typed);
    const sets = Object.entries(info.decoders[row.querySelector("select").value] ?? {}).map((pair) => pair.join("="));
    row.querySelector("p").textContent = field ? `${field.name}: ${field.about}` : sets.length ? `Sets ${sets.join(", ")}` : "";
  }

  function listField(field) {
    const name = element("button", "link", field.name);
    name.type = "button";
    name.title = `Add ${field.name}= to the parameters`;
    name.addEventListener("click", () => {
      const row = rows().find((other) => other.classList.contains("current")) ?? rows()[0];
      const input = row.querySelector("input");
      input.value = [input.value.trim(), `${field.name}=`].filter(Boolean).join(", ");
      input.focus();
    });
    const term = element("dt");
    term.append(name);
    const allowed = field.choices ? field.choices.join(" | ") : field.type;
    return [term, element("dd", "", `${field.about} (${allowed}, ${field.default ?? "none"} by default)`)];
  }

  // ---- decodes ---------------------------------------------------------------------------------------------------------

  // Empty canvases, one a decoder. Without a request they only show what is to come.
  function buildPanels(request = null, example = null) {
    viewer.clear();
    runs = rows().map((row) => createRun(specOf(row), request, example));
    byId("save").disabled = true;
    viewer.redraw();
  }

  function previewPanels() {
    if (!turns.length && byId("length").checkValidity()) buildPanels();
  }

  function createRun(decoder, request, example) {
    const run = { name: decoder, request, live: request !== null, rows: ROWS, said: "", solved: null, nfe: 0, picked: false };
    run.candidates = request ? findOnce((step) => findCandidates(run, step), viewer.redraw) : () => [];
    run.likeliest = () => null;
    clearCells(run, byId("length").checkValidity() ? byId("length").valueAsNumber : info.max_new_tokens);
    const part = viewer.addPanel(run);
    const facts = part.querySelector("dl");
    run.passes = addFact(facts, "forward passes", "0");
    run.seconds = addFact(facts, "seconds", "0.0");
    run.progress = addFact(facts, "committed", "");
    run.graded = example && addFact(facts, "graded", "—");
    run.box = part.querySelector("pre");
    run.button = part.querySelector(".pick");
    run.button.hidden = rows().length === 1;
    run.button.addEventListener("click", () => pick(run));
    return run;
  }

  function clearCells(run, length) {
    const all = (value) => new Array(length).fill(value);
    Object.assign(run, { token: all(info.mask_id), text: all(""), step: all(NEVER), logprob: all(0), horizon: [], steps: 0, planned: 1 });
  }

  // Returns the error, if there was one other than the reader's stop.
  async function decode(run, signal) {
    run.started = performance.now();
    const path = "prompt" in run.request ? "/v1/completions" : "/v1/chat/completions";
    const options = { model: info.model, decoder: run.name, stream: true, stream_options: { drafts: true } };
    try {
      for await (const event of readEvents(await call(path, { ...run.request, ...options }, signal))) {
        if (event.error) throw new Error(event.error.message);
        if (event.draft) applyDraft(run, event.draft);
        for (const choice of event.choices) applyChoice(run, choice);
      }
    } catch (error) {
      run.stopped = true;
      if (signal.aborted) return;
      say("", error.message);
      return error;
    } finally {
      tick(run);
      viewer.finish(run);
    }
  }

  function applyDraft(run, draft) {
    if ("step" in draft) {
      viewer.commit(run, draft.step, draft.cells, draft.horizon);
      run.nfe = draft.nfe ?? draft.step + 1;
      return;
    }
    if (draft.canvas !== run.token.length) { // a template's
      clearCells(run, draft.canvas);
      viewer.buildCells(run);
    }
    run.planned = draft.steps;
    viewer.setCells(run, FIXED, draft.cells);
    viewer.redraw();
  }

  function applyChoice(run, choice) {
    run.nfe = choice.nfe ?? run.nfe;
    const text = choice.delta?.content ?? choice.text;
    if (!text) return;
    run.said += text;
    showText(run);
  }

  function tick(run) {
    run.passes.textContent = run.nfe;
    run.seconds.textContent = ((performance.now() - run.started) / 1000).toFixed(1);
  }

  // What the server must be told again about a decode.
  function stateOf({ request: { messages, prompt, prefill }, name, token, step }) {
    return { messages, prompt, prefill, decoder: name, tokens: token, step: step.map((at) => Math.max(at, NEVER)) };
  }

  async function findCandidates(run, before) {
    const state = { ...stateOf(run), before, count: ROWS };
    try {
      const { cells } = await (await call("/unmask/candidates", state)).json();
      const candidate = ([token, text, share]) => ({ token, text, title: `${text} (token ${token})`, share });
      return Object.fromEntries(Object.entries(cells).map(([i, found]) => [i, found.map(candidate)]));
    } catch (error) {
      say("", error.message);
      return {};
    }
  }

  async function grade(run, { task, index }) {
    const found = await (await call("/unmask/grade", { task, index, completion: run.said })).json();
    const partly = found.score > 0 && found.score < 1 ? `, ${found.score_name} ${found.score.toFixed(2)}` : "";
    run.solved = found.solved;
    run.graded.textContent = (found.solved ? "✓ solved" : "✗ not solved") + partly;
  }

  // ---- a turn ----------------------------------------------------------------------------------------------------------

  function setRunning(controller) {
    const [stop, send] = [byId("stop"), byId("send")];
    const focused = [stop, send].includes(document.activeElement);
    running = controller;
    stop.hidden = !running;
    send.hidden = Boolean(running);
    byId("save").disabled = Boolean(running) || runs.every((run) => run.steps === 0);
    for (const run of runs) run.button.disabled = Boolean(running) || !run.request;
    if (focused) (running ? stop : byId("text")).focus();
  }

  function settingsAreValid() {
    const invalid = byId("settings").querySelector(":invalid");
    if (invalid) byId("settings").open = true;
    return invalid?.reportValidity() ?? true;
  }

  function requestOf(prefill) {
    const messages = turns.map(({ role, content }) => ({ role, content }));
    const prompt = isCompletion() ? { prompt: messages.at(-1).content } : { messages, prefill };
    return { ...prompt, max_tokens: byId("length").valueAsNumber, seed: byId("seed").valueAsNumber };
  }

  async function startTurn(messages, { prefill = "", example = null } = {}) {
    if (isCompletion()) dropTurns();
    const before = turns.length;
    for (const { role, content } of messages) addTurn(role, content);
    const request = requestOf(prefill);
    addTurn("assistant", "");
    buildPanels(request, example);
    pick(runs[0]);
    if (byId("answer").getBoundingClientRect().top > innerHeight / 2) byId("answer").scrollIntoView();
    const controller = new AbortController();
    setRunning(controller);
    say("Decoding…");
    const errors = await decodeAll(controller.signal);
    if (running !== controller) return; // another conversation has begun
    setRunning(null);
    if (errors.length && runs.every((run) => run.steps === 0)) {
      dropTurns(before);
      if (!example) byId("text").value = messages.at(-1).content;
    }
    if (errors.length) return;
    say(controller.signal.aborted ? "Stopped." : "Done.");
    if (example && !controller.signal.aborted) await Promise.all(runs.map((run) => grade(run, example)));
  }

  // Returns the errors.
  async function decodeAll(signal) {
    const clock = setInterval(() => runs.filter((run) => run.live).forEach(tick), 100);
    const errors = await Promise.all(runs.map((run) => decode(run, signal)));
    clearInterval(clock);
    return errors.filter(Boolean);
  }

  function send() {
    const content = byId("text").value;
    if (!info || running || !content.trim() || !settingsAreValid()) return;
    byId("text").value = "";
    return startTurn([{ role: "user", content }]);
  }

  function tryExample(example) {
    if (!settingsAreValid()) return;
    byId("mode").querySelector("[value=chat]").checked = true;
    changeMode();
    return startTurn(example.messages, { prefill: example.prefill, example });
  }

  async function save() {
    say("Preparing the page…");
    const panels = runs.filter((run) => run.steps > 0).map((run) => {
      const { logprob, said: text, solved } = run;
      return { ...stateOf(run), logprob, text, solved };
    });
    const page = await (await call("/unmask/view", { panels })).blob();
    const link = element("a");
    link.href = URL.createObjectURL(page);
    link.download = "decode.html";
    link.click();
    URL.revokeObjectURL(link.href);
    say("");
  }

  // ---- the page --------------------------------------------------------------------------------------------------------

  // What fails is said in the line of the box.
  const reportErrors = (act) => async (...values) => {
    try {
      await act(...values);
    } catch (error) {
      say("", error.message);
    }
  };

  function listExamples() {
    for (const task of new Set(info.examples.map((example) => example.task))) {
      const group = element("p", "", task);
      for (const example of info.examples.filter((other) => other.task === task)) {
        const chip = element("button", "", example.title.replace(`${task} `, ""));
        chip.type = "button";
        chip.setAttribute("aria-label", `Try ${example.title}`);
        chip.addEventListener("click", reportErrors(() => tryExample(example)));
        group.append(chip);
      }
      byId("examples").append(group);
    }
  }

  function changeMode() {
    byId("text").placeholder = isCompletion() ? "Text to go on with, or with gaps: The capital of <|mask:4|> is Rome." : "Message";
    restart();
  }

  async function start() {
    info = await (await call("/unmask/info")).json();
    document.title = `${info.model} · unmask`;
    byId("model").textContent = `${info.model}, weights ${info.weights}`;
    byId("length").value = info.max_new_tokens;
    byId("length").max = info.max_length;
    byId("panels").style.setProperty("--glyphs", Math.min(Math.max(info.glyph_width ?? 4, 1), 8));
    byId("fields").append(...info.fields.flatMap(listField));
    listExamples();
    addDecoder(info.default_decoder);
    changeMode();
  }

  byId("settings").open = matchMedia("(min-width: 64rem)").matches;
  byId("box").addEventListener("submit", reportErrors((event) => {
    event.preventDefault();
    return send();
  }));
  byId("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("box").requestSubmit();
  });
  byId("access").addEventListener("submit", (event) => event.preventDefault());
  byId("stop").addEventListener("click", () => running.abort());
  byId("restart").addEventListener("click", () => {
    restart();
    byId("text").focus();
  });
  byId("mode").addEventListener("change", changeMode);
  byId("compare").addEventListener("click", compare);
  byId("length").addEventListener("input", previewPanels);
  byId("save").addEventListener("click", reportErrors(save));
  reportErrors(start)();
})();

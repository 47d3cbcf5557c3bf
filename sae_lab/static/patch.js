// A latent is edited at some tokens. Choices go to the kernel; what comes back is drawn. Results are Python's HTML.
const OPERATIONS = { ablate: "its activation becomes 0", set: "its activation becomes the value", scale: "its activation is multiplied by the value",
  add: "the value is added to its activation", swap: "its activations become those on the other prompt of the pair, token for token" };
const PLACES = { fires: "where it fires", chosen: "chosen tokens", all: "all tokens" };
const ERRORS = { keep: "kept", drop: "dropped" }, NAMES = ["its median", "90 % of its own activations", "99 % of its own activations", "its largest"];
const signed = (x, most = 0) => (x > 0 ? "+" : "") + level(x, most, 2).replace("-", "−");

/** A row of choices of which one holds: radios that look like one switch. */
function segments(name, choices, pick) {
  const group = `sl-x-${Math.random().toString(36).slice(2)}`, inputs = new Map();
  const box = make("div", { className: "sl-x-seg", role: "radiogroup", ariaLabel: name });
  for (const [value, [text, title]] of Object.entries(choices)) {
    const input = make("input", { type: "radio", name: group, value });
    input.onchange = () => pick(value);
    inputs.set(value, input);
    box.append(make("label", { title }, input, make("span", { textContent: text })));
  }
  return { box, show: (value) => inputs.forEach((input, key) => { input.checked = key === value; }), of: (value) => inputs.get(value) };
}

/** Send choices one at a time: while one is computed, only the last of those that follow is kept. */
function sender(ask, says, shown) {
  let busy = false, next = null;
  const tell = (textContent, error = false) => { says.textContent = textContent; says.className = error ? "sl-x-says sl-error" : "sl-x-says sl-quiet"; };
  async function send(name, args) {
    if (busy) { next = [name, args]; return; }
    busy = true;
    const slow = setTimeout(() => tell("computing …"), 250);
    try { await ask(name, args); tell(""); }
    catch (error) { tell(error.message, true); if (!next) shown(); }
    clearTimeout(slow);
    busy = false;
    if (next) { const [again, given] = next; next = null; send(again, given); }
  }
  return { send, tell };
}

function render({ model, el }) {
  el.classList.add("sl", "sl-patch");
  const ask = asker(model), note = notes(el), get = (name) => model.get(name), facts = () => get("facts"), choice = () => get("choice");
  const says = make("span", { className: "sl-x-says", role: "status" }), edit = make("b", { className: "sl-x-edit" });
  const kernel = sender(ask, says, () => draw());
  let wanted = null, last = -1, at = 0;
  const change = (part, moving = false) => { wanted = { ...choice(), ...wanted, ...part }; kernel.send("edit", { choice: wanted, moving }); };

  const title = make("b", { className: "sl-x-title" }), about = make("span", { className: "sl-quiet" }), words = make("span", {});
  const errors = segments("the dictionary's error", { keep: [ERRORS.keep, "what the dictionary does not explain stays"], drop: [ERRORS.drop, "the model reads the reconstruction alone"] }, (error) => change({ error }));
  const latent = make("input", { type: "number", min: 0, step: 1, className: "sl-x-latent", ariaLabel: "latent" });
  const operations = segments("operation", Object.fromEntries(Object.entries(OPERATIONS).map(([name, said]) => [name, [name, said]])), (operation) => change({ operation, value: first(operation) }));
  const places = segments("where", Object.fromEntries(Object.entries(PLACES).map(([name, said]) => [name, [said, name === "chosen" ? "click tokens below" : ""]])), (place) => {
    if (place === "chosen" && !choice().positions.length) return change({ at: place, positions: facts().edited.flatMap((on, i) => (on ? [i] : [])) });
    return change({ at: place });
  });
  const slider = make("input", { type: "range", ariaLabel: "value, coarse" }), value = make("input", { type: "number", step: "any", className: "sl-x-value", ariaLabel: "value" });
  const rank = make("span", { className: "sl-quiet sl-x-rank" }), values = make("div", { className: "sl-x-values" }, slider, value, rank);
  const answer = make("input", { type: "text", ariaLabel: "answer", placeholder: "answer" }), distractor = make("input", { type: "text", ariaLabel: "distractor", placeholder: "distractor" });
  const prompt = make("input", { type: "number", min: 0, step: 1, ariaLabel: "prompt", className: "sl-x-value" }), prompts = make("label", {});
  prompts.append("prompt ", prompt);
  const part = (name, ...children) => make("div", { className: "sl-x-part" }, make("span", { className: "sl-x-name", textContent: name }), ...children);
  const tokens = make("div", { className: "sl-x-tokens", role: "listbox", ariaLabel: "tokens; Enter chooses where the edit is made", ariaMultiSelectable: "true", dir: "ltr" });
  const legend = make("div", { className: "sl-quiet sl-x-legend" }), results = make("div", { className: "sl-x-results" }), past = make("div", { className: "sl-x-past" });
  el.prepend(
    make("div", { className: "sl-x-head" }, title, about),
    make("div", { className: "sl-x-choice" }, part("latent", latent, words), part("edit", operations.box, values), part("where", places.box),
      part("error", errors.box), part("judge", answer, make("span", { textContent: "against" }), distractor, prompts)),
    make("div", { className: "sl-x-line" }, edit, says), tokens, legend, results, past);

  const first = (operation) => ({ set: natural(2), add: natural(2), scale: 2 })[operation] ?? 0;
  const natural = (i) => facts().natural[i] ?? (largest(facts().before.filter((x) => x !== null)) || 1);
  const reach = (operation) => (operation === "scale" ? [-1, 4] : operation === "add" ? [-1.5 * natural(3), 1.5 * natural(3)] : [0, 1.5 * natural(3)]);

  function draw() {
    const now = choice(), { size, prompts: n, source } = facts();
    wanted = null;
    title.textContent = facts().title || "patch";
    about.textContent = facts().facts;
    latent.value = now.latent < 0 ? "" : now.latent;
    if (size) latent.max = size - 1;
    words.replaceChildren(...chips(facts().words));
    operations.show(now.operation);
    operations.of("swap").disabled = !source.length;
    operations.of("swap").parentElement.title = source.length ? OPERATIONS.swap : "needs a pair of prompts of equal length";
    places.show(now.at);
    errors.show(now.error);
    answer.value = now.answer;
    distractor.value = now.distractor;
    [answer.placeholder, distractor.placeholder] = facts().judge.length ? facts().judge : ["answer", "distractor"];
    prompts.hidden = n < 2;
    prompt.max = n - 1;
    prompt.value = now.prompt;
    edit.textContent = facts().edit || (now.latent < 0 ? "Choose a latent: click one in a linked view, or write its number." : "Nothing is edited.");
    kernel.tell(get("problem"), Boolean(get("problem")));
    drawValue(now.operation, now.value);
    drawTokens();
    drawPast();
  }

  function drawValue(operation, x) {
    values.hidden = operation === "ablate" || operation === "swap";
    const [low, high] = reach(operation);
    Object.assign(slider, { min: low, max: high, step: (high - low) / 200 });
    slider.value = x;
    if (document.activeElement !== value) value.value = Number(x.toPrecision(4));
    const known = facts().natural.filter((each) => each !== null), over = known.filter((each) => x > each).length;
    rank.textContent = operation === "scale" || !known.length ? (operation === "scale" ? "times its activation" : "") : over ? `above ${NAMES[over - 1]}${over === 4 ? ", off its distribution" : ""}` : x < 0 ? "below zero" : "below its median";
  }

  function drawTokens() {
    const { tokens: text, change: moved, loss, edited, special, before, after, source } = facts(), most = largest(moved.filter((x) => x !== null));
    const shade = (x) => (!x ? "" : `color-mix(in srgb, var(${x > 0 ? "--sl-hot" : "--sl-cold"}) ${Math.round(100 * (0.1 + 0.65 * Math.min(1, Math.abs(x) / most)))}%, transparent)`);
    if (tokens.childElementCount !== text.length) tokens.replaceChildren(...text.map(cell));
    at = Math.min(at, text.length - 1);
    const done = Boolean(facts().edit);
    [...tokens.children].forEach((box, i) => {
      const [word, under, fires] = box.children, acts = before[i] || after[i];
      word.textContent = text[i] || "∅";
      word.style.background = shade(moved[i]);
      under.textContent = done && moved[i] !== null ? (Math.abs(moved[i]) > most / 200 ? signed(moved[i], most) : moved[i] ? "≈0" : "0") : "";
      under.classList.toggle("sl-x-still", !moved[i]);
      fires.textContent = !acts ? (edited[i] ? "0" : "") : edited[i] && done ? `${short(before[i], 2)} → ${short(after[i], 2)}` : short(before[i], 2);
      box.classList.toggle("sl-x-special", special[i]);
      box.classList.toggle("sl-x-on", edited[i]);
      box.setAttribute("aria-selected", String(edited[i]));
      box.tabIndex = i === at ? 0 : -1;
      box.ariaLabel = `${i}: ${text[i]}${edited[i] ? ", edited" : ""}`;
      box.onmouseenter = box.onfocus = () => tell(box, i, loss[i], source[i]);
    });
    const shown = most ? `Deepest shade: ${short(most, 2)} nats.` : "";
    legend.textContent = choice().latent < 0 ? "" : `Under each token: change of its own loss (orange: harder to predict), then the latent's activation; edited tokens are underlined. ${shown}`;
  }
  function cell(_, i) {
    const box = make("span", { className: "sl-x-token", role: "option" }, make("span", {}), make("small", {}), make("small", { className: "sl-x-fires" }));
    box.onclick = (event) => toggle(i, event.shiftKey);
    box.onmouseleave = box.onblur = () => note(null);
    box.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -i, End: tokens.childElementCount - 1 - i }[event.key];
      if (step !== undefined) move(i + step);
      else if (event.key === "Enter" || event.key === " ") toggle(i, event.shiftKey);
      else if (event.key === "Escape") note(null); else return;
      event.preventDefault();
      event.stopPropagation();
    };
    return box;
  }
  function move(to) {
    at = Math.max(0, Math.min(tokens.childElementCount - 1, to));
    [...tokens.children].forEach((box, i) => { box.tabIndex = i === at ? 0 : -1; });
    tokens.children[at].focus();
  }
  function toggle(i, range) {
    at = i;
    if (facts().special[i]) return kernel.tell("Special tokens are never edited.", true);
    const now = wanted ?? choice(), held = new Set(now.at === "chosen" ? now.positions : []);
    if (range && last >= 0) { for (let j = Math.min(i, last); j <= Math.max(i, last); j++) if (!facts().special[j]) held.add(j); }
    else if (!held.delete(i)) held.add(i);
    last = i;
    const positions = [...held].sort((a, b) => a - b);
    change(positions.length ? { at: "chosen", positions } : { at: "fires", positions });
  }
  function tell(box, i, loss, other) {
    const { before, after, change: moved, edited, tokens: text } = facts(), rows = [];
    const line = (name, content) => rows.push(make("div", { className: "sl-x-note" }, make("span", { className: "sl-quiet", textContent: name }), make("b", { textContent: content })));
    line("activation", edited[i] ? `${short(before[i])} → ${short(after[i])}` : short(before[i]));
    if (loss !== null) line("its loss, nats", moved[i] === null ? short(loss) : `${short(loss)} → ${short(loss + moved[i])}`);
    if (other !== undefined && other !== text[i]) line("the other prompt has", other);
    note(box, make("div", {}, make("div", {}, `${i} `, ...chips(text[i])), ...rows));
  }

  function drawPast() {
    const { tried, names } = facts();
    past.hidden = !tried.length;
    const head = make("tr", {}, make("th", { textContent: `edits tried (${tried.length})` }), ...names.map((name) => make("th", { textContent: `Δ ${name}` })), make("th", {}));
    const rows = tried.map((each, i) => {
      const button = make("button", { type: "button", textContent: each.edit, title: "make this edit again" });
      button.onclick = () => kernel.send("again", { which: i });
      const tr = make("tr", {}, make("td", {}, button), ...names.map((_, k) => make("td", { textContent: each.changes[k] ?? "" })), make("td", { className: "sl-quiet", textContent: each.said }));
      if (each.now) tr.setAttribute("aria-current", "true");
      return tr;
    });
    past.replaceChildren(make("table", {}, head, ...rows));
  }

  const whole = (input) => (input.value.trim() === "" ? -1 : Math.trunc(Number(input.value)));
  latent.onchange = () => change({ latent: whole(latent) });
  prompt.onchange = () => change({ prompt: whole(prompt), positions: [], at: choice().at === "chosen" ? "fires" : choice().at, answer: "", distractor: "" });
  slider.oninput = () => { drawValue(choice().operation, Number(slider.value)); change({ value: Number(slider.value) }, true); };
  slider.onchange = () => change({ value: Number(slider.value) });
  value.onchange = () => change({ value: value.value.trim() === "" ? null : Number(value.value) });
  answer.onchange = () => change({ answer: answer.value });
  distractor.onchange = () => change({ distractor: distractor.value });
  for (const input of [latent, prompt, value, answer, distractor]) {
    input.onkeydown = (event) => { event.stopPropagation(); if (event.key === "Enter") input.onchange(); if (event.key === "Escape") draw(); };
  }
  follow(model, results);
  const later = framed(draw), heard = ["change:facts", "change:choice", "change:problem"];
  for (const name of heard) model.on(name, later);
  draw();
  return () => { for (const name of heard) model.off(name, later); };
}
export default { render };

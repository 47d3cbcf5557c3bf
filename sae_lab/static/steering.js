// Steering: sliders on latents, the texts they make.
const LOW = -3, HIGH = 6, FULL = 2;
const AGAIN = ["doses", "prompt", "n", "seed", "temperature", "top_k", "error", "place", "control"];

/** Where a dose stands among natural activations, as Python's `standing` says it. */
function standing({ op, value }, { unit, marks, top, n }) {
  const amount = value * unit;
  if (top === null) return [`never fires on ${n.toLocaleString("en")} tokens: no natural range`, amount !== 0];
  if (amount === 0) return [op === "add" ? "nothing added" : "switched off", false];
  if (amount < 0) return [op === "add" ? "taken away; below 0 where it is silent" : "below 0", true];
  if (amount > top) return [`above every natural activation (largest ${short(top)})`, true];
  const over = marks.filter(([, level]) => amount > level).map(([share]) => share);
  return [over.length ? `natural: above ${Math.round(100 * Math.max(...over))}% of its activations` : "natural: not above its median", false];
}

/** The natural range of a latent behind its slider. */
function scale({ unit, marks, top }) {
  const place = (v) => `${100 * (Math.min(HIGH, Math.max(LOW, v)) - LOW) / (HIGH - LOW)}%`;
  const band = (className, a, b) => make("i", { className, style: `left:${place(a)};width:calc(${place(b)} - ${place(a)})` });
  const tick = (v, title) => make("u", { style: `left:${place(v)}`, title });
  const text = (v, textContent) => make("span", { style: `left:${place(v)}`, textContent });
  const most = top === null || !(unit > 0) ? 0 : top / unit, parts = [make("i", { className: "sl-st-beyond" })];
  if (most > 0) parts.push(band("sl-st-natural", 0, Math.min(1, most)));
  if (most > 1) parts.push(band("sl-st-rare", 1, most));
  parts.push(tick(0), text(0, "0"));
  for (const [share, level] of marks) if (unit > 0) parts.push(tick(level / unit, `${Math.round(100 * share)} % of its activations are below ${short(level)}`));
  if (most > 0) parts.push(text(1, "99 %"));
  for (const v of [-2, 3, 5]) parts.push(text(v, `${v} ×`.replace("-", "−")));
  if (most > 1.9 && most < 2.6 || most > 3.4 && most < 4.6) parts.push(text(most, "largest"));
  return make("div", { className: "sl-st-scale", ariaHidden: "true" }, ...parts);
}

/** Mean of what is known. */
const mean = (values) => { const some = values.filter((v) => v !== null && v !== undefined); return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null; };

export default {
  render({ model, el }) {
    el.classList.add("sl", "sl-steer");
    const ask = asker(model), note = notes(el), can = (name) => (model.get("can") ?? []).includes(name);
    const button = (textContent, onclick, className = "") => make("button", { type: "button", textContent, onclick, className });
    const said = make("div", { className: "sl-st-said sl-quiet", role: "status" });
    const say = (text, wrong = false) => { said.textContent = text; said.classList.toggle("sl-error", wrong); };
    const call = (name, args = {}) => ask(name, args).catch((error) => { say(error.message, true); return null; });
    const running = () => model.get("status") === "running";

    // What is written anew, and when.
    let timer;
    const changed = () => { clearTimeout(timer); if (model.get("auto") && can("run")) timer = setTimeout(() => call("run"), 250); };
    const put = (name, value) => { set(model, name, value); if (AGAIN.includes(name)) changed(); };

    // Head and conditions.
    const about = model.get("about");
    const head = make("div", { className: "sl-st-head" }, make("b", { textContent: about.title || "Steering" }), make("span", { className: "sl-quiet", textContent: about.note }));
    const field = (label, input) => { input.setAttribute("aria-label", label); return make("label", {}, make("span", { textContent: label, ariaHidden: "true" }), input); };
    const bound = [];
    const bind = (name, input, read, write) => {
      const commit = () => { const v = read(input); if (v !== null && v !== model.get(name)) put(name, v); };
      input.addEventListener("change", commit);
      if (input.type === "number") input.addEventListener("keydown", (e) => { if (e.key === "Enter") commit(); });
      const typed = input.type === "number" || input.type === "textarea";
      bound.push([name, () => { if (!typed || document.activeElement !== input) write(input, model.get(name)); }]);
      return input;
    };
    const number = (name, facts) => bind(name, make("input", { type: "number", ...facts }), (i) => (i.value === "" || !i.validity.valid ? null : Number(i.value)), (i, v) => { i.value = v; });
    const box = (name) => bind(name, make("input", { type: "checkbox" }), (i) => i.checked, (i, v) => { i.checked = v; });
    const select = (name, options) => bind(name, make("select", {}, ...Object.entries(options).map(([value, textContent]) => make("option", { value, textContent }))), (i) => i.value, (i, v) => { i.value = v; });
    const prompt = bind("prompt", make("textarea", { rows: 2, spellcheck: false }), (i) => i.value, (i, v) => { if (i.value !== v) i.value = v; });
    prompt.setAttribute("aria-label", "prompt");
    prompt.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { prompt.blur(); prompt.focus(); go(); } });
    const go = () => { clearTimeout(timer); call("run"); };
    const run = button("Run", go, "sl-st-run"), stop = button("Stop", () => call("stop"));
    const bar = make("div", { className: "sl-st-bar" },
      field("tokens", number("n", { min: 1, max: 2000, step: 1 })), field("seed", number("seed", { min: 0, step: 1 })),
      field("temperature", number("temperature", { min: 0, step: .1 })), field("top k", number("top_k", { min: 0, step: 1, title: "0: all tokens" })),
      field("steer", select("place", { all: "every text token", new: "new tokens only" })), field("error", select("error", { keep: "kept", drop: "dropped" })),
      field("control text", box("control")), field("run on change", box("auto")), make("span", { className: "sl-st-keys" }, run, stop));

    // Sliders.
    const list = make("div", { className: "sl-st-doses" });
    let rows = [];
    const doses = () => model.get("doses") ?? [], facts = (latent) => model.get("known")?.[latent] ?? { label: "", unit: 1, marks: [], top: null, count: 0, n: 0 };
    const edit = (i, change) => { const next = doses().map((d, j) => (j === i ? { ...d, ...change } : d)); set(model, "doses", next); };
    const choose = (latent) => { if (model.get("selected") !== latent) set(model, "selected", latent); };
    const row = (dose, i) => {
      const about = facts(dose.latent), latent = dose.latent;
      const range = make("input", { type: "range", min: LOW, max: HIGH, step: .05 });
      range.setAttribute("aria-label", `dose of latent ${latent}`);
      range.addEventListener("input", () => edit(i, { value: Number(range.value) }));
      range.addEventListener("change", changed);
      range.addEventListener("keydown", (e) => { if (e.key === "Escape") { edit(i, { value: 0 }); changed(); } });
      const op = make("select", {}, make("option", { value: "add", textContent: "add" }), make("option", { value: "set", textContent: "set to" }));
      op.setAttribute("aria-label", `what is done with latent ${latent}`);
      op.addEventListener("change", () => { edit(i, { op: op.value }); changed(); });
      const away = button("×", () => { set(model, "doses", doses().filter((_, j) => j !== i)); changed(); }, "sl-st-away");
      away.setAttribute("aria-label", `take latent ${latent} away`);
      const strong = make("b"), rest = make("span"), words = make("small"), tell = make("div", { className: "sl-st-tell" }, make("div", {}, strong, rest), words);
      const name = make("div", { className: "sl-st-name", title: `latent ${latent} ${about.label}: ${about.count.toLocaleString("en")} activations on ${about.n.toLocaleString("en")} tokens` }, make("b", { textContent: latent }), about.label);
      const line = make("div", { className: "sl-st-dose" }, name, op, make("div", { className: "sl-st-rail" }, scale(about), range), tell, away);
      line.addEventListener("focusin", () => choose(latent));
      line.addEventListener("pointerdown", () => choose(latent));
      const update = (now) => {
        const at = facts(latent), [says, far] = standing(now, at);
        if (range.value !== String(now.value)) { range.min = Math.min(LOW, now.value); range.max = Math.max(HIGH, now.value); range.value = now.value; }
        op.value = now.op;
        strong.textContent = `${now.op === "add" && now.value >= 0 ? "+" : ""}${short(now.value * at.unit)}`.replace("-", "−");
        rest.textContent = `  =  ${short(now.value)} × ${short(at.unit)}`.replace("-", "−");
        words.textContent = (far ? "⚠ " : "") + says;
        range.setAttribute("aria-valuetext", `${short(now.value)} times the 99 % activation, ${says}`);
        line.classList.toggle("sl-st-far", far);
        line.classList.toggle("sl-st-chosen", model.get("selected") === latent);
      };
      return { key: `${latent} ${JSON.stringify(about)}`, line, update };
    };
    const sliders = () => {
      const now = doses(), keys = now.map((d) => `${d.latent} ${JSON.stringify(facts(d.latent))}`);
      if (keys.join("\n") !== rows.map((r) => r.key).join("\n") || rows.length !== now.length) {
        rows = now.map(row);
        list.replaceChildren(...rows.map((r) => r.line));
      }
      rows.forEach((r, i) => r.update(now[i]));
      empty.hidden = now.length > 0;
    };
    const empty = make("div", { className: "sl-quiet", textContent: "No latent is steered: add one by its number." });
    const latent = make("input", { type: "number", min: 0, step: 1 }), nats = make("input", { type: "number", min: 0, step: "any", value: .1 });
    const add = button("Add", async () => {
      if (latent.value === "") return say("Give the number of a latent.", true);
      const at = Number(latent.value);
      if (doses().some((d) => d.latent === at)) return say(`Latent ${at} has a slider already.`, true);
      const found = await call("known", { latent: at });
      if (!found) return;
      model.set("known", { ...model.get("known"), [at]: found });
      set(model, "doses", [...doses(), { latent: at, op: "add", value: 0 }]);
      choose(at); latent.value = "";
      list.lastChild?.querySelector("input[type=range]").focus();
    });
    latent.addEventListener("keydown", (e) => { if (e.key === "Enter") add.click(); });
    const fit = button("Scale to KL", async () => {
      if (nats.value === "") return say("Give a number of nats.", true);
      say("looking for the strength…");
      const found = await call("calibrate", { nats: Number(nats.value) });
      if (found) say(found);
    });
    fit.title = "Multiply all doses by one number, so that the mean KL on the default text is this many nats a token.";
    const zero = button("All to 0", () => { set(model, "doses", doses().map((d) => ({ ...d, value: 0 }))); changed(); });
    const more = make("div", { className: "sl-st-more" }, field("latent", latent), add, field("nats", nats), fit, zero, empty);
    nats.setAttribute("aria-label", "nats a token"); nats.previousSibling.textContent = "nats a token";
    more.insertBefore(fit, nats.parentElement); more.insertBefore(nats.parentElement, zero);

    // Texts.
    const texts = make("div", { className: "sl-st-texts" });
    let columns = [];
    const column = (text) => {
      const name = make("b"), what = make("small"), flow = make("div", { className: "sl-st-flow", dir: "ltr" }), numbers = make("div", { className: "sl-st-facts" });
      const box = make("section", { className: "sl-st-text" }, make("header", {}, name, what), numbers, flow);
      const prefix = make("span", { className: "sl-st-prefix" }), cursor = make("i");
      let shown = [];
      const fact = (label, value, title) => make("span", { title }, `${label} `, make("b", { textContent: value }));
      const update = (now) => {
        name.textContent = now.name; what.textContent = now.note;
        box.setAttribute("aria-label", `${now.name} text`);
        prefix.textContent = (model.get("prefix") ?? []).join("");
        if (shown.length > now.tokens.length || shown.some((s, i) => s.textContent !== now.tokens[i])) shown = [];
        now.tokens.slice(shown.length).forEach((token) => shown.push(make("span", { textContent: token })));
        now.tokens.forEach((_, i) => {
          const kl = now.kl[i], share = kl > 0 ? .7 * Math.min(1, kl / FULL) : 0;
          shown[i].style.background = share ? `rgb(var(--sl-kl) / ${share.toFixed(2)})` : "";
          shown[i].title = `loss ${short(now.loss[i])} nats under the unsteered model · KL ${short(kl)} nats`;
        });
        flow.replaceChildren(prefix, ...shown, ...(running() ? [cursor] : []));
        const loss = mean(now.loss), pairs = now.tokens.slice(1).map((t, i) => `${now.tokens[i]}\u0000${t}`);
        const ppl = loss === null ? null : Math.exp(loss);
        const parts = [fact("perplexity", short(ppl), "exp of the mean loss under the unsteered model")];
        if (now.name !== "default") parts.push(fact("KL", short(mean(now.kl)), "mean over these tokens, nats, of the steered from the unsteered distribution, temperature 1"));
        if (pairs.length) parts.push(fact("new pairs", `${Math.round(100 * new Set(pairs).size / pairs.length)} %`, "share of pairs of neighbouring tokens that came for the first time; low where the text goes in circles"));
        parts.push(fact("tokens", String(now.tokens.length), ""));
        numbers.replaceChildren(...parts);
      };
      return { box, update };
    };
    const stream = () => {
      const now = model.get("streams") ?? [];
      if (columns.length !== now.length) { columns = now.map(column); texts.replaceChildren(...columns.map((c) => c.box)); }
      columns.forEach((c, i) => c.update(now[i]));
    };

    // What is said beneath, and the state of the keys.
    const legend = make("span", { className: "sl-st-key" }, "KL, nats:", ...[.1, .5, 1, 2].map((kl) => make("span", { textContent: kl === 2 ? "≥ 2" : kl, style: `background:rgb(var(--sl-kl) / ${(.35 * kl).toFixed(2)})` })));
    const condition = make("b"), where = make("span");
    const foot = make("div", { className: "sl-st-about" }, legend, make("div", {}, condition, where),
      make("div", { textContent: "Orange on a slider is the natural range, paler above its 99 % mark; hatched is out of distribution. Perplexity is that of each text under the unsteered model; KL(unsteered ‖ steered) is of the distribution each token was drawn from, at temperature 1." }),
      make("div", { textContent: "The same seed in every text: with nothing added they are the same. One text each; how an effect varies over prompts is what dose_response shows." }));
    const state = () => {
      const live = running();
      run.disabled = !can("run"); stop.disabled = !can("stop") || !live;
      add.disabled = latent.disabled = !can("known"); fit.disabled = nats.disabled = !can("calibrate");
      run.textContent = live ? "Again" : "Run";
      const text = model.get("said");
      if (text || !live) say(text.replace(/^!/, ""), text.startsWith("!"));
      if (live && !text) say("writing…");
      const sentence = about.error[model.get("error")], cut = sentence.indexOf(":");
      condition.textContent = sentence.slice(0, cut).replace(/^./, (c) => c.toUpperCase());
      where.textContent = `${sentence.slice(cut)}. Steered: ${about.place[model.get("place")]}.`;
      bound.forEach(([, update]) => update());
      stream();
    };

    el.prepend(head, make("label", { className: "sl-st-prompt" }, prompt), bar, list, more, said, texts, foot);
    new ResizeObserver(([entry]) => el.classList.toggle("sl-st-narrow", entry.contentRect.width < 880)).observe(el);
    for (const name of ["doses", "known", "selected"]) model.on(`change:${name}`, sliders);
    for (const name of ["streams", "prefix"]) model.on(`change:${name}`, stream);
    for (const name of ["status", "said", "can", ...bound.map(([name]) => name)]) model.on(`change:${name}`, state);
    sliders(); state();
  },
};

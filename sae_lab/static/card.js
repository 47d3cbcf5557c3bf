// The card of a latent: what a token, a bar or another latent says under the mouse or the keyboard.
const BANDS = { rank: "by rank", value: "by value", near: "near misses" };
const DWELL = 180; // milliseconds on a token before the kernel is asked

/** A button that stays in or out: toggle(text, title, pressed, whenPressed). */
function toggle(text, title, pressed, act) {
  const key = make("button", { type: "button", className: "sl-key", textContent: text, title });
  key.setAttribute("aria-pressed", pressed);
  key.addEventListener("click", act);
  return key;
}

/** Previous, next, any number, and the pin; nothing where no other latent can be opened. */
function steps(model) {
  const size = model.get("size"), go = (to) => set(model, "latent", Math.min(size - 1, Math.max(0, to)));
  const box = make("input", { type: "number", min: 0, max: size - 1, className: "sl-number", ariaLabel: "number of the latent" });
  const pin = toggle("", "put this latent aside", false, () => {
    const at = model.get("latent"), kept = model.get("pinned");
    set(model, "pinned", kept.includes(at) ? kept.filter((each) => each !== at) : [...kept, at]);
  });
  const step = (text, by, title) => {
    const key = make("button", { type: "button", className: "sl-key", textContent: text, title, ariaLabel: title });
    key.addEventListener("click", () => go(model.get("latent") + by));
    return key;
  };
  const draw = () => {
    const held = model.get("pinned").includes(model.get("latent"));
    box.value = model.get("latent");
    pin.textContent = held ? "★ pinned" : "☆ pin";
    pin.setAttribute("aria-pressed", held);
  };
  box.addEventListener("change", () => box.value !== "" && go(Math.round(Number(box.value))));
  model.on("change:latent", draw);
  model.on("change:pinned", draw);
  draw();
  const walk = size ? [step("‹", -1, "previous latent"), box, step("›", 1, "next latent"),
    make("span", { className: "sl-quiet", textContent: `of ${size.toLocaleString("en")}` })] : [];
  return make("span", { className: "sl-steps" }, ...walk, pin);
}

/** A line across a chart at a value, or none where the value has no place in it. */
function mark(body, kind, value) {
  body.querySelectorAll(`.sl-chart[data-kind="${kind}"]`).forEach((chart) => {
    chart.querySelectorAll(".sl-mark").forEach((old) => old.remove());
    const { low, high, left, right, top, bottom } = Object.fromEntries(Object.entries(chart.dataset).map(([k, v]) => [k, Number(v)]));
    if (!Number.isFinite(value) || value < low || value > high) return;
    const x = left + ((right - left) * (value - low)) / (high - low || 1);
    chart.querySelectorAll("svg").forEach((svg) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("class", "sl-mark");
      line.setAttribute("d", `M${x} ${top}V${bottom}`);
      svg.append(line);
    });
  });
}

/** The choice among the bands that the card has, in front of the first of them. */
function bands(model, body) {
  const all = [...body.querySelectorAll(".sl-sec")].filter((part) => part.dataset.family in BANDS);
  const names = [...new Set(all.map((part) => part.dataset.family))];
  if (!names.length) return () => {};
  const keys = names.map((name) => toggle(BANDS[name], `examples ${BANDS[name]}`, false, () => set(model, "band", name)));
  all[0].before(make("div", { className: "sl-bands", role: "group", ariaLabel: "examples" }, ...keys));
  return () => {
    const wanted = names.includes(model.get("band")) ? model.get("band") : names[0];
    keys.forEach((key, i) => key.setAttribute("aria-pressed", names[i] === wanted));
    all.forEach((part) => { part.hidden = part.dataset.family !== wanted; });
  };
}

/** One switch on each histogram between a linear and a logarithmic count. */
function scales(model, body) {
  const charts = [...body.querySelectorAll(".sl-chart")];
  const keys = charts.map((chart) => {
    const key = toggle("log", "counts by their logarithm", true, () => set(model, "log", !model.get("log")));
    chart.prepend(key);
    return key;
  });
  return () => charts.forEach((chart, i) => {
    chart.classList.toggle("sl-by-log", model.get("log"));
    keys[i].setAttribute("aria-pressed", model.get("log"));
  });
}

/** What the tokens say: at once what the page knows, after a moment what the kernel answers. */
function tokens(model, body, note, ask) {
  const known = new Map(), able = model.get("can").includes("effect");
  let timer = 0, now = null, held = false;
  const key = (token) => `${model.get("latent")}:${token.closest(".sl-w").dataset.w}:${token.dataset.t}`;
  const head = (token) => make("div", {}, make("b", { textContent: token.dataset.v }),
    make("span", { className: "sl-quiet", textContent: `  at “${token.textContent}” · ${place(token)}` }));
  const place = (token) => {
    const [, document, at] = token.closest(".sl-w").dataset.d.match(/^(.*):(\w+)$/s) ?? [];
    return document ? `${document}:${at === "None" ? token.dataset.t : Number(at) + Number(token.dataset.t)}` : "";
  };
  const tell = (token, more) => { if (token === now) note(token, make("div", {}, ...(more.html ? [] : [head(token)]), more.node)); };
  const answer = (token) => {
    if (!known.has(key(token))) {
      const [group, window] = token.closest(".sl-w").dataset.w.split(".").map(Number);
      known.set(key(token), ask("effect", { group, window, token: Number(token.dataset.t) }));
    }
    const at = key(token);
    known.get(at).then((seen) => tell(token, { html: true, node: make("div", { innerHTML: seen.html, className: "sl-effect" }) }),
      (error) => { known.delete(at); tell(token, { node: make("div", { className: "sl-error", textContent: error.message }) }); });
  };
  const leave = () => { clearTimeout(timer); now = null; held = false; note(null); mark(body, "activation", NaN); };
  const enter = (token, wait = DWELL) => {
    if (token === now) return;
    clearTimeout(timer);
    now = token;
    mark(body, "activation", Number(token.dataset.x));
    tell(token, { node: make("div", { className: "sl-quiet", textContent: able ? "running the model without it …" : "" }) });
    if (able) timer = setTimeout(() => answer(token), wait);
  };
  const hit = (event) => event.target.closest?.(".sl-t");
  body.addEventListener("pointerover", (event) => { if (!held && hit(event)) enter(hit(event)); });
  body.addEventListener("pointerout", (event) => { if (!held && hit(event) && !event.relatedTarget?.closest?.(".sl-t")) leave(); });
  body.addEventListener("click", (event) => {
    leave();
    if (hit(event)) { enter(hit(event), 0); held = true; }
  });
  body.addEventListener("focusin", (event) => { if (hit(event) && event.target.matches(":focus-visible")) enter(hit(event)); });
  body.addEventListener("focusout", (event) => { if (hit(event) && !held) leave(); });
  body.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (hit(event)) arrows(event, hit(event), body, () => { leave(); enter(event.target, 0); held = true; });
  });
  return leave;
}

/** Arrows go from token to token in a window and from window to window; one token of the card is in the order of Tab. */
function arrows(event, token, body, choose) {
  const rows = [...body.querySelectorAll(".sl-w")].filter((row) => row.querySelector(".sl-t")?.offsetParent);
  const row = token.closest(".sl-w"), here = [...row.querySelectorAll(".sl-t")], at = here.indexOf(token);
  const line = (by) => rows[rows.indexOf(row) + by]?.querySelector("u .sl-t, .sl-t");
  const next = { ArrowRight: here[at + 1], ArrowLeft: here[at - 1], ArrowDown: line(1), ArrowUp: line(-1) }[event.key];
  if (event.key === "Enter") choose();
  if (!event.key.startsWith("Arrow") && event.key !== "Enter") return;
  event.preventDefault();
  if (!next) return;
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** A text of one's own, through the model and the latent. */
function trial(model, ask) {
  const box = make("input", { type: "text", placeholder: "try a text of your own", ariaLabel: "text to try", spellcheck: false });
  const out = make("div", { className: "sl-tried", ariaLive: "polite" });
  const run = async () => {
    if (!box.value) return;
    out.classList.add("sl-wait");
    try {
      const seen = await ask("try", { text: box.value });
      out.innerHTML = seen.html;
      out.append(make("div", { className: "sl-quiet", textContent: seen.facts.join(" · ") }));
    } catch (error) { out.replaceChildren(make("div", { className: "sl-error", textContent: error.message })); }
    out.classList.remove("sl-wait");
  };
  const key = make("button", { type: "button", textContent: "try" });
  key.addEventListener("click", run);
  box.addEventListener("keydown", (event) => event.key === "Enter" && run());
  model.on("change:html", run);
  return [make("span", { className: "sl-line" }, box, key), out];
}

export default {
  render({ model, el }) {
    el.classList.add("sl", "sl-card");
    const ask = asker(model), body = make("div", { className: "sl-body" });
    const problem = make("div", { className: "sl-error", role: "alert" });
    const [line, tried] = model.get("can").includes("try") ? trial(model, ask) : ["", ""];
    el.append(make("div", { className: "sl-bar" }, steps(model), line), problem, tried, body);
    const note = notes(el), leave = tokens(model, body, note, ask);
    let redraw = [];
    const draw = () => redraw.forEach((each) => each());
    const open = (row) => row && model.get("size") && set(model, "latent", Number(row.dataset.latent));
    body.addEventListener("click", (event) => open(event.target.closest(".sl-go")));
    body.addEventListener("keydown", (event) => ["Enter", " "].includes(event.key) && open(event.target.closest?.(".sl-go")));
    follow(model, body, () => {
      leave();
      redraw = [bands(model, body), scales(model, body)];
      const first = body.querySelector(".sl-w u .sl-t, .sl-w .sl-t");
      if (first) first.tabIndex = 0;
      body.classList.remove("sl-wait");
      draw();
    });
    const wait = () => { body.classList.toggle("sl-wait", !model.get("problem")); };
    const say = () => { problem.textContent = model.get("problem"); body.classList.remove("sl-wait"); };
    model.on("change:latent", () => model.get("size") && !body.innerHTML.includes(`latent ${model.get("latent")}<`) && wait());
    model.on("change:problem", say);
    model.on("change:band", draw);
    model.on("change:log", draw);
    say();
  },
};

// A text and the latents that fire on it. Everything but another text and further effects is answered here.
const NS = "http://www.w3.org/2000/svg", CELL = 16, SIDE = 170, TOP = 78, FEW = 30, MARK = { activation: "activation", quantile: "quantile", effect: "effect on next token", total: "effect on all later" };
const ABOUT = { activation: "how strongly it fires, model units", quantile: "share of its own activations in the index that are weaker or equal",
  effect: "change of the next token's loss without it, nats; positive: it helps", total: "change of the summed loss of all later tokens without it, nats" };

function svg(tag, facts = {}, ...children) {
  const el = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(facts)) el.setAttribute(key, value);
  el.append(...children);
  return el;
}
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const signed = (x, most = 0) => (x > 0 ? "+" : "") + level(x, most);

/** Entries as objects, with what is known about each. */
function read(model) {
  const flat = typed(model.get("numbers"), Float32Array), m = flat.length / 6, facts = model.get("facts");
  const names = ["at", "which", "activation", "quantile", "effect", "total"];
  return { facts, entries: Array.from({ length: m }, (_, i) => Object.fromEntries(names.map((name, k) => [name, flat[k * m + i]]))) };
}

/** Entries that pass the filters, the largest in size first. */
function ranked({ facts, entries }, metric, most, begin) {
  const passes = (e) => Number.isFinite(e[metric]) && (begin || !facts.special[e.at]) && (facts.density[e.which] ?? 0) <= most;
  return entries.filter(passes).sort((a, b) => Math.abs(b[metric]) - Math.abs(a[metric]));
}

/** The best entry of each latent, the n highest of them, in the order of the tokens on which they peak. */
function peaks(order, n, keep) {
  const best = new Map();
  for (const e of order) if (!best.has(e.which) && (best.size < n || e.which === keep)) best.set(e.which, e);
  return [...best.values()].sort((a, b) => a.at - b.at);
}

function render({ model, el }) {
  el.classList.add("sl", "sl-prompt");
  const ask = asker(model), note = notes(el), get = (name) => model.get(name);
  let data = read(model), order = [], rows = [], columns = [], full = 1, cell = [0, 0], built = "", band = null;

  const title = make("b", { className: "sl-p-title" }), about = make("div", { className: "sl-quiet sl-p-about" });
  const measures = make("div", { className: "sl-p-measures", role: "radiogroup", ariaLabel: "measure" });
  const radios = Object.keys(MARK).map((name) => {
    const input = make("input", { type: "radio", name: `sl-${Math.random()}`, value: name });
    input.onchange = () => set(model, "metric", name);
    measures.append(make("label", { title: ABOUT[name] }, input, ` ${MARK[name]}`));
    return input;
  });
  const group = `sl-p-${Math.random().toString(36).slice(2)}`;
  for (const input of radios) input.name = group;
  const slider = make("input", { type: "range", min: -5, max: 0, step: 0.1, ariaLabel: "largest density shown" }), sliderSays = make("output", {});
  const begin = make("input", { type: "checkbox" });
  const filters = make("div", { className: "sl-p-filters" }, make("label", { title: "latents that fire on more of the index are left out" }, "density ≤ ", slider, " ", sliderSays),
    make("label", {}, begin, " begin token"));
  const text = make("textarea", { rows: 1, placeholder: "another text …", ariaLabel: "another text" }), send = make("button", { type: "button", textContent: "read" });
  const box = make("div", { className: "sl-p-box" }, text, send), says = make("div", { className: "sl-p-says", role: "status" });
  const strip = make("div", { className: "sl-p-strip", role: "listbox", ariaLabel: "tokens", dir: "ltr" });
  const map = make("div", { className: "sl-p-map" }), list = make("div", { className: "sl-p-list" });
  el.prepend(make("div", { className: "sl-p-head" }, title, measures, filters), box, says, strip, make("div", { className: "sl-p-both" }, map, list), about);

  const value = (e) => e[get("metric")];
  const shade = (x) => (!x || !Number.isFinite(x) ? "" : `color-mix(in srgb, var(${x > 0 ? "--sl-hot" : "--sl-cold"}) ${Math.round(100 * (0.12 + 0.73 * Math.min(1, Math.abs(x) / full)))}%, transparent)`);
  const latentOf = (e) => data.facts.latents[e.which];
  const chosen = () => data.facts.latents.indexOf(get("selected"));

  function draw() {
    const { facts } = data, metric = get("metric");
    order = ranked(data, metric, get("most"), get("begin"));
    full = order.length ? Math.abs(value(order[0])) || 1 : 1;
    columns = facts.tokens.map((_, i) => i).filter((i) => get("begin") || !facts.special[i]);
    rows = peaks(order, get("lines"), chosen());
    title.textContent = facts.title;
    about.textContent = `${facts.note}. Colour: ${ABOUT[metric]}; the deepest shade is ${short(full)}${metric === "effect" || metric === "total" ? "; a dot: it fires, its effect was not computed" : ""}. Quantiles that rest on fewer than ${FEW} activations are in italics.`;
    for (const input of radios) input.checked = input.value === metric;
    slider.value = Math.log10(get("most"));
    sliderSays.textContent = get("most") >= 1 ? "any" : percent(get("most"), 2);
    begin.checked = get("begin");
    begin.parentElement.hidden = !facts.special.some((x) => x);
    box.hidden = !get("can").includes("read");
    drawStrip();
    drawMap();
    pointed();
  }

  function drawStrip() {
    const mine = new Map(data.entries.filter((e) => e.which === chosen()).map((e) => [e.at, value(e)]));
    if (built !== `${get("begin")}` || strip.childElementCount !== columns.length) {
      built = `${get("begin")}`;
      strip.replaceChildren(...columns.map(spanOf));
    }
    for (const span of strip.children) span.style.background = shade(mine.get(Number(span.dataset.at)));
  }
  function spanOf(i) {
    const loss = data.facts.loss[i], span = make("span", { textContent: data.facts.tokens[i] || "∅", role: "option", tabIndex: -1 });
    span.dataset.at = i;
    span.classList.toggle("sl-p-special", data.facts.special[i]);
    span.title = `${i}${loss === null || loss === undefined ? "" : ` · next-token loss ${short(loss)} nats`}`;
    return span;
  }

  function pointed() {  // the token: its frame, its band, its latents
    const token = get("token"), none = !columns.includes(token);
    [...strip.children].forEach((span, i) => {
      const here = columns[i] === token;
      if (span.getAttribute("aria-selected") !== String(here)) span.setAttribute("aria-selected", here);
      span.tabIndex = here || (none && i === 0) ? 0 : -1;
    });
    band?.setAttribute("x", SIDE + CELL * columns.indexOf(token));
    if (band) band.style.display = none ? "none" : "";
    drawList();
  }
  const focusToken = (i) => strip.querySelector(`[data-at="${i}"]`)?.focus({ preventScroll: true });
  function pick(i) { set(model, "token", i === get("token") ? -1 : i); focusToken(i); }
  strip.onclick = (event) => { const at = event.target.dataset?.at; if (at !== undefined) pick(Number(at)); };
  strip.onkeydown = (event) => {
    const now = columns.indexOf(Number(event.target.dataset.at)), last = columns.length - 1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) { const i = columns[Math.max(0, Math.min(last, to))]; set(model, "token", i); focusToken(i); }
    else if (event.key === "Enter" || event.key === " ") pick(columns[now]);
    else if (event.key === "Escape") { set(model, "token", -1); focusToken(columns[now]); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  function drawMap() {
    band = null;
    if (!rows.length) {
      const why = get("metric") === "activation" || !data.entries.length ? "No latent fires on this text." : "Nothing is known by this measure here.";
      return map.replaceChildren(make("p", { className: "sl-quiet", textContent: get("most") < 1 && data.entries.length ? "No latent passes the density filter." : why }));
    }
    const { facts } = data, wide = CELL * columns.length, high = CELL * rows.length, x = new Map(columns.map((at, i) => [at, SIDE + CELL * i]));
    const y = new Map(rows.map((e, i) => [e.which, TOP + CELL * i])), picture = svg("svg", { width: SIDE + wide + 44, height: TOP + high + 4, role: "application",
      tabindex: 0, "aria-label": `heatmap of ${rows.length} latents over ${columns.length} tokens; arrows move, Enter selects` });
    const mine = y.get(chosen());
    band = svg("rect", { x: 0, y: TOP, width: CELL - 1, height: high, class: "sl-p-band" });
    picture.append(band);
    if (mine !== undefined) picture.append(svg("rect", { x: 0, y: mine, width: SIDE + wide, height: CELL - 1, class: "sl-p-band" }));
    picture.append(svg("path", { d: `M${SIDE - 0.5} ${TOP - 0.5}h${wide}M${SIDE - 0.5} ${TOP - 0.5}v${high}`, class: "sl-p-axis" }));
    for (const [at, px] of x) picture.append(label(px + 4, TOP - 5, cut(facts.tokens[at].trim() || "␣", 11), "start", `rotate(-60 ${px + 4} ${TOP - 5})`));
    for (const e of rows) {
      const py = y.get(e.which) + 12, on = e.which === chosen();
      picture.append(label(SIDE - 8, py, latentOf(e), "end", "", on), label(SIDE - 56, py, cut((facts.labels[e.which].split("\u241f")[0] ?? "").trim(), 15), "end", "", on));
    }
    const paths = new Map();
    for (const e of order) {
      if (!y.has(e.which) || !x.has(e.at) || !value(e)) continue;
      const key = `${value(e) > 0 ? "hot" : "cold"} ${Math.max(1, Math.ceil((10 * Math.abs(value(e))) / full))}`;
      paths.set(key, `${paths.get(key) ?? ""}M${x.get(e.at)} ${y.get(e.which)}h15v15h-15z`);
    }
    for (const [key, d] of paths) { const [hue, step] = key.split(" "); picture.append(svg("path", { d, class: `sl-p-${hue}`, "fill-opacity": 0.1 + 0.085 * step })); }
    const minus = order.filter((e) => value(e) < 0 && y.has(e.which) && x.has(e.at)).map((e) => `M${x.get(e.at) + 4} ${y.get(e.which) + 7}h7v1.4h-7z`).join("");
    if (minus) picture.append(svg("path", { d: minus, class: "sl-p-minus" }));
    let open = "";  // fires there, but by this measure nothing is known
    for (const e of data.entries) if (y.has(e.which) && x.has(e.at) && Number.isNaN(value(e))) open += `M${x.get(e.at) + 6} ${y.get(e.which) + 6}h3v3h-3z`;
    if (open) picture.append(svg("path", { d: open, class: "sl-p-silent" }));
    const cursor = svg("rect", { width: CELL - 1, height: CELL - 1, class: "sl-p-cursor" });
    picture.append(cursor);
    const held = document.activeElement && map.contains(document.activeElement), scroll = map.scrollLeft;
    map.replaceChildren(picture);
    map.scrollLeft = scroll;
    steer(picture, cursor);
    if (held) picture.focus({ preventScroll: true });
  }
  function label(x, y, content, anchor, transform, strong) {
    const el = svg("text", { x, y, "text-anchor": anchor, ...(transform && { transform }), ...(strong && { "font-weight": 700 }) });
    el.textContent = content;
    return el;
  }

  function steer(picture, cursor) {  // mouse and keys on the heatmap
    const point = (r, c, say) => {
      cell = [Math.max(0, Math.min(rows.length - 1, r)), Math.max(0, Math.min(columns.length - 1, c))];
      cursor.setAttribute("x", SIDE + CELL * cell[1]);
      cursor.setAttribute("y", TOP + CELL * cell[0]);
      if (say) tell(cursor, rows[cell[0]].which, columns[cell[1]]);
    };
    point(...cell, false);
    const where = (event) => {
      const home = picture.getBoundingClientRect();
      return [Math.floor((event.clientY - home.top - TOP) / CELL), Math.floor((event.clientX - home.left - SIDE) / CELL)];
    };
    picture.onmousemove = (event) => {
      const [r, c] = where(event);
      if (r >= 0 && r < rows.length && c >= 0 && c < columns.length) point(r, c, true); else note(null);
    };
    picture.onmouseleave = picture.onblur = () => note(null);
    picture.onclick = (event) => {
      const [r, c] = where(event);
      if (c >= 0 && c < columns.length && r < rows.length) set(model, "token", columns[c]);
      if (r >= 0 && r < rows.length) choose(rows[r].which);
    };
    picture.onkeydown = (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (step) point(cell[0] + step[0], cell[1] + step[1], true);
      else if (event.key === "Enter" || event.key === " ") { set(model, "token", columns[cell[1]]); choose(rows[cell[0]].which); }
      else if (event.key === "Escape") { note(null); set(model, "selected", -1); } else return;
      event.preventDefault();
      event.stopPropagation();
    };
  }

  function tell(target, which, at) {
    const { facts } = data, e = data.entries.find((each) => each.which === which && each.at === at);
    const line = (name, content) => make("div", { className: "sl-p-line" }, make("span", { className: "sl-quiet", textContent: name }), make("b", { textContent: content }));
    const head = make("div", {}, make("b", { textContent: `latent ${facts.latents[which]}` }), " at ", ...chips(facts.tokens[at]));
    if (!e) return note(target, make("div", {}, head, make("div", { className: "sl-quiet", textContent: "silent here" })));
    note(target, make("div", {}, head, line("activation", short(e.activation)), line("quantile", quantileText(e)),
      line("next-token loss without it", effectText(e.effect)), line("all later tokens", effectText(e.total))));
  }
  const quantileText = (e) => (Number.isNaN(e.quantile) ? "never fires in the index" : `${short(e.quantile)} of ${data.facts.counts[e.which].toLocaleString("en-US")}`);
  const effectText = (x) => (Number.isNaN(x) ? "not computed" : `${signed(x)} nats`);
  function choose(which) { const latent = data.facts.latents[which]; set(model, "selected", latent === get("selected") ? -1 : latent); }

  function drawList() {
    const at = get("token"), { facts } = data, here = at >= 0;
    const passing = here ? data.entries.filter((e) => e.at === at && (facts.density[e.which] ?? 0) <= get("most")) : [];
    const rest = passing.filter((e) => !Number.isFinite(value(e))), best = here ? order.filter((e) => e.at === at) : [];
    const known = here && best.length + rest.length < passing.length ? passing.filter((e) => Number.isFinite(value(e))).sort((a, b) => Math.abs(value(b)) - Math.abs(value(a))) : best;
    const shown = here ? [...known, ...rest] : peaks(order, 40).sort((a, b) => Math.abs(value(b)) - Math.abs(value(a)));
    const loss = here ? facts.loss[at] : null;
    const head = make("div", { className: "sl-p-token" }, make("b", { textContent: here ? "latents at " : "latents of the whole text, where they peak" }), ...(here ? chips(facts.tokens[at]) : []),
      make("span", { className: "sl-quiet", textContent: here && loss !== null && loss !== undefined ? ` next-token loss ${short(loss)} nats` : "" }));
    if (here && get("can").includes("effects") && passing.some((e) => Number.isNaN(e.effect)) && loss !== null) {
      const button = make("button", { type: "button", textContent: `compute all ${passing.length} effects` });
      button.onclick = () => wait(button, "effects", { token: at });
      head.append(button);
    }
    const tops = { activation: largest(shown.map((e) => e.activation)), loss: largest(shown.flatMap((e) => [e.effect, e.total])) };
    const names = ["latent", "top tokens", ...(here ? [] : ["at"]), "activation", "quantile", "Δ next", "Δ later", "density"];
    const notesOf = { "Δ next": ABOUT.effect, "Δ later": ABOUT.total, density: "share of the tokens of the index on which it fires", quantile: ABOUT.quantile, activation: ABOUT.activation };
    const table = make("table", { role: "grid" }, make("tr", {}, ...names.map((textContent) => make("th", { textContent, title: notesOf[textContent] ?? "", className: ["top tokens", "at"].includes(textContent) ? "sl-p-words" : "" }))),
      ...shown.map((e, i) => line(e, i, here, tops)));
    const held = [...list.querySelectorAll("tr")].indexOf(document.activeElement);
    list.replaceChildren(head, shown.length ? make("div", { className: "sl-p-scroll" }, table) : make("p", { className: "sl-quiet", textContent: "none" }));
    if (held > 0) list.querySelectorAll("tr")[held]?.focus();
  }
  function line(e, i, here, tops) {
    const { facts } = data, tr = make("tr", { tabIndex: i ? -1 : 0 });
    const put = (content, className = "") => tr.append(make("td", { className }, ...(Array.isArray(content) ? content : [content])));
    const coloured = (x, name, text) => { put(text); if (get("metric") === name) tr.lastChild.style.background = shade(x); };
    put(String(latentOf(e)), "sl-p-latent");
    put(chips(facts.labels[e.which]), "sl-p-words");
    if (!here) put(chips(facts.tokens[e.at]), "sl-p-words");
    coloured(e.activation, "activation", level(e.activation, tops.activation));
    coloured(e.quantile, "quantile", Number.isNaN(e.quantile) ? "–" : e.quantile.toFixed(3));
    tr.lastChild.title = `of ${facts.counts[e.which].toLocaleString("en-US")} activations in the index`;
    tr.lastChild.classList.toggle("sl-p-few", facts.counts[e.which] < FEW);
    coloured(e.effect, "effect", Number.isNaN(e.effect) ? "–" : signed(e.effect, tops.loss));
    coloured(e.total, "total", Number.isNaN(e.total) ? "–" : signed(e.total, tops.loss));
    put(percent(facts.density[e.which], 2));
    tr.setAttribute("aria-selected", e.which === chosen());
    tr.onclick = () => choose(e.which);
    tr.onkeydown = (event) => {
      const near = { ArrowDown: tr.nextElementSibling, ArrowUp: tr.previousElementSibling }[event.key];
      if (near?.tabIndex !== undefined && near?.querySelector("td")) near.focus();
      else if (event.key === "Enter" || event.key === " ") choose(e.which);
      else if (event.key === "Escape") set(model, "selected", -1);
      else if (!["ArrowDown", "ArrowUp"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
    };
    return tr;
  }

  async function wait(button, name, args) {
    button.disabled = true;
    says.className = "sl-p-says sl-quiet";
    says.textContent = "computing …";
    try { await ask(name, args); says.textContent = ""; }
    catch (error) { says.className = "sl-p-says sl-error"; says.textContent = error.message; }
    button.disabled = false;
  }
  send.onclick = () => text.value && wait(send, "read", { text: text.value });
  text.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send.onclick(); }
  };
  slider.oninput = () => set(model, "most", Number(slider.value) >= 0 ? 1 : 10 ** Number(slider.value));
  begin.onchange = () => set(model, "begin", begin.checked);
  const later = framed(draw), again = () => { data = read(model); cell = [0, 0]; built = ""; later(); };
  const heard = { "change:numbers": again, "change:facts": again };
  heard["change:token"] = framed(pointed);
  for (const name of ["selected", "metric", "most", "begin", "lines", "can"]) heard[`change:${name}`] = later;
  for (const [name, then] of Object.entries(heard)) model.on(name, then);
  draw();
  return () => { for (const [name, then] of Object.entries(heard)) model.off(name, then); };
}
export default { render };

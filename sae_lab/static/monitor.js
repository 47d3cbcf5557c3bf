// A training while it runs: buttons, a coefficient, a look back in time, the card of a latent that is not yet finished.
const SVG = "http://www.w3.org/2000/svg";

/** A number in a few characters. */
function brief(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size >= 100 || Number.isInteger(x)) return Math.round(x).toLocaleString("en");
  return size && size < 1e-4 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
}

/** The points of all charts: times, curves, histograms with times of their own. */
function unpack(facts, view) {
  const all = new Float32Array(view.buffer, view.byteOffset, view.byteLength / 4);
  let at = 0;
  const take = (n) => all.subarray(at, at += n);
  const times = take(facts.times), curves = facts.curves.map(() => take(facts.times));
  return { times, curves, movements: facts.movements.map((m) => ({ times: take(m.times), counts: take(m.times * m.bins), ...m })) };
}

/** The last index whose time is not after t, at least 0. */
function before(times, t) {
  let low = 0, high = times.length - 1;
  while (low < high) { const mid = (low + high + 1) >> 1; if (times[mid] <= t) low = mid; else high = mid - 1; }
  return low;
}

/** The newest value at or before an index that is a number. */
function known(values, i) {
  while (i > 0 && !Number.isFinite(values[i])) i -= 1;
  return values[i];
}

/** A histogram as a path in a chart. */
function bars(chart, edges, counts) {
  const [left, top, right, bottom] = chart.box, x = (v) => left + (right - left) * (v - chart.x[0]) / (chart.x[1] - chart.x[0]);
  const y = (v) => bottom - (bottom - top) * (v - chart.y[0]) / (chart.y[1] - chart.y[0]);
  let path = "";
  counts.forEach((n, j) => {
    if (n) path += `M${x(edges[j]) + .5} ${bottom}V${Math.min(y(n), bottom - 1)}H${x(edges[j + 1]) - .5}V${bottom}z`;
  });
  return path;
}

/** Fill a <select> when its choices are others than before; what was chosen stays if it is still there. */
function choices(select, names) {
  if ([...select.options].map((o) => o.value).join("\n") === names.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
  if (names.includes(chosen)) select.value = chosen;
}

/** The charts, and the time they show: null is now. */
function timeline(model, body, note, told) {
  let data, charts = [], facts, time = null;
  const lines = (table) => make("table", {}, ...table.map(([name, value, colour]) => make("tr", {},
    make("td", { textContent: name, style: colour ? `color:${colour};font-weight:600` : "" }), make("td", { textContent: value }))));
  const place = () => {
    const i = time === null ? data.times.length - 1 : before(data.times, time);
    charts.forEach(([svg, chart, path, now]) => {
      if (chart.series) return mark(svg, chart, time);
      const m = data.movements[chart.movement], j = before(m.times, time ?? Infinity);
      path.setAttribute("d", time === null ? now : bars(chart, m.edges, [...m.counts.subarray(j * m.bins, (j + 1) * m.bins)]));
    });
    told(time === null || !data.times.length ? null : data.times[i], values(i));
  };
  const values = (i) => facts.curves.map((c, k) => ({ ...c, value: known(data.curves[k], i) }));
  const mark = (svg, chart, t) => {
    svg.querySelector(".sl-mon-at")?.remove();
    if (t === null) return;
    const [left, top, right, bottom] = chart.box, line = document.createElementNS(SVG, "path");
    line.setAttribute("d", `M${left + (right - left) * (t - chart.x[0]) / (chart.x[1] - chart.x[0])} ${top}V${bottom}`);
    line.setAttribute("class", "sl-mon-at");
    line.setAttribute("stroke", "currentColor");
    svg.append(line);
  };
  const draw = () => {
    facts = model.get("facts"); data = unpack(facts, model.get("points"));
    const found = [...body.querySelectorAll("svg[role=img]")];
    charts = found.slice(0, facts.charts.length).map((svg, i) => {
      const path = svg.querySelector('path[fill-opacity=".8"]');
      return [svg, facts.charts[i], path, path?.getAttribute("d")];
    });
    if (time !== null) place();
  };
  const move = (event) => {
    const hit = charts.find(([svg, chart]) => chart.series && svg.contains(event.target));
    if (!hit || !data.times.length) return leave();
    const [svg, chart] = hit, box = svg.getBoundingClientRect(), [left, , right] = chart.box;
    const px = (event.clientX - box.left) * chart.width / box.width;
    const t = chart.x[0] + (chart.x[1] - chart.x[0]) * (px - left) / (right - left);
    time = data.times[before(data.times, Math.max(data.times[0], t))];
    place();
    const i = before(data.times, time);
    note(svg, lines([["tokens", brief(time)], ...chart.series.map((k) => [facts.curves[k].coder, brief(known(data.curves[k], i)), facts.curves[k].colour])]));
  };
  let held = null;
  const leave = () => { note(null); if (time !== held) { time = held; place(); } };
  body.addEventListener("pointermove", move);
  body.addEventListener("pointerleave", leave);
  return { draw, hold: (share) => { held = share >= 1 || !data.times.length ? null : data.times[Math.round(share * (data.times.length - 1))]; time = held; place(); } };
}

export default {
  render({ model, el }) {
    el.classList.add("sl", "sl-mon");
    const ask = asker(model), note = notes(el);
    const part = (...inner) => make("span", { className: "sl-mon-part" }, ...inner);
    const button = (textContent, onclick, className = "") => make("button", { type: "button", textContent, onclick, className });
    const number = (label, facts) => { const n = make("input", { type: "number", className: "sl-mon-number", ...facts }); n.setAttribute("aria-label", label); return n; };
    const select = (label) => { const s = make("select"); s.setAttribute("aria-label", label); return s; };
    const said = make("div", { className: "sl-mon-said sl-quiet", role: "status" });
    const say = (text, wrong = false) => { said.textContent = text; said.classList.toggle("sl-error", wrong); };
    const call = (name, args, then = () => {}) => ask(name, args).then(then, (error) => say(error.message, true));

    const go = button("Pause", () => call(go.textContent === "Pause" ? "pause" : "resume", {}), "sl-mon-go");
    const stop = button("Stop", () => {
      if (!stop.classList.contains("sl-mon-sure")) {
        stop.classList.add("sl-mon-sure"); stop.textContent = "Stop for good?";
        setTimeout(calm, 4000);
        return;
      }
      calm(); say("stopping…"); call("stop", {}, () => say(""));
    });
    const calm = () => { stop.classList.remove("sl-mon-sure"); stop.textContent = "Stop"; };
    const coder = select("coder"), coefficient = select("coefficient");
    const value = number("value of the coefficient", { step: "any", min: 0 }), latent = number("latent", { min: 0, step: 1, value: 0 });
    const put = button("Set", () => {
      if (value.value === "") return say("Give a number.", true);
      call("change", { coder: coder.value, coefficient: coefficient.value, value: Number(value.value) }, (text) => { value.dataset.own = ""; say(text); });
    });
    const show = (again) => call("card", { coder: coder.value, latent: Number(latent.value), again });
    const open = button("Open card", () => show(false)), same = button("in the same copy", () => show(true));
    same.title = "The card of this latent as it stood when the card below was made; quick, since the text is read already.";
    const enter = (input, key) => input.addEventListener("keydown", (e) => { if (e.key === "Enter") key.click(); });
    enter(value, put); enter(latent, open);
    value.addEventListener("input", () => { value.dataset.own = "1"; });

    const forget = () => { value.dataset.own = ""; controls(); };
    coder.onchange = coefficient.onchange = forget;
    const whose = part(make("label", {}, "coder ", coder)), weight = part(make("label", {}, "coefficient ", coefficient), value, put);
    const look = part(make("label", {}, "latent ", latent), open, same);
    const controls = () => {
      const { status = "", coefficients = {}, latents = {}, why = "" } = model.get("controls");
      const live = status === "running" || status === "paused", names = Object.keys(coefficients);
      go.textContent = status === "paused" ? "Continue" : "Pause";
      go.disabled = stop.disabled = put.disabled = value.disabled = !live;
      choices(coder, names);
      choices(coefficient, Object.keys(coefficients[coder.value] ?? {}));
      whose.hidden = names.length < 2;
      weight.hidden = !names.length;
      if (!value.dataset.own) value.value = coefficients[coder.value]?.[coefficient.value] ?? "";
      const size = latents[coder.value];
      open.disabled = latent.disabled = !size;
      same.hidden = !model.get("card");
      look.title = size ? `0 to ${size - 1}` : why;
      if (size) latent.max = size - 1;
    };

    const body = make("div", { className: "sl-mon-body" }), card = make("div", { className: "sl-mon-card" });
    const slider = make("input", { type: "range", min: 0, max: 1000, value: 1000 });
    slider.setAttribute("aria-label", "look back in time");
    const then = make("span", { className: "sl-quiet", textContent: "now" });
    const back = make("label", { className: "sl-mon-back" }, "look back", slider, then);
    const line = timeline(model, body, note, (t, values) => {
      then.textContent = t === null ? "now" : `at ${brief(t)} tokens`;
      slider.setAttribute("aria-valuetext", t === null ? "now" : `${brief(t)} tokens; ${values.map((v) => `${v.coder} ${v.name} ${brief(v.value)}`).join(", ")}`);
    });
    slider.addEventListener("input", () => line.hold(slider.value / 1000));
    slider.addEventListener("keydown", (e) => { if (e.key === "Escape") { slider.value = 1000; line.hold(1); } });

    el.prepend(make("div", { className: "sl-mon-bar" }, part(go, stop), whose, weight, look), said, body, back, card);
    follow(model, body, line.draw);
    controls();
    model.on("change:controls", controls);
    const doing = () => say(model.get("doing"), model.get("doing").startsWith("!"));
    model.on("change:doing", () => { const text = model.get("doing"); say(text.replace(/^!/, ""), text.startsWith("!")); });
    if (model.get("doing")) doing();
    const opened = () => { card.innerHTML = model.get("card"); same.hidden = !model.get("card"); };
    model.on("change:card", opened);
    opened();
  },
};

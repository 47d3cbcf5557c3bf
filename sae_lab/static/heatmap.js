// Effects over layers, positions and latents: walk on the grid, select a cell, choose a latent. Everything is answered here.
const NS = "http://www.w3.org/2000/svg", STEPS = 24;

function svg(tag, facts = {}, ...children) {
  const el = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(facts)) el.setAttribute(key, value);
  el.append(...children);
  return el;
}
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const minus = (text) => text.replace("-", "−");
const signed = (x, most) => (Number.isNaN(x) ? "not computed" : (x > 0 ? "+" : "") + minus(level(x, most)));

function render({ model, el }) {
  el.classList.add("sl", "sl-heat");
  const note = notes(el), get = (name) => model.get(name);
  let facts, flat, grids, at = [0, 0], cursor = null, box;

  const title = make("b", { className: "sl-h-title" }), name = make("span"), said = make("div", { className: "sl-quiet sl-h-said" });
  const map = make("div", { className: "sl-h-map" }), list = make("div", { className: "sl-h-list" }), key = make("div");
  const about = make("div", { className: "sl-quiet sl-h-said" }), status = make("div", { className: "sl-h-status", role: "status" });
  el.prepend(make("div", { className: "sl-h-head" }, title, name), said, make("div", { className: "sl-h-both" }, make("div", { className: "sl-h-left" }, map, status), list), key, about);

  const size = () => [facts.down.length, facts.along.length];
  const place = (choice, r, k) => (choice * facts.down.length + r) * facts.along.length + k;
  const value = (choice, r, k, kind = 0) => flat[kind * grids + place(choice, r, k)];
  const shown = () => Math.max(0, Math.min(facts.choices.length - 1, get("choice")));
  const chosen = () => (get("selected").length === 3 ? get("selected") : null);
  const sure = (choice, r, k) => value(choice, r, k, 1) > 0 || value(choice, r, k, 2) < 0;
  const called = (choice) => [facts.choice_label, facts.choices[choice]].filter((x) => x).join(" ");

  function read() {
    facts = get("facts");
    flat = typed(get("numbers"), Float32Array);
    grids = flat.length / 3;
    draw();
  }

  function draw() {
    title.textContent = facts.title;
    said.textContent = facts.said;
    about.textContent = facts.note;
    if (!grids) return map.replaceChildren(make("p", { className: "sl-quiet", textContent: "There is nothing to draw." }));
    name.textContent = facts.choices[shown()] ? called(shown()) : facts.quantity;
    key.innerHTML = facts.key;  // from Python, escaped there
    drawMap();
    drawList();
    tellStatus();
  }

  function drawMap() {
    const [rows, columns] = size(), wide = columns <= 14 ? 46 : columns <= 32 ? 24 : 16, tall = columns <= 14 ? 22 : columns <= 32 ? 20 : 16;
    const long = (names, most) => Math.min(most, Math.max(0, ...names.map((text) => text.length)));
    const side = 14 + 6.8 * long([facts.down_label, ...facts.down], 22), top = 24 + 5 * long(facts.along, 20);
    box = { wide, tall, side, top };
    const picture = svg("svg", { width: side + wide * columns + 60, height: top + tall * rows + 3, role: "application", tabindex: 0,
      "aria-label": `${called(shown())}: ${rows} by ${columns} effects; arrows move, Enter selects, Escape clears` });
    facts.along.forEach((text, k) => picture.append(words(side + wide * (k + 0.5) + 3, top - 7, cut(text, 20), "start", -50, chosen()?.[1] === k)));
    facts.down.forEach((text, r) => picture.append(words(side - 6, top + tall * (r + 0.5) + 3.5, cut(text, 22), "end", 0, chosen()?.[0] === r)));
    picture.append(words(side - 6, top - 7, cut(facts.down_label, 22), "end", 0, false, "sl-h-faint"));
    picture.append(cells(rows, columns));
    cursor = svg("rect", { width: wide - 1, height: tall - 1, class: "sl-h-cursor" });
    if (chosen()) picture.append(svg("rect", { x: side + wide * chosen()[1] - 1, y: top + tall * chosen()[0] - 1, width: wide + 1, height: tall + 1, class: "sl-h-chosen" }));
    picture.append(cursor);
    const held = map.contains(document.activeElement), scroll = map.scrollLeft;
    map.replaceChildren(picture);
    map.scrollLeft = scroll;
    steer(picture);
    if (held) picture.focus({ preventScroll: true });
  }

  function cells(rows, columns) {
    const { wide, tall, side, top } = box, group = svg("g", { transform: `translate(${side} ${top})` }), shades = new Map();
    let lines = "", framed_ = "", below = "", lost = "";
    for (let r = 0; r <= rows; r++) lines += `M0 ${r * tall - 0.5}H${columns * wide}`;
    for (let k = 0; k <= columns; k++) lines += `M${k * wide - 0.5} 0V${rows * tall}`;
    group.append(svg("path", { d: lines, class: "sl-h-lines" }));
    for (let r = 0; r < rows; r++) for (let k = 0; k < columns; k++) {
      const x = value(shown(), r, k), step = Number.isNaN(x) ? 0 : Math.round(STEPS * Math.min(1, Math.abs(x) / facts.scale));
      const shade = `${x > 0 ? "hot" : "cold"} ${step}`;
      if (step) shades.set(shade, `${shades.get(shade) ?? ""}M${k * wide} ${r * tall}h${wide - 1}v${tall - 1}h${1 - wide}z`);
      if (sure(shown(), r, k)) framed_ += `M${k * wide + 0.5} ${r * tall + 0.5}h${wide - 2}v${tall - 2}h${2 - wide}z`;
      if (Number.isNaN(x)) lost += `M${(k + 0.5) * wide - 3.5} ${(r + 0.5) * tall - 3.5}l6 6m0-6l-6 6`;
      else if (x < 0 && step && wide < 40) below += `M${(k + 0.5) * wide - 4} ${(r + 1) * tall - 5}h7`;
    }
    for (const [shade, d] of shades) { const [hue, step] = shade.split(" "); group.append(svg("path", { d, class: `sl-h-${hue}`, "fill-opacity": 0.04 + (0.66 * step) / STEPS })); }
    for (const [d, look] of [[framed_, "sl-h-sure"], [below, "sl-h-minus"], [lost, "sl-h-lost"]]) if (d) group.append(svg("path", { d, class: look }));
    if (wide > 40) for (let r = 0; r < rows; r++) for (let k = 0; k < columns; k++) if (!Number.isNaN(value(shown(), r, k)))
      group.append(words((k + 0.5) * wide - 0.5, (r + 0.5) * tall + 3.5, even(value(shown(), r, k)), "middle"));
    return group;
  }
  function even(x) {  // with the decimals of the largest, as on paper
    const text = facts.scale > 1e-3 && facts.scale < 1e4 ? x.toFixed(Math.max(0, 1 - Math.floor(Math.log10(facts.scale)))) : short(x, 2);
    return minus(Number(text) === 0 ? text.replace("-", "") : text);
  }
  function words(x, y, content, anchor, turn = 0, strong = false, look = "") {
    const el = svg("text", { x, y, "text-anchor": anchor, ...(turn && { transform: `rotate(${turn} ${x} ${y})` }), ...(strong && { "font-weight": 700 }), ...(look && { class: look }) });
    el.textContent = content;
    return el;
  }

  function steer(picture) {  // mouse and keys on the grid
    const { wide, tall, side, top } = box, [rows, columns] = size();
    const point = (r, k, say) => {
      at = [Math.max(0, Math.min(rows - 1, r)), Math.max(0, Math.min(columns - 1, k))];
      cursor.setAttribute("x", side + wide * at[1]);
      cursor.setAttribute("y", top + tall * at[0]);
      if (say) note(cursor, about_(shown(), ...at));
    };
    point(...at, false);
    const where = (event) => {
      const home = picture.getBoundingClientRect(), r = Math.floor((event.clientY - home.top - top) / tall), k = Math.floor((event.clientX - home.left - side) / wide);
      return r >= 0 && r < rows && k >= 0 && k < columns ? [r, k] : null;
    };
    picture.onmousemove = (event) => { const here = where(event); if (here) point(...here, true); else note(null); };
    picture.onmouseleave = picture.onblur = () => note(null);
    picture.onclick = (event) => { const here = where(event); if (here) choose(...here); };
    picture.onkeydown = (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (step) { point(at[0] + step[0], at[1] + step[1], true); cursor.scrollIntoView({ block: "nearest", inline: "nearest" }); }
      else if (event.key === "Enter" || event.key === " ") choose(...at);
      else if (event.key === "Escape") { note(null); set(model, "selected", []); } else return;
      event.preventDefault();
      event.stopPropagation();
    };
  }
  function choose(r, k) {
    const same = chosen() && chosen()[0] === r && chosen()[1] === k && chosen()[2] === shown();
    set(model, "selected", same ? [] : [r, k, shown()]);
  }

  function told(choice, r, k) {
    const x = value(choice, r, k), low = value(choice, r, k, 1), high = value(choice, r, k, 2);
    const unit = facts.unit ? ` ${facts.unit}` : "", spread = Number.isNaN(low) || Number.isNaN(high) ? "" : ` (${minus(short(low))} to ${minus(short(high))})`;
    return `${signed(x, 0)}${Number.isNaN(x) ? "" : spread + unit}`;
  }
  function about_(choice, r, k) {
    const line = (label, text) => make("div", { className: "sl-h-line" }, make("span", { className: "sl-quiet", textContent: label }), make("span", { textContent: text }));
    return make("div", {}, make("b", { textContent: told(choice, r, k) }), ...(facts.choices[choice] ? [line(facts.choice_label, facts.choices[choice])] : []),
      line(facts.down_label, facts.down[r]), line(facts.along_label, facts.along[k]), ...(facts.n ? [line("prompts", facts.n.toLocaleString("en-US"))] : []));
  }
  function tellStatus() {
    const here = chosen();
    status.textContent = here ? `${called(here[2])} ${facts.down_label} ${facts.down[here[0]]}, ${facts.along_label} ${facts.along[here[1]]}: ${told(here[2], here[0], here[1])}`.trim() : "";
  }

  function drawList() {  // the choices: at the selected cell, or where each is largest
    list.hidden = facts.choices.length < 2;
    if (list.hidden) return;
    const here = chosen(), [rows, columns] = size();
    const found = facts.choices.map((_, i) => (here ? [here[0], here[1]] : peak(i, rows, columns)));
    const order = facts.choices.map((_, i) => i).sort((a, b) => rank(b, found[b]) - rank(a, found[a])).slice(0, 200);
    const most = largest(order.map((i) => value(i, ...found[i])));
    const heads = [facts.choice_label, facts.quantity, ...(facts.intervals ? ["95 % interval"] : []), ...(here ? [] : ["where"])];
    const table = make("table", { role: "grid" }, make("tr", {}, ...heads.map((textContent) => make("th", { textContent }))), ...order.map((i) => row(i, found[i], most, !here)));
    const note_ = make("div", { className: "sl-quiet", textContent: here ? `at ${facts.down_label} ${facts.down[here[0]]}, ${facts.along_label} ${facts.along[here[1]]}` : "where each is largest" });
    const held = list.contains(document.activeElement), scroll = list.querySelector(".sl-h-scroll")?.scrollTop ?? 0;
    list.replaceChildren(note_, make("div", { className: "sl-h-scroll" }, table), ...(facts.choices.length > 200 ? [make("div", { className: "sl-quiet", textContent: `and ${facts.choices.length - 200} more` })] : []));
    list.querySelector(".sl-h-scroll").scrollTop = scroll;
    if (held) table.querySelector("[aria-selected=true]")?.focus({ preventScroll: true });
  }
  const rank = (i, [r, k]) => (Number.isNaN(value(i, r, k)) ? -1 : Math.abs(value(i, r, k)));
  function peak(choice, rows, columns) {
    let best = [0, 0], top = -1;
    for (let r = 0; r < rows; r++) for (let k = 0; k < columns; k++) if (Math.abs(value(choice, r, k)) > top) { top = Math.abs(value(choice, r, k)); best = [r, k]; }
    return best;
  }
  function row(i, [r, k], most, everywhere) {
    const x = value(i, r, k), low = value(i, r, k, 1), high = value(i, r, k, 2), mine = i === shown();
    const tr = make("tr", { tabIndex: mine ? 0 : -1 }), cell = (textContent, className = "") => { const td = make("td", { textContent, className }); tr.append(td); return td; };
    cell(cut(facts.choices[i], 40), "sl-h-words");
    const strong = cell(signed(x, most));
    if (x) strong.style.background = `color-mix(in srgb, var(${x > 0 ? "--sl-hot" : "--sl-cold"}) ${Math.round(4 + (66 * Math.min(1, Math.abs(x) / facts.scale)))}%, transparent)`;
    if (facts.intervals) cell(Number.isNaN(low) || Number.isNaN(high) ? "–" : `${minus(level(low, most))} to ${minus(level(high, most))}`, "sl-quiet");
    if (everywhere) cell(cut(`${facts.down[r]}, ${facts.along[k]}`, 32), "sl-h-words");
    tr.setAttribute("aria-selected", mine);
    tr.onclick = () => take(i);
    tr.onkeydown = (event) => {
      const near = { ArrowDown: tr.nextElementSibling, ArrowUp: tr.previousElementSibling }[event.key];
      if (near?.querySelector("td")) near.focus();
      else if (event.key === "Enter" || event.key === " ") take(i);
      else if (event.key === "Escape") set(model, "selected", []);
      else if (!["ArrowDown", "ArrowUp"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
    };
    return tr;
  }
  function take(i) {
    if (chosen()) set(model, "selected", [chosen()[0], chosen()[1], i]);
    set(model, "choice", i);
  }

  const later = framed(() => grids && draw()), again = framed(read);
  const followed = framed(() => { if (chosen() && chosen()[2] !== get("choice")) set(model, "choice", chosen()[2]); draw(); });
  const heard = { "change:numbers": again, "change:facts": again, "change:choice": later, "change:selected": followed };
  for (const [event, then] of Object.entries(heard)) model.on(event, then);
  read();
  return () => { for (const [event, then] of Object.entries(heard)) model.off(event, then); };
}
export default { render };

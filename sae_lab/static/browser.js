// Every latent of a dictionary in one table. Only the rows in sight exist; sorting and filtering never leave the browser.
const ROW = 26, TALLEST = 8e6, BLOCKS = " ▁▂▃▄▅▆▇█";
const WIDE = { shape: [80, 0], tokens: [132, 3], text: [54, 1], number: [58, 1] };  // least pixels, share of what is left

/** What the kernel sent, as columns with `value(i)` and, for words, `folded(i)`. */
function read(model) {
  const latents = typed(model.get("latents"), Int32Array), numbers = typed(model.get("numbers"), Float32Array);
  const words = parsed(model.get("words"), []), n = latents.length;
  const own = { name: "latent", kind: "number", note: "number of the latent", bar: "", unit: "", numeric: true, value: (i) => latents[i] };
  const columns = model.get("columns").map((facts) => {
    if (facts.kind === "number") {
      const part = numbers.subarray(facts.at * n, (facts.at + 1) * n);
      return { ...facts, numeric: true, most: spread(facts, part), value: (i) => part[i] };
    }
    const list = words[facts.at] ?? [];
    let low = null;
    return { ...facts, numeric: false, value: (i) => list[i], folded: (i) => (low ??= list.map(fold))[i] };
  });
  return { n, latents, columns: [own, ...columns] };
}
const fold = (text) => (text ?? "").toLowerCase().replaceAll("\u241f", " ");

const NUMBER = String.raw`[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?`, UNITS = { "%": 0.01, k: 1e3, m: 1e6, g: 1e9 };
const parse = (text, unit) => Number(text) * (UNITS[unit] ?? 1);

/** The largest of a column whose decimals are to be aligned; 0 for counts and for what runs over many powers of ten. */
const spread = (facts, part) => (facts.bar === "log" || part.every((x) => Number.isNaN(x) || Number.isInteger(x)) ? 0 : largest(part));

/** A test of one value from what a person wrote for a column of numbers, in the unit it is shown in; throws a sentence. */
function numberTest(text, unit) {
  const clean = text.trim().toLowerCase();
  if (clean === "none") return (x) => Number.isNaN(x);
  if (clean === "known") return (x) => !Number.isNaN(x);
  const range = clean.match(new RegExp(`^(${NUMBER})\\s*([%kmg]?)\\s*(?:\\.\\.|to)\\s*(${NUMBER})\\s*([%kmg]?)$`));
  if (range) { const low = parse(range[1], range[2] || unit), high = parse(range[3], range[4] || unit); return (x) => x >= low && x <= high; }
  const one = new RegExp(`(<=|>=|!=|<|>|=|≤|≥)?\\s*(${NUMBER})\\s*([%kmg]?)`, "y"), tests = [];
  let at = 0;
  while (at < clean.length) {
    one.lastIndex = at;
    const hit = one.exec(clean);
    if (!hit) throw new Error(`“${text}” is no range: write > 0.01, 0.1..0.5, >= 3 < 10, none or known`);
    tests.push(compare(hit[1] ?? "=", parse(hit[2], hit[3] || unit)));
    at = one.lastIndex + clean.slice(one.lastIndex).match(/^[\s,&]*/)[0].length;
  }
  return (x) => tests.every((test) => test(x));
}
function compare(sign, than) {
  const near = Math.max(Math.abs(than) * 1e-6, 1e-30);  // float32 of a decimal
  return { "<": (x) => x < than, ">": (x) => x > than, "<=": (x) => x <= than + near, ">=": (x) => x >= than - near,
           "≤": (x) => x <= than + near, "≥": (x) => x >= than - near, "=": (x) => Math.abs(x - than) <= near,
           "!=": (x) => Math.abs(x - than) > near }[sign];
}

/** The same for a column of words: a part of them, =whole, /regular expression/, !opposite. */
function wordTest(text) {
  if (text.startsWith("!") && text.length > 1) { const test = wordTest(text.slice(1)); return (...x) => !test(...x); }
  if (text === "none") return (raw) => !raw;
  if (text === "known") return (raw) => !!raw;
  if (text.startsWith("=")) { const whole = fold(text.slice(1)); return (raw, folded) => folded === whole; }
  const pattern = text.match(/^\/(.+)\/(i?)$/);
  if (pattern) {
    let test;
    try { test = new RegExp(pattern[1], pattern[2] + "u"); } catch { throw new Error(`“${text}” is no regular expression`); }
    return (raw) => (raw ?? "").split("\u241f").some((part) => test.test(part));
  }
  const part = fold(text);
  return (raw, folded) => folded.includes(part);
}

/** Rows that pass every filter and the search, and what could not be read, by column. */
function chosen(table, filters, search, only) {
  const wrong = {}, tests = [];
  for (const column of table.columns) {
    const text = (filters[column.name] ?? "").trim();
    if (!text) continue;
    try {
      const test = column.numeric ? numberTest(text, column.unit) : wordTest(text);
      tests.push(column.numeric ? (i) => test(column.value(i)) : (i) => test(column.value(i), column.folded(i)));
    } catch (error) { wrong[column.name] = error.message; }
  }
  const words = table.columns.filter((c) => !c.numeric && c.kind !== "shape"), wanted = fold(search).trimEnd();
  if (wanted.trim()) tests.push((i) => String(table.latents[i]) === wanted.trim() || words.some((c) => c.folded(i).includes(wanted)));
  if (only) tests.push((i) => only.has(table.latents[i]));
  const rows = [];
  for (let i = 0; i < table.n; i++) if (tests.every((test) => test(i))) rows.push(i);
  return { rows, wrong };
}

/** Sort rows in place; what is unknown comes last either way, and equals keep the order of their numbers. */
function sorted(table, rows, order) {
  const keys = order.map(([name, way]) => [table.columns.find((c) => c.name === name), way === "up" ? 1 : -1]).filter(([c]) => c);
  const missing = (c, x) => (c.numeric ? Number.isNaN(x) : !x);
  return rows.sort((a, b) => {
    for (const [column, way] of keys) {
      const x = column.value(a), y = column.value(b);
      if (x === y) continue;
      const no = missing(column, x), neither = no && missing(column, y);
      if (neither) continue;
      if (no) return 1;
      if (missing(column, y)) return -1;
      return x < y ? -way : way;
    }
    return a - b;
  });
}

/** Length of the bar behind a number, 0 to 1. */
function length(column, x) {
  if (!column.bar || !Number.isFinite(x) || !(x > 0) || !(column.high > 0)) return 0;
  if (column.bar === "linear") return Math.min(1, x / column.high);
  const share = column.high > column.low ? Math.log(x / column.low) / Math.log(column.high / column.low) : 1;
  return 0.04 + 0.96 * Math.max(0, Math.min(1, share));
}

/** A number as a person reads it. */
function told(column, x) {
  const scale = column.unit === "%" ? 100 : 1;  // the unit stands in the head
  return level(scale * x, scale * column.most);
}

/** The outline of a histogram from its sparkline. */
function path(cell, width = 68, height = 16) {
  const step = width / (cell.length || 1);
  return [...cell].map((c, i) => [i * step, (height * Math.max(0, BLOCKS.indexOf(c))) / 8])
    .filter(([, tall]) => tall).map(([x, tall]) => `M${x.toFixed(1)} ${height}v${-tall}h${(step - 1).toFixed(1)}v${tall}z`).join("");
}

/** A cell that can be filled again and again: [element, fill(row)]. Nothing is made anew while rows go by. */
function cellOf(column) {
  const el = make("div", { className: `sl-b-${column.kind}`, role: "gridcell" });
  if (column.kind === "shape") {
    const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "path");
    svg.append(line);
    svg.setAttribute("aria-hidden", "true");
    el.append(svg);
    return [el, (i) => line.setAttribute("d", path(column.value(i) ?? ""))];
  }
  if (column.kind === "tokens") return [el, framesIn(el, column)];
  const text = document.createTextNode("");
  el.append(text);
  if (!column.numeric || column.name === "latent") return [el, (i) => { text.data = column.value(i) ?? ""; }];
  if (!column.bar) return [el, (i) => { text.data = told(column, column.value(i)); }];
  return [el, (i) => {
    const x = column.value(i);
    text.data = told(column, x);
    el.style.backgroundSize = `${(100 * length(column, x)).toFixed(0)}% 18px`;
  }];
}

/** Tokens in frames that are kept and filled. */
function framesIn(el, column) {
  const spans = [];
  return (i) => {
    const cell = column.value(i), parts = cell ? cell.split("\u241f") : [];
    while (spans.length < parts.length) { spans.push(make("span", { className: "sl-chip" }, "")); el.append(spans.at(-1)); }
    spans.forEach((span, k) => {
      if (span.hidden !== k >= parts.length) span.hidden = k >= parts.length;
      if (k < parts.length) span.firstChild.data = parts[k];
    });
  };
}

/** Widths of the columns in pixels: the least of each, and a share of what is left. */
function widths(columns, room) {
  const wide = columns.slice(1).map((c) => WIDE[c.kind]), least = 86 + wide.reduce((sum, [px]) => sum + px, 0);
  const parts = wide.reduce((sum, [, part]) => sum + part, 0), left = Math.max(0, room - least);
  return [28, 58, ...wide.map(([px, part]) => Math.floor(px + (parts ? (left * part) / parts : 0)))];
}

function render({ model, el }) {
  el.classList.add("sl", "sl-browser");
  const uid = `sl-b${Math.random().toString(36).slice(2)}`;
  let table = read(model), rows = [], pool = [], cursor = 0, only = false, first = -1, inputs = {}, heads = {};

  const title = make("b", { className: "sl-b-title" }), count = make("span", { className: "sl-quiet", role: "status" });
  const search = make("input", { type: "search", placeholder: "search tokens, labels, numbers", ariaLabel: "search latents" });
  const pins = make("button", { type: "button", ariaPressed: "false" });
  const clear = make("button", { type: "button", textContent: "clear" });
  const keys = make("span", { className: "sl-quiet sl-b-keys", textContent: "↑↓ move · Enter open · Space pin · / search" });
  const bar = make("div", { className: "sl-b-bar" }, title, search, pins, clear, count);
  const error = make("div", { className: "sl-error", role: "alert" });
  const head = make("div", { className: "sl-b-head", role: "row" }), sieve = make("div", { className: "sl-b-sieve", role: "row" });
  const stage = make("div", { className: "sl-b-stage", role: "rowgroup" }), space = make("div", { className: "sl-b-space", role: "presentation" }, stage);
  const top = make("div", { className: "sl-b-top", role: "rowgroup" }, head, sieve);
  const grid = make("div", { className: "sl-b-grid", tabIndex: 0, role: "grid" }, top, space);
  el.append(bar, error, grid, make("div", { className: "sl-b-foot" }, keys));

  const visible = () => Math.max(1, Math.floor((grid.clientHeight - top.offsetHeight) / ROW));
  const ratio = () => Math.min(1, TALLEST / Math.max(1, rows.length * ROW));

  function build() {  // what hangs on the columns alone
    table = read(model);
    title.textContent = model.get("title");
    title.title = model.get("note");
    grid.style.height = `${model.get("height")}px`;
    grid.setAttribute("aria-label", `latents of ${model.get("title") || "a dictionary"}`);
    grid.setAttribute("aria-colcount", table.columns.length + 1);
    heads = {}; inputs = {};
    head.replaceChildren(make("div", { className: "sl-b-pin", role: "columnheader", ariaLabel: "pinned" }), ...table.columns.map(headOf));
    sieve.replaceChildren(make("div", { className: "sl-b-pin", role: "gridcell" }), ...table.columns.map(filterOf));
    pool = [];
    stage.replaceChildren();
    grow();
    sieved();
  }

  function headOf(column) {
    const button = make("button", { type: "button", textContent: column.unit ? `${column.name}, ${column.unit}` : column.name, title: column.note });
    button.onclick = (event) => sortBy(column, event.shiftKey);
    const cell = make("div", { className: `sl-b-${column.kind}`, role: "columnheader" }, button);
    heads[column.name] = cell;
    return cell;
  }

  function filterOf(column) {
    const about = column.numeric ? `> 0.01, 0.1..0.5, none${column.unit && `; in ${column.unit}`}` : "part, =whole, /regex/, !not";
    const input = make("input", { type: "text", placeholder: "filter", title: about, ariaLabel: `filter ${column.name}: ${about}` });
    input.spellcheck = false;
    input.oninput = () => { set(model, "filters", { ...model.get("filters"), [column.name]: input.value }); };
    input.onkeydown = leave;
    if (column.kind !== "shape") inputs[column.name] = input;
    return make("div", { role: "gridcell" }, ...(column.kind === "shape" ? [] : [input]));
  }

  function leave(event) {
    if (event.key === "Escape" && event.target.value) { event.target.value = ""; event.target.oninput(); event.preventDefault(); }
    else if (["Escape", "ArrowDown", "Enter"].includes(event.key)) { grid.focus({ preventScroll: true }); event.preventDefault(); }
    event.stopPropagation();
  }

  function sortBy(column, also) {
    const was = model.get("order"), mine = was.find(([name]) => name === column.name);
    const begin = column.numeric && column.name !== "latent" ? "down" : "up", other = begin === "down" ? "up" : "down";
    const next = !mine ? [[column.name, begin]] : mine[1] === begin ? [[column.name, other]] : [];
    set(model, "order", also ? [...was.filter(([name]) => name !== column.name), ...next] : next);
  }

  function grow() {  // as many row elements as can be in sight, and columns as wide as there is room
    const wide = widths(table.columns, grid.clientWidth), wanted = visible() + 2;
    el.style.setProperty("--sl-b-columns", wide.map((px) => `${px}px`).join(" "));
    el.style.setProperty("--sl-b-least", `${wide.reduce((sum, px) => sum + px, 0)}px`);
    if (pool.length >= wanted) return;
    while (pool.length < wanted) pool.push(rowOf(pool.length));
    for (const each of pool) each.at = -1;
  }

  function rowOf(k) {
    const star = make("button", { type: "button", className: "sl-b-star", tabIndex: -1 }, "☆");
    const pin = make("div", { className: "sl-b-pin", role: "gridcell" }, star), made = table.columns.map(cellOf);
    const row = make("div", { className: "sl-b-row", role: "row", id: `${uid}-${k}` }, pin, ...made.map(([cell]) => cell));
    made[0][0].className = "sl-b-latent";
    const self = { row, star, fills: made.map(([, fill]) => fill), at: -1, i: -1, says: "" };
    row.onclick = () => { cursor = self.at; choose(); };
    star.onclick = (event) => { event.stopPropagation(); togglePin(table.latents[self.i]); };
    stage.append(row);
    return self;
  }

  function sieved() {  // filters, search, order changed
    const only_ = only ? new Set(model.get("pinned")) : null, held = rows[cursor];
    const { rows: passed, wrong } = chosen(table, model.get("filters"), model.get("search"), only_);
    rows = sorted(table, passed, model.get("order"));
    cursor = Math.max(0, rows.indexOf(held));
    const { n } = table;
    count.textContent = rows.length === n ? `${n.toLocaleString("en-US")} latents` :
      `${rows.length.toLocaleString("en-US")} of ${n.toLocaleString("en-US")} latents`;
    error.textContent = Object.values(wrong).join("\n");
    for (const [name, input] of Object.entries(inputs)) {
      const text = model.get("filters")[name] ?? "";
      if (input.value !== text) input.value = text;
      input.toggleAttribute("aria-invalid", name in wrong);
      input.classList.toggle("sl-b-on", !!text);
    }
    if (search.value !== model.get("search")) search.value = model.get("search");
    for (const [name, cell] of Object.entries(heads)) {
      const rank = model.get("order").findIndex(([key]) => key === name), way = rank < 0 ? "" : model.get("order")[rank][1];
      cell.setAttribute("aria-sort", way === "up" ? "ascending" : way ? "descending" : "none");
    }
    grid.setAttribute("aria-rowcount", rows.length + 2);
    space.style.height = `${rows.length * ROW * ratio()}px`;
    grid.classList.toggle("sl-b-empty", !rows.length);
    space.dataset.empty = table.n ? "no latent passes" : "no latents";
    pinLabel();
    redraw(true);
    tell();
  }

  let telling = 0;
  function tell() {  // Python learns which latents pass once the person pauses
    const was = model.get("found"), same = () => was.length === rows.length && rows.every((i, k) => table.latents[i] === was[k]);
    clearTimeout(telling);
    telling = setTimeout(() => same() || set(model, "found", Array.from(rows, (i) => table.latents[i])), 250);
  }

  function redraw(all) {  // row `at` lives in pool[at % pool.length]: a small step fills only what has come into sight
    const from = Math.max(0, Math.min(Math.floor(grid.scrollTop / ratio() / ROW), rows.length - visible()));
    if (!all && from === first) return;
    const shift = ratio() < 1 ? grid.scrollTop - from * ROW : 0, pinned = new Set(model.get("pinned")), selected = model.get("selected");
    first = from;
    for (let at = from; at < from + pool.length; at++) fill(pool[at % pool.length], at, shift, pinned, selected);
    const active = pool[cursor % pool.length], seen = active.at === cursor && !active.row.hidden ? active.row.id : "";
    if (grid.getAttribute("aria-activedescendant") !== seen) grid.setAttribute("aria-activedescendant", seen);
  }

  function fill(each, at, shift, pinned, selected) {
    const { row, star } = each, gone = at >= rows.length;
    if (row.hidden !== gone) row.hidden = gone;
    each.at = at;
    if (gone) return;
    const i = rows[at], latent = table.latents[i], isPinned = pinned.has(latent);
    if (each.i !== i) { each.i = i; for (const put of each.fills) put(i); }
    const says = [at, shift, isPinned, latent === selected, at === cursor].join();
    if (each.says === says) return;
    each.says = says;
    row.style.transform = `translateY(${at * ROW + shift}px)`;
    row.className = `sl-b-row${at % 2 ? " sl-b-odd" : ""}${isPinned ? " sl-b-pinned" : ""}${at === cursor ? " sl-b-cursor" : ""}`;
    row.setAttribute("aria-selected", latent === selected);
    row.setAttribute("aria-rowindex", at + 3);
    star.firstChild.data = isPinned ? "★" : "☆";
    star.setAttribute("aria-label", isPinned ? "unpin" : "pin");
  }

  function move(to) {
    if (!rows.length) return;
    cursor = Math.max(0, Math.min(rows.length - 1, to));
    const at = grid.scrollTop / ratio(), y = cursor * ROW, high = visible() * ROW;
    if (y < at) grid.scrollTop = y * ratio();
    else if (y + ROW > at + high) grid.scrollTop = (y + ROW - high) * ratio();
    redraw(true);
  }
  function choose() { if (rows.length) { set(model, "selected", table.latents[rows[cursor]]); redraw(true); } }
  function togglePin(latent) {
    const was = model.get("pinned");
    set(model, "pinned", was.includes(latent) ? was.filter((each) => each !== latent) : [...was, latent]);
  }
  function pinLabel() {
    const n = model.get("pinned").length;
    pins.textContent = `★ ${n} pinned`;
    pins.setAttribute("aria-pressed", only);
    pins.classList.toggle("sl-b-on", only);
    clear.hidden = !model.get("search") && !Object.values(model.get("filters")).some((text) => text);
  }

  grid.onkeydown = (event) => {
    if (event.target !== grid || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { ArrowDown: () => move(cursor + 1), ArrowUp: () => move(cursor - 1), PageDown: () => move(cursor + visible()),
      PageUp: () => move(cursor - visible()), Home: () => move(0), End: () => move(rows.length - 1), Enter: choose,
      " ": () => rows.length && togglePin(table.latents[rows[cursor]]), "/": () => search.focus(),
      Escape: () => set(model, "selected", -1) }[event.key];
    if (!act) return;
    act();
    event.preventDefault();
    event.stopPropagation();
  };
  grid.onscroll = framed(() => redraw(false));
  search.oninput = () => set(model, "search", search.value);
  search.onkeydown = leave;
  pins.onclick = () => { only = !only; sieved(); };
  clear.onclick = () => { set(model, "filters", {}); set(model, "search", ""); search.focus(); };
  const later = framed(sieved), heard = {
    "change:search": later, "change:filters": later, "change:order": later, "change:columns": build, "change:numbers": build,
    "change:height": build, "change:selected": reveal, "change:pinned": () => (only ? sieved() : (pinLabel(), redraw(true))) };
  for (const [name, then] of Object.entries(heard)) model.on(name, then);

  function reveal() {  // Python or a linked view chose a latent
    const latent = model.get("selected"), at = rows.findIndex((i) => table.latents[i] === latent);
    if (at >= 0 && at !== cursor) move(at); else redraw(true);
  }
  const sight = new ResizeObserver(() => { grow(); redraw(true); });
  build();
  sight.observe(grid);
  reveal();
  return () => { sight.disconnect(); clearTimeout(telling); for (const [name, then] of Object.entries(heard)) model.off(name, then); };
}
export default { render };

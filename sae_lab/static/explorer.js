// The splitting explorer: a forest of every dictionary, the family of one latent, evidence beside its null.
const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"], GREY = "#8c8c8c";
const KINDS = [["cosine", "cosine"], ["correlation", "correlation"], ["given", "P(parent|child)"]];
const COLUMNS = ["level", "parent", "child", "cosine", "correlation", "given", "reverse", "n_child", "p", "q", "shown", "strength"];
const ROW = 19, MOST = 28, TOP = 40, GAP = 22;
const TREE = "A line joins a parent and a child: the thicker, the larger the mean of cosine, correlation and P(parent|child); dashed grey: another parent or child.";
const clip = (v) => (Number.isFinite(v) ? Math.min(Math.max(v, 0), 1) : 0);
const hue = (branch) => (branch === -2 ? GREY : branch < 0 ? "currentColor" : HUES[branch % HUES.length]);

/** An SVG element with attributes and children. */
function draw(tag, facts = {}, ...children) {
  const el = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(facts)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

/** Evidence in two digits. */
const few = (x) => (x === null || Number.isNaN(x) ? "?" : short(x, 2));

/** Wilson's 95 % interval of a share of n. */
function wilson(share, n) {
  if (!(n > 0) || !Number.isFinite(share)) return [0, 1];
  const z = 1.96, z2 = z * z / n, half = z * Math.sqrt(share * (1 - share) / n + z2 / (4 * n));
  return [clip((share + z2 / 2 - half) / (1 + z2)), clip((share + z2 / 2 + half) / (1 + z2))];
}

/** A band that leaves and arrives level, from (x, a, b) to (to, c, d). */
function ribbon([x, a, b], [to, c, d]) {
  const r = (v) => Math.round(v * 10) / 10, mid = r((x + to) / 2);
  return `M${r(x)} ${r(a)}C${mid} ${r(a)} ${mid} ${r(c)} ${r(to)} ${r(c)}V${r(d)}C${mid} ${r(d)} ${mid} ${r(b)} ${r(x)} ${r(b)}z`;
}

/** What the kernel sent, as typed arrays and lists; latents are numbered through all dictionaries. */
function readLadder(model) {
  const sizes = model.get("sizes"), names = model.get("names"), flat = typed(model.get("edges"), Float32Array);
  const n = flat.length / COLUMNS.length, edges = { n };
  COLUMNS.forEach((name, i) => { edges[name] = flat.subarray(i * n, (i + 1) * n); });
  const first = [0];
  for (const size of sizes) first.push(first[first.length - 1] + size);
  const total = first[sizes.length], from = new Int32Array(n), to = new Int32Array(n);
  for (let i = 0; i < n; i++) {
    from[i] = first[edges.level[i]] + edges.parent[i];
    to[i] = first[edges.level[i] + 1] + edges.child[i];
  }
  const texts = new TextDecoder().decode(model.get("texts")).split("\n");
  const levelOf = (id) => { let l = 0; while (id >= first[l + 1]) l++; return l; };
  const kin = (own) => {  // edges of each latent, in the order sent: strongest first
    const start = new Int32Array(total + 1), list = new Int32Array(n);
    for (let i = 0; i < n; i++) start[own[i] + 1]++;
    for (let i = 0; i < total; i++) start[i + 1] += start[i];
    const at = start.slice(0, total);
    for (let i = 0; i < n; i++) list[at[own[i]]++] = i;
    return (id) => list.subarray(start[id], start[id + 1]);
  };
  const text = (id) => { const [label, tokens, state] = texts[id].split("\t"); return { label, tokens, state }; };
  return { sizes, names, edges, first, total, from, to, texts, text, levelOf, down: kin(from), up: kin(to),
    rank: typed(model.get("ranks"), Int32Array), density: typed(model.get("density"), Float32Array), attached: model.get("attached"),
    nulls: model.get("nulls") };
}

/** The family of a latent: rows, branches and what is left out; the same rules as `views.family.family`. */
function familyOf(data, pass, focus, most = MOST) {
  const side = (down) => {
    const kin = new Map(), hidden = new Map(), tree = new Map();
    let own = [focus];
    while (own.length) {
      const cand = [];
      for (const id of own) for (const e of (down ? data.down : data.up)(id)) if (pass[e]) cand.push(e);
      cand.sort((a, b) => a - b);  // edges are sent strongest first
      const groups = new Map(own.map((id) => [id, []])), seen = new Set();
      for (const e of cand) {
        const other = down ? data.to[e] : data.from[e];
        if (!seen.has(other)) groups.get(down ? data.from[e] : data.to[e]).push(e);
        seen.add(other);
      }
      const turns = own.flatMap((id, place) => groups.get(id).map((_, turn) => [turn, place]));
      turns.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
      const take = new Map();
      for (const [, place] of turns.slice(0, most)) take.set(place, (take.get(place) ?? 0) + 1);
      const next = [];
      own.forEach((id, place) => {
        const all = groups.get(id), kept = all.slice(0, take.get(place) ?? 0);
        const ids = kept.map((e) => (down ? data.to[e] : data.from[e]));
        kept.forEach((e, i) => tree.set(e, ids[i]));
        kin.set(id, ids);
        hidden.set(id, all.length - kept.length);
        next.push(...ids);
      });
      own = next;
    }
    const rows = new Map(), branch = new Map([[focus, -1]]);
    const place = (id, top) => {
      const own = kin.get(id) ?? [];
      if (!own.length) { rows.set(id, top + .5); return top + 1; }
      let at = top;
      own.forEach((each, i) => { branch.set(each, id === focus ? i : branch.get(id)); at = place(each, at); });
      let end = rows.get(own[own.length - 1]);
      if (hidden.get(id)) { end = at + .5; at += 1; }
      rows.set(id, (rows.get(own[0]) + end) / 2);
      return at + (own.length > 1 ? .35 : 0);
    };
    place(focus, 0);
    return { kin, hidden, rows, branch, tree };
  };
  const sides = [side(true), side(false)], deepest = Math.max(...sides.map((each) => each.rows.get(focus)));
  const members = new Map(), tree = new Map();
  for (const [i, each] of sides.entries()) {
    const shift = deepest - each.rows.get(focus);
    for (const [e, far] of each.tree) tree.set(e, { far, down: i === 0 });
    for (const [id, row] of each.rows) {
      if (members.has(id)) continue;
      members.set(id, { id, level: data.levelOf(id), row: row + shift, branch: each.branch.get(id), down: i === 0,
        kids: each.kin.get(id) ?? [], hidden: each.hidden.get(id) ?? 0 });
    }
  }
  const parent = (sides[0].kin.get(focus) ?? []).length ? undefined : (sides[1].kin.get(focus) ?? [])[0];
  let beside = null;  // the parent whose other children stand beneath a focus without descendants
  if (parent !== undefined) {
    const all = [...data.down(parent)].filter((e) => pass[e]), at = members.get(focus);
    all.slice(0, most).filter((e) => data.to[e] !== focus).forEach((e, i) => {
      members.set(data.to[e], { id: data.to[e], level: at.level, row: at.row + i + 1, branch: -2, down: false, kids: [], hidden: 0 });
      tree.set(e, { far: data.to[e], down: false });
      beside = parent;
    });
    members.get(parent).hidden += Math.max(all.length - most, 0);
    const others = [...members.values()], half = others.filter((m) => m.branch === -2).length / 2;
    for (const m of others) if (m.branch !== -2 && m.id !== focus) m.row += half;  // before the middle of the siblings
  }
  const least = Math.min(...[...members.values()].map((m) => m.row)) - .5;
  for (const m of members.values()) m.row -= least;
  const edges = [];
  for (const id of members.keys()) for (const e of data.down(id)) if (pass[e] && members.has(data.to[e])) edges.push(e);
  const branchOf = (e) => (tree.has(e) ? members.get(tree.get(e).far).branch : null);
  const parentIn = new Map([...tree].map(([e, { far }]) => [far, e]));
  return { focus, members, edges, tree, branchOf, parentIn, up: sides[1].kin, beside };
}

/** Both ends of every ribbon; shares that add up to more than their bar are squeezed into it. */
function portsOf(data, fam, ys, tall, xs) {
  const ends = new Map(fam.edges.map((e) => [e, []]));
  for (const left of [true, false]) {
    const bars = new Map();
    for (const e of fam.edges) {
      const [own, other] = left ? [data.from[e], data.to[e]] : [data.to[e], data.from[e]];
      if (!bars.has(own)) bars.set(own, []);
      bars.get(own).push([ys.get(other), clip(left ? data.edges.reverse[e] : data.edges.given[e]), e]);
    }
    for (const [own, parts] of bars) {
      const sum = parts.reduce((total, [, part]) => total + part, 0), scale = tall.get(own) / Math.max(1, sum);
      let top = ys.get(own) - scale * sum / 2;
      const x = xs[fam.members.get(own).level] + (left ? 7 : 0);
      parts.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
      for (const [, part, e] of parts) {
        ends.get(e).push([x, top, top + Math.max(scale * part, .7)]);
        top += scale * part;
      }
    }
  }
  return ends;
}

/** What a latent is called beside its number. */
function nameOf(data, id, limit = 40) {
  const { label, tokens, state } = data.text(id), name = label || tokens;
  const cut = name.length > limit ? `${name.slice(0, Math.max(limit - 1, 1))}…` : name;
  return [cut, ["novel", "absorbed", "rare"].includes(state) ? state : ""].filter(Boolean).join(" · ");
}

/** The null of a kind of evidence at a step of the ladder. */
const nullOf = (data, kind, level) => data.nulls.find((each) => each.evidence === kind && [-1, level].includes(each.level));

/** Every latent on its column, bands from parents to children, the family in colour. */
function forest(canvas, data, pass, mains) {
  const last = Math.max(data.sizes.length - 1, 1);
  let width = 0, height = 0, base = null;
  const x = (level) => 10 + (width - 24) * level / last;
  const depth = (level, place, end = false) => {
    const size = Math.max(data.sizes[level], 1), tied = data.attached[level], gap = tied > 0 && tied < size ? 10 : 0;
    return 4 + (height - 8 - gap) * place / size + (gap && (place > tied || (place === tied && !end)) ? gap : 0);
  };
  function paintBase() {
    const pen = base.getContext("2d", { willReadFrequently: true });
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const band = (ctx, x0, a, b, x1, c, d) => {
      const mid = (x0 + x1) / 2;
      ctx.moveTo(x0, a); ctx.bezierCurveTo(mid, a, mid, c, x1, c); ctx.lineTo(x1, d); ctx.bezierCurveTo(mid, d, mid, b, x0, b);
    };
    const odd = [new Path2D(), new Path2D()], cross = new Path2D();
    for (let level = 0; level + 1 < data.sizes.length; level++) {
      const counts = new Int32Array(data.sizes[level]);
      for (let i = 0; i < data.sizes[level + 1]; i++) {
        const e = mains[data.first[level + 1] + i];
        if (e >= 0) counts[data.rank[data.from[e]]]++;
      }
      const thin = Math.ceil(data.sizes[level + 1] / height), near = Math.ceil(data.sizes[level] / height);
      let at = 0, turn = 0, run = null;  // neighbours thinner than a pixel are drawn as one
      const flush = () => run && band(odd[turn++ % 2], x(level) + 5, depth(level, run.above), depth(level, run.below, true),
        x(level + 1) - 1, depth(level + 1, run.top), depth(level + 1, run.bottom, true));
      counts.forEach((count, place) => {
        if (!count) return;
        if (run && place - run.below <= near && count < thin && run.bottom - run.top < thin) Object.assign(run, { below: place + 1, bottom: at + count });
        else { flush(); run = { above: place, below: place + 1, top: at, bottom: at + count }; }
        at += count;
      });
      flush();
    }
    for (let e = 0; e < data.edges.n; e++) {
      if (!data.edges.shown[e] || mains[data.to[e]] === e) continue;
      const level = data.edges.level[e], a = depth(level, data.rank[data.from[e]] + .5), b = depth(level + 1, data.rank[data.to[e]] + .5);
      const mid = (x(level) + x(level + 1)) / 2;
      cross.moveTo(x(level) + 5, a); cross.bezierCurveTo(mid, a, mid, b, x(level + 1) - 1, b);
    }
    pen.fillStyle = "rgb(136 136 136 / .42)"; pen.fill(odd[0]);
    pen.fillStyle = "rgb(136 136 136 / .26)"; pen.fill(odd[1]);
    pen.strokeStyle = "rgb(136 136 136 / .06)"; pen.lineWidth = .5; pen.stroke(cross);
    data.sizes.forEach((size, level) => {
      for (const [from, to, ink] of level ? [[0, data.attached[level], ".95"], [data.attached[level], size, ".4"]] : [[0, size, ".95"]]) {
        pen.fillStyle = `rgb(136 136 136 / ${ink})`;
        if (to > from) pen.fillRect(x(level), depth(level, from), 4, Math.max(depth(level, to, true) - depth(level, from), .5));
      }
    });
  }
  function size() {
    width = canvas.clientWidth; height = canvas.clientHeight;
    for (const each of [canvas, base ??= document.createElement("canvas")]) {
      each.width = Math.round(width * devicePixelRatio); each.height = Math.round(height * devicePixelRatio);
    }
    if (width) paintBase();
  }
  function paint(fam, lit = null) {
    if (!width || !height) return;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(base, 0, 0);
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    const ink = getComputedStyle(canvas).color;
    for (const e of fam.edges) {
      const level = data.edges.level[e], a = depth(level, data.rank[data.from[e]] + .5), b = depth(level + 1, data.rank[data.to[e]] + .5);
      const mid = (x(level) + x(level + 1)) / 2, branch = fam.branchOf(e), bright = !lit || lit.has(e);
      pen.strokeStyle = branch === null ? GREY : hue(branch); pen.lineWidth = lit && bright ? 2.6 : 1.3; pen.globalAlpha = bright ? 1 : .25;
      pen.beginPath(); pen.moveTo(x(level) + 5, a); pen.bezierCurveTo(mid, a, mid, b, x(level + 1) - 1, b); pen.stroke();
    }
    pen.globalAlpha = 1;
    for (const m of fam.members.values()) {
      const y = depth(m.level, data.rank[m.id] + .5), focus = m.id === fam.focus;
      pen.fillStyle = focus ? ink : hue(m.branch);
      pen.fillRect(x(m.level) - 2, y - (focus ? 1.5 : .8), 8, focus ? 3 : 1.6);
    }
  }
  function pick(px, py) {
    let level = 0;
    for (let l = 1; l <= last && l < data.sizes.length; l++) if (Math.abs(x(l) + 2 - px) < Math.abs(x(level) + 2 - px)) level = l;
    const size = data.sizes[level], tied = data.attached[level], gap = tied > 0 && tied < size ? 10 : 0;
    let place = (py - 4) * size / (height - 8 - gap);
    if (gap && place > tied) place = Math.max(tied, place - gap * size / (height - 8 - gap));
    return { level, place: Math.min(size - 1, Math.max(0, Math.floor(place))), x: x(level), y: py };
  }
  return { size, paint, pick, x };
}

/** A little chart of one kind of evidence of an edge over its null. */
function bullet(data, e, kind, title) {
  const W = 96, value = data.edges[kind][e], none = nullOf(data, kind, data.edges.level[e]);
  const svg = draw("svg", { width: W + 2, height: 16, viewBox: `-1 0 ${W + 2} 16`, "aria-hidden": "true" });
  if (none) {
    svg.append(draw("rect", { x: 0, y: 2, width: Math.max(W * clip(none.q99), 1), height: 12, fill: "currentColor", "fill-opacity": .16 }),
      draw("path", { d: `M${W * clip(none.max)} 2v12`, stroke: "currentColor", opacity: .6 }));
  }
  svg.append(draw("path", { d: `M0 8H${W}`, stroke: "currentColor", opacity: .25 }));
  if (Number.isFinite(value)) {
    if (kind === "given") {
      const [low, high] = wilson(clip(value), data.edges.n_child[e]);
      svg.append(draw("path", { d: `M${W * low} 8H${W * high}`, stroke: "currentColor", "stroke-width": 1.5 }));
    }
    svg.append(draw("circle", { cx: W * clip(value), cy: 8, r: 3.8, fill: "currentColor" }));
  }
  const beyond = !none || !Number.isFinite(value) ? "" : value > none.max ? "beyond every draw of the null" : value > none.q99 ? "beyond 99 % of the null" : "as the null gives";
  const said = none ? `${title} ${few(value)}: ${beyond} (${none.null}; ${none.draws.toLocaleString("en")} draws, 99 % below ${few(none.q99)}, largest ${few(none.max)})` : `${title} ${few(value)}`;
  return make("div", { className: "sl-ex-bullet", title: said }, make("span", { textContent: title }), svg, make("b", { textContent: few(value) }));
}

function render({ model, el }) {
  const began = performance.now(), root = make("div", { className: "sl sl-ex" });
  el.append(root);
  const data = readLadder(model), note = notes(root), edges = data.edges;
  const counts = edges.n_child;
  const pass = new Uint8Array(edges.n), mains = new Int32Array(data.total).fill(-1);
  for (let e = edges.n - 1; e >= 0; e--) if (edges.shown[e]) mains[data.to[e]] = e;  // the strongest is written last
  let fam = null, cursor = 0, hover = null, past = [], plane = null, width = 0;
  const id = (level, latent) => data.first[level] + latent, latentOf = (i) => i - data.first[data.levelOf(i)];
  const called = (i) => `${data.names[data.levelOf(i)]}:${latentOf(i)}`;
  const many = (n, one, more) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;
  const kinOf = (i) => [data.up(i).filter((e) => pass[e]).length, data.down(i).filter((e) => pass[e]).length];

  // controls
  const search = make("input", { type: "search", placeholder: "latent, label or token", title: "a number, dictionary:number, a label or a token", className: "sl-ex-search" });
  search.setAttribute("aria-label", "Find a latent");
  const hits = make("div", { className: "sl-ex-hits", hidden: true, role: "listbox" });
  const back = make("button", { textContent: "← back", disabled: true, title: "The latent before (Escape)" });
  const modes = make("span", { className: "sl-ex-modes", role: "group" }, ...["flow", "tree"].map((mode) =>
    make("button", { textContent: mode, onclick: () => set(model, "mode", mode), value: mode })));
  const passing = make("span", { className: "sl-quiet sl-ex-passing" });
  passing.setAttribute("role", "status");
  const knobs = KINDS.map(([kind, title]) => {
    const input = make("input", { type: "range", min: 0, max: 1, step: .01, oninput: () => set(model, kind, Number(input.value)) }), out = make("output");
    const show = () => { input.value = model.get(kind); out.textContent = model.get(kind) > 0 ? `≥ ${model.get(kind).toFixed(2)}` : "any"; };
    model.on(`change:${kind}`, () => { show(); filter(); });
    show();
    return make("label", {}, make("span", { textContent: title }), input, out);
  });
  const level = make("select", { onchange: () => set(model, "q", Number(level.value)) });
  for (const q of [...new Set([.001, .01, model.get("fdr"), 1, model.get("q")])].sort((a, b) => a - b))
    level.append(make("option", { value: q, textContent: q >= 1 ? "any" : `≤ ${q}` }));
  level.value = model.get("q");
  model.on("change:q", () => { level.value = model.get("q"); filter(); });
  knobs.push(make("label", {}, make("span", { textContent: "q" }), level));
  const reset = make("button", { textContent: "reset", onclick: () => {
    for (const [kind] of KINDS) set(model, kind, 0);
    set(model, "q", model.get("fdr"));
  } });

  // the page
  const title = make("div", { className: "sl-ex-title" }), strip = make("div", { className: "sl-ex-strip" });
  const canvas = make("canvas", { className: "sl-ex-forest", title: "Every latent; click to pick one" });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", model.get("summary"));
  const heads = make("div", { className: "sl-ex-heads" }), feet = make("div", { className: "sl-ex-heads sl-quiet" });
  data.names.forEach((name, l) => {
    heads.append(make("span", { textContent: name, title: `${name}: ${data.sizes[l].toLocaleString("en")} latents` }));
    feet.append(make("span", { textContent: l ? `${percent(1 - data.attached[l] / Math.max(data.sizes[l], 1), 2)} new` : data.sizes[l].toLocaleString("en"),
      title: l ? `${(data.sizes[l] - data.attached[l]).toLocaleString("en")} latents without a shown parent` : "latents" }));
  });
  const chart = make("div", { className: "sl-ex-chart" });
  const how = make("div", { className: "sl-quiet sl-ex-how" });
  const explain = () => { how.textContent = model.get("mode") === "tree" ? TREE : model.get("how"); };
  model.on("change:mode", explain);
  explain();
  chart.innerHTML = model.get("chart");  // made and escaped by Python
  const stage = make("div", { className: "sl-ex-stage" });
  root.append(
    make("div", { className: "sl-ex-bar" }, title, make("div", { className: "sl-ex-find" }, search, hits, back, modes)),
    make("div", { className: "sl-ex-bar sl-ex-knobs" }, ...knobs, reset, passing), strip,
    make("div", { className: "sl-ex-main" }, make("div", { className: "sl-ex-aside" }, heads, canvas, feet, chart), stage),
    how);
  const trees = forest(canvas, data, pass, mains);

  function filter() {
    const least = KINDS.map(([kind]) => [edges[kind], model.get(kind)]), q = model.get("q"), fdr = model.get("fdr");
    let n = 0;
    for (let e = 0; e < edges.n; e++) {
      pass[e] = (edges.shown[e] || q > fdr) && (edges.q[e] <= q || q >= 1) && least.every(([column, floor]) => !(floor > 0) || column[e] >= floor) ? 1 : 0;
      n += pass[e];
    }
    passing.textContent = `${n.toLocaleString("en")} of ${model.get("tried").toLocaleString("en")} edges`;
    if (fam) refocus(fam.focus, false);
  }

  // what is looked at
  function lineage(i) {
    const found = new Set(), walk = (at, list, far) => { for (const each of list.get(at)?.kids ?? []) { const e = fam.parentIn.get(each); if (e !== undefined) found.add(e); walk(each, list); } };
    for (let at = i; fam.parentIn.has(at) && at !== fam.focus;) {
      const e = fam.parentIn.get(at);
      found.add(e);
      at = data.from[e] === at ? data.to[e] : data.from[e];
    }
    walk(i, fam.members);
    return found;
  }
  function pathOf(i) {
    const path = Array(data.sizes.length).fill(-1), at = data.levelOf(i), strongest = (list) => { for (const e of list) if (pass[e]) return e; return -1; };
    path[at] = i;
    for (let l = at; l > 0 && path[l] >= 0; l--) {
      const inTree = fam.parentIn.get(path[l]), e = inTree !== undefined && data.to[inTree] === path[l] ? inTree : strongest(data.up(path[l]));
      path[l - 1] = e < 0 ? -1 : data.from[e];
    }
    for (let l = at; l + 1 < path.length && path[l] >= 0; l++) {
      const inTree = l < data.levelOf(fam.focus) ? fam.parentIn.get(path[l]) : undefined;
      const e = inTree !== undefined && data.from[inTree] === path[l] ? inTree : strongest(data.down(path[l]));
      path[l + 1] = e < 0 ? -1 : data.to[e];
    }
    return path;
  }
  const edgeBetween = (a, b) => { for (const e of data.down(a)) if (data.to[e] === b) return e; return -1; };

  function cards(i) {
    const path = pathOf(i);
    strip.replaceChildren();
    path.forEach((each, l) => {
      if (l) {
        const e = each >= 0 && path[l - 1] >= 0 ? edgeBetween(path[l - 1], each) : -1;
        const box = make("div", { className: "sl-ex-edge" });
        if (e >= 0) {
          box.append(...KINDS.map(([kind, name]) => bullet(data, e, kind, name)),
            make("small", { className: "sl-quiet", textContent: `P(child|parent) ${few(edges.reverse[e])} · n ${counts[e].toLocaleString("en")} · q ${few(edges.q[e])}` }));
        } else box.append(make("small", { className: "sl-quiet", textContent: "no shown edge" }));
        strip.append(box);
      }
      const card = make("button", { className: "sl-ex-card" });
      if (each >= 0) {
        const { label, tokens, state } = data.text(each), [up, down] = kinOf(each), density = data.density[each];
        card.append(make("span", { className: "sl-quiet", textContent: `${data.names[l]} · latent ` }), make("b", { textContent: latentOf(each) }),
          make("div", { className: "sl-ex-name", textContent: label || tokens || "no label" }),
          make("small", { className: "sl-quiet", textContent: [label && tokens, density >= 0 ? `density ${percent(density, 2)}` : "", l ? many(up, "parent", "parents") : "",
            l + 1 < data.sizes.length ? many(down, "child", "children") : "", state === "first" ? "" : state].filter(Boolean).join(" · ") }));
        card.classList.toggle("sl-ex-now", each === i);
        card.setAttribute("aria-label", `latent ${called(each)}`);
        card.title = each === fam.focus ? "The focus" : "Look at its family";
        card.onclick = () => refocus(each);
      } else {
        card.disabled = true;
        card.append(make("span", { className: "sl-quiet", textContent: `${data.names[l]}: none` }));
      }
      strip.append(card);
    });
    return path;
  }

  function look(i, settled = true) {  // move the cursor, or only show what lies under the mouse
    if (settled) cursor = i;
    hover = settled ? null : i;
    const path = cards(i), lit = i === fam.focus ? null : lineage(i);
    if (settled) set(model, "path", path.map((each, l) => (each < 0 ? -1 : each - data.first[l])));
    light(i, lit);
    trees.paint(fam, lit);
  }
  function light(i, lit) {
    if (!plane) return;
    plane.svg.classList.toggle("sl-ex-dim", lit !== null);
    const kept = new Set([i, fam.focus]);
    for (const e of lit ?? []) kept.add(data.from[e]).add(data.to[e]);
    for (const [e, path] of plane.ribbons) path.classList.toggle("sl-ex-lit", lit !== null && lit.has(e));
    for (const [each, g] of plane.nodes) {
      g.classList.toggle("sl-ex-lit", kept.has(each));
      g.classList.toggle("sl-ex-now", each === cursor);
      g.setAttribute("tabindex", each === cursor ? 0 : -1);
    }
  }

  // the family
  function lay() {
    const levels = data.sizes.length, narrow = width < 640, gap = narrow ? 14 : GAP, wide = narrow ? 40 : Math.min(84, 62 + Math.max(0, (width - 800) / 16));
    const names = narrow ? 96 : Math.min(200, 150 + Math.max(0, (width - 800) / 8)), room = Math.max(width, 300 + 100 * (levels - 1));
    const end = room - 3 * (wide + gap) - names, xs = data.sizes.map((_, l) => 8 + (end - 8) * l / Math.max(levels - 1, 1));
    const ys = new Map([...fam.members.values()].map((m) => [m.id, TOP + ROW * m.row])), tall = new Map();
    for (const m of fam.members.values()) {
      const own = [...m.kids, ...(m.id === fam.focus ? fam.up.get(m.id) ?? [] : [])];
      if (m.id === fam.beside) own.splice(0, own.length, ...[...fam.members.values()].filter((k) => k.level === m.level + 1).map((k) => k.id));
      const span = (list) => (list.length ? Math.max(...list.map((k) => ys.get(k))) - Math.min(...list.map((k) => ys.get(k))) : 0);
      tall.set(m.id, Math.max(13, .7 * (m.id === fam.focus ? Math.max(span(m.kids), span(fam.up.get(m.id) ?? [])) : span(own))));
    }
    if (fam.beside !== null) {
      const own = fam.members.get(fam.beside), near = [...fam.members.values()].filter((m) => m.level === own.level && m !== own).map((m) => Math.abs(ys.get(m.id) - ys.get(own.id)));
      tall.set(own.id, Math.max(13, Math.min(tall.get(own.id), 2 * Math.min(...near) - 18)));
    }
    const height = TOP + ROW * (Math.max(...[...fam.members.values()].map((m) => m.row)) + 1.2) + 34;
    return { xs, ys, tall, wide, names, room, height, step: levels > 1 ? xs[1] - xs[0] : names,
      facets: [0, 1, 2].map((i) => room - (3 - i) * (wide + gap)) };
  }
  function outer() {  // edges with a row of their own, as in the printed picture
    const down = fam.edges.filter((e) => fam.tree.get(e)?.down), inner = new Set(down.map((e) => data.from[e]));
    if (fam.beside !== null) return fam.edges.filter((e) => data.from[e] === fam.beside && fam.tree.has(e)).map((e) => [e, fam.members.get(data.to[e])]);
    if (!down.length) return fam.edges.filter((e) => data.to[e] === fam.focus).map((e) => [e, fam.members.get(data.from[e])]);
    return down.filter((e) => !inner.has(data.to[e])).map((e) => [e, fam.members.get(data.to[e])]);
  }
  const text = (x, y, said, facts = {}) => { const t = draw("text", { x, y, ...facts }); t.textContent = said; return t; };

  function fields(svg, at) {
    const rows = outer(), low = at.height - 30;
    if (!rows.length) return;
    KINDS.forEach(([kind, name], i) => {
      const x0 = at.facets[i], x = (v) => x0 + at.wide * clip(v);
      for (const [e, m] of rows) {
        const none = nullOf(data, kind, edges.level[e]), y = at.ys.get(m.id);
        if (!none) continue;
        svg.append(draw("rect", { x: x0, y: y - ROW / 2, width: Math.max(at.wide * clip(none.q99), 1), height: ROW, class: "sl-ex-null" }),
          draw("path", { d: `M${x(none.max)} ${y - ROW / 2}v${ROW}`, class: "sl-ex-max" }));
      }
      svg.append(draw("path", { d: `M${x0} ${low}H${x0 + at.wide}`, stroke: "currentColor", opacity: .5 }),
        text(x0 + at.wide / 2, 14, at.wide < 60 ? ["cos", "corr", "P(p|c)"][i] : name, { "text-anchor": "middle", class: "sl-ex-faint" }),
        ...(at.wide < 60 ? [0, 1] : [0, .5, 1]).map((v) => text(x(v), low + 13, String(v), { "text-anchor": "middle", class: "sl-ex-faint" })));
      for (const [e, m] of rows) {
        const y = at.ys.get(m.id), value = edges[kind][e], ink = hue(m.branch);
        if (!Number.isFinite(value)) { svg.append(text(x0 + 2, y + 4, "?", { class: "sl-ex-faint" })); continue; }
        if (kind === "given") {
          const [a, b] = wilson(clip(value), counts[e]);
          svg.append(draw("path", { d: `M${x(a)} ${y}H${x(b)}`, stroke: ink, "stroke-width": 1.5 }));
        }
        const mark = draw("circle", { cx: x(value), cy: y, r: 3.5, fill: ink, class: "sl-ex-mark" });
        mark.dataset.edge = e;
        svg.append(mark);
      }
    });
    svg.append(text(at.facets[2] + at.wide, at.height - 3, "grey: 99 % of the null’s draws; line: its largest", { "text-anchor": "end", class: "sl-ex-faint" }));
    const leaders = rows.map(([, m]) => `M${Math.min(at.xs[m.level] + 24 + 6.6 * (String(latentOf(m.id)).length + nameOf(data, m.id, fits(m, at)).length), at.facets[0] - 6)} ${at.ys.get(m.id)}H${at.facets[2] + at.wide}`);
    svg.append(draw("path", { d: leaders.join(""), stroke: "currentColor", "stroke-dasharray": "1 4", opacity: .35 }));
  }
  const fits = (m, at) => {
    const room = (m.level + 1 < data.sizes.length ? at.step : at.names) - 24, more = m.hidden ? 9 + String(m.hidden).length : 0;
    return Math.max(3, Math.floor((room - 7 * String(latentOf(m.id)).length - 5) / 6.1) - more);
  };

  function node(m, at) {
    const x = at.xs[m.level], y = at.ys.get(m.id), tall = at.tall.get(m.id), focus = m.id === fam.focus, ink = hue(m.branch);
    const g = draw("g", { class: "sl-ex-node", role: "treeitem", tabindex: -1 }), tree = model.get("mode") === "tree";
    const more = m.hidden ? ` · ${m.hidden.toLocaleString("en")} more` : "", name = nameOf(data, m.id, fits(m, at)) + more;
    const digits = 7 * String(latentOf(m.id)).length + 5;
    g.append(draw("rect", { x: x - 3, y: y - Math.max(tall / 2, 9), width: 18 + digits + 6 * name.length, height: Math.max(tall, 18), class: "sl-ex-hit" }),
      draw("rect", { x: x + 10, y: y - 7, width: 4 + digits + 6.1 * name.length, height: 14, rx: 3, class: "sl-ex-plate" }),
      tree ? draw("circle", { cx: x + 3.5, cy: y, r: focus ? 6 : 4.5, fill: ink, stroke: ink, "fill-opacity": focus || !m.kids.length ? 1 : .25 })
        : draw("rect", { x, y: y - tall / 2, width: 7, height: tall, fill: ink, "fill-opacity": focus ? 1 : .25, stroke: ink }),
      text(x + 12, y + 4, String(latentOf(m.id)), { class: focus ? "sl-ex-bold" : "" }), text(x + 12 + digits, y + 4, name, { class: "sl-ex-faint" }));
    const [up, down] = kinOf(m.id);
    g.setAttribute("aria-label", `${called(m.id)} ${nameOf(data, m.id)}, ${many(up, "parent", "parents")}, ${many(down, "child", "children")}`);
    g.dataset.id = m.id;
    return g;
  }
  function drawFamily() {
    const at = lay(), held = stage.contains(document.activeElement);
    const svg = draw("svg", { width: at.room, height: at.height, viewBox: `0 0 ${at.room} ${at.height}`, role: "tree", class: "sl-ex-flow" });
    svg.setAttribute("aria-label", `family of ${called(fam.focus)}; arrows walk, Enter looks at a latent's own family`);
    data.names.forEach((name, l) => svg.append(text(at.xs[l], 14, name.length * 7 > at.step ? `${name.slice(0, Math.floor(at.step / 7) - 1)}…` : name, { class: "sl-ex-bold" })));
    fields(svg, at);
    const ends = portsOf({ ...data }, fam, at.ys, at.tall, at.xs), ribbons = new Map(), nodes = new Map(), tree = model.get("mode") === "tree";
    for (const e of fam.edges) {
      const branch = fam.branchOf(e), ink = branch === null ? GREY : hue(branch), [a, b] = ends.get(e);
      const [y, to] = [at.ys.get(data.from[e]), at.ys.get(data.to[e])], mid = (a[0] + b[0]) / 2;
      const path = tree
        ? draw("path", { d: `M${a[0]} ${y}C${mid} ${y} ${mid} ${to} ${b[0]} ${to}`, fill: "none", stroke: ink, "stroke-width": .8 + 2.4 * clip(edges.strength[e]), "stroke-dasharray": branch === null ? "3 3" : "none", class: "sl-ex-line" })
        : draw("path", { d: ribbon(a, b), fill: ink, class: branch === null ? "sl-ex-ribbon sl-ex-cross" : "sl-ex-ribbon" });
      path.dataset.edge = e;
      ribbons.set(e, path);
      svg.append(path);
    }
    for (const m of [...fam.members.values()].sort((a, b) => a.level - b.level || a.row - b.row)) {
      const g = node(m, at);
      nodes.set(m.id, g);
      svg.append(g);
    }
    plane = { svg, ribbons, nodes };
    stage.replaceChildren(svg);
    light(cursor, cursor === fam.focus ? null : lineage(cursor));
    if (held) nodes.get(cursor)?.focus({ preventScroll: true });
  }
  function refocus(i, remember = true) {
    if (fam && remember && fam.focus !== i) past.push(fam.focus);
    back.disabled = !past.length;
    fam = familyOf(data, pass, i);
    cursor = i;
    const [up, down] = kinOf(i);
    title.replaceChildren(make("b", { textContent: `latent ${latentOf(i)}` }), ` of ${data.names[data.levelOf(i)]} `,
      make("span", { className: "sl-quiet", textContent: `${nameOf(data, i, 60)}${nameOf(data, i) ? " · " : ""}${many(up, "parent", "parents")}, ${many(down, "child", "children")}` }));
    if (width) drawFamily();
    look(i);
    if (model.get("level") !== data.levelOf(i) || model.get("latent") !== latentOf(i)) {
      model.set("level", data.levelOf(i));
      model.set("latent", latentOf(i));
      model.save_changes();
    }
  }
  const goBack = () => { if (past.length) refocus(past.pop(), false); };

  // mouse
  const idAt = (event) => {
    const g = event.target.closest?.(".sl-ex-node"), e = event.target.closest?.("[data-edge]")?.dataset.edge;
    if (g) return Number(g.dataset.id);
    if (e === undefined) return null;
    return fam.tree.get(Number(e))?.far ?? data.to[e];
  };
  stage.addEventListener("mouseover", (event) => { const i = idAt(event); if (i !== null && i !== hover) look(i, false); });
  stage.addEventListener("mouseleave", () => { if (hover !== null) look(cursor); });
  stage.addEventListener("click", (event) => {
    const i = idAt(event);
    if (i === null) return;
    if (i === cursor && i !== fam.focus) return refocus(i);
    look(i);
    plane.nodes.get(i)?.focus({ preventScroll: true });
  });
  stage.addEventListener("dblclick", (event) => { const i = idAt(event); if (i !== null) refocus(i); });
  const pointed = (event) => {
    const box = canvas.getBoundingClientRect(), found = trees.pick(event.clientX - box.left, event.clientY - box.top);
    return { ...found, id: data.byPlace(found.level, found.place) };
  };
  const order = data.sizes.map((size, l) => { const list = new Int32Array(size); for (let i = 0; i < size; i++) list[data.rank[data.first[l] + i]] = i; return list; });
  data.byPlace = (l, place) => data.first[l] + order[l][place];
  canvas.addEventListener("mousemove", (event) => {
    const { id: i } = pointed(event), [up, down] = kinOf(i), box = root.getBoundingClientRect();
    const spot = { getBoundingClientRect: () => ({ left: event.clientX + 12, bottom: event.clientY }) };
    note(spot, `${called(i)} `);
    root.querySelector(":scope > .sl-note").textContent = `${called(i)} ${nameOf(data, i)} — ${many(up, "parent", "parents")}, ${many(down, "child", "children")}`;
  });
  canvas.addEventListener("mouseleave", () => note(null));
  canvas.addEventListener("click", (event) => refocus(pointed(event).id));

  // keyboard
  stage.addEventListener("keydown", (event) => {
    const here = fam.members.get(cursor);
    if (!here) return;
    const column = [...fam.members.values()].filter((m) => m.level === here.level).sort((a, b) => a.row - b.row);
    const near = (list) => list.filter((i) => fam.members.has(i)).sort((a, b) => Math.abs(fam.members.get(a).row - here.row) - Math.abs(fam.members.get(b).row - here.row))[0];
    const beside = (l) => near(fam.edges.flatMap((e) => (l > here.level ? (data.from[e] === cursor ? [data.to[e]] : []) : data.to[e] === cursor ? [data.from[e]] : [])));
    const go = { ArrowUp: () => column[column.indexOf(here) - 1]?.id, ArrowDown: () => column[column.indexOf(here) + 1]?.id,
      ArrowRight: () => beside(here.level + 1), ArrowLeft: () => beside(here.level - 1), Home: () => fam.focus }[event.key];
    if (go) {
      const to = go();
      if (to !== undefined) { look(to); plane.nodes.get(to).focus(); }
    } else if (event.key === "Enter") refocus(cursor);
    else if (event.key === "Escape") goBack();
    else if (event.key === "/") search.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  back.onclick = goBack;

  // search
  let found = [], chosen = 0;
  function seek() {
    const query = search.value.trim(), word = query.toLowerCase(), cut = query.lastIndexOf(":"), name = query.slice(0, Math.max(cut, 0)).trim(), number = query.slice(cut + 1).trim();
    data.low ??= data.texts.map((each) => each.toLowerCase());
    const all = new Set();
    if (/^\d+$/.test(number)) data.sizes.forEach((size, l) => { if (Number(number) < size && (!name || name === data.names[l] || name === String(size))) all.add(id(l, Number(number))); });
    if (word) for (let i = 0; i < data.total && all.size < 12; i++) {
      const state = data.low[i].lastIndexOf("\t"), at = data.low[i].indexOf(word);
      if (at >= 0 && at + word.length <= state) all.add(i);
    }
    found = [...all].slice(0, 12);
    chosen = 0;
    hits.replaceChildren(...found.map((i, n) => {
      const hit = make("div", { className: "sl-ex-hit-row", role: "option", onmousedown: (event) => { event.preventDefault(); choose(n); } },
        make("b", { textContent: called(i) }), make("span", { className: "sl-quiet", textContent: ` ${nameOf(data, i)}` }));
      return hit;
    }));
    if (word && !found.length) hits.append(make("div", { className: "sl-quiet", textContent: "no latent is called that" }));
    hits.hidden = !word;
    mark();
  }
  const mark = () => [...hits.children].forEach((each, n) => each.setAttribute("aria-selected", n === chosen));
  function choose(n) {
    if (found[n] === undefined) return;
    hits.hidden = true;
    search.value = "";
    refocus(found[n]);
    plane?.nodes.get(cursor)?.focus({ preventScroll: true });
  }
  search.addEventListener("input", seek);
  search.addEventListener("blur", () => { hits.hidden = true; });
  search.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) { chosen = Math.min(Math.max(chosen + step, 0), found.length - 1); mark(); event.preventDefault(); }
    else if (event.key === "Enter") choose(chosen);
    else if (event.key === "Escape") { search.value = ""; hits.hidden = true; }
    event.stopPropagation();
  });

  // Python and linked widgets
  const pull = () => {
    const l = model.get("level"), latent = model.get("latent");
    if (l >= 0 && l < data.sizes.length && latent >= 0 && latent < data.sizes[l] && id(l, latent) !== fam?.focus) refocus(id(l, latent));
  };
  model.on("change:latent", () => queueMicrotask(pull));
  model.on("change:level", () => queueMicrotask(pull));
  const press = () => [...modes.children].forEach((each) => each.setAttribute("aria-pressed", each.value === model.get("mode")));
  model.on("change:mode", () => { press(); if (width) drawFamily(); });
  press();
  filter();
  pull();
  const fit = () => {
    if (stage.clientWidth === width || !stage.clientWidth) return;
    width = stage.clientWidth;
    trees.size();
    drawFamily();
    trees.paint(fam);
  };
  fit();
  const watch = new ResizeObserver(() => requestAnimationFrame(fit));
  watch.observe(stage);
  root.dataset.painted = (performance.now() - began).toFixed(1);
  return () => watch.disconnect();
}

export default { render };

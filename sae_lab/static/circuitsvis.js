// Attention heads and neurons by CircuitsVis, whose bundle a page asks for once.
let count = 0;

/** CircuitsVis, from whoever asked first. */
function library(ask) {
  globalThis.slCircuitsVis ??= ask("bundle").then(async (text) => {
    const url = URL.createObjectURL(new Blob([text, "\nexport default CircuitsVis;"], { type: "text/javascript" }));
    try { return (await import(url)).default; } finally { URL.revokeObjectURL(url); }
  }).catch((error) => { globalThis.slCircuitsVis = undefined; throw error; });
  return globalThis.slCircuitsVis;
}

/** Numbers as nested arrays. */
function nested(view, shape) {
  const all = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const build = (at, [n, ...rest]) => {
    if (!rest.length) return Array.from(all.subarray(at, at + n));
    const size = rest.reduce((a, b) => a * b, 1);
    return Array.from({ length: n }, (_, i) => build(at + i * size, rest));
  };
  return shape.length ? build(0, shape) : [];
}

export default {
  render({ model, el }) {
    el.classList.add("sl", "sl-cv");
    const ask = asker(model), body = make("div"), bar = make("div", { className: "sl-cv-bar" }), title = make("b"), legend = make("span", { className: "sl-quiet" }), said = make("div", { className: "sl-quiet", role: "status" });
    el.append(bar, said, body);
    bar.append(title, legend);
    const names = model.get("layers");
    if (names.length > 1) {
      const pick = make("select", { onchange: () => { pick.disabled = true; set(model, "layer", pick.selectedIndex); } });
      pick.append(...names.map((name) => make("option", { textContent: name })));
      pick.selectedIndex = model.get("layer");
      model.on("change:layer", () => { pick.selectedIndex = model.get("layer"); });
      model.on("change:html", () => { pick.disabled = false; });
      bar.prepend(make("label", {}, "layer ", pick));
    }
    let place;
    const draw = async () => {
      const mine = place = make("div", { id: `sl-cv-${Date.now().toString(36)}-${count++}`, className: "sl-cv-sheet" });
      if (!body.childElementCount) body.innerHTML = model.get("html");
      try {
        const lib = await library(ask);
        while (!el.isConnected) await new Promise(requestAnimationFrame);
        if (mine !== place) return;
        const key = model.get("element") === "AttentionHeads" ? "attention" : "activations";
        body.replaceChildren(mine);
        title.textContent = model.get("title"); legend.textContent = model.get("legend");
        lib.render(mine.id, lib[model.get("element")], { ...model.get("props"), [key]: nested(model.get("data"), model.get("shape")) });
        said.textContent = "";
      } catch (error) {
        said.textContent = `Drawn without CircuitsVis. ${error.message}`;
        title.textContent = legend.textContent = "";
        body.innerHTML = model.get("html");
      }
    };
    model.on("change:html", draw);
    draw();
  },
};

// Shared by every widget; it stands in front of each widget's own module.

// Keys pressed inside a widget are its own: JupyterLab's shortcuts leave alone what says so.
window.slKeys ??= document.addEventListener("focusin", ({ target }) => {
  if (target.closest?.(".sl")) target.setAttribute("data-lm-suppress-shortcuts", "true");
}, true) ?? true;

/** What asks the kernel: `ask("name", {argument: value})` is a promise of what the Python function `name` gives. */
function asker(model) {
  const waiting = new Map(), mine = Math.random().toString(36).slice(2);
  let next = 0;
  model.on("msg:custom", (reply) => {
    const wait = waiting.get(reply.id);
    if (!wait) return;
    waiting.delete(reply.id);
    if (reply.error) wait.reject(new Error(reply.error)); else wait.resolve(reply.value);
  });
  return (name, args = {}) => new Promise((resolve, reject) => {
    const id = `${mine}-${next++}`;
    waiting.set(id, { resolve, reject });
    model.send({ id, ask: name, args });
    setTimeout(() => waiting.delete(id) && reject(new Error("No answer from the kernel: it is busy or gone.")), 30000);
  });
}

/** Keep an element's HTML equal to the trait `html`, which Python has escaped; `then` runs after each change. */
function follow(model, body, then = () => {}) {
  const draw = () => { body.innerHTML = model.get("html"); then(); };
  model.on("change:html", draw);
  draw();
}

/** An element: make("span", {className: "sl-x", textContent: "…"}, child, child). Text goes in as text, never as HTML. */
function make(tag, facts = {}, ...children) {
  const el = Object.assign(document.createElement(tag), facts);
  el.append(...children);
  return el;
}

/** Set a trait for Python and for whoever is linked to it. */
function set(model, name, value) {
  model.set(name, value);
  model.save_changes();
}

/** One note that floats beside what the mouse or the focus is on: note(target, htmlOrNode), note(null) takes it away. */
function notes(root) {
  const box = make("div", { className: "sl-note", hidden: true, role: "tooltip" });
  root.append(box);
  return (target, content) => {
    box.hidden = !target;
    if (!target) return;
    if (typeof content === "string") box.innerHTML = content; else box.replaceChildren(content);
    const at = target.getBoundingClientRect(), home = root.getBoundingClientRect();
    const left = Math.min(at.left - home.left, home.width - box.offsetWidth - 4);
    const over = at.bottom + box.offsetHeight + 8 > Math.min(home.bottom, innerHeight) && at.top - home.top > box.offsetHeight + 8;
    box.style.left = `${Math.max(0, left)}px`;
    box.style.top = `${over ? at.top - home.top - box.offsetHeight - 4 : at.bottom - home.top + 4}px`;
  };
}

// A kernel's model for a saved page: traits live here, questions to a kernel are refused with a sentence that says so.
const { state, packed, source } = JSON.parse(document.getElementById("saved").textContent);
const heard = {}, tell = (name, ...args) => (heard[name] ?? []).forEach((f) => f(...args));
for (const key of packed) state[key] = new DataView(Uint8Array.from(atob(state[key]), (c) => c.charCodeAt(0)).buffer);
const model = {
  get: (key) => state[key],
  set(key, value) { state[key] = value; tell(`change:${key}`); tell("change"); },
  on: (name, f) => (heard[name] ??= []).push(f),
  off() {}, save_changes() {},
  send: ({ id }) => setTimeout(() => tell("msg:custom", { id, error: "This is a saved page: no kernel answers here." })),
};
const widget = (await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))).default;
await widget.render({ model, el: document.getElementById("live") });
document.getElementById("still").remove();

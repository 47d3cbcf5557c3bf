// Numbers for people, and typed arrays out of what the kernel sends.

/** A number briefly, as `ground.html.number` writes it. */
function short(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "-∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e15 || size < 1e-4) return x.toExponential(digits - 1).replace("e+", "e");
  for (const [scale, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
    if (size >= scale) return `${trimmed((x / scale).toPrecision(digits))}${unit}`;
  if (size >= 10 ** (digits - 1) || Number.isInteger(x)) return Math.round(x).toLocaleString("en-US");
  return trimmed(x.toPrecision(digits));
}
const trimmed = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);

/** A share in percent, as `ground.html.percent` writes it. */
const percent = (x, digits = 3) => (x === null || x === undefined || Number.isNaN(x) ? "–" : `${short(100 * x, digits)} %`);

/** A number with the decimals of its column, whose largest is `most`. */
function level(x, most, digits = 3) {
  if (x === null || x === undefined || !Number.isFinite(x) || !(most >= 0.01 && most < 1000)) return short(x, digits);
  const text = x.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(most))));
  return x && !Number(text) ? short(x, 1) : text;
}

/** The largest size of numbers; those that are not known are passed over. */
function largest(values) {
  let most = 0;
  for (const x of values) if (Math.abs(x) > most && Number.isFinite(x)) most = Math.abs(x);
  return most;
}

/** Bytes of a trait as numbers, whatever their alignment. */
function typed(view, kind) {
  if (!view || !view.byteLength) return new kind(0);
  return new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Bytes of a trait as JSON. */
const parsed = (view, empty) => (view && view.byteLength ? JSON.parse(new TextDecoder().decode(view)) : empty);

/** Tokens of one cell, each in a frame so that its spaces are seen. */
function chips(cell) {
  return (cell ? cell.split("\u241f") : []).map((textContent) => make("span", { className: "sl-chip", textContent }));
}

/** Call `then` at most once a frame. */
function framed(then) {
  let due = 0;
  return () => { due ||= requestAnimationFrame(() => { due = 0; then(); }); };
}

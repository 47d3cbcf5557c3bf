// What a reader would complain about in an element: text that is hard to see, parts that stick out.
(root) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }), known = {};
  const rgba = (colour) => (known[colour] ??= (() => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  })());
  const over = ([r, g, b, a], under) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
  const light = (c) => c.map((x) => (x /= 255, x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (el) => {
    const chain = [];
    for (let at = el; at; at = at.parentElement) chain.unshift(rgba(getComputedStyle(at).backgroundColor));
    return chain.reduce((under, colour) => over(colour, under), matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255]);
  };
  const shown = (el) => { let part = 1; for (let at = el; at; at = at.parentElement) part *= getComputedStyle(at).opacity; return part; };
  const dim = [], wide = [], frame = root.getBoundingClientRect();
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const el = node.parentElement;
    if (!/[\p{L}\p{N}]/u.test(node.data) || !el.checkVisibility({ visibilityProperty: true }) || el.closest("option, :disabled, [aria-hidden=true]")) continue;
    const style = getComputedStyle(el), under = ground(el), ink = rgba(el instanceof SVGElement ? style.fill : style.color);
    const seen = over([ink[0], ink[1], ink[2], ink[3] * shown(el)], under);
    const [high, low] = [light(seen), light(under)].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 3) dim.push(`${ratio.toFixed(2)} ${JSON.stringify(node.data.trim().slice(0, 30))} in ${el.tagName}.${el.getAttribute("class") ?? ""}`);
  }
  const held = (el) => { for (let at = el.parentElement; at && at !== root.parentElement; at = at.parentElement) if (/auto|scroll|hidden|clip/.test(getComputedStyle(at).overflowX)) return true; };
  for (const el of root.querySelectorAll("*")) {
    const at = el.getBoundingClientRect();
    if (at.width && at.right > frame.right + 2 && !held(el) && !(el instanceof SVGElement && !(el instanceof SVGSVGElement)))
      wide.push(`${Math.round(at.right - frame.right)} px ${el.tagName}.${el.getAttribute("class") ?? ""} ${(el.textContent ?? "").slice(0, 30)}`);
  }
  return { dim: dim.slice(0, 6), wide: wide.slice(0, 6), text: root.innerText.trim().length };
}

"use strict";
// Attention weights by layer and head.
(async () => {
  // Keys around a query whose words and arcs are drawn.
  const NEAR = 60;
  let layers, layer = 0, head = 0, shades;
  const picture = zoomable(paint, tell, content.tokens || content.keyTokens ? 90 : 0), { view, canvas } = picture;
  const label = (names, i) => names === null ? String(i) : names[i];

  // Calls `found(key, weight)` for each weight of a query that the page holds.
  function weightsOf(which, at, query, found) {
    const { kept, queries, unit, indices, weights } = layers[which];
    const first = (at * queries + query) * kept;
    for (let i = first; i < first + kept; i++)
      if (weights[i] > 0) found(indices[i], weights[i] * unit);
  }

  // A picture of `width` x `height` pixels, the greatest weight of each.
  function drawn(which, at, width, height, t0, s0, scale) {
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const { queries, keys } = layers[which], values = new Float32Array(width * height);
    const pixel = (place, from) => (place - from) * scale;
    const last = Math.min(queries, Math.ceil(t0 + height / scale));
    for (let t = Math.max(0, Math.floor(t0)); t < last; t++) {
      const y0 = Math.max(0, Math.floor(pixel(t, t0)));
      const y1 = Math.min(height, Math.max(y0 + 1, Math.floor(pixel(t + 1, t0))));
      weightsOf(which, at, t, (s, weight) => {
        if (pixel(s + 1, s0) <= 0) return;
        const x0 = Math.max(0, Math.floor(pixel(s, s0)));
        const x1 = Math.min(width, Math.max(x0 + 1, Math.floor(pixel(s + 1, s0))));
        for (let y = y0; y < y1; y++)
          for (let x = x0; x < x1; x++)
            values[y * width + x] = Math.max(values[y * width + x], weight);
      });
    }
    const right = Math.min(width, Math.ceil(pixel(keys, s0)));
    const bottom = Math.min(height, Math.ceil(pixel(queries, t0)));
    const left = Math.max(0, Math.floor(-s0 * scale)), top = Math.max(0, Math.floor(-t0 * scale));
    for (let y = top; y < bottom; y++)
      for (let x = left; x < right; x++) {
        const weight = Math.min(values[y * width + x], 1);
        pixels[y * width + x] = shades[Math.round(255 * Math.sqrt(weight))];
      }
    return image;
  }

  function paint(pen, width, height) {
    const { margin, scale } = view;
    const image = drawn(layer, head, width, height, view.t, view.s, scale);
    pen.putImageData(image, margin, margin);
    if (!margin || scale < 10) return;
    // Words in the margin where there is room for them.
    pen.font = `${Math.min(scale * 0.75, margin / 6)}px ui-monospace, monospace`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    pen.fillStyle = `rgb(${colour("--ink")})`;
    const write = (name, place, turned) => {
      pen.save();
      pen.translate(margin, margin);
      pen.rotate(turned ? Math.PI / 2 : 0);
      pen.fillText(name, -4, turned ? -place : place, margin - 6);
      pen.restore();
    };
    const bottom = Math.min(view.queries, view.t + height / scale);
    for (let t = Math.max(0, Math.ceil(view.t)); t < bottom; t++)
      write(label(content.tokens, t), (t - view.t + 0.5) * scale, false);
    const right = Math.min(view.keys, view.s + width / scale);
    for (let s = Math.max(0, Math.ceil(view.s)); s < right; s++)
      write(label(content.keyTokens, s), (s - view.s + 0.5) * scale, true);
  }

  function tell(t, s) {
    let here = 0, total = 0;
    const greatest = [];
    weightsOf(layer, head, t, (key, weight) => {
      if (key === s) here = weight;
      total += weight;
      greatest.push([key, weight]);
    });
    greatest.sort((a, b) => b[1] - a[1]);
    $("said").textContent =
      `Query ${t} (${label(content.tokens, t)}), key ${s} ` +
      `(${label(content.keyTokens, s)}): weight ${here.toFixed(4)}. ` +
      `The page holds ${greatest.length} weights of this query, ${total.toFixed(3)} in all.`;
    $("greatest").replaceChildren();
    tableRow($("greatest"), ["key", "token", "weight"], "th");
    for (const [key, weight] of greatest.slice(0, 8))
      tableRow($("greatest"), [key, label(content.keyTokens, key), weight.toFixed(4)]);
    arcs(t, greatest);
  }

  function svg(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  // Keys near the query as a column of words; arcs from the query's line to each.
  function arcs(query, greatest) {
    const from = Math.max(0, Math.min(query - NEAR / 2, view.keys - NEAR));
    const to = Math.min(view.keys, from + NEAR), line = 15, middle = (i) => (i - from + 0.7) * line;
    const at = middle(Math.min(query, to - 1)), parts = [];
    for (const [key, weight] of greatest) {
      if (key < from || key >= to) continue;
      const y = middle(key), bend = 20 + Math.abs(y - at) / 3;
      parts.push(svg("path", {
        d: `M 110 ${at - 4} C ${110 - bend} ${at - 4} ${110 - bend} ${y - 4} 110 ${y - 4}`,
        "stroke-opacity": Math.min(1, Math.sqrt(weight)).toFixed(3),
        "stroke-width": 1 + 3 * Math.min(1, weight),
      }));
    }
    for (let key = from; key < to; key++)
      parts.push(svg("text", { x: 116, y: middle(key) }, label(content.keyTokens, key).slice(0, 24)));
    const name = label(content.tokens, query).slice(0, 12);
    parts.push(svg("text", { x: 2, y: at, class: "query" }, name));
    $("arcs").setAttribute("viewBox", `0 0 300 ${(to - from + 1) * line}`);
    $("arcs").replaceChildren(...parts);
  }

  function select(newLayer, newHead) {
    layer = newLayer;
    head = Math.min(newHead, layers[layer].heads - 1);
    $("layer").value = layer;
    choices("head", [...Array(layers[layer].heads).keys()], (i) => select(layer, i));
    $("head").value = head;
    const { name, queries, keys } = layers[layer];
    canvas.setAttribute("aria-label",
      `Weights of ${name}, head ${head}: ${queries} queries, ${keys} keys`);
    for (const button of $("overview").querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.value === `${layer} ${head}`);
    if (view.queries !== queries || view.keys !== keys) picture.over(queries, keys);
    picture.redraw();
  }

  function overview() {
    const most = Math.max(...layers.map((each) => each.heads));
    $("overview").style.gridTemplateColumns = `repeat(${most}, max-content)`;
    $("overview").replaceChildren();
    layers.forEach((each, i) => {
      for (let at = 0; at < each.heads; at++) {
        const button = document.createElement("button"), small = document.createElement("canvas");
        button.value = `${i} ${at}`;
        button.title = `${each.name}, head ${at}`;
        button.setAttribute("aria-label", button.title);
        button.onclick = () => select(i, at);
        if (!at) button.style.gridColumn = 1;
        small.width = small.height = 96;
        const scale = Math.min(96 / each.keys, 96 / each.queries);
        small.getContext("2d").putImageData(drawn(i, at, 96, 96, 0, 0, scale), 0, 0);
        button.append(small);
        $("overview").append(button);
      }
    });
  }

  layers = await Promise.all(content.layers.map(async (each) => ({
    ...each, indices: await unpack(each.indices), weights: await unpack(each.weights),
  })));
  choices("layer", layers.map((each) => each.name), (i) => select(i, head));
  themes(() => {
    const [low, high] = [colour("--empty"), colour("--full")];
    shades = Array.from({ length: 256 }, (_, i) =>
      packedColour(low.map((x, c) => Math.round(x + (high[c] - x) * i / 255))));
    overview();
    select(layer, head);
  });
  // For tests, which look at the page.
  window.attnlab = { ...picture, select, weightsOf: (...given) => {
    const found = [];
    weightsOf(...given, (key, weight) => found.push([key, weight]));
    return found;
  } };
  ready();
})();

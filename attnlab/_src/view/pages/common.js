"use strict";
// What all pages share: arrays out of the page, themes, and a picture to zoom into.
const $ = (id) => document.getElementById(id);
const content = JSON.parse($("content").textContent);
const types = {
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
  int32: Int32Array, uint32: Uint32Array, float32: Float32Array,
};

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new types[packed.type](await new Response(stream).arrayBuffer());
}

function ready() {
  document.documentElement.dataset.ready = "yes";
}

// The red, green and blue of a colour of the style sheet.
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

const packedColour = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;

function themes(changed) {
  const dark = (on) => {
    document.documentElement.classList.toggle("dark", on);
    $("theme").textContent = on ? "Light" : "Dark";
    changed();
  };
  $("theme").onclick = () => dark(!document.documentElement.classList.contains("dark"));
  dark(matchMedia("(prefers-color-scheme: dark)").matches);
}

function tableRow(table, cells, tag = "td") {
  const line = table.insertRow();
  cells.forEach((text, i) => {
    const cell = document.createElement(i ? tag : "th");
    cell.textContent = text;
    line.append(cell);
  });
}

function choices(id, names, changed) {
  $(id + "-label").hidden = names.length < 2;
  $(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  $(id).onchange = () => changed(Number($(id).value));
}

// A picture of queries (down) and keys (to the right) on the canvas "view". `paint` draws
// what the view holds, `tell` says what is at a query and a key. Words may stand in a
// margin to the left and above.
function zoomable(paint, tell, margin = 0) {
  const canvas = $("view"), pen = canvas.getContext("2d");
  // Position of the left upper corner, and pixels of the screen for a position.
  const view = { s: 0, t: 0, scale: 1, queries: 0, keys: 0, margin: 0 };
  const size = () => canvas.width - view.margin;
  let pointed = null, dirty = false;

  function say() {
    const [t, s] = pointed;
    if (t >= 0 && s >= 0 && t < view.queries && s < view.keys) tell(t, s);
  }

  function draw() {
    dirty = false;
    pen.fillStyle = `rgb(${colour("--ground")})`;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    paint(pen, size(), size());
    if (pointed) say();
  }

  function redraw() {
    if (!dirty) { dirty = true; requestAnimationFrame(draw); }
  }

  const smallest = () => Math.min(size() / view.keys, size() / view.queries);

  function fit() {
    view.s = view.t = 0;
    view.scale = smallest();
    redraw();
  }

  function clampView() {
    const limit = (place, length, size) =>
      Math.min(Math.max(place, Math.min(0, length - size)), Math.max(0, length - size));
    view.s = limit(view.s, view.keys, size() / view.scale);
    view.t = limit(view.t, view.queries, size() / view.scale);
    redraw();
  }

  function zoom(factor, x = size() / 2, y = size() / 2) {
    const most = Math.max(64, smallest());
    const scale = Math.min(Math.max(view.scale * factor, smallest()), most);
    view.s += x / view.scale - x / scale;
    view.t += y / view.scale - y / scale;
    view.scale = scale;
    clampView();
  }

  function over(queries, keys) {
    Object.assign(view, { queries, keys });
    pointed = null;
    fit();
  }

  function point(event) {
    const box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width;
    const x = (event.clientX - box.left) * ratio - view.margin;
    const y = (event.clientY - box.top) * ratio - view.margin;
    pointed = [Math.floor(view.t + y / view.scale), Math.floor(view.s + x / view.scale)];
    say();
    return [x, y, ratio];
  }

  function resize() {
    const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    const pixels = Math.max(1, Math.round(box.width * ratio));
    if (pixels === canvas.width) return;
    const all = view.keys && view.scale === smallest();
    canvas.width = canvas.height = pixels;
    view.margin = Math.round(margin * ratio);
    if (view.keys) { if (all) fit(); else clampView(); }
  }

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y, ratio] = point(event), before = fingers.get(event.pointerId);
    if (!before) return;
    if (fingers.size === 2) {
      const [other] = [...fingers.values()].filter((f) => f.pointerId !== event.pointerId);
      const far = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY);
      if (far(before) > 0) zoom(far(event) / far(before), x, y);
    } else {
      view.s -= (event.clientX - before.clientX) * ratio / view.scale;
      view.t -= (event.clientY - before.clientY) * ratio / view.scale;
      clampView();
    }
    fingers.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = point(event);
    zoom(Math.exp(-event.deltaY / 300), x, y);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = size() / view.scale / 8;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      view.s += moves[event.key][0] * step;
      view.t += moves[event.key][1] * step;
      clampView();
    } else if (event.key === "+" || event.key === "=") zoom(2);
    else if (event.key === "-") zoom(0.5);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
    // The keyboard points at the middle.
    const middle = size() / view.scale / 2;
    pointed = [Math.floor(view.t + middle), Math.floor(view.s + middle)];
    say();
  });
  $("in").onclick = () => zoom(2);
  $("out").onclick = () => zoom(0.5);
  $("fit").onclick = fit;
  new ResizeObserver(resize).observe(canvas);
  resize();
  return { canvas, view, over, draw, redraw, zoom, clampView };
}

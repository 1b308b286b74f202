"use strict";
// Masks and plans.
(async () => {
  // A node of the expression answers true, false, or null where a rule is not known.
  function compile(node, data) {
    const made = { ...node };
    if (node.parts) made.parts = node.parts.map((part) => compile(part, data));
    if (node.body) {
      const own = node.data.map((i) => data[i]);
      const rule = new Function("t", "s", "head", "example", "data", node.body);
      made.sees = (t, s, head, example) => rule(t, s, head, example, own);
    } else if (node.op === "not") {
      const [part] = made.parts;
      made.sees = (...pair) => { const x = part.sees(...pair); return x === null ? null : !x; };
    } else if (node.op === "head") {
      made.chosen = (head) => made.parts[node.order[head % node.order.length]];
      made.sees = (t, s, head, example) => made.chosen(head).sees(t, s, head, example);
    } else if (node.op) {
      const decisive = node.op === "or";
      made.sees = (...pair) => {
        let unknown = false;
        for (const part of made.parts) {
          const x = part.sees(...pair);
          if (x === decisive) return decisive;
          unknown ||= x === null;
        }
        return unknown ? null : !decisive;
      };
    } else {
      made.sees = () => null;
    }
    return made;
  }

  async function open(mask) {
    const [counts, runs] = await Promise.all([
      unpack(mask.blocks.counts), unpack(mask.blocks.runs),
    ]);
    const first = new Int32Array(counts.length + 1);
    for (let i = 0; i < counts.length; i++) first[i + 1] = first[i] + counts[i];
    const starts = new Int32Array(runs.length / 2), stops = new Int32Array(runs.length / 2);
    const full = new Uint8Array(runs.length / 2);
    for (let row = 0; row < counts.length; row++) {
      let end = 0;
      for (let i = first[row]; i < first[row + 1]; i++) {
        full[i] = runs[2 * i] & 1;
        starts[i] = end + (runs[2 * i] >> 1);
        end = stops[i] = starts[i] + runs[2 * i + 1];
      }
    }
    const data = await Promise.all((mask.data || []).map(unpack));
    const tree = mask.tree ? compile(mask.tree, data) : { text: mask.text, sees: () => null };
    const [, , rows] = mask.blocks.shape;
    return { ...mask, tree, first, starts, stops, full, rows };
  }

  let mask, head = 0, example = 0, colours;
  const picture = zoomable(paint, tell), { view, canvas } = picture;

  function rowOf(t) {
    const [examples, heads] = mask.blocks.shape;
    const group = (example % examples) * heads + (head % heads);
    return group * mask.rows + Math.floor(t / mask.blocks.size[0]);
  }

  // 0: hidden, 1: a block with both kinds, 2: visible.
  function blockAt(t, s) {
    const row = rowOf(t), block = Math.floor(s / mask.blocks.size[1]);
    for (let i = mask.first[row]; i < mask.first[row + 1]; i++) {
      if (block < mask.starts[i]) return 0;
      if (block < mask.stops[i]) return mask.full[i] ? 2 : 1;
    }
    return 0;
  }

  function stateAt(t, s) {
    const state = blockAt(t, s);
    if (state !== 1) return state;
    const seen = mask.tree.sees(t, s, head, example);
    return seen === null ? 1 : seen ? 2 : 0;
  }

  function drawPairs(pen, width, height) {
    const s0 = Math.max(0, Math.floor(view.s)), t0 = Math.max(0, Math.floor(view.t));
    const s1 = Math.min(mask.keys, Math.ceil(view.s + width / view.scale));
    const t1 = Math.min(mask.queries, Math.ceil(view.t + height / view.scale));
    if (s1 <= s0 || t1 <= t0) return;
    const pairs = new Uint32Array((s1 - s0) * (t1 - t0));
    for (let t = t0, at = 0; t < t1; t++)
      for (let s = s0; s < s1; s++, at++) pairs[at] = colours[stateAt(t, s)];
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const keys = Array.from({ length: width }, (_, x) =>
      Math.floor(view.s + (x + 0.5) / view.scale));
    for (let y = 0; y < height; y++) {
      const t = Math.floor(view.t + (y + 0.5) / view.scale);
      if (t < t0 || t >= t1) continue;
      for (let x = 0; x < width; x++)
        if (keys[x] >= s0 && keys[x] < s1)
          pixels[y * width + x] = pairs[(t - t0) * (s1 - s0) + keys[x] - s0];
    }
    pen.putImageData(image, 0, 0);
  }

  // A pixel is full if all blocks below it are, and empty if none is alive.
  function drawBlocks(pen, width, height) {
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const [blockQ, blockK] = mask.blocks.size, { scale } = view;
    const right = Math.min(width, Math.ceil((mask.keys - view.s) * scale));
    const left = Math.max(0, Math.floor(-view.s * scale));
    for (let y = 0; y < height; y++) {
      const t0 = view.t + y / scale, t1 = Math.min(view.t + (y + 1) / scale, mask.queries);
      if (t1 <= 0 || t0 >= mask.queries) continue;
      const from = Math.floor(Math.max(t0, 0) / blockQ);
      const to = Math.max(from + 1, Math.ceil(t1 / blockQ));
      const covered = new Int32Array(width + 1), touched = new Int32Array(width + 1);
      for (let block = from; block < to; block++) {
        const row = rowOf(block * blockQ);
        for (let i = mask.first[row]; i < mask.first[row + 1]; i++) {
          const lo = (mask.starts[i] * blockK - view.s) * scale;
          const hi = (Math.min(mask.stops[i] * blockK, mask.keys) - view.s) * scale;
          if (hi <= 0 || lo >= width) continue;
          touched[Math.max(0, Math.floor(lo))]++;
          touched[Math.min(width, Math.ceil(hi))]--;
          if (!mask.full[i]) continue;
          // The last pixel may reach beyond the last key.
          const last = mask.stops[i] * blockK >= mask.keys ? Math.ceil(hi) : Math.floor(hi);
          const a = Math.max(0, Math.ceil(lo)), b = Math.min(width, last);
          if (a < b) { covered[a]++; covered[b]--; }
        }
      }
      let full = 0, some = 0;
      for (let x = 0; x < width; x++) {
        full += covered[x]; some += touched[x];
        if (x < left || x >= right) continue;
        pixels[y * width + x] = colours[full === to - from ? 2 : some > 0 ? 1 : 0];
      }
    }
    pen.putImageData(image, 0, 0);
  }

  function paint(pen, width, height) {
    if (view.scale >= 1) drawPairs(pen, width, height); else drawBlocks(pen, width, height);
  }

  // The parts whose answer settles the answer of the whole.
  function deciding(node, pair, found = new Set()) {
    if (!node.op) { found.add(node); return found; }
    if (node.op === "not") return deciding(node.parts[0], pair, found);
    if (node.op === "head") return deciding(node.chosen(pair[2]), pair, found);
    const value = node.sees(...pair), decisive = node.op === "or";
    for (const part of node.parts)
      if (value !== decisive || part.sees(...pair) === decisive) deciding(part, pair, found);
    return found;
  }

  function written(node, pair, decides) {
    const span = document.createElement("span");
    if (!node.op) {
      const seen = node.sees(...pair);
      span.textContent = node.text;
      span.className = seen === null ? "" : seen ? "yes" : "no";
      if (decides.has(node)) span.classList.add("decides");
      return span;
    }
    const between = { and: " & ", or: " | ", head: ", " }[node.op];
    span.append({ not: "~", head: "per_head(" }[node.op] ?? "(");
    node.parts.forEach((part, i) => {
      if (i) span.append(between);
      span.append(written(part, pair, decides));
    });
    if (node.op !== "not") span.append(")");
    return span;
  }

  function tell(t, s) {
    const pair = [t, s, head, example], state = stateAt(t, s);
    const kind = ["empty", "partial", "full"][blockAt(t, s)];
    const seen = ["hidden", "not known: only its block is", "visible"][state];
    const decides = deciding(mask.tree, pair);
    const names = [...decides].map((node) => node.text).join(", ");
    $("said").textContent =
      `Query ${t.toLocaleString("en")}, key ${s.toLocaleString("en")}: ${seen}` +
      (state === 1 ? ` (${[...decides].map((node) => node.why).filter(Boolean)})` : "") +
      (state === 1 ? "" : `, decided by ${names}`) + `. Its block is ${kind}.`;
    $("expression").replaceChildren(written(mask.tree, pair, decides));
  }

  function tables() {
    $("numbers").replaceChildren();
    for (const cells of mask.numbers) tableRow($("numbers"), cells);
    $("bands").replaceChildren();
    tableRow($("bands"), ["queries", "full blocks", "partial blocks", "first key", "last key"], "th");
    const [blockQ, blockK] = mask.blocks.size, step = Math.ceil(mask.rows / 16);
    for (let from = 0; from < mask.rows; from += step) {
      let kinds = [0, 0], low = Infinity, high = -1;
      const to = Math.min(from + step, mask.rows);
      for (let block = from; block < to; block++) {
        const at = rowOf(block * blockQ);
        for (let i = mask.first[at]; i < mask.first[at + 1]; i++) {
          kinds[mask.full[i]] += mask.stops[i] - mask.starts[i];
          low = Math.min(low, mask.starts[i] * blockK);
          high = Math.max(high, Math.min(mask.stops[i] * blockK, mask.keys) - 1);
        }
      }
      const last = Math.min(to * blockQ, mask.queries) - 1;
      tableRow($("bands"), [`${from * blockQ} to ${last}`, kinds[1], kinds[0],
        high < 0 ? "-" : low, high < 0 ? "-" : high]);
    }
  }

  function choose(newHead, newExample) {
    head = newHead;
    example = newExample;
    tables();
    picture.redraw();
  }

  async function select(number) {
    mask = await open(content.masks[number]);
    choices("head", [...Array(mask.heads).keys()], (i) => choose(i, example));
    choices("example", [...Array(mask.examples).keys()], (i) => choose(head, i));
    canvas.setAttribute("aria-label",
      `${mask.text}: ${mask.queries} queries, ${mask.keys} keys`);
    $("said").textContent = "Point at the picture.";
    $("expression").textContent = mask.text;
    choose(0, 0);
    picture.over(mask.queries, mask.keys);
  }

  themes(() => {
    colours = ["--empty", "--partial", "--full"].map((name) => packedColour(colour(name)));
    if (mask) picture.redraw();
  });
  choices("which", content.masks.map((each) => each.text), select);
  await select(0);
  // For tests, which look at the page.
  window.attnlab = { ...picture, select, stateAt, blockAt, choose };
  ready();
})();

// Draws a document (omgoptim/render/document.py): inline in report.html, or from a tool's answer in a chat (MCP Apps).
// Every text is set as text, never as markup; nothing is loaded.
"use strict";
(() => {
  const PAGE = document.getElementById("page");
  const KEY = "omgoptim/page";
  const POLL_MS = 5000;
  const SVG = "http://www.w3.org/2000/svg";

  // Elements

  const add = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== undefined && value !== null && value !== "" && value !== false) element.setAttribute(name, value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== "") element.append(child);
    return element;
  };
  const h = (tag, attributes, ...children) => add(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => add(document.createElementNS(SVG, tag), attributes, children);
  const list = (value) => (Array.isArray(value) ? value : []);
  const textOf = (value) => (value && typeof value === "object" ? String(value.text ?? "") : String(value ?? ""));
  const shown = (value) => {
    const text = textOf(value);
    return value && value.code && text ? h("code", {}, text) : text;
  };
  const toneOf = (value) => (["better", "worse", "open"].includes(value && value.tone) ? value.tone : "");

  // Blocks

  const heading = (title, section) => (title && title.toLowerCase() !== section.toLowerCase() ? h("h3", {}, title) : null);

  const UNITS = { B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, ms: 1e-3, s: 1, min: 60, k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
  const numberIn = (text) => {
    const found = /^([+-]?[\d,]*\.?\d+)\s*([A-Za-z]*)/.exec(text);
    return found ? parseFloat(found[1].replaceAll(",", "")) * (UNITS[found[2]] || 1) : NaN;
  };
  const order = (a, b) => {
    const [x, y] = [numberIn(a), numberIn(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return (Number.isNaN(x) - Number.isNaN(y)) || a.localeCompare(b);
    return x - y;
  };

  const tableRows = (table, rows) => rows.map((row) => {
    const cells = Array.isArray(row) ? row : list(row.cells);
    return h("tr", { class: ["chosen", "faded"].includes(row.mark) ? row.mark : "" }, cells.map((cell, place) => {
      const column = table.columns[place] || {};
      const long = textOf(cell).length > 60 ? "long" : /\S{15}/.test(textOf(cell)) ? "word" : "";
      const kinds = [column.numeric ? "n" : "", long, toneOf(cell)].filter(Boolean).join(" ");
      return h("td", { class: kinds, "data-label": column.name || "" }, shown(cell));
    }));
  });

  const FIRST_ROWS = 60;
  const drawTable = (table, name) => {
    table.columns = list(table.columns);
    let rows = list(table.rows);
    let most = FIRST_ROWS;
    const body = h("tbody");
    const sortable = rows.length > 2 && Boolean((table.columns[0] || {}).name);
    const heads = table.columns.map((column, place) => {
      const label = column.name || "";
      if (!sortable || !label) return label ? h("th", { scope: "col", class: column.numeric && "n" }, label) : h("td");
      const head = h("th", { scope: "col", class: column.numeric && "n" }, h("button", { type: "button" }, label));
      head.firstChild.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const cell = (row) => textOf((Array.isArray(row) ? row : list(row.cells))[place]);
        rows = [...rows].sort((a, b) => (!cell(a)) - (!cell(b)) || (down ? -1 : 1) * order(cell(a), cell(b)));
        fill();
      });
      return head;
    });
    const more = h("button", { type: "button", class: "do" }, `show all ${rows.length} rows`);
    more.addEventListener("click", () => { most = Infinity; more.remove(); fill(); });
    const fill = () => body.replaceChildren(...tableRows(table, rows.slice(0, most)));
    fill();
    const four = table.columns.length === 4 && !table.columns[0].name;
    const wide = table.columns.length > 9 ? "scroll wide many" : table.columns.length > 4 ? "scroll wide" : four ? "scroll compare" : "scroll";
    const frame = h("div", { class: wide, tabindex: 0, role: "group", "aria-label": `table: ${name}` },
      h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
    const cut = table.left_out ? h("p", { class: "note" }, `${table.left_out} more in report.json`) : null;
    return [frame, rows.length > most ? more : null, cut];
  };

  const folded = (title, make) => {
    const box = h("details", {}, h("summary", {}, title));
    const fill = () => { if (box.children.length === 1) add(box, {}, make()); };
    box.addEventListener("toggle", fill);
    return box;
  };

  const BLOCKS = {
    table: (block, section) => {
      const note = block.note ? h("p", { class: "note" }, block.note) : null;
      const make = () => [note, drawTable(block, block.title || section)].flat();
      return block.folded ? folded(block.title || section, make) : [heading(block.title || "", section), make()].flat();
    },
    items: (block, section) => [
      heading(block.title || "", section),
      h("ul", {}, list(block.items).map((item) => h("li", { class: toneOf(item) }, shown(item)))),
      block.left_out ? h("p", { class: "note" }, `${block.left_out} more in report.json`) : null,
    ],
    code: (block) => {
      const pre = () => h("pre", {}, textOf(block));
      if (block.folded) return folded(block.title || "more", () => [pre()]);
      const ask = block.ask && hosted ? button("Do this", block.ask) : null;
      return h("div", { class: "call" }, block.title ? h("span", {}, block.title) : null, pre(), ask);
    },
    chart: (block) => {
      const make = DRAWINGS[block.drawing && block.drawing.type];
      if (!make) return null;
      const caption = block.note ? h("figcaption", {}, block.note) : null;
      return h("figure", {}, caption, make(block.drawing));
    },
  };

  const lines = (block) => [
    block.label ? h("dt", {}, block.label) : null,
    h("dd", { class: toneOf(block.text) }, block.head ? [h("b", { class: toneOf(block.head) }, textOf(block.head)), " "] : "", shown(block.text)),
  ];

  const drawSection = (section) => {
    const title = section.title || "";
    const parts = [];
    let terms = null;
    for (const block of list(section.blocks)) {
      if (block.type === "line") {
        if (!terms) parts.push(terms = h("dl"));
        terms.append(...lines(block).filter(Boolean));
        continue;
      }
      terms = null;
      if (BLOCKS[block.type]) parts.push(BLOCKS[block.type](block, title));
    }
    const kind = section.kind === "warnings" ? "warnings" : "";
    return h("section", { class: kind }, h("h2", {}, title, section.note ? h("small", {}, ` ${section.note}`) : null), parts);
  };

  // Drawings: an SVG is drawn again when its width changes, so that its text keeps its size

  const redraws = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (Math.abs(contentRect.width - target.drawn) > 4) paint(target, contentRect.width);
    }
  });
  const paint = (box, width) => {
    box.drawn = width;
    box.replaceChildren(box.make(Math.max(240, Math.min(1000, width || 760))));
  };
  const picture = (make) => {
    const box = h("div");
    box.make = make;
    paint(box, Math.min(992, PAGE.clientWidth - (hosted ? 60 : 92)));
    redraws.observe(box);
    return box;
  };
  const svg = (width, height, title, ...children) =>
    s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title }, children);
  const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  const ticks = (low, high, most) => {
    const rough = (high - low) / most || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
    const found = [];
    for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9 && found.length < 20; n += 1) found.push(n * step);
    return found;
  };
  const digits = (values) => {
    for (let d = 0; d < 6; d += 1) if (new Set(values.map((v) => v.toFixed(d))).size === values.length) return d;
    return 6;
  };
  const label = (x, y, text, kind, anchor) => s("text", { x: x.toFixed(1), y: y.toFixed(1), class: kind, "text-anchor": anchor }, text);
  const rule = (x1, y1, x2, y2, kind) =>
    s("line", { x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), class: kind });
  const path = (points, kind) => s("polyline", { points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "), class: kind });
  const vertical = (title, values, y, left, right) => {
    const d = digits(values);
    return values.map((v) => [rule(left, y(v), right, y(v), "grid"), label(left - 8, y(v) + 4, v.toFixed(d), "", "end")]).flat().concat(
      s("text", { transform: `translate(12 ${(y(values[0] ?? 0) + y(values[values.length - 1] ?? 0)) / 2}) rotate(-90)`, "text-anchor": "middle" }, title));
  };
  const dot = (x, y, r, kind, text) =>
    s("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: r.toFixed(1), class: kind }, text ? s("title", {}, text) : null);

  const scatter = (drawing) => picture((width) => {
    const points = list(drawing.points);
    const original = drawing.original_ms > 0 ? drawing.original_ms : 0;
    const height = Math.round(Math.min(380, Math.max(260, width * 0.48))) + (original ? 16 : 0);
    const [left, right, top, bottom] = [62, width - 16, 14, height - (original ? 58 : 42)];
    const ys = points.map((p) => p.y).concat(Number.isFinite(drawing.guard) ? [drawing.guard] : []);
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    const margin = Math.max(0.12 * (high - low), 0.002);
    const most = Math.max(1, ...points.map((p) => p.x_high ?? p.x)) * 1.08;
    const x = scale(0, most, left, right);
    const y = scale(low - margin, high + margin, bottom, top);
    const parts = [vertical(drawing.y, ticks(low - margin, high + margin, 5), y, left, right)];
    for (const tick of ticks(0, most, width < 420 ? 4 : 7)) {
      parts.push(label(x(tick), bottom + 18, `${+tick.toPrecision(6)}x`, "", "middle"));
      const ms = original && tick > 0 ? `${+(original / tick).toPrecision(3)} ms` : "";
      if (ms) parts.push(label(Math.min(x(tick), width - 3.6 * ms.length), bottom + 33, ms, "", "middle"));
    }
    const latency = !original ? "" : width < 420 ? " and latency" : ` and latency, ${+original.toPrecision(3)} ms / speedup`;
    parts.push(label((left + right) / 2, height - 4, `${drawing.x}${latency} (area: size)`, "", "middle"));
    if (Number.isFinite(drawing.guard)) {
      const at = y(drawing.guard);
      parts.push(s("rect", { x: left, y: at, width: right - left, height: Math.max(0, bottom - at), class: "band" }));
      parts.push(rule(left, at, right, at, "guard"), label(right, at + 14, "below the guard", "bad", "end"));
    }
    const front = list(drawing.front);
    if (front.length > 1) parts.push(path(front.map(([a, b]) => [x(a), y(b)]), "front"));
    const largest = Math.max(1, ...points.map((p) => p.size || 0));
    const marks = points.map((p) => ({ ...p, at: [x(p.x), y(p.y)], r: p.size ? 4 + 9 * Math.sqrt(p.size / largest) : 6 }));
    for (const p of marks.filter((p) => Number.isFinite(p.x_low) && Number.isFinite(p.x_high))) {
      parts.push(rule(x(p.x_low), p.at[1], x(p.x_high), p.at[1], "interval"));
      for (const end of [p.x_low, p.x_high]) parts.push(rule(x(end), p.at[1] - 4, x(end), p.at[1] + 4, "interval"));
    }
    const kinds = ["point", "outside", "original", "kept"];
    const sorted = [...marks].sort((a, b) => kinds.indexOf(a.kind) - kinds.indexOf(b.kind) || b.r - a.r);
    for (const p of sorted) parts.push(dot(...p.at, p.r, kinds.includes(p.kind) ? p.kind : "point", p.text));
    const taken = marks.map((p) => [p.at[0], p.at[1], p.r]);
    if (Number.isFinite(drawing.guard)) for (let back = 0; back < 100; back += 16) taken.push([right - back, y(drawing.guard) + 10, 9]);
    const named = marks.length > 40 ? marks.filter((p) => p.kind === "kept" || p.kind === "original") : marks;
    for (const p of named) {
      const half = 4 + 3.4 * p.label.length;
      const places = [[0, -p.r - 10], [half + p.r + 2, 0], [-half - p.r - 2, 0], [0, p.r + 10], [half + p.r, -p.r - 8], [-half - p.r, p.r + 8]];
      const free = places.map(([dx, dy]) => [p.at[0] + dx, p.at[1] + dy]).find(([px, py]) =>
        px - half > left && px + half < right && py > 8 && taken.every(([tx, ty, r]) => Math.abs(px - tx) > half + r || Math.abs(py - ty) > 7 + r));
      if (!free) continue;
      taken.push([...free, half - 2]);
      parts.push(label(free[0], free[1] + 4, p.label, p.kind === "kept" ? "strong" : "ink", "middle"));
    }
    return svg(width, height, drawing.title, parts);
  });

  const bars = (drawing) => {
    const rows = list(drawing.bars);
    const most = Math.max(1e-12, ...rows.map((bar) => Math.max(bar.value, bar.expected || 0)));
    const wide = (kind, value) => {
      const bar = h("i", { class: kind });
      bar.style.width = `${(100 * Math.max(0, value)) / most}%`;
      return bar;
    };
    return h("ul", { class: "bars", "aria-label": drawing.title }, rows.map((bar) => h("li", { class: bar.faded && "faded" },
      h("code", { title: bar.whole }, bar.label),
      h("span", { class: "track" }, wide("", bar.value), bar.expected ? wide("expected", bar.expected) : null),
      h("span", {}, bar.text))));
  };

  const curves = (drawing) => {
    const epochs = Math.max(...drawing.panels.flatMap((panel) => panel.curves.map((curve) => curve.values.length)));
    const named = drawing.panels[0].curves.filter((curve) => curve.name);
    const make = (width) => {
      const [left, right, tall, gap] = [62, width - 16, 112, 26];
      const x = scale(0.5, epochs + 0.5, left, right);
      const height = 14 + drawing.panels.length * (tall + gap) + 22;
      const parts = [];
      const rounds = drawing.panels[0].curves[0].rounds;
      rounds.forEach((round, place) => {
        if (rounds[rounds.length - 1] === rounds[0] || (place && round === rounds[place - 1])) return;
        if (place) parts.push(rule(x(place + 0.5), 4, x(place + 0.5), height - 44, "grid"));
        parts.push(label(x(place + 0.5) + 4, 10, width / new Set(rounds).size > 90 ? `round ${round}` : `${round}`, "", ""));
      });
      drawing.panels.forEach((panel, place) => {
        const known = panel.curves.flatMap((curve) => curve.values).filter(Number.isFinite);
        if (!known.length) return;
        const [low, high] = [Math.min(...known), Math.max(...known)];
        const margin = Math.max(0.12 * (high - low), 1e-3 * Math.max(Math.abs(high), 1e-3));
        const top = 14 + place * (tall + gap);
        const y = scale(low - margin, high + margin, top + tall, top);
        parts.push(vertical(panel.name, ticks(low - margin, high + margin, 4), y, left, right));
        for (const curve of [...panel.curves].reverse()) {
          const kind = `curve ${panel.name === "quality" ? "quality" : ""} ${curve.control ? "control" : ""}`;
          let run = [];
          const runs = [run];
          curve.values.forEach((value, at) => {
            if (!Number.isFinite(value) || (at && curve.rounds[at] !== curve.rounds[at - 1])) runs.push(run = []);
            if (Number.isFinite(value)) run.push([x(at + 1), y(value)]);
          });
          parts.push(runs.filter((one) => one.length > 1).map((one) => path(one, kind)));
          curve.values.forEach((value, at) => {
            const kept = curve.kept.includes(at);
            if (!Number.isFinite(value) || (!kept && epochs > 120)) return;
            const what = `${curve.control ? "control, " : ""}round ${curve.rounds[at]}, epoch ${at + 1}: ${panel.name} ${+value.toPrecision(4)}${kept ? ", kept" : ""}`;
            parts.push(dot(x(at + 1), y(value), kept ? 5 : 3, kept ? "kept" : "point", what));
          });
        }
      });
      const step = Math.max(1, Math.ceil(epochs / (width < 420 ? 6 : 12)));
      for (let epoch = step; epoch <= epochs; epoch += step) parts.push(label(x(epoch), height - 22, `${epoch}`, "", "middle"));
      parts.push(label((left + right) / 2, height - 4, drawing.x, "", "middle"));
      return svg(width, height, `${drawing.title}: ${drawing.text || ""}`, parts);
    };
    const key = (curve) => {
      const line = s("svg", { width: 28, height: 8, "aria-hidden": "true" }, rule(0, 4, 28, 4, `curve ${curve.control ? "control" : ""}`));
      line.style.display = "inline-block";
      return h("li", {}, line, ` ${curve.name}`);
    };
    return [named.length > 1 ? h("ul", { class: "legend" }, named.map(key)) : null, picture(make)];
  };

  const multiples = (drawing) => {
    const cells = list(drawing.cells);
    const drops = cells.flatMap((cell) => cell.points.map((point) => point[1]));
    const guard = Number.isFinite(drawing.guard) ? drawing.guard : null;
    const [low, high] = [Math.min(0, ...drops), Math.max(1e-6, guard || 0, ...drops)];
    const widest = Math.max(1e-6, ...cells.flatMap((cell) => cell.points.map((point) => point[0])));
    const x = scale(0, widest, 4, 156);
    const y = scale(low, high, 54, 6);
    return h("ul", { class: "cells", "aria-label": drawing.title }, cells.map((cell) => {
      const points = cell.points.map(([a, d]) => [x(a), y(d)]);
      const title = `${cell.name}: ${cell.points.slice(1).map(([a, d]) => `${+(100 * a).toPrecision(3)}%: drop ${d.toFixed(4)}`).join(", ")}`;
      return h("li", {}, h("code", { title: cell.name }, `\u200e${cell.name}`), svg(160, 60, title, rule(4, y(0), 156, y(0), "grid"),
        guard === null ? null : rule(4, y(guard), 156, y(guard), "guard"), path(points, "curve"),
        dot(...points[points.length - 1], 4, cell.over ? "outside" : "kept", title)), h("span", {}, cell.text));
    }));
  };

  const LAYERS = { integer: "computed in integers", stored: "stored in fewer bits", left: "left as it was" };
  const strip = (drawing) => {
    const layers = list(drawing.layers).map(([name, bytes, kind]) => ({ name, bytes, kind: LAYERS[kind] ? kind : "left" }));
    const total = layers.reduce((sum, layer) => sum + layer.bytes, 0) || 1;
    const counts = Object.keys(LAYERS).map((kind) => [kind, layers.filter((layer) => layer.kind === kind)]).filter(([, of]) => of.length);
    const make = (width) => {
      let at = 0;
      const gap = layers.length > 150 ? 0 : 1;
      return svg(width, 26, drawing.title, layers.map((layer) => {
        const wide = (width * (layer.bytes / total + 0.5 / layers.length)) / 1.5;
        const bar = s("rect", { x: at.toFixed(2), y: 0, width: Math.max(0.3, wide - gap).toFixed(2), height: 26, class: `l-${layer.kind}` },
          s("title", {}, `${layer.name}: ${layer.bytes.toLocaleString("en")} B, ${LAYERS[layer.kind]}`));
        at += wide;
        return bar;
      }));
    };
    return [h("p", { class: "note" }, `${drawing.title}: each in order, wider with more bytes`), picture(make), h("ul", { class: "legend" },
      counts.map(([kind, of]) => h("li", {}, h("i", { class: `l-${kind}` }), `${LAYERS[kind]}: ${of.length}`)))];
  };

  const chain = (drawing) => h("ol", { class: "chain", "aria-label": drawing.title }, list(drawing.links).map((link) =>
    h("li", { class: link.kept && "kept" }, h("b", {}, link.name), h("span", {}, link.status), link.text ? h("span", {}, link.text) : null,
      link.parent ? h("span", {}, `from ${link.parent}`) : null)));

  const DRAWINGS = { scatter, bars, curves, multiples, strip, chain };

  // The page

  const draw = (page) => {
    const open = [...PAGE.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent);
    const head = h("header", {},
      h("p", { class: "kicker" }, page.verdict ? h("span", { class: `badge ${/^\w+$/.test(page.tone || "") ? page.tone : ""}` }, page.verdict) : null,
        list(page.about).map((part) => h("span", {}, shown(part)))),
      h("h1", {}, page.title || "omgoptim"), page.lead ? h("p", { class: "lead" }, page.lead) : null,
      Number.isFinite(page.progress) ? h("progress", { max: 1, value: page.progress, "aria-label": "fraction done" }) : null);
    const tiles = list(page.tiles).map((tile) => h("div", { class: "tile" }, h("b", { class: toneOf(tile) }, tile.big),
      h("span", {}, tile.label), tile.small ? h("small", {}, tile.small) : null));
    const actions = hosted ? list(page.actions).map((action) => button(action.label, action.message, action.confirm)) : [];
    PAGE.replaceChildren(head, ...(tiles.length ? [h("div", { class: "tiles" }, tiles)] : []),
      ...(actions.length ? [h("p", { class: "actions" }, actions)] : []), ...list(page.sections).map(drawSection));
    for (const summary of PAGE.querySelectorAll("details > summary")) if (open.includes(summary.textContent)) summary.parentElement.open = true;
  };

  const button = (name, message, confirm) => {
    const box = h("span");
    const reset = () => box.replaceChildren(first);
    const send = () => {
      box.replaceChildren(h("span", { class: "note", role: "status" }, "asked in the chat"));
      request("ui/message", { role: "user", content: [{ type: "text", text: message }] }).then(
        (answer) => { if (answer && answer.isError) reset(); }, reset);
    };
    const first = h("button", { type: "button", class: "do" }, name);
    first.addEventListener("click", () => {
      if (!confirm) return send();
      const yes = h("button", { type: "button", class: "do" }, "Yes, ask for it");
      const no = h("button", { type: "button", class: "do" }, "No");
      yes.addEventListener("click", send);
      no.addEventListener("click", reset);
      box.replaceChildren(h("span", {}, `${confirm} `), yes, no);
      return yes.focus();
    });
    reset();
    return box;
  };

  const theme = (name) => {
    const root = document.documentElement;
    root.style.colorScheme = name === "dark" ? "dark" : "light";
    root.setAttribute("data-theme", root.style.colorScheme);
  };
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  theme(system.matches ? "dark" : "light");

  const inline = document.getElementById("data");
  const hosted = !inline;
  if (inline) {
    system.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
    draw(JSON.parse(inline.textContent));
    return;
  }

  // In a chat: the protocol of MCP Apps (2026-01-26), as JSON-RPC over postMessage

  const waiting = new Map();
  let lastId = 0;
  let poll = null;
  let timer = 0;
  let gone = false;
  let seen = true;
  const post = (message) => window.parent.postMessage({ jsonrpc: "2.0", ...message }, "*");
  const request = (method, params) => new Promise((resolve, reject) => {
    lastId += 1;
    waiting.set(lastId, { resolve, reject });
    post({ id: lastId, method, params });
  });

  const show = (result) => {
    const structured = (result && result.structuredContent) || {};
    const page = (result && result._meta && result._meta[KEY]) || plainPage(structured, result || {});
    poll = list(page.poll).length ? Object.fromEntries(page.poll) : null;
    draw(page);
    schedule();
  };

  // A host that leaves `_meta` out: the structured answer alone
  const plainPage = (given, result) => {
    const error = given.error || {};
    const said = list(result.content).map((part) => part && part.text).filter(Boolean).join("\n");
    const sections = [];
    const items = (title, texts, kind) => texts.length && sections.push({ title, kind, blocks: [{ type: "items", items: texts }] });
    items("Warnings", list(given.warnings).map(String), "warnings");
    items("Gains", Object.entries(given.gains || {}).filter(([, value]) => value !== null).map(([name, value]) => `${name}: ${value}`));
    const next = list(given.next_steps).map((step) => ({ type: "code", title: step.why, text: step.command, ask: callText(step) }));
    if (next.length) sections.push({ title: "Next", blocks: next });
    if (!given.summary && said) sections.push({ title: "Answer", blocks: [{ type: "code", text: said }] });
    if (error.fix) items("Fix", [error.fix]);
    const going = ["starting", "queued", "running"].includes(given.status);
    const call = (list(given.next_steps)[0] || {}).arguments || {};
    const where = Object.entries({ action: "show", run_id: given.run_id, project: call.project }).filter(([, value]) => typeof value === "string");
    return { title: given.summary || error.what || "omgoptim", lead: error.why, verdict: given.outcome || given.status || (error.what && "failed"),
      tone: going ? "running" : given.outcome || (error.what ? "failed" : ""), about: [given.verb, given.run_id].filter(Boolean), sections,
      progress: going ? given.progress : undefined, poll: going && given.run_id ? where : [] };
  };
  const callText = (step) => `Call the tool ${step.tool} of omgoptim with ${JSON.stringify(step.arguments)}`;

  const schedule = () => {
    clearTimeout(timer);
    if (poll && !gone && seen && !document.hidden) timer = setTimeout(look, POLL_MS);
  };
  const look = () => request("tools/call", { name: "runs", arguments: poll }).then(show, schedule);
  document.addEventListener("visibilitychange", schedule);
  new IntersectionObserver((entries) => { seen = entries[entries.length - 1].isIntersecting; schedule(); }).observe(document.documentElement);

  const VARIABLES = { "--color-background-primary": "--bg", "--color-background-secondary": "--card", "--color-background-tertiary": "--code",
    "--color-text-primary": "--ink", "--color-text-secondary": "--soft", "--color-border-primary": "--line", "--font-sans": "--sans",
    "--font-mono": "--mono", "--border-radius-lg": "--round" };
  const adapt = (context) => {
    if (!context) return;
    if (context.theme) theme(context.theme);
    const variables = (context.styles && context.styles.variables) || {};
    for (const [theirs, ours] of Object.entries(VARIABLES)) {
      const value = variables[theirs];
      if (typeof value === "string" && value.length < 200) document.documentElement.style.setProperty(ours, value);
    }
    const inset = context.safeAreaInsets;
    if (inset) document.body.style.padding = ["top", "right", "bottom", "left"].map((side) => `${Number(inset[side]) || 0}px`).join(" ");
  };

  const NOTICES = {
    "ui/notifications/tool-input": (params) => {
      if (!PAGE.firstChild) draw({ title: "Waiting for the first answer", tone: "running", verdict: "STARTED", about: [String((params.arguments || {}).model || "")].filter(Boolean) });
    },
    "ui/notifications/tool-result": show,
    "ui/notifications/tool-cancelled": (params) => { poll = null; draw({ title: "The call was cancelled", lead: String(params.reason || "") }); },
    "ui/notifications/host-context-changed": adapt,
  };
  window.addEventListener("message", (event) => {
    const message = event.data;
    if (event.source !== window.parent || !message || message.jsonrpc !== "2.0") return;
    if (message.method === undefined) {
      const asked = waiting.get(message.id);
      waiting.delete(message.id);
      if (asked && message.error) asked.reject(message.error);
      else if (asked) asked.resolve(message.result);
    } else if (message.id === undefined) {
      if (Object.hasOwn(NOTICES, message.method)) NOTICES[message.method](message.params || {});
    } else if (message.method === "ping" || message.method === "ui/resource-teardown") {
      if (message.method !== "ping") { gone = true; clearTimeout(timer); }
      post({ id: message.id, result: {} });
    } else {
      post({ id: message.id, error: { code: -32601, message: "Method not found" } });
    }
  });

  let sizing = 0;
  const tell = () => {
    clearTimeout(sizing);
    sizing = setTimeout(() => {
      const height = Math.ceil(document.body.getBoundingClientRect().height);
      post({ method: "ui/notifications/size-changed", params: { width: window.innerWidth, height } });
    }, 100);
  };
  const about = { appInfo: { name: "omgoptim", version: "1" }, appCapabilities: { availableDisplayModes: ["inline", "fullscreen"] }, protocolVersion: "2026-01-26" };
  request("ui/initialize", about).then((answer) => {
    adapt(answer && answer.hostContext);
    post({ method: "ui/notifications/initialized" });
    new ResizeObserver(tell).observe(document.body);
  }, () => draw({ title: "This host does not show the report" }));
})();

"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const maps = data.maps;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const rgb = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
  const palettes = Object.fromEntries(Object.entries(data.colours).map(([name, stops]) => [name, stops.map(rgb)]));
  const state = { layer: 0, head: -1, query: 0, opacity: 0.8 };

  function colour(palette, x) {
    const stops = palettes[palette], place = Math.min(Math.max(x, 0), 1) * (stops.length - 1);
    const low = Math.floor(place), high = Math.min(low + 1, stops.length - 1);
    return stops[low].map((v, n) => Math.round(v + (stops[high][n] - v) * (place - low)));
  }
  function element(tag, parent, text) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }
  const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 2 : 1) + " %";

  // -- the map over the picture ---------------------------------------------------------------------------------------
  let levels, scales, cells;
  if (maps) {
    levels = bytes(maps.data);
    const raw = bytes(maps.scale);
    scales = new Float32Array(raw.buffer, raw.byteOffset, raw.byteLength / 4);
    cells = maps.rows * maps.columns;
  }
  function headMap(query, layer, head) {
    const place = (query * data.layers + layer) * maps.heads + head, map = new Float32Array(cells);
    for (let n = 0; n < cells; n++) map[n] = (levels[place * cells + n] / 255) * scales[place];
    return map;
  }
  function currentMap() {
    const { query, layer, head } = state;
    if (head >= 0) return headMap(query, layer, head);
    const mean = new Float32Array(cells), count = data.heads[layer];
    for (let h = 0; h < count; h++) headMap(query, layer, h).forEach((v, n) => { mean[n] += v / count; });
    return mean;
  }
  function paint(canvas, map, opacity, solid) {
    canvas.width = maps.columns;
    canvas.height = maps.rows;
    const context = canvas.getContext("2d"), image = context.createImageData(maps.columns, maps.rows);
    const top = Math.max(...map) || 1;
    for (let n = 0; n < cells; n++) {
      const x = map[n] / top, [r, g, b] = colour("inferno", x);
      image.data.set([r, g, b, solid ? 255 : 255 * opacity * (0.4 + 0.6 * Math.sqrt(x))], 4 * n);
    }
    context.putImageData(image, 0, 0);
  }
  function mark(cell) {
    const canvas = at("overlay"), factor = Math.max(1, Math.round(640 / Math.max(maps.columns, maps.rows)));
    const small = document.createElement("canvas");
    small.width = canvas.width;
    small.height = canvas.height;
    small.getContext("2d").drawImage(canvas, 0, 0);
    canvas.width = maps.columns * factor;
    canvas.height = maps.rows * factor;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (cell === undefined) return;
    const x = (cell % maps.columns) * factor, y = Math.floor(cell / maps.columns) * factor;
    context.lineWidth = Math.max(3, factor / 8);
    for (const [style, inset] of [["#000000", 0], ["#38f2ff", context.lineWidth * 0.6]]) {
      context.strokeStyle = style;
      context.strokeRect(x + inset, y + inset, factor - 2 * inset, factor - 2 * inset);
    }
  }
  function showBars(query) {
    const bars = at("bars");
    bars.replaceChildren();
    if (!query.masses) return;
    const heads = query.masses[state.layer];
    query.groups.forEach((group, n) => {
      const share = state.head >= 0 ? heads[state.head][n] : heads.reduce((sum, h) => sum + h[n], 0) / heads.length;
      const row = element("div", bars);
      row.className = "bar";
      element("span", row, group);
      element("i", element("span", row)).style.width = (100 * share).toFixed(1) + "%";
      element("span", row, percent(share));
    });
  }
  function showHeads() {
    const box = at("heads");
    box.replaceChildren();
    for (let head = -1; head < data.heads[state.layer]; head++) {
      const button = element("button", box), canvas = element("canvas", button);
      button.type = "button";
      button.setAttribute("aria-pressed", String(head === state.head));
      const kept = state.head;
      state.head = head;
      paint(canvas, currentMap(), 1, true);
      state.head = kept;
      element("span", button, head < 0 ? "mean" : "head " + head);
      button.addEventListener("click", () => go({ head }));
    }
  }
  function showMap() {
    if (!maps) return;
    const query = maps.queries[state.query], map = currentMap();
    paint(at("overlay"), map, state.opacity, false);
    mark(query.cell);
    const total = map.reduce((a, b) => a + b, 0), top = Math.max(...map), place = map.indexOf(top);
    at("readout").textContent =
      `${query.label}; layer ${state.layer}${data.layerNames[state.layer] ? " (" + data.layerNames[state.layer] + ")" : ""}, ` +
      `${state.head < 0 ? "mean of the heads" : "head " + state.head}: ${percent(total)} of the attention is on these ` +
      `patches, at most ${percent(top)} on one (row ${Math.floor(place / maps.columns)}, column ${place % maps.columns}).`;
    at("layer-value").textContent = `${state.layer} of 0-${data.layers - 1}`;
    at("head-value").textContent = state.head < 0 ? "mean" : `${state.head} of 0-${data.heads[state.layer] - 1}`;
    at("query-value").textContent = query.short || (query.cell === undefined ? "" : `${Math.floor(query.cell / maps.columns)}, ${query.cell % maps.columns}`);
    at("opacity-value").textContent = Math.round(100 * state.opacity) + " %";
    at("layer").value = state.layer;
    at("head").max = data.heads[state.layer] - 1;
    at("head").value = state.head;
    at("query").value = state.query;
    document.querySelectorAll("#chips button").forEach((b, n) => b.setAttribute("aria-pressed", String(n === state.query)));
    showBars(query);
    showHeads();
  }

  // -- the table of heads ---------------------------------------------------------------------------------------------
  function shade(measure, value) {
    if (measure.palette === "clusters") return palettes.clusters[value % palettes.clusters.length];
    return colour(measure.palette, (value - measure.low) / (measure.high - measure.low || 1));
  }
  const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.01 && Math.abs(x) < 1e4 ? String(+x.toPrecision(3)) : x.toExponential(1));
  function showMeasure() {
    const measure = data.measures[+at("measure").value], box = at("map"), heads = Math.max(...measure.values.map((r) => r.length));
    at("measure-note").textContent = measure.name + ": " + measure.note + (maps && !measure.tower ? ". Click a cell to see that head's map above." : "");
    box.replaceChildren();
    box.classList.toggle("small", heads > 16);
    const table = element("table", box), first = element("tr", element("thead", table)), body = element("tbody", table);
    element("th", first, "layer");
    for (let h = 0; h < heads; h++) element("th", first, heads <= 16 || h % 4 === 0 ? h : "");
    measure.values.forEach((row, layer) => {
      const line = element("tr", body);
      element("th", line, layer);
      row.forEach((value, head) => {
        const cell = element("td", line), button = element("button", cell);
        button.type = "button";
        if (value === null || (measure.palette === "clusters" && value < 0)) {
          cell.className = "none";
          button.disabled = true;
          return;
        }
        const [r, g, b] = shade(measure, value);
        button.style.background = `rgb(${r},${g},${b})`;
        button.style.color = 0.299 * r + 0.587 * g + 0.114 * b < 140 ? "#fff" : "#1f2933";
        button.title = `layer ${layer}, head ${head}: ${value}`;
        button.setAttribute("aria-label", button.title);
        button.setAttribute("aria-pressed", String(Boolean(maps) && !measure.tower && layer === state.layer && head === state.head));
        if (heads <= 16) button.textContent = number(value);
        if (maps && !measure.tower) button.addEventListener("click", () => go({ layer, head }));
      });
    });
    at("scale").hidden = measure.palette === "clusters";
    at("low").textContent = number(measure.low);
    at("high").textContent = number(measure.high);
    if (measure.palette === "clusters") return;
    const context = at("ramp").getContext("2d");
    for (let n = 0; n < 128; n++) {
      context.fillStyle = `rgb(${colour(measure.palette, n / 127).join(",")})`;
      context.fillRect(n, 0, 1, 1);
    }
  }
  function go(change) {
    Object.assign(state, change);
    if (maps) state.head = Math.min(state.head, data.heads[state.layer] - 1);
    showMap();
    if (data.measures.length) showMeasure();
  }

  // -- what the reader does -------------------------------------------------------------------------------------------
  if (maps) {
    at("explorer").hidden = false;
    at("layer").max = data.layers - 1;
    at("query").max = maps.queries.length - 1;
    at("query-name").textContent = data.kind === "lmm" ? "step" : "query";
    for (const name of ["layer", "head", "query"]) at(name).addEventListener("input", (e) => go({ [name]: +e.target.value }));
    at("opacity").addEventListener("input", (e) => go({ opacity: e.target.value / 100 }));
    const patches = maps.queries.some((q) => q.cell !== undefined);
    at("hint").textContent = data.kind === "lmm"
      ? "Every step's row, from the last token of the prompt on, gave one token of the answer:"
      : patches ? "Click a patch to see where it looks." : "";
    if (data.kind === "lmm") {
      maps.queries.forEach((query, n) => {
        const chip = element("button", at("chips"), query.short);
        chip.type = "button";
        chip.addEventListener("click", () => go({ query: n }));
      });
    } else if (patches) {
      at("stage").classList.add("pick");
      at("stage").addEventListener("click", (event) => {
        const box = at("stage").getBoundingClientRect();
        const row = ((event.clientY - box.top) / box.height) * maps.rows - 0.5;
        const column = ((event.clientX - box.left) / box.width) * maps.columns - 0.5;
        let best = 0, near = Infinity;
        maps.queries.forEach((query, n) => {
          if (query.cell === undefined) return;
          const apart = Math.hypot(Math.floor(query.cell / maps.columns) - row, (query.cell % maps.columns) - column);
          if (apart < near) [best, near] = [n, apart];
        });
        go({ query: best });
      });
    } else if (maps.queries.length === 1) at("query").closest("label").hidden = true;
    if (maps.queries.length === 1) at("query").disabled = true;
  }
  if (data.measures.length) {
    at("measures").hidden = false;
    data.measures.forEach((measure, n) => { element("option", at("measure"), measure.title).value = n; });
    at("measure").addEventListener("change", showMeasure);
  }
  go({ layer: Math.floor(data.layers / 2) });
})();

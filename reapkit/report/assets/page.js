"use strict";
// Draws the charts of this page: static ones as they are given, live ones from matrices and the slider's position.
(() => {
  const root = document.documentElement;
  const errors = [];
  window.addEventListener("error", (event) => { errors.push(event.message); root.dataset.errors = errors.join(" | "); });
  window.addEventListener("unhandledrejection", (event) => { errors.push(String(event.reason)); root.dataset.errors = errors.join(" | "); });

  // ------------------------------------------------------------------------------------------ frame

  document.getElementById("theme").addEventListener("click", () => root.switchTheme());
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.closest(".code").querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  const nav = document.querySelector("nav"), menu = nav.querySelector(".menu"), here = document.getElementById("here");
  const links = [...menu.querySelectorAll("a")], sections = links.map((link) => document.querySelector(link.hash));
  const isWide = matchMedia("(min-width: 60rem)");
  const measure = () => root.style.setProperty("--nav", `${getComputedStyle(nav).position === "sticky" ? nav.offsetHeight : 0}px`);
  const follow = () => {  // the section that a quarter of the window has reached
    const reached = sections.findLastIndex((section) => section.getBoundingClientRect().top < innerHeight / 4);
    links.forEach((link, index) => link.classList.toggle("here", index === reached));
    here.textContent = links[reached] ? `: ${links[reached].textContent}` : "";
  };
  const fold = () => {
    if (isWide.matches) return;
    menu.open = false;
    measure();  // before the browser scrolls to the section
  };
  isWide.addEventListener("change", () => { menu.open = isWide.matches; });
  menu.addEventListener("toggle", measure);
  links.forEach((link) => link.addEventListener("click", fold));
  fold();
  new ResizeObserver(measure).observe(nav);
  addEventListener("scroll", follow, { passive: true });
  follow();

  const source = document.getElementById("page-data");
  if (!source) return;

  // ------------------------------------------------------------------------------------------ data

  const page = JSON.parse(source.textContent);
  const ARRAYS = { f4: Float32Array, i2: Int16Array, u1: Uint8Array };
  const decode = (base64) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
    const letters = atob(base64), bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return bytes;
  };
  const unpack = ({ shape, dtype, base64 }) => {
    const bytes = decode(base64);
    const values = new ARRAYS[dtype](bytes.buffer);
    return { rows: shape[0], columns: shape[1], at: (row, column) => values[row * shape[1] + column],
             row: (row) => values.subarray(row * shape[1], (row + 1) * shape[1]) };
  };
  const matrices = Object.fromEntries(Object.entries(page.matrices || {}).map(([name, packed]) => [name, unpack(packed)]));
  const layers = page.layers || [], experts = page.experts || 0;
  const slider = document.getElementById("removed"), decidedButton = document.getElementById("decided");
  const state = { removed: slider ? Number(slider.value) : 0, decided: Boolean(decidedButton) };

  const isDropped = (layer, expert) => (state.decided ? matrices.decided.at(layer, expert) === 1 : matrices.rank.at(layer, expert) < state.removed);
  const percent = (share, digits = 1) => {
    if (share == null || Number.isNaN(share)) return "–";
    const least = 10 ** -digits;
    return share > 0 && 100 * share < least / 2 ? `< ${least} %` : `${(100 * share).toFixed(digits)} %`;
  };
  const short = (value) => {
    if (value == null || !Number.isFinite(value)) return "never routed";
    if (value === 0) return "0";
    return Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  };
  const at = () => (state.decided ? experts : state.removed);  // the position, of which Python has said everything

  // ------------------------------------------------------------------------------------------ live charts

  const known = (name, layer) => { const value = matrices[name].at(layer, at()); return Number.isNaN(value) ? null : value; };
  const overLayers = (compute) => layers.map((_, index) => compute(index));
  const markAt = (x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "--text", width: 1.5, dash: "dot" } });

  const distributionSentence = (layer) => {
    const { sentences, shape, floor, share, lost } = page.distribution;
    if (shape[layer] === null) return sentences.nobody;
    const words = { shape: shape[layer], floor: floor[layer][at()], share: share[layer][at()], lost: lost[layer][at()] };
    return (words.floor === null ? sentences.nothing : sentences.cut).replace(/\{(\w+)\}/g, (_, name) => words[name]);
  };

  const roundStep = (rough) => {
    const decade = 10 ** Math.floor(Math.log10(rough || 1));
    return decade * [1, 2, 5, 10].find((step) => step * decade >= rough);
  };
  const square = (name, color) => ({ type: "scatter", x: [null], y: [null], mode: "markers", name, marker: { color, size: 11, symbol: "square" } });

  const options = {};
  const live = {
    cut(spec) {
      const { removed, traffic, mass } = page.positions;
      spec.layout.shapes = [markAt(removed[at()])];
      if (state.decided) {
        const marker = (y, color, name) => ({ x: [removed[at()]], y: [y], mode: "markers", showlegend: false, name,
          marker: { color, size: 11, line: { color: "--surface", width: 2 } }, hovertemplate: "%{y:.1%} removed<extra>" + name + "</extra>" });
        spec.data.push(marker(traffic[at()], "--neutral", "traffic, as decided"), marker(mass[at()], "--drop", "saliency mass, as decided"));
      }
      return spec;
    },
    geography(spec) {
      spec.data[0].y = overLayers((layer) => known("floors", layer));
      spec.data[1].y = overLayers((layer) => known("tail_risks", layer));
      return spec;
    },
    coverage(spec) {
      spec.data[0].y = overLayers((layer) => known("coverage", layer));
      spec.data[1].y = overLayers((layer) => known("chance", layer));
      return spec;
    },
    distribution(spec, chosen) {
      const layer = Number(chosen.layer ?? spec.layer);
      const values = [...matrices.saliency.row(layer)].map((value, e) => [value, isDropped(layer, e)]).filter(([value]) => Number.isFinite(value));
      const numbers = values.map(([value]) => value).sort((a, b) => a - b);
      const low = Math.min(0, numbers[0] ?? 0), high = numbers[numbers.length - 1] ?? 1;
      const bins = Math.max(8, Math.min(48, Math.round(experts / 3)));
      const width = (high - low) / bins || 1;
      const counts = [new Array(bins).fill(0), new Array(bins).fill(0)];
      for (const [value, dropped] of values) counts[dropped ? 0 : 1][Math.min(bins - 1, Math.floor((value - low) / width))] += 1;
      const centers = counts[0].map((_, bin) => low + (bin + 0.5) * width);
      spec.layout.xaxis.dtick = roundStep((high - low) / 4);  // bars would put the ticks at their middles
      const bar = (name, y, color) => ({ type: "bar", name, x: centers, y, width: width * 0.94, marker: { color },
        hovertemplate: `%{y} experts around %{x:.3g}<extra>${name}</extra>` });
      spec.data = [bar("dropped", counts[0], "--drop"), bar("kept", counts[1], "--keep")];
      const floor = known("floors", layer);
      if (floor !== null) spec.layout.shapes = [{ ...markAt(floor), line: { color: "--text", width: 1.5, dash: "dash" } }];
      spec.title = layer === spec.layer ? null : `Layer ${layers[layer]}`;
      spec.sentence = distributionSentence(layer);
      return spec;
    },
    heat(spec, chosen) {
      const value = chosen.value || "saliency", bySaliency = chosen.order === "saliency";
      const z = [[], []], text = [];
      const order = overLayers((layer) => {
        const indices = Array.from({ length: experts }, (_, e) => e);
        return bySaliency ? indices.sort((a, b) => matrices.rank.at(layer, a) - matrices.rank.at(layer, b)) : indices;
      });
      for (let layer = 0; layer < layers.length; layer++) {
        const row = matrices[value === "saliency" ? "saliency" : "count"].row(layer);
        const sorted = [...row].filter(Number.isFinite).sort((a, b) => a - b);
        const middle = sorted[Math.floor(sorted.length / 2)] || sorted[sorted.length - 1] || 1;
        const cells = order[layer].map((e) => [e, Math.max(-1, Math.min(1, Math.log10(Math.max(row[e], 0) / middle))), isDropped(layer, e)]);
        z[0].push(cells.map(([e, level, dropped]) => (dropped ? null : Number.isFinite(row[e]) && matrices.count.at(layer, e) > 0 ? level : -1)));
        z[1].push(cells.map(([e, level, dropped]) => (dropped ? (Number.isFinite(row[e]) && matrices.count.at(layer, e) > 0 ? level : -1) : null)));
        text.push(cells.map(([e, , dropped]) => `layer ${layers[layer]}, expert ${e}: ${dropped ? "dropped" : "kept"}<br>saliency ${short(matrices.saliency.at(layer, e))}`
          + `, ${percent(matrices.count.at(layer, e) / page.routed[layer], 2)} of the layer's traffic`));
      }
      spec.data[0].z = z[0]; spec.data[1].z = z[1];
      spec.data[0].text = spec.data[1].text = text;
      spec.data.push(square("kept", "--keep-high"), square("dropped", "--drop-high"));
      spec.layout.xaxis.title.text = bySaliency ? "experts, lowest saliency left" : "expert";
      return spec;
    },
    specialists(spec, chosen) {
      const view = Number(chosen.source ?? -1);
      const z = overLayers((layer) => Array.from({ length: experts }, (_, e) => {
        if (matrices.dominant.at(layer, e) === 255) return null;
        return view < 0 ? matrices.dominant.at(layer, e) : matrices[`lift${view}`].at(layer, e);
      }));
      const trace = spec.data[0];
      trace.z = z;
      trace.text = overLayers((layer) => Array.from({ length: experts }, (_, e) => {
        const shares = page.sources.map((name, s) => `${name} ${short(matrices[`lift${s}`].at(layer, e))}×`);
        return `layer ${layers[layer]}, expert ${e}<br>traffic against an even expert: ${shares.join(", ")}`;
      }));
      const n = page.sources.length;
      if (view < 0) {
        trace.zmin = -0.5; trace.zmax = n - 0.5;
        trace.colorscale = page.sources.flatMap((_, s) => [[s / n, `--c${(s % 8) + 1}`], [(s + 1) / n, `--c${(s % 8) + 1}`]]);
        spec.data.push(...page.sources.map((name, s) => square(name, `--c${(s % 8) + 1}`)));
      } else {
        trace.zmin = 0; trace.zmax = Math.min(n, 3);
        trace.colorscale = [[0, "--heat-low"], [1, "--heat-high"]];
        spec.data.push(square("hardly ever", "--heat-low"), square(`${Math.min(n, 3)} times an even expert, or more`, "--heat-high"));
      }
      return spec;
    },
  };

  // ------------------------------------------------------------------------------------------ drawing

  const resolve = (value, style) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.length > 8 && typeof value[0] === "number" ? value : value.map((item) => resolve(item, style));
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    }
    return value;
  };
  const merge = (base, over) => {
    const merged = { ...base };
    for (const [key, value] of Object.entries(over || {})) {
      merged[key] = value && typeof value === "object" && !Array.isArray(value) && typeof merged[key] === "object" ? merge(merged[key], value) : value;
    }
    return merged;
  };
  const AXIS = { gridcolor: "--grid", zerolinecolor: "--line", linecolor: "--line", tickcolor: "--line",
                 title: { font: { size: 12, color: "--muted" }, standoff: 8 }, tickfont: { size: 11, color: "--muted" } };
  const house = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--text" },
    margin: { l: 48, r: 22, t: 8, b: 40 }, hoverlabel: { bgcolor: "--raised", bordercolor: "--line", font: { color: "--text", size: 12 }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12, color: "--text" }, bgcolor: "rgba(0,0,0,0)" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", bargap: 0.25, barmode: "group", hovermode: "closest",
  });
  const settings = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
                     modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"] };

  const charts = [...document.querySelectorAll(".chart")];
  const given = new Map(charts.map((chart) => [chart, document.querySelector(`script[data-for="${chart.id}"]`).textContent]));
  const drawn = new Set();
  const draw = (chart) => {
    const style = getComputedStyle(root);
    let spec = JSON.parse(given.get(chart));
    if (chart.dataset.live) spec = live[chart.dataset.live](spec, options[chart.id] || {});
    if (spec.sentence) {
      const figure = chart.closest("figure"), title = figure.querySelector("h3");
      title.dataset.given ??= title.textContent;
      title.textContent = spec.title ?? title.dataset.given;
      figure.querySelector("figcaption").textContent = spec.sentence;
      chart.setAttribute("aria-label", `${title.textContent}. ${spec.sentence}`);
    }
    let layout = merge(house(), spec.layout);
    for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = merge({ ...AXIS, automargin: key[0] === "x" ? "height" : "width" }, layout[key]);
    layout.height = Number(chart.dataset.height);
    drawn.add(chart);
    return Plotly.react(chart, resolve(spec.data, style), resolve(layout, style), settings);
  };

  const showReadout = () => {
    if (!slider) return;
    document.getElementById("removed-now").textContent = page.positions.label[at()];
    document.getElementById("readout").textContent = page.positions.readout[at()];
  };

  const PAPER_WIDTH = 640, COLUMN_WIDTH = 290;  // pixels between the margins of an A4 or letter page; of one of two columns
  const SLOW = new Set(["heat"]);
  let pending = null, later = null;
  const moved = () => {
    if (decidedButton) decidedButton.setAttribute("aria-pressed", String(state.decided));
    cancelAnimationFrame(pending);
    clearTimeout(later);
    const following = charts.filter((chart) => drawn.has(chart) && chart.dataset.live && chart.dataset.live !== "specialists");
    pending = requestAnimationFrame(() => { showReadout(); following.filter((c) => !SLOW.has(c.dataset.live)).forEach(draw); });
    later = setTimeout(() => following.filter((c) => SLOW.has(c.dataset.live)).forEach(draw), 150);
  };
  slider?.addEventListener("input", () => { state.removed = Number(slider.value); state.decided = false; moved(); });
  decidedButton?.addEventListener("click", () => { state.decided = true; slider.value = state.removed = page.decidedRemoved; moved(); });
  for (const select of document.querySelectorAll("select[data-chart]")) {
    options[select.dataset.chart] = { ...options[select.dataset.chart] };
    select.addEventListener("change", () => {
      options[select.dataset.chart][select.dataset.option] = select.value;
      draw(document.getElementById(select.dataset.chart));
    });
  }

  const loadPlotly = async () => {
    const packed = document.getElementById("plotly-gz");
    const code = await new Response(new Blob([decode(packed.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    packed.remove();
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
  };

  // The load event waits for the charts: who prints or photographs the page once it is loaded finds every one of them.
  const holdLoad = () => {
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    frame.contentDocument.open();  // a document that is still being written keeps this page loading
    return () => frame.remove();
  };
  const nextTask = () => new Promise((done) => { setTimeout(done); });
  const isInSight = (chart) => { const box = chart.getBoundingClientRect(); return box.bottom > 0 && box.top < innerHeight; };
  const drawAll = async () => {  // what the reader sees first, then one chart at a time, so that the page answers meanwhile
    const seen = charts.filter(isInSight);
    seen.forEach(draw);
    root.dataset.usable = "yes";
    for (const chart of charts) {
      if (drawn.has(chart)) continue;
      await nextTask();
      await draw(chart);
    }
  };

  showReadout();
  const release = holdLoad();
  loadPlotly().then(async () => {
    const redraw = () => drawn.forEach(draw);
    root.addEventListener("themechange", redraw);
    const folds = [...document.querySelectorAll("details")];
    let opened = [], theme = "";
    window.addEventListener("beforeprint", () => {
      theme = root.dataset.theme;
      root.dataset.theme = "light";
      charts.forEach(draw);
      opened = folds.filter((fold) => !fold.open);
      opened.forEach((fold) => { fold.open = true; });
      charts.forEach((chart) => Plotly.relayout(chart, { width: chart.closest(".grid:not(.wide)") ? COLUMN_WIDTH : PAPER_WIDTH }));
    });
    window.addEventListener("afterprint", () => {
      root.dataset.theme = theme;
      opened.forEach((fold) => { fold.open = false; });
      redraw();
      charts.forEach((chart) => Plotly.relayout(chart, { width: null, autosize: true }));
    });
    folds.forEach((fold) => fold.addEventListener("toggle", () => fold.querySelectorAll(".chart").forEach((c) => drawn.has(c) && Plotly.Plots.resize(c))));
    await drawAll();
    root.dataset.ready = "yes";
  }).catch((error) => {
    root.dataset.errors = String(error);
    for (const chart of charts) { chart.style.height = "auto"; chart.textContent = "This chart needs a browser of 2023 or later."; }
  }).finally(release);
})();

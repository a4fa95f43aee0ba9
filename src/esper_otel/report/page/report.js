// The page of a report: reads the data in it, draws charts with uPlot, tells decisions in words.
// Served by a sidecar (data-live) it asks that for its data, and every second for what is new.
// Whatever comes from a recording reaches the page as text (textContent), never as markup.
"use strict";
(async () => {
  // ---- the data ---------------------------------------------------------------------------

  function bytesOf(text) {
    const plain = atob(text.trim()), raw = new Uint8Array(plain.length);
    for (let i = 0; i < plain.length; i++) raw[i] = plain.charCodeAt(i);
    return raw;
  }

  async function unpack(raw) {
    if (typeof DecompressionStream === "undefined")
      throw new Error("this browser is too old to unpack the data (it has no DecompressionStream)");
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = new DataView(bytes.buffer).getUint32(0, true);
    const data = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
    let at = 4 + size;
    const WIDTH = {delta: 4, single: 4, double: 8};
    const places = data.arrays.map(([kind, count, base]) => {
      const start = at;
      at += count * WIDTH[kind];
      return {kind, count, base, start, made: null};
    });
    // Numbers of an array, made when a chart first wants them.
    data.array = place => {
      const {kind, count, base, start, made} = places[place];
      if (made) return made;
      const width = WIDTH[kind], whole = new Uint8Array(count * width);
      for (let plane = 0; plane < width; plane++)
        for (let i = 0, from = start + plane * count; i < count; i++) whole[i * width + plane] = bytes[from + i];
      let found;
      if (kind === "single") found = Float64Array.from(new Float32Array(whole.buffer));
      else if (kind === "double") found = new Float64Array(whole.buffer);
      else {
        found = Float64Array.from(new Uint32Array(whole.buffer));
        for (let i = 0, sum = base; i < count; i++) found[i] = sum += found[i];
      }
      return places[place].made = found;
    };
    return data;
  }

  const LIVE = document.documentElement.dataset.live || "";  // where the data come from, "" here
  class Gone extends Error {}

  // What the sidecar has: null where nothing is new; throws Gone where all is to be loaded again.
  async function ask(what) {
    const response = await fetch(`${LIVE}/${what}`);
    if (response.status === 204) return null;
    if (response.status === 205) throw new Gone("the sidecar does not know this run any more");
    if (!response.ok) throw new Error(`the sidecar answers ${response.status}`);
    return unpack(new Uint8Array(await response.arrayBuffer()));
  }

  let data;
  try {
    data = await (LIVE ? ask("data") : unpack(bytesOf($("data").textContent)));
  } catch (error) {
    $("problems").textContent = LIVE ? `No data of this run: ${error.message}.` : `The data of this report cannot be read: ${error.message}`;
    if (LIVE) $("problems").append(" ", Object.assign(document.createElement("a"), {href: "/", textContent: "All runs"}));
    return;
  }

  // ---- words ------------------------------------------------------------------------------

  const name = text => h("bdi", {}, shown(text));

  function duration(seconds) {
    if (!(seconds >= 0)) return "–";
    if (seconds < 120) return `${brief(seconds)} s`;
    const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
    return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min ${Math.round(seconds % 60)} s`;
  }

  // ---- runs, ranks, curves ----------------------------------------------------------------

  const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63d2", "#8c8c00"];
  const PHASES = [
    ["input_wait_ms", "input wait", "#e69f00"], ["forward_ms", "forward", "#0072b2"],
    ["backward_ms", "backward", "#56b4e9"], ["optimizer_ms", "optimizer", "#009e73"],
    ["kasmina.apply_ms", "apply", "#cc79a7"], ["kasmina.finalize_ms", "finalize", "#8a63d2"],
    ["hook_latency_ms", "instrumentation", "#d55e00"],
  ];

  const several = data.runs.length > 1;
  const lines = [];  // one for each rank of each run

  function withArrays(curve, from) {  // its numbers are made when a chart first wants them
    let x = null, y = null;
    Object.defineProperty(curve, "x", {get: () => x || from.array(curve.steps), set: made => { x = made; }});
    Object.defineProperty(curve, "y", {get: () => y || from.array(curve.values), set: made => { y = made; }});
    return curve;
  }
  const curvesOf = rank => [rank.curves, ...Object.values(rank.seeds)];

  function addRank(run, rank, from) {
    const index = run.ranks.indexOf(rank);
    rank.run = run;
    rank.color = several ? COLORS[run.place % COLORS.length] : COLORS[index % COLORS.length];
    rank.dash = several && index ? [6 - Math.min(index, 4), 2 + Math.min(index, 4)] : null;
    rank.visible = run.ranks.every(other => other.visible !== false);
    for (const curves of curvesOf(rank)) for (const curve of Object.values(curves)) withArrays(curve, from);
  }

  function addRuns() {  // makes what is read of each run from what is packed of it
    lines.length = 0;
    data.runs.forEach((run, place) => {
      run.place = place;
      run.ranks.forEach(rank => addRank(run, rank, data));
      run.decisions = run.decisions.map((numbers, index) => decisionOf(run, run, numbers, index));
    });
    label();
  }

  function label() {
    lines.length = 0;
    for (const run of data.runs) for (const rank of run.ranks) {
      rank.label = run.ranks.length > 1 ? (several ? `${shown(run.title || run.name)} rank ${rank.rank}` : `rank ${rank.rank}`) : shown(run.title || run.name);
      lines.push(rank);
    }
  }

  // A decision out of its numbers; packed is the run as it came, with the words of decisions.
  function decisionOf(run, packed, numbers, index) {
    const [template, step, rank, applied, ...values] = numbers;
    return {run, step, rank, applied, values, ...packed.templates[template], after: packed.aftermaths[index] || null};
  }
  addRuns();

  // The greatest place of x in sorted, -1 before the first.
  function before(sorted, x) {
    let low = 0, high = sorted.length;
    while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] <= x) low = middle + 1; else high = middle; }
    return low - 1;
  }

  // The value of a curve at x; between two points on the line through them.
  function at(curve, x) {
    if (!curve) return null;
    const xs = curve.x, ys = curve.y, i = before(xs, x);
    if (i < 0) return null;
    if (xs[i] === x || i + 1 >= xs.length) return xs[i] === x ? ys[i] : null;
    return ys[i] + (x - xs[i]) / (xs[i + 1] - xs[i]) * (ys[i + 1] - ys[i]);
  }

  const state = {axis: "step", log: false, smoothing: 0, range: null, chosen: null, step: null, tail: 0};

  // Steps of a rank as what the axis shows.
  function along(rank, steps) {
    if (state.axis === "step") return steps.slice();
    const clock = rank.curves.time_unix_nano;
    const found = steps.map(step => at(clock, step));
    for (let i = 1; i < found.length; i++)  // uPlot wants each x once, and rising
      if (!(found[i] > found[i - 1])) found[i] = found[i - 1] + 1e-6;
    return found;
  }

  // As in TensorBoard: a weighted mean, divided by the weight that it has got so far.
  function smoothed(values, weight) {
    if (!weight) return values;
    let last = 0, count = 0;
    return Array.from(values, value => {
      if (value === null || Number.isNaN(value)) return null;
      last = last * weight + (1 - weight) * value;
      count += 1;
      return last / (1 - Math.pow(weight, count));
    });
  }

  const clean = values => Array.from(values, v => Number.isNaN(v) || (state.log && v <= 0) ? null : v);

  // ---- charts -----------------------------------------------------------------------------

  const css = variable => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  const charts = [];
  const faded = (color, alpha) => color + Math.round(alpha * 255).toString(16).padStart(2, "0");
  const ofRun = rank => lines.filter(line => line.visible && (!rank || line === rank));

  // One table for uPlot.join and how its columns are drawn, for each line of a chart.
  function plain(key, options = {}) {
    return () => ofRun().flatMap(rank => {
      const curve = rank.curves[key];
      if (!curve || !curve.total) return [];
      const x = along(rank, curve.x), y = clean(curve.y);
      const series = {label: (options.name ? `${rank.label} ${options.name}` : rank.label), stroke: options.color || rank.color, width: options.width || 1.25,
        dash: options.dash || rank.dash, scale: options.scale || "y", paths: options.stepped ? uPlot.paths.stepped({align: 1}) : undefined,
        points: options.points ? {show: true, size: 6} : undefined};
      if (!state.smoothing || options.raw) return [{x, columns: [y], series: [series]}];
      return [{x, columns: [y, smoothed(y, state.smoothing)],
        series: [{...series, label: `${series.label} (recorded)`, stroke: faded(rank.color, 0.28), width: 1}, {...series, width: 1.8}]}];
    });
  }

  function band() {  // the mean of the loss and its scatter around it
    return ofRun().slice(0, 4).flatMap(rank => {
      const mean = rank.curves.loss_ewma, scatter = rank.curves.loss_volatility;
      if (!mean || !scatter) return [];
      const width = Array.from(mean.x, step => at(scatter, step));
      const ys = mean.y, high = ys.map((v, i) => v + (width[i] || 0)), low = ys.map((v, i) => v - (width[i] || 0));
      const hidden = {scale: "y", auto: false, stroke: faded(rank.color, 0.35), width: 0.5, quiet: true};
      return [{x: along(rank, mean.x), columns: [clean(high), clean(low), clean(mean.y)], bands: [[0, 1, faded(rank.color, Number(css("--band")))]],
        series: [{...hidden, label: "mean + scatter"}, {...hidden, label: "mean − scatter"},
          {label: `${rank.label} mean ± scatter`, scale: "y", stroke: rank.color, width: 0.8, dash: [2, 3]}]}];
    });
  }

  function stacked(pick) {
    return () => {
      const rank = pick();
      const whole = rank && rank.curves.step_latency_ms;
      if (!whole) return [];
      const steps = whole.x, columns = [], series = [], bands = [];
      let sum = Array.from(steps, () => 0);
      for (const [key, label, color] of PHASES) {
        const curve = rank.curves[key];
        if (!curve || !curve.total) continue;
        const own = Array.from(steps, step => at(curve, step));
        sum = sum.map((s, i) => s + (own[i] || 0));
        columns.push(sum);
        series.push({label, stroke: color, width: 1, scale: "y", own});
        bands.push([columns.length - 1, columns.length - 2, faded(color, 0.6)]);
      }
      columns.push(Array.from(whole.y, v => Number.isNaN(v) ? null : v));
      series.push({label: "whole step", stroke: css("--faint"), width: 0.6, scale: "y", own: whole.y});
      series.forEach(one => { one.value = (u, v, s, i) => i === null || i === undefined ? "–" : `${brief(one.own[i])} ms`; });
      return [{x: along(rank, steps), columns, series, bands: bands.map(([hi, lo, fill]) => [hi, lo, fill])}];
    };
  }

  function ofSeeds(key, options = {}) {
    return () => ofRun().flatMap(rank => {
      const first = rank.run.ranks[0];
      return Object.entries(rank.seeds).flatMap(([seed, curves], index) => {
        const curve = curves[key];
        if (!curve || !curve.total) return [];
        // Ranks whose seed did the same are one line.
        if (rank !== first && first.seeds[seed] && first.seeds[seed][key] && first.seeds[seed][key].values === curve.values) return [];
        const label = `${several || rank !== first ? rank.label + " " : ""}${shown(seed)}`;
        return [{x: along(rank, curve.x), columns: [clean(curve.y)], series: [{label, stroke: COLORS[(index + (several ? rank.run.place * 3 : 0)) % COLORS.length],
          width: 1.4, scale: "y", paths: options.stepped ? uPlot.paths.stepped({align: 1}) : undefined, value: options.value, dash: rank.dash}]}];
      });
    });
  }

  const both = (...makers) => () => makers.flatMap(make => make());
  const has = key => lines.some(rank => rank.curves[key] && rank.curves[key].total);
  const seedsHave = key => lines.some(rank => Object.values(rank.seeds).some(curves => curves[key] && curves[key].total));
  const unit = key => (data.metrics[key] || {}).unit || "";

  // Decisions as marks on a chart, in the colours of their severity: a triangle at the top for
  // each, and a veil over the steps from the first to the last of those that follow each other.
  function marks(chart) {
    const {ctx, bbox} = chart, ratio = devicePixelRatio || 1;
    const seen = new Set();
    const inside = left => Math.min(Math.max(left, bbox.left), bbox.left + bbox.width);
    ctx.save();
    for (const {first, last} of episodes) {
      if (!decisionsShown().includes(first)) continue;
      const [a, b] = [first, last].map(one => placeOf(one));
      if (a === null || b === null) continue;
      const left = inside(chart.valToPos(a, "x", true)), right = inside(chart.valToPos(b, "x", true));
      if (right <= bbox.left || left >= bbox.left + bbox.width) continue;
      ctx.fillStyle = colorOf(first.severity);
      ctx.globalAlpha = 0.09;
      ctx.fillRect(left, bbox.top, Math.max(right - left, ratio), bbox.height);
    }
    for (const decision of decisionsShown()) {
      const x = placeOf(decision);
      if (x === null) continue;
      const left = Math.round(chart.valToPos(x, "x", true));
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      const chosen = decision === state.chosen;
      const place = `${left} ${decision.severity}`;
      if (seen.has(place) && !chosen) continue;
      seen.add(place);
      ctx.fillStyle = colorOf(decision.severity);
      ctx.globalAlpha = 1;
      if (chosen) ctx.fillRect(left, bbox.top, 2 * ratio, bbox.height);
      ctx.beginPath();
      ctx.moveTo(left - 4 * ratio, bbox.top); ctx.lineTo(left + 4 * ratio, bbox.top); ctx.lineTo(left, bbox.top + 7 * ratio);
      ctx.fill();
    }
    ctx.restore();
  }

  const colors = new Map();  // until the scheme changes
  function colorOf(severity) {
    if (!colors.has(severity)) colors.set(severity, css(`--${(severity || "normal").toLowerCase().replace(/[^a-z]/g, "")}`) || css("--faint"));
    return colors.get(severity);
  }
  const rankOf = decision => decision.run.ranks.find(rank => rank.rank === decision.rank) || decision.run.ranks[0];
  function placeOf(decision) {
    if (state.axis === "step") return decision.step;
    const rank = rankOf(decision);
    return rank ? at(rank.curves.time_unix_nano, decision.step) : null;
  }
  let listed = null;  // until what is shown changes
  function decisionsShown() {
    if (!listed) {
      listed = data.runs.filter(run => !run.ranks.length || run.ranks.some(rank => rank.visible)).flatMap(run => run.decisions);
      listed.includes = Set.prototype.has.bind(new Set(listed));
    }
    return listed;
  }

  function draw(chart) {
    let log = state.log && !chart.linear;
    let tables = chart.make();
    if (log && !tables.some(table => table.columns.some(column => column.some(value => value !== null)))) {
      state.log = log = false;  // nothing above zero: as it is, rather than nothing
      tables = chart.make();
      state.log = true;
    }
    if (chart.plot) { chart.plot.destroy(); chart.plot = null; }
    chart.body.replaceChildren();
    chart.figure.hidden = !tables.length;
    if (!tables.length) return;
    const joined = uPlot.join(tables.map(table => [table.x, ...table.columns]));
    const series = [{label: state.axis === "step" ? "step" : "time", value: (u, v) => v === null || v === undefined ? "–" : state.axis === "step" ? number(v) : duration(v)}];
    const bands = [];
    for (const table of tables) {
      const first = series.length;
      for (const one of table.series)
        series.push({spanGaps: false, points: {show: (u, i, a, b) => b - a < 60}, value: (u, v) => brief(v), ...one});
      for (const [high, low, fill] of table.bands || [])
        bands.push(low < 0 ? null : {series: [first + high, first + low], fill});
      // The lowest of a stack is filled down to zero.
      (table.bands || []).forEach(([high, low, fill]) => { if (low < 0) series[first + high].fill = fill; });
    }
    const right = tables.some(table => table.series.some(one => one.scale === "right"));
    const axis = {stroke: css("--faint"), grid: {stroke: css("--grid"), width: 1}, ticks: {stroke: css("--line"), width: 1}, font: "12px system-ui, sans-serif"};
    const options = {
      width: Math.max(chart.body.clientWidth, 280), height: chart.height || 240,
      scales: {x: {time: false}, y: {distr: log ? 3 : 1, range: chart.range}, right: {auto: true}},
      axes: [
        {...axis, values: (u, ticks) => ticks.map(v => state.axis === "step" ? number(v) : duration(v)), size: 34},
        {...axis, size: chart.ticks ? 96 : 62, values: chart.ticks || ((u, ticks) => ticks.map(v => v === null ? "" : brief(v))), splits: chart.splits},
        ...(right ? [{...axis, side: 1, scale: "right", grid: {show: false}, size: 50, values: (u, ticks) => ticks.map(brief)}] : []),
      ],
      series, bands: bands.filter(Boolean),
      cursor: {sync: {key: "esper"}, drag: {x: true, y: false}, focus: {prox: 24}, points: {size: 6}},
      focus: {alpha: 0.5},
      legend: {live: true},
      hooks: {
        draw: chart.marked ? [marks] : [],
        setScale: [(u, key) => { if (key === "x" && !chart.following && u.status === 1) { hold(); follow(u.scales.x.min, u.scales.x.max, chart); } }],
        ready: [u => prepare(u, chart)],
      },
    };
    chart.following = true;
    chart.plot = new uPlot(options, joined, chart.body);
    const range = state.range || everything();
    if (range) chart.plot.setScale("x", range);
    queueMicrotask(() => { chart.following = false; });  // behind uPlot's own, which calls the hooks
  }

  function hold() {  // somebody looks at a part of it, which stays
    state.tail = 0;
    if ($("tail")) $("tail").value = "0";
  }

  function follow(min, max, from) {
    if (min === null || max === null) return;
    state.range = {min, max};
    for (const chart of charts) {
      if (!chart.plot || chart === from || chart.following) continue;
      chart.following = true;
      chart.plot.batch(() => chart.plot.setScale("x", state.range));  // at once, hooks included
      chart.following = false;
    }
    drawLanes();
  }

  function everything() {  // from the first x of all lines to the last
    const shown = lines.filter(rank => rank.visible);
    if (!shown.length) return null;
    const min = state.axis === "step" ? Math.min(...shown.map(rank => rank.first)) : 0;
    const max = Math.max(...shown.map(rank => state.axis === "step" ? rank.last : rank.seconds));
    return max > min ? {min, max} : null;
  }

  function zoom(factor, around) {
    const all = everything();
    if (!all) return;
    const now = state.range || all;
    const center = around === undefined ? (now.min + now.max) / 2 : around;
    const min = Math.max(all.min, center - (center - now.min) * factor), max = Math.min(all.max, center + (now.max - center) * factor);
    if (max - min > 1e-9) { hold(); follow(min, max, null); }
  }
  function pan(share) {
    const all = everything();
    if (!all) return;
    const now = state.range || all, size = now.max - now.min;
    const min = Math.min(Math.max(all.min, now.min + share * size), all.max - size);
    hold();
    follow(min, min + size, null);
  }
  function reset() {
    hold();
    const all = everything();
    if (all) follow(all.min, all.max, null);
    state.range = null;
  }

  function prepare(u, chart) {
    u.over.addEventListener("dblclick", event => { event.stopImmediatePropagation(); reset(); }, true);
    u.over.addEventListener("wheel", event => {
      if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return;  // else the page scrolls
      event.preventDefault();
      if (event.shiftKey) return pan((event.deltaX || event.deltaY) > 0 ? 0.1 : -0.1);
      zoom(event.deltaY > 0 ? 1.25 : 0.8, u.posToVal(event.offsetX, "x"));
    }, {passive: false});
    let down = null;
    u.over.addEventListener("mousedown", event => {
      down = event.offsetX;
      if (!event.shiftKey) return;
      event.stopImmediatePropagation();  // pan, and do not select
      let last = event.clientX;
      const move = e => { pan((last - e.clientX) / u.over.clientWidth); last = e.clientX; };
      const up = () => { removeEventListener("mousemove", move); removeEventListener("mouseup", up); };
      addEventListener("mousemove", move); addEventListener("mouseup", up);
    }, true);
    u.over.addEventListener("click", event => {
      if (down === null || Math.abs(event.offsetX - down) > 3) return;
      let nearest = null, distance = 8;
      for (const decision of chart.marked ? decisionsShown() : []) {
        const x = placeOf(decision);
        const away = x === null ? Infinity : Math.abs(u.valToPos(x, "x") - event.offsetX);
        if (away < distance) { nearest = decision; distance = away; }
      }
      if (nearest) choose(nearest); else pickStep(stepAt(u.posToVal(event.offsetX, "x")));
    });
    for (const label of u.root.querySelectorAll(".u-legend .u-series th")) {
      label.tabIndex = 0;
      label.setAttribute("role", "button");
      label.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); label.click(); } });
    }
    u.series.forEach((one, i) => { if (one.quiet) u.root.querySelectorAll(".u-legend .u-series")[i].style.display = "none"; });
  }

  // What a chart shows now, into the plot that is there: cursor, focus and zoom stay.
  function renew(chart) {
    const tables = chart.plot ? chart.make() : [];
    const fresh = tables.flatMap(table => table.series);
    const old = chart.plot ? chart.plot.series.slice(1) : [];
    if (!chart.plot || !tables.length || fresh.length !== old.length || fresh.some((one, i) => one.label !== old[i].label)) { draw(chart); return; }
    fresh.forEach((one, i) => { if (one.value) old[i].value = one.value; });
    const joined = uPlot.join(tables.map(table => [table.x, ...table.columns]));
    chart.following = true;
    const range = state.range || everything();
    chart.plot.batch(() => {
      chart.plot.setData(joined, !range);
      if (!range) return;
      chart.plot.redraw(true, true);
      chart.plot.setScale("x", range);
    });
    chart.following = false;
  }

  function chart(title, about, make, options = {}) {
    const body = h("div", {class: "body"});
    const made = {make, body, ...options};
    made.figure = h("figure", {tabindex: 0, role: "group", "aria-label": `Chart: ${title}`, class: options.wholly ? "wholly" : null},
      h("figcaption", {}, h("span", {}, title, " ", h("span", {class: "faint"}, about)), options.extra || null), body);
    made.figure.addEventListener("keydown", event => keys(event, made));
    (options.into || $("charts")).append(made.figure);
    charts.push(made);
    return made;
  }

  function keys(event, on) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {"+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), "0": reset, Home: reset,
      ArrowLeft: () => event.shiftKey ? pan(-0.2) : point(on, -1), ArrowRight: () => event.shiftKey ? pan(0.2) : point(on, 1)}[event.key];
    if (act && event.target.tagName !== "SELECT") { event.preventDefault(); act(); }
  }

  // Move the cursor of a chart by one point, as the mouse would.
  function point(on, by) {
    const u = on.plot;
    if (!u) return;
    const xs = u.data[0], low = before(xs, u.scales.x.min - 1e-12) + 1, high = before(xs, u.scales.x.max);
    const now = u.cursor.idx === null || u.cursor.idx === undefined ? (by > 0 ? low - 1 : high + 1) : u.cursor.idx;
    const next = Math.min(Math.max(now + by, low), high);
    if (xs[next] === undefined) return;
    u.setCursor({left: u.valToPos(xs[next], "x"), top: u.over.clientHeight / 2});
  }

  // What can be seen is drawn at once, the rest when there is time.
  let waiting = [];
  function redraw() {
    listed = null;
    colors.clear();
    const tops = charts.map(one => one.figure.hidden ? Infinity : one.figure.getBoundingClientRect()).map(box => box === Infinity || (box.top < innerHeight && box.bottom > 0));
    waiting = charts.filter((_, i) => !tops[i]);
    charts.filter((_, i) => tops[i]).forEach(draw);
    drawLanes();
    drawStep();
    delete document.documentElement.dataset.drawn;
    setTimeout(later, 0);
  }
  function later() {
    const chart = waiting.shift();
    if (chart) { draw(chart); setTimeout(later, 0); } else document.documentElement.dataset.drawn = "all";
  }
  function fit() {  // charts to the width that there is for them
    for (const {plot, body, height} of charts) {
      const width = Math.max(body.clientWidth, 280);
      if (plot && plot.width !== width) plot.setSize({width, height: height || 240});
    }
  }
  function drawAll() { waiting.splice(0).forEach(draw); }

  // ---- decisions --------------------------------------------------------------------------

  const AGAINST = {baseline: "baseline", frozen: "frozen baseline", lowest: "lowest baseline", highest: "highest baseline", peers: "other ranks",
    previous: "before", missing: "missing for", left: "left", level: "level", scatter: "scatter", expected: "limit of its record",
    excursions: "excursions so far", farthest: "farthest of them in scatters"};
  const OUTCOMES = {came_back: "came back by itself", got_better: "got better by itself", stayed: "stayed, nothing was done", got_worse: "got worse, nothing was done"};
  const idOf = d => `${shown(d.run.name)}/${d.rank}/${d.step}${d.update ? "/update" : ""}`;
  const headOf = d => d.action === "CONTINUE" ? "notice" : d.update ? "update" : d.action;

  function rowsOf(decision) {  // [parameter rows, for each finding its rows]
    let at = decision.parameters.length;
    return [decision.parameters.map((key, i) => [key, decision.values[i]]),
      decision.findings.map(found => found.keys.map(key => [key, decision.values[at++]]))];
  }

  function seen(rows) {  // values, and beside each what it was held against
    const values = new Map(rows), told = new Map();
    for (const [key, value] of rows) {
      const match = /^(\w+)\((.+)\)$/.exec(key);
      const metric = match ? match[2] : key;
      if (!told.has(metric)) told.set(metric, []);
      if (!match) continue;
      const times = ["baseline", "frozen", "lowest", "highest", "peers"].includes(match[1]) && value > 0 && values.has(metric)
        ? ` (${brief(values.get(metric) / value)} times that)` : "";
      told.get(metric).push(`${AGAINST[match[1]] || match[1]} ${brief(value)}${times}`);
    }
    return h("table", {}, h("tbody", {}, [...told].map(([metric, words]) => h("tr", {},
      h("td", {}, name(metric)), h("td", {}, values.has(metric) ? number(values.get(metric)) : ""), h("td", {class: "words"}, words.join("; "))))));
  }

  function why(decision) {
    const winner = decision.findings.find(found => found.rule === decision.reason) || decision.findings[0];
    if (winner) return shown(winner.text || winner.rule);
    return decision.reason === "nominal" ? "Nothing was wrong, so the proposal is granted." : decision.reason === "conservative_mode"
      ? "Conservative mode: seeds wait until the run has been calm for a while." : shown(decision.reason);
  }

  let episodes = [];
  function gather() {  // decisions that follow each other for the same reason are one line of the table
    episodes = [];
    for (const run of data.runs) {
      const open = new Map();
      for (const decision of run.decisions) {
        const key = `${decision.rank} ${decision.reason} ${decision.action} ${decision.severity} ${decision.update}`;
        const last = open.get(key);
        if (last && decision.step - last.last.step <= 3) { last.last = decision; last.all.push(decision); continue; }
        const episode = {first: decision, last: decision, all: [decision]};
        open.set(key, episode);
        episodes.push(episode);
      }
    }
    for (const episode of episodes) for (const decision of episode.all) decision.episode = episode;
  }

  const aftermathOf = decision => decision.after;
  function outcomeOf(decision) {
    const found = aftermathOf(decision);
    return found ? OUTCOMES[found.outcome] || shown(found.outcome) : "";
  }
  const done = d => headOf(d) === "notice" ? "" : d.applied === 1 ? "applied" : d.applied === 0 ? "not applied" : "";

  const FIRST = 300;
  let listedAll = false;
  function listDecisions(all = false) {
    listedAll = all;
    const total = data.runs.reduce((sum, run) => sum + run.decisions.length, 0);
    const table = $("decisions").querySelector(".tall"), scrolled = table ? table.scrollTop : 0;
    const rows = (all ? episodes : episodes.slice(0, FIRST)).map(episode => {
      const d = episode.first;
      episode.row = h("tr", {},
        h("td", {}, h("button", {type: "button", class: "pick", onclick: () => choose(d)},
          episode.all.length > 1 ? `steps ${number(d.step)} to ${number(episode.last.step)}` : `step ${number(d.step)}`)),
        several ? h("td", {class: "words"}, name(d.run.name)) : null, h("td", {}, String(d.rank)), h("td", {}, number(episode.all.length)),
        h("td", {class: `words ${d.severity}`}, `${headOf(d)} ${d.severity}`), h("td", {class: "words"}, name(d.reason)), h("td", {class: "words"}, name(why(d))),
        h("td", {class: "words"}, done(d)), h("td", {class: "words"}, outcomeOf(d)));
      return episode.row;
    });
    const head = ["when", several ? "run" : null, "rank", "decisions", "what", "rule", "why", "applied", "outcome"].filter(Boolean);
    $("decisions").replaceChildren(h("h2", {id: "h-decisions"}, `Decisions and notices (${number(total)})`),
      total ? h("div", {class: "tall", tabindex: 0, role: "region", "aria-label": "Table of decisions"}, h("table", {}, h("thead", {}, h("tr", {}, head.map(word => h("th", {class: "words"}, word)))), h("tbody", {}, rows)))
        : h("p", {class: "faint"}, "None is known from these files."),
      rows.length < episodes.length ? h("p", {}, h("button", {type: "button", onclick: () => listDecisions(true)}, `Show all ${number(episodes.length)}`)) : "");
    if (scrolled) $("decisions").querySelector(".tall").scrollTop = scrolled;
    if (state.chosen && state.chosen.episode && state.chosen.episode.row) state.chosen.episode.row.classList.add("chosen");
  }

  function choose(decision, again = false) {
    const old = state.chosen;
    state.chosen = decision;
    if (old && old.episode.row) old.episode.row.classList.remove("chosen");
    if (decision && decision.episode.row) decision.episode.row.classList.add("chosen");
    charts.forEach(chart => chart.marked && chart.plot && chart.plot.redraw(false));
    const panel = $("detail");
    panel.hidden = !decision;
    document.body.classList.toggle("beside", Boolean(decision));
    fit();
    if (!decision) { if (old && old.episode.row) old.episode.row.querySelector("button").focus(); return; }
    const [parameters, findings] = rowsOf(decision);
    const after = aftermathOf(decision);
    const told = [h("div", {class: "buttons"},
      h("button", {type: "button", onclick: () => next(-1)}, "‹ previous"), h("button", {type: "button", onclick: () => next(1)}, "next ›"),
      h("button", {type: "button", onclick: () => choose(null)}, "close")),
    h("h2", {id: "chosen", tabindex: -1}, h("bdi", {}, idOf(decision))),
    h("p", {}, h("strong", {class: decision.severity}, `${headOf(decision)} ${decision.severity}`), " ", name(decision.reason),
      decision.operation ? `, ${shown(decision.operation)} of seed ${shown(decision.seed || "")}` : decision.seed ? `, about seed ${shown(decision.seed)}` : "",
      decision.conservative ? ", conservative mode" : "")];
    if (!decision.findings.length) told.push(h("p", {}, why(decision)));
    decision.findings.forEach((found, i) => {
      const words = data.rules && data.rules[found.rule];
      told.push(h("h3", {}, name(found.rule), " ", h("span", {class: `faint ${found.severity}`}, `${shown(found.action)} ${shown(found.severity)}`)), h("p", {}, name(found.text)));
      if (words && words[0]) told.push(h("p", {class: "faint"}, "It asks for: ", name(words[0])));
      if (found.seed) told.push(h("p", {}, "About seed ", name(found.seed)));
      told.push(seen(findings[i]));
    });
    if (parameters.length) told.push(h("h3", {}, "Asked for"), seen(parameters));
    const facts = [decision.mode ? `mode ${shown(decision.mode)}` : "", done(decision), decision.table ? `table ${shown(decision.table)}` : ""].filter(Boolean);
    if (facts.length) told.push(h("p", {class: "faint"}, facts.join(", ")));
    told.push(h("h3", {}, "Afterwards"));
    if (after) {
      told.push(h("p", {}, h("strong", {}, outcomeOf(decision)), after.sentences.length ? ": " : "", name(after.sentences.join("; "))));
      told.push(h("table", {}, h("thead", {}, h("tr", {}, ["median", "before", "at the decision", "after"].map(word => h("th", {}, word)))),
        h("tbody", {}, Object.entries(after.values).map(([key, values]) => h("tr", {}, h("td", {}, name(key)), values.map(v => h("td", {}, v === null ? "–" : number(v))))))));
    } else told.push(h("p", {class: "faint"}, "Not known from these files. The sidecar's journal tells it: name that as well when the report is made."));
    const rank = rankOf(decision);
    if (rank) {
      const rows = ["loss", "gradient_norm", "lr_scale", "step_latency_ms"].map(key => [key, at(rank.curves[key], decision.step)]).filter(row => row[1] !== null && !Number.isNaN(row[1]));
      if (rows.length) told.push(h("h3", {}, "The step itself"), seen(rows));
      if (rank.curves.step_latency_ms) told.push(h("p", {}, h("button", {type: "button", onclick: () => { pickStep(decision.step); $("step").scrollIntoView({block: "center"}); }}, "show its phases")));
    }
    panel.replaceChildren(...told);
    if (!again) $("chosen").focus({preventScroll: true});
  }

  function next(by) {
    const all = decisionsShown();
    if (!all.length) return;
    const now = all.indexOf(state.chosen);
    choose(all[now < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(now + by, 0), all.length - 1)]);
  }

  // ---- tables -----------------------------------------------------------------------------

  const table = (head, rows) => h("table", {}, h("thead", {}, h("tr", {}, head.map((word, i) => h("th", {class: i ? null : "words", scope: "col"}, word)))),
    h("tbody", {}, rows.map(row => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : {scope: "row"}, cell))))));
  const total = (rank, key, what) => {
    const found = rank && rank.curves[key] && rank.curves[key].total;
    return found ? what === "mean" ? found[1] / found[0] : found[{count: 0, sum: 1, least: 2, leastStep: 3, greatest: 4, greatestStep: 5, first: 6, last: 7}[what]] : null;
  };

  const FACTS = [
    ["steps", rank => rank ? number(rank.count) : "–"], ["last step", rank => rank ? number(rank.last) : "–"], ["took", rank => rank ? duration(rank.seconds) : "–"], ["ended", rank => rank && rank.ended ? shown(rank.ended) : "–"],
    ["first loss", rank => number(total(rank, "loss", "first"))], ["last loss", rank => number(total(rank, "loss", "last"))],
    ["lowest loss", rank => { const least = total(rank, "loss", "least"); return least === null ? "–" : `${number(least)} at ${number(total(rank, "loss", "leastStep"))}`; }],
    ["last accuracy", rank => number(total(rank, "accuracy", "last"))],
    ["greatest gradient norm", rank => { const most = total(rank, "gradient_norm", "greatest"); return most === null ? "–" : `${brief(most)} at ${number(total(rank, "gradient_norm", "greatestStep"))}`; }],
    ["first rate", rank => number(total(rank, "optimizer_lr", "first"))], ["skipped updates", rank => number(total(rank, "update_skipped", "sum"))],
    ["non-finite values", rank => number(total(rank, "nonfinite", "sum"))],
    ["mean step", rank => ms(total(rank, "step_latency_ms", "mean"))], ["longest step", rank => ms(total(rank, "step_latency_ms", "greatest"))],
    ...PHASES.map(([key, label]) => [`mean ${label}`, rank => ms(total(rank, key, "mean"))]),
    ["mean samples/s", rank => brief(total(rank, "samples_per_s", "mean"))],
  ];
  // What the script reports itself, and what of that is measured on held-out data.
  const customs = () => [...new Set(lines.flatMap(rank => Object.keys(rank.curves)))].filter(key => key.startsWith("custom.") && has(key)).sort();
  const isEvaluation = key => Boolean((data.metrics[key] || {}).evaluation);
  const evaluated = word => customs().filter(key => isEvaluation(key) && word.test(key));
  const ownName = key => shown(key.slice("custom.".length));
  const lowest = (rank, key) => { const least = total(rank, key, "least"); return least === null ? "–" : `${number(least)} at ${number(total(rank, key, "leastStep"))}`; };
  const facts = () => [...FACTS, ...customs().slice(0, 32).flatMap(key => [[`last ${ownName(key)}`, rank => number(total(rank, key, "last"))],
    ...(isEvaluation(key) ? [[`lowest ${ownName(key)}`, rank => lowest(rank, key)]] : [])])];
  const ms = value => value === null || value === undefined ? "–" : `${brief(value)} ms`;
  const countOf = (run, test) => number(run.decisions.filter(test).length);

  function listRuns() {
    const ended = lines.some(rank => rank.ended);
    const head = ["run", "ranks", "began", "steps", "took", ended ? "ended" : null, "loss", "mean step", "decisions", "seeds"].filter(Boolean);
    const rows = data.runs.map(run => {
      const rank = run.ranks[0];
      const box = h("input", {type: "checkbox", checked: !run.ranks.length || run.ranks.some(r => r.visible), "aria-label": `Show ${shown(run.title || run.name)}`, onchange: event => { run.ranks.forEach(r => { r.visible = event.target.checked; }); redraw(); }});
      return [h("label", {}, several ? box : null, h("span", {class: "mark"}), name(run.title || run.name)), number(run.ranks.length),
        rank ? new Date(rank.start_ms).toISOString().replace("T", " ").slice(0, 19) + " UTC" : "–", rank ? number(rank.count) : "–", rank ? duration(rank.seconds) : "–",
        ended ? (rank && rank.ended ? name(rank.ended) : "–") : null, rank ? `${brief(total(rank, "loss", "first"))} → ${brief(total(rank, "loss", "last"))}` : "–", rank ? ms(total(rank, "step_latency_ms", "mean")) : "–",
        number(run.decisions.length), rank ? number(Object.keys(rank.seeds).length) : "–"].filter(cell => cell !== null);
    });
    const made = table(head, rows);
    made.querySelectorAll(".mark").forEach((mark, i) => { mark.style.background = several ? COLORS[i % COLORS.length] : COLORS[0]; });
    $("runs").replaceChildren(made);
  }

  function listRanks() {
    if (!data.runs.some(run => run.ranks.length > 1)) return;
    const keys = facts().filter(([, of]) => lines.some(rank => of(rank) !== "–"));
    $("ranks").replaceChildren(h("h2", {id: "h-ranks"}, "Ranks side by side"),
      ...data.runs.filter(run => run.ranks.length > 1).map(run => h("div", {class: "wide"}, several ? h("h3", {}, name(run.name)) : "",
        table(["", ...run.ranks.map(rank => h("label", {}, h("input", {type: "checkbox", checked: rank.visible, onchange: event => { rank.visible = event.target.checked; redraw(); }}), ` rank ${rank.rank}`))],
          keys.map(([label, of]) => [label, ...run.ranks.map(of)])))));
  }

  function listDifferences() {
    const section = $("differences");
    const settings = [...new Set(data.runs.flatMap(run => Object.keys(run.settings)))].sort();
    const of = (run, key) => key in run.settings ? shown(run.settings[key]) : "–";
    // Name, tags and hyper-parameters as people call them; other attributes by their own names.
    const called = key => key.replace(/^esper\.run\.name$/, "name").replace(/^esper\.run\.tag\./, "tag ").replace(/^esper\.config\./, "config ");
    if (!several) {
      if (settings.length) section.replaceChildren(h("h2", {id: "h-differences"}, "Settings"), h("div", {class: "wide"}, table(["setting", "value"], settings.map(key => [name(called(key)), of(data.runs[0], key)]))));
      return;
    }
    const reasons = [...new Set(data.runs.flatMap(run => run.decisions.map(d => d.reason)))].sort();
    const rows = [
      ...settings.map(key => [name(called(key)), ...data.runs.map(run => of(run, key))]),
      ...facts().map(([label, fact]) => [label, ...data.runs.map(run => fact(run.ranks[0]))]),
      ...reasons.map(reason => [h("span", {}, "decisions: ", name(reason)), ...data.runs.map(run => countOf(run, d => d.reason === reason))]),
      ["decisions applied", ...data.runs.map(run => countOf(run, d => d.applied === 1))],
    ];
    const differ = rows.filter(([, ...cells]) => new Set(cells).size > 1);
    section.replaceChildren(h("h2", {id: "h-differences"}, "Differences"),
      h("p", {class: "faint"}, `${differ.length} of ${rows.length} settings, results, decisions and times; those of rank ${data.runs[0].ranks[0] ? data.runs[0].ranks[0].rank : 0} where there are several.`),
      h("div", {class: "wide"}, table(["", ...data.runs.map(run => name(run.title || run.name))], differ)));
  }

  const SVG = "http://www.w3.org/2000/svg";

  // ---- one step ---------------------------------------------------------------------------

  // In the order in which they happen: what the package does around the end of the step before
  // lies at the beginning of a step's latency, and within it what is told of that in parts.
  const BEFORE = ["hook_latency_ms", "instrumentation", "#d55e00"];
  const WITHIN = [["tamiyo_latency_ms", "asking Tamiyo", "#d55e00"], ["kasmina.apply_ms", "apply", "#cc79a7"], ["kasmina.finalize_ms", "finalize", "#8a63d2"]];
  const MOST_APART = 4;  // ranks whose phases have a line each

  function stepAt(x) {  // the step that a place on the axis is about
    if (state.axis === "step") return Math.round(x);
    const rank = ofRun()[0], clock = rank && rank.curves.time_unix_nano;
    return clock ? clock.x[Math.max(before(clock.y, x), 0)] : null;
  }
  function pickStep(step) {
    state.step = step;
    drawStep();
  }

  function partsOf(rank, step) {  // [label, ms, from, color] of each phase of a step
    const value = key => rank.curves[key] ? at(rank.curves[key], step) : null;
    const whole = value("step_latency_ms"), parts = [];
    if (whole === null || Number.isNaN(whole)) return null;
    let from = 0;
    const put = ([key, label, color], inside) => {
      const took = value(key);
      if (!(took > 0)) return;
      parts.push({label, took, from: inside ? 0 : from, color});
      if (!inside) from += took;
    };
    put(BEFORE);
    WITHIN.forEach(one => put(one, true));
    PHASES.slice(0, 4).forEach(one => put(one));
    if (whole - from > whole * 0.005) parts.push({label: "in no phase", took: whole - from, from, color: "#8c959f"});
    return {whole, parts};
  }

  function stepsOf(rank) {  // those of which all phases are known
    const {step, step_latency_ms: whole} = rank.curves;
    const thin = [whole, ...PHASES.map(([key]) => rank.curves[key])].some(curve => curve && curve.thinned);
    // Between points that are left out as repeats the line is right; between thinned ones it is not.
    return thin || !step ? whole.x : step.x.subarray(before(step.x, whole.x[0] - 1) + 1);
  }

  function drawStep() {
    const section = $("step"), some = ofRun().filter(rank => rank.curves.step_latency_ms && rank.curves.step_latency_ms.total);
    section.hidden = !some.length;
    if (!some.length) return;
    const xs = stepsOf(some[0]);
    const place = state.step === null ? xs.length - 1 : Math.max(before(xs, state.step), 0), step = xs[place];
    const found = some.map(rank => {
      const told = before(rank.curves.step_latency_ms.x, step) < 0 || step > rank.last ? null : partsOf(rank, step);
      const clock = rank.curves.time_unix_nano;
      return told && {rank, ...told, end: rank.start_ms + 1000 * (clock ? at(clock, step) : 0)};
    }).filter(Boolean);
    let start = Math.min(...found.map(one => one.end - one.whole)), size = Math.max(...found.map(one => one.end)) - start;
    const longest = Math.max(...found.map(one => one.whole)), apart = !(size <= 4 * longest) || several;
    if (apart) size = longest;  // clocks that differ, or runs: each from its own beginning
    const grid = h("div", {class: "lanes"});
    const line = (label, bars) => {
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("class", "lane"); svg.setAttribute("viewBox", "0 0 1000 10"); svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("role", "img"); svg.setAttribute("aria-label", bars.map(bar => `${bar.label} ${ms(bar.took)}`).join(", "));
      for (const bar of bars) {
        const rect = document.createElementNS(SVG, "rect"), title = document.createElementNS(SVG, "title");
        rect.setAttribute("x", 1000 * bar.from / size); rect.setAttribute("y", 0); rect.setAttribute("height", 10);
        rect.setAttribute("width", Math.max(1000 * bar.took / size, 1.5)); rect.setAttribute("fill", bar.color);
        title.textContent = `${bar.label}: ${ms(bar.took)}, from ${ms(bar.from)} on`;
        rect.append(title); svg.append(rect);
      }
      grid.append(h("span", {}, label), svg);
    };
    for (const {rank, whole, parts, end} of found) {
      const offset = apart ? 0 : end - whole - start, moved = parts.map(part => ({...part, from: part.from + offset}));
      const outer = moved.filter(part => !WITHIN.some(([, label]) => label === part.label));
      line(h("strong", {}, `${rank.label}, ${ms(whole)}`), outer);
      if (found.length <= MOST_APART) for (const part of moved) line(`${part.label} ${ms(part.took)}`, [part]);
    }
    const which = h("input", {type: "number", id: "which", min: xs[0], max: xs[xs.length - 1], value: step, "aria-label": "Step", onchange: event => pickStep(Number(event.target.value))});
    const move = by => pickStep(xs[Math.min(Math.max(place + by, 0), xs.length - 1)]);
    const focused = document.activeElement && section.contains(document.activeElement) ? document.activeElement.dataset.do || document.activeElement.id : null;
    section.replaceChildren(h("h2", {id: "h-step"}, "One step"),
      h("p", {class: "faint"}, h("button", {type: "button", "data-do": "back", onclick: () => move(-1)}, "‹"), " ", which, " ", h("button", {type: "button", "data-do": "on", onclick: () => move(1)}, "›"), " ",
        h("button", {type: "button", "data-do": "newest", onclick: () => pickStep(null)}, "newest"), " ",
        `Where its ${ms(longest)} went; a click on a chart chooses a step. Each phase is drawn in one piece`, apart ? ", each line from its own beginning." : ", ranks by their clocks."), grid);
    const again = focused && [...section.querySelectorAll("button, input")].find(one => (one.dataset.do || one.id) === focused);
    if (again) again.focus({preventScroll: true});
  }

  function drawLanes() {
    const section = $("rules"), all = data.runs.flatMap(run => run.rules.map(row => ({run, row})));
    if (!all.length) { section.hidden = true; return; }
    const lanes = new Map();
    for (const {run, row} of all) {
      const [rank, rule, seed] = row;
      const key = `${several ? shown(run.name) + " · " : ""}${run.ranks.length > 1 ? `rank ${rank} · ` : ""}${shown(rule)}${seed ? ` · ${shown(seed)}` : ""}`;
      if (!lanes.has(key)) lanes.set(key, []);
      lanes.get(key).push({run, row});
    }
    const steps = data.runs.flatMap(run => run.decisions.map(decision => decision.step));
    const range = state.range || everything() || {min: Math.min(...all.map(one => one.row[4]), ...steps.slice(0, 1)), max: Math.max(...all.map(one => (one.row[5] || one.row[4]) + 1), ...steps.slice(-1))};
    const size = range.max - range.min || 1;
    const grid = h("div", {class: "lanes"});
    for (const [label, rows] of [...lanes].slice(0, 120)) {
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("class", "lane"); svg.setAttribute("viewBox", "0 0 1000 10"); svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("role", "img"); svg.setAttribute("aria-label", `${label}: ${rows.length} interval${rows.length === 1 ? "" : "s"}`);
      const drawn = {};  // state → how far it is drawn: what is narrower than a line joins it
      for (const {run, row} of rows) {
        const [rank, , , what, start, end] = row, of = run.ranks.find(one => one.rank === rank) || run.ranks[0];
        const last = end === null ? (of ? of.last : start + 1) : end;
        const [a, b] = state.axis === "step" || !of ? [start, last] : [start, last].map(step => at(of.curves.time_unix_nano, Math.min(step, of.last)));
        if (a === null || b === null || b < range.min || a > range.max) continue;
        const left = 1000 * (Math.max(a, range.min) - range.min) / size, right = Math.max(1000 * (Math.min(b, range.max) - range.min) / size, left + 1.5);
        if (right <= (drawn[what] || -1) + 0.5) continue;
        drawn[what] = right;
        const rect = document.createElementNS(SVG, "rect");
        rect.setAttribute("class", ["pending", "firing", "recovering", "unknown"].includes(what) ? what : "unknown");
        rect.setAttribute("x", left); rect.setAttribute("y", 0); rect.setAttribute("height", 10);
        rect.setAttribute("width", right - left);
        const title = document.createElementNS(SVG, "title");
        title.textContent = `${what} from step ${start} to ${end === null ? "the end" : end}`;
        rect.append(title); svg.append(rect);
      }
      grid.append(h("span", {}, label), svg);
    }
    section.replaceChildren(h("h2", {id: "h-rules"}, "States of rules"), h("p", {class: "faint keys"}, "Over the part that the charts show: ",
      ...["pending", "firing", "recovering", "unknown"].flatMap(word => [h("span", {class: "mark state", "data-state": word}), word, " "])), grid);
    const colors = {pending: "--warning", firing: "--critical", recovering: "--accent", unknown: "--faint"};
    section.querySelectorAll(".state").forEach(mark => { mark.style.background = css(colors[mark.dataset.state]); });
  }

  function listHappenings() {
    const all = data.runs.flatMap(run => run.happenings.map(row => [run, ...row]));
    if (!all.length) return;
    const rows = all.slice(0, 2000).map(([run, step, rank, what, severity, text, seed]) => [step < 0 ? "–" : `step ${number(step)}`, several ? name(run.name) : null, String(rank), name(what.replace(/^esper\./, "")),
      seed ? name(seed) : "", h("span", {class: /^[A-Z]+$/.test(severity) ? severity : null}, name(text))].filter(cell => cell !== null));
    const made = table(["when", several ? "run" : null, "rank", "event", "seed", "details"].filter(Boolean), rows);
    made.querySelectorAll("td").forEach(cell => cell.classList.add("words"));
    $("more").append(h("details", {}, h("summary", {id: "h-more"}, `Events of seeds and weights (${number(all.length)})`), h("div", {class: "tall", tabindex: 0, role: "region", "aria-label": "Table of events"}, made)));
  }

  // ---- the page ---------------------------------------------------------------------------

  function controls() {
    const choice = (value, label) => h("label", {}, h("input", {type: "radio", name: "axis", value, checked: state.axis === value, onchange: () => { state.axis = value; state.range = null; redraw(); }}), ` ${label}`);
    const shownWeight = h("output", {}, "0");
    let due = 0;
    $("controls").append(
      h("fieldset", {}, h("legend", {}, "axis"), choice("step", "steps"), choice("time", "time")),
      h("label", {}, h("input", {type: "checkbox", id: "log", onchange: event => { state.log = event.target.checked; redraw(); }}), " log scale"),
      h("label", {}, "smoothing ", h("input", {type: "range", id: "smoothing", min: 0, max: 0.999, step: 0.001, value: 0, oninput: event => {
        state.smoothing = Number(event.target.value); shownWeight.textContent = event.target.value;
        cancelAnimationFrame(due); due = requestAnimationFrame(() => charts.filter(one => !one.linear).forEach(draw));
      }}), " ", shownWeight),
      h("button", {type: "button", onclick: reset}, "reset zoom"),
      h("span", {class: "faint keys"}, "drag to zoom, shift-drag to pan, double click to reset; on a chart ", h("kbd", {}, "←"), " ", h("kbd", {}, "→"), " read, with ",
        h("kbd", {}, "shift"), " pan, ", h("kbd", {}, "+"), " ", h("kbd", {}, "-"), " ", h("kbd", {}, "0"), " zoom; ", h("kbd", {}, "n"), " ", h("kbd", {}, "p"), " decisions"));
    $("controls").addEventListener("submit", event => event.preventDefault());
  }

  function charted() {
    const measured = (key, dash) => plain(key, {raw: true, points: true, name: ownName(key), dash});
    const DASHES = [[8, 4], [2, 3], [8, 3, 2, 3], [4, 4]];
    const losses = evaluated(/loss/i), accuracies = evaluated(/acc/i).filter(key => !losses.includes(key));
    chart("Loss", `recorded, with its mean ± scatter${losses.length ? ` and evaluations (${losses.map(ownName).join(", ")})` : ""}; triangles are decisions`,
      both(band, plain("loss"), ...losses.map((key, i) => measured(key, DASHES[i % 4]))), {wholly: true, height: 320, marked: true});
    if (has("accuracy") || accuracies.length) chart("Accuracy", accuracies.map(ownName).join(", "), both(plain("accuracy"), ...accuracies.map((key, i) => measured(key, DASHES[i % 4]))), {});
    const others = customs().filter(key => ![...losses, ...accuracies].includes(key)).slice(0, 12);
    for (const key of others) chart(ownName(key), isEvaluation(key) ? "evaluation" : "reported by the script", isEvaluation(key) ? measured(key) : plain(key), {});
    chart("Gradient norm", "before clipping", plain("gradient_norm"), {marked: true});
    chart("Learning rate", "used by the update; right: factor of decisions", both(plain("optimizer_lr", {raw: true, stepped: true}), plain("lr_scale", {raw: true, stepped: true, scale: "right", name: "factor", dash: [3, 3], width: 1})), {marked: true});
    const pick = h("select", {"aria-label": "Whose steps", onchange: () => draw(phases)}, lines.map((rank, i) => h("option", {value: i}, rank.label)));
    const phases = chart("Step time by phase", "ms, on top of each other", stacked(() => lines[Number(pick.value)]), {linear: true, extra: lines.length > 1 ? pick : null});
    chart("Step time", "ms", plain("step_latency_ms"), {});
    if (has("input_wait_ms")) chart("Input wait", "ms a step", plain("input_wait_ms"), {});
    if (has("samples_per_s")) chart("Samples", "per second", plain("samples_per_s"), {});
    if (has("cpu_util_percent") || has("gpu_util_percent"))
      chart("Devices", "% busy", both(plain("cpu_util_percent", {name: "CPU"}), plain("gpu_util_percent", {name: "GPU", width: 2})), {});
    if (has("gpu_mem_used_gb")) chart("Device memory", "GB", both(plain("gpu_mem_used_gb", {name: "used"}), plain("gpu_mem_free_gb", {name: "free", dash: [3, 3]})), {});
    if (seedsHave("kasmina.seed.stage"))
      chart("Seeds: stage", "", ofSeeds("kasmina.seed.stage", {stepped: true, value: (u, v) => v === null || v === undefined ? "–" : data.stages[v] || String(v)}),
        {linear: true, range: [0.5, data.stages.length - 0.5], splits: () => data.stages.map((_, i) => i), ticks: (u, ticks) => ticks.map(v => (data.stages[v] || "").toLowerCase()), height: 300});
    if (seedsHave("kasmina.seed.alpha")) chart("Seeds: alpha", "weight in the host's output", ofSeeds("kasmina.seed.alpha"), {linear: true, height: 300});
    const used = new Set(["step", "time_unix_nano", "loss", "loss_ewma", "loss_volatility", "accuracy", "gradient_norm", "optimizer_lr", "lr_scale", "step_latency_ms", "input_wait_ms",
      "samples_per_s", "cpu_util_percent", "gpu_util_percent", "gpu_mem_used_gb", "gpu_mem_free_gb", ...losses, ...accuracies, ...others]);
    const rest = [...new Set(lines.flatMap(rank => Object.keys(rank.curves)))].filter(key => !used.has(key) && has(key)).map(key => [key, plain(key)]);
    const seeds = [...new Set(lines.flatMap(rank => Object.values(rank.seeds).flatMap(Object.keys)))].filter(key => !["kasmina.seed.stage", "kasmina.seed.alpha"].includes(key)).map(key => [key, ofSeeds(key)]);
    if (!rest.length && !seeds.length) return;
    const grid = h("div", {id: "rest"});
    let drawn = false;
    $("more").append(h("details", {id: "all-metrics", ontoggle: event => {
      if (!event.target.open || drawn) return;
      drawn = true;
      for (const [key, make] of [...rest, ...seeds]) draw(chart(shown(key), unit(key), make, {into: grid, height: 180}));
    }}, h("summary", {}, `All other metrics (${rest.length + seeds.length})`), grid));
  }

  function listHead() {
    const names = data.runs.map(run => shown(run.title || run.name));
    $("title").textContent = names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
    if (LIVE) document.title = `${$("title").textContent} · Tamiyo`;
    const thin = lines.some(rank => Object.values(rank.curves).some(curve => curve.thinned));
    $("made").textContent = `esper-otel ${data.release}` + (LIVE ? "" : `, made ${data.made.replace("T", " ").replace("+00:00", " UTC")}`)
      + (thin ? "; long curves are thinned: each part of them keeps its least and its greatest value" : "");
    $("problems").replaceChildren(...(data.problems.length ? [h("ul", {}, data.problems.map(text => h("li", {}, shown(text))))] : []));
  }

  let chartedKeys = "";
  const keysNow = () => [...new Set(lines.flatMap(rank => [...Object.keys(rank.curves), ...Object.values(rank.seeds).flatMap(Object.keys)]))].sort().join(" ");
  function listCharts() {
    chartedKeys = keysNow();
    const more = $("all-metrics"), open = Boolean(more && more.open);
    for (const one of charts.splice(0)) if (one.plot) one.plot.destroy();
    for (const id of ["charts", "more"]) $(id).replaceChildren();
    charted();
    listHappenings();
    if (!lines.length) $("charts").append(h("p", {class: "faint"}, LIVE ? "No curves yet." : "No curves: these files hold decisions alone."));
    if (open && $("all-metrics")) $("all-metrics").open = true;
  }

  listHead();
  listRuns();
  controls();
  gather();
  listDecisions();
  listRanks();
  listDifferences();
  listCharts();
  redraw();

  // ---- live -------------------------------------------------------------------------------

  const EVERY_MS = 1000, MOST_NEW = 400000;  // points beyond which all is loaded again, thinned
  let version = data.version, fresh = 0;

  function joinArrays(old, more, joins) {  // of arrays that several curves share one is made
    let known = joins.get(old);
    if (!known) joins.set(old, known = new Map());
    if (!known.has(more)) {
      const made = new Float64Array(old.length + more.length);
      made.set(old); made.set(more, old.length);
      known.set(more, made);
    }
    return known.get(more);
  }

  function join(curve, news, joins) {
    const x = news.x, y = news.y;
    if (x.length && (!curve.x.length || x[0] > curve.x[curve.x.length - 1])) {
      curve.x = joinArrays(curve.x, x, joins);
      curve.y = joinArrays(curve.y, y, joins);
    } else if (x.length) {  // it overlaps: the later value of a step holds
      const all = new Map();
      curve.x.forEach((step, i) => all.set(step, curve.y[i]));
      x.forEach((step, i) => all.set(step, y[i]));
      const steps = [...all.keys()].sort((a, b) => a - b);
      curve.x = Float64Array.from(steps);
      curve.y = Float64Array.from(steps, step => all.get(step));
    }
    curve.values = `${curve.values} ${news.values}`;  // alike where both parts are
    curve.total = news.total || curve.total;
    curve.thinned = curve.thinned || news.thinned;
    fresh += x.length;
  }

  function take(update) {  // puts what is new into data; whether a rank or a metric is
    const joins = new Map();
    update.runs.forEach((came, place) => {
      const run = data.runs[data.ids.indexOf(update.ids[place])];
      if (!run) return;
      run.name = came.name;
      for (const rank of came.ranks) {
        const known = run.ranks.find(one => one.rank === rank.rank);
        if (!known) {
          run.ranks.push(rank);
          run.ranks.sort((a, b) => a.rank - b.rank);
          addRank(run, rank, update);
          continue;
        }
        const names = Object.keys(rank.seeds), pairs = [[known.curves, rank.curves], ...names.map(seed => [known.seeds[seed] = known.seeds[seed] || {}, rank.seeds[seed]])];
        for (const [mine, theirs] of pairs)
          for (const [key, curve] of Object.entries(theirs)) {
            withArrays(curve, update);
            if (mine[key]) join(mine[key], curve, joins); else mine[key] = curve;
          }
        if (rank.count) Object.assign(known, {count: rank.count, first: rank.first, last: rank.last, start_ms: rank.start_ms, seconds: rank.seconds});
        known.ended = rank.ended;
      }
      came.decisions.forEach((numbers, index) => {
        const decision = decisionOf(run, came, numbers, index);
        const known = run.decisions.find(one => one.step === decision.step && one.rank === decision.rank && one.update === decision.update);
        if (known) Object.assign(known, decision); else run.decisions.push(decision);
      });
      if (came.decisions.length) run.decisions.sort((a, b) => a.step - b.step || a.rank - b.rank);
      if (update.told.includes(update.ids[place])) run.rules = came.rules;
    });
    version = update.version;
    Object.assign(data.metrics, update.metrics);
    label();
    return update.runs.some(run => run.decisions.length);
  }

  function follows() {  // the newest steps, where somebody asked for so many
    const all = state.tail && state.axis === "step" ? everything() : null;
    if (all) follow(Math.max(all.min, all.max - state.tail), all.max, null);
  }

  function refresh(decided) {
    listed = null;
    const calm = id => !$(id).contains(document.activeElement);  // nobody is choosing there
    for (const [id, list] of [["runs", listRuns], ["ranks", listRanks], ["differences", listDifferences]]) if (calm(id)) list();
    listHead();
    if (decided) {
      const old = state.chosen && state.chosen.after;
      gather();
      listDecisions(listedAll);
      if (state.chosen && state.chosen.after !== old) choose(state.chosen, true);
    }
    if (chartedKeys !== keysNow()) { listCharts(); redraw(); return; }
    waiting = [];
    for (const one of charts) {
      const box = one.figure.getBoundingClientRect();
      one.old = one.figure.hidden || box.bottom < 0 || box.top > innerHeight;  // when it is seen
      if (!one.old) renew(one);
    }
    if (!state.tail) drawLanes();
    if (state.step === null) drawStep();
    follows();
    document.documentElement.dataset.version = version;
  }

  function live() {
    const tail = h("select", {id: "tail", "aria-label": "Steps shown", onchange: event => {
      state.tail = Number(event.target.value);
      if (state.tail) follows(); else reset();
    }}, [[0, "all steps"], [1000, "newest 1,000"], [100, "newest 100"]].map(([value, text]) => h("option", {value}, text)));
    $("controls").prepend(h("a", {href: "/"}, "All runs"), tail);
    addEventListener("scroll", () => { for (const one of charts) if (one.old) {
      const box = one.figure.getBoundingClientRect();
      if (box.bottom >= 0 && box.top <= innerHeight) { one.old = false; renew(one); }
    } }, {passive: true});
    $("live").hidden = false;
    let failures = 0;
    const say = text => { if ($("live").textContent !== text) $("live").textContent = text; };
    const look = async () => {
      try {
        if (!document.hidden) {
          const update = fresh > MOST_NEW ? (() => { throw new Gone(); })() : await ask(`news?since=${version}`);
          if (update) refresh(take(update));
          failures = 0;
          say(lines.length && lines.every(rank => rank.ended) ? "The run has ended." : "Live: the newest steps come by themselves.");
        }
      } catch (error) {
        if (error instanceof Gone) await again().catch(() => { failures += 1; });
        else {
          failures += 1;
          say(`No answer from the sidecar (${shown(error.message)}): what is shown is not news.`);
        }
      }
      setTimeout(look, EVERY_MS * Math.min(2 ** failures, 10));
    };
    // Everything anew: too much has come, or the sidecar's page has.
    const again = async () => {
      const chosen = state.chosen && idOf(state.chosen), hidden = new Set(lines.filter(rank => !rank.visible).map(rank => rank.label));
      const came = await ask("data");
      if (came.ids.join() !== data.ids.join()) { location.reload(); return; }
      data = came;
      fresh = 0;
      version = data.version;
      state.chosen = null;
      addRuns();
      for (const rank of lines) if (hidden.has(rank.label)) rank.visible = false;
      gather();
      listDecisions(listedAll);
      listHead(); listRuns(); listRanks(); listDifferences(); listCharts(); redraw();
      const same = chosen && decisionsShown().find(decision => idOf(decision) === chosen);
      if (same) choose(same, true); else if (chosen) choose(null);
    };
    setTimeout(look, EVERY_MS);
  }
  if (LIVE) live();

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "n") next(1);
    else if (event.key === "p") next(-1);
    else if (event.key === "Escape" && state.chosen) choose(null);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const paper = document.documentElement.classList;
  addEventListener("beforeprint", () => { paper.add("paper"); redraw(); drawAll(); });
  addEventListener("afterprint", () => { paper.remove("paper"); redraw(); });
  let resized = 0;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(fit, 120); });
  globalThis.esperReport = {get data() { return data; }, charts, state, choose, zoom, pan, reset};
  performance.mark("drawn");
  document.documentElement.dataset.ready = "yes";
})();

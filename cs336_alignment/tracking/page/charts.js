// Curves: one chart a panel, or, with several runs, one chart a metric with a curve for each run.
const GROUPS = { learning: "Learning", responses: "Responses to held-out prompts", speed: "Speed and memory", more: "More" };
const SMOOTH_FROM = 50;  // points; fewer are read best raw
const NOISY_FROM = 200;  // points; more are smoothed at first
const charts = [];
let smoothing = runs.some(run => Object.entries(run.curves).some(([name, { x, of }]) => !name.startsWith("eval/") && (of ?? x.length) >= NOISY_FROM)) ? .8 : 0, logScale = false, zoom = null;

function specifications() {
  const found = [];
  for (const panel of data.panels) {
    const metrics = Object.entries(panel.metrics);
    const line = (run, metric, label, color) => ({ curve: runs[run].curves[metric], facts: runs[run].metrics[metric], label, color, kind: panel.kind, dense: !metric.startsWith("eval/") });
    const part = (title, lines) => found.push({ ...panel, title, lines: lines.filter(one => one.curve) });
    if (!several) part(panel.title, metrics.map(([metric, label], i) => line(0, metric, label, i)));
    else for (const [metric, label] of metrics) {
      part(metrics.length > 1 ? `${panel.title}: ${label}` : panel.title, runs.map((run, i) => line(i, metric, labelOf(run), i)));
    }
  }
  return found;
}

function smoothed(curve) {
  // Exponential mean without the bias of its start; a thinned curve's means stand for many points each.
  const xs = curve.mx ?? curve.x, ys = curve.my ?? curve.y;
  const keep = smoothing ** (curve.mx ? curve.of / curve.mx.length : 1);
  let mean = 0, weight = 0;
  return [xs, ys.map(y => {
    if (y === null) return null;
    mean = keep * mean + (1 - keep) * y;
    weight = keep * weight + 1 - keep;
    return mean / weight;
  })];
}

const isSmoothed = line => smoothing > 0 && line.kind !== "rate" && line.dense && (line.curve.of ?? line.curve.x.length) >= SMOOTH_FROM;

const span = (() => {  // all charts have the same steps from left to right
  const ends = runs.flatMap(run => Object.values(run.curves).flatMap(({ x }) => [x[0], x.at(-1)]));
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  return low < high ? [low, high] : [low - 1, high + 1];
})();

function nearest(u, series, index) {
  // The point of a series that is next to the cursor: curves have their points at different steps.
  const values = u.data[series], xs = u.data[0];
  if (index === null || values[index] != null) return index;
  let left = index, right = index;
  while (left >= 0 && values[left] == null) left--;
  while (right < values.length && values[right] == null) right++;
  if (left < 0) return right < values.length ? right : index;
  if (right >= values.length) return left;
  return xs[index] - xs[left] <= xs[right] - xs[index] ? left : right;
}

function yRange(chart) {
  return (u, low, high) => {
    if (low === null || low === undefined) return [0, 1];
    if (useLog(chart)) return uPlot.rangeLog(low, high, 10, false);
    if (chart.kind === "share") return [Math.min(0, low) - .02, Math.max(1, high) + .02];
    if (chart.group === "speed" || chart.kind === "rate") return [0, high > 0 ? 1.12 * high : 1];
    return uPlot.rangeNum(low, high, { min: { pad: .08, soft: 0, mode: 3 }, max: { pad: .08 } });
  };
}

const useLog = chart => logScale && chart.kind !== "share" && chart.lines.every(line => line.facts.least && line.facts.least[1] > 0);

function build(chart) {
  const tables = [], series = [{}], colors = chart.lines.map(line => resolved(colorOf(line.color)));
  const ink = resolved("var(--muted)"), grid = resolved("var(--grid)"), card = resolved("var(--card)");
  chart.lines.forEach((line, i) => {
    const smooth = isSmoothed(line), few = line.curve.x.length <= 120;
    tables.push([line.curve.x, line.curve.y]);
    series.push({
      stroke: colors[i], width: smooth ? 1 : 1.8, alpha: smooth ? .28 : 1, show: !chart.hidden.has(i),
      points: few && !smooth ? { show: true, size: 5, fill: colors[i], width: 0 } : { show: false },
    });
    if (!smooth) return;
    tables.push(smoothed(line.curve));
    series.push({ smooth: true, stroke: colors[i], width: 2, show: !chart.hidden.has(i), points: { show: false } });
  });
  chart.places = [];  // the series that speaks for each line
  let next = 1;
  for (const line of chart.lines) { chart.places.push(isSmoothed(line) ? [next, next + 1] : [next]); next += isSmoothed(line) ? 2 : 1; }
  const font = "12px " + getComputedStyle(document.body).fontFamily;
  const line = { stroke: ink, font, ticks: { show: false }, border: { show: false }, grid: { stroke: grid, width: 1 } };
  const tick = chart.kind === "share" ? n => fixed(100 * n, 0) + " %" : chart.kind === "rate" ? n => n === 0 ? "0" : Number(n.toPrecision(3)).toExponential()
    : chart.kind === "seconds" ? n => n >= 60 ? duration(n) : n + " s" : n => Math.abs(n) >= 1e4 ? compact(n).replace(".0 ", " ") : n.toLocaleString("en", { maximumSignificantDigits: 6 });
  chart.plot?.destroy();
  chart.plot = new uPlot({
    width: Math.max(120, chart.host.clientWidth), height: chart.host.clientHeight, padding: [10, 22, 0, 0], legend: { show: false }, series,
    scales: { x: { time: false, range: () => zoom ?? span }, y: { distr: useLog(chart) ? 3 : 1, range: yRange(chart) } },
    axes: [
      { ...line, size: 28, gap: 6, label: "step", labelSize: 15, labelGap: -2, labelFont: font.replace("12px", "11px"), space: 70, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 2500, 5e3, 1e4, 2e4, 25e3, 5e4, 1e5, 2e5, 25e4, 5e5, 1e6, 2e6, 5e6, 1e7], values: (u, all) => all.map(n => n >= 1e4 ? compact(n).replace(".0 ", " ") : whole(n)), grid: { show: false } },
      { ...line, gap: 6, space: 34, values: (u, all) => all.map(n => n === null ? "" : tick(n)), size: (u, all) => 14 + Math.max(18, ...(all ?? []).map(text => 6.9 * text.length)) },
    ],
    cursor: {
      y: false, drag: { x: true, y: false, dist: 6, setScale: false }, dataIdx: nearest,
      sync: { key: "steps", setSeries: false, scales: ["x", null], filters: { pub: type => !["mousedown", "mouseup", "dblclick"].includes(type) } },
      points: { size: 9, width: 2, stroke: (u, i) => u.series[i].smooth ? "transparent" : card, fill: (u, i) => u.series[i].smooth ? "transparent" : u.series[i].stroke(u, i) },
    },
    hooks: { setCursor: [u => say(chart, u.cursor.idx)], setSelect: [zoomInto] },
  }, uPlot.join(tables), chart.host);
  say(chart, null);
}

function say(chart, index) {
  // The values under the cursor, or the last ones.
  const u = chart.plot;
  if (!u) return;
  const at = index === null || index === undefined ? null : u.data[0][index];
  chart.lines.forEach((line, i) => {
    const place = chart.places[i][0];
    const found = index === null || index === undefined ? null : nearest(u, place, index);
    const [step, value] = found === null ? line.facts.last ?? [null, null] : [u.data[0][found], u.data[place][found]];
    chart.values[i].textContent = format(chart.kind, value);
    chart.steps[i].textContent = found !== null && step !== at ? `at ${whole(step)}` : "";
  });
  chart.now.textContent = at === null ? "" : `step ${whole(at)}`;
}

function zoomInto(u) {
  const { left, width } = u.select;
  if (width < 6) return;
  zoom = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  applyZoom();
}

function applyZoom() {
  const [min, max] = zoom ?? span;
  for (const { plot } of charts) plot?.setScale("x", { min, max });
  $("unzoom").hidden = !zoom;
}

function rebuild() {
  for (const chart of charts) if (chart.plot) build(chart);
}

function describe(chart) {
  return chart.lines.map(({ label, facts }) => facts.last
    ? `${label}: ${format(chart.kind, facts.first[1])} at step ${whole(facts.first[0])}, ${format(chart.kind, facts.last[1])} at step ${whole(facts.last[0])}`
    : `${label}: no finite value`).join("; ");
}

function notes(chart) {
  const thinned = chart.lines.filter(line => line.curve.of), found = [];
  if (thinned.length) {
    const most = Math.max(...thinned.map(line => line.curve.of));
    found.push(`${whole(most)} points, drawn as the least and the greatest of each of ${whole(thinned[0].curve.mx.length)} stretches; metrics.jsonl has them all.`);
  }
  const odd = chart.lines.reduce((sum, line) => sum + line.facts.not_finite, 0);
  if (odd) found.push(`${plural(odd, "value")} not finite: a gap.`);
  return found.join(" ");
}

function chartCard(spec) {
  const chart = { ...spec, hidden: new Set(), values: [], steps: [], now: make("span", "note"), plot: null };
  const legend = make("div", "legend");
  chart.lines.forEach((line, i) => {
    const swatch = make("i", "swatch"), value = make("span", "value"), step = make("span", chart.lines.some(other => other.curve.x.length > line.curve.x.length) ? "at sparse" : "at");
    swatch.style.setProperty("--c", colorOf(line.color));
    const entry = button(swatch, "", () => toggle(chart, i, entry));
    entry.append(make("span", "label", line.label), value, step);
    entry.setAttribute("aria-pressed", "true");
    entry.title = `${line.label}: show or hide`;
    chart.values.push(value);
    chart.steps.push(step);
    legend.append(entry);
    value.textContent = format(chart.kind, line.facts.last?.[1]);
  });
  chart.host = make("div", "plot");
  chart.host.tabIndex = 0;
  chart.host.setAttribute("role", "img");
  chart.host.setAttribute("aria-label", `${spec.title}. ${describe(chart)}`);
  chart.host.addEventListener("keydown", event => move(chart, event));
  chart.host.addEventListener("blur", () => chart.plot?.setCursor({ left: -10, top: -10 }));
  const note = notes(chart), title = make("h4", "", spec.title);
  chart.card = make("figure", "card" + (spec.name === "loss" && !several ? " wide" : ""),
    make("figcaption", "", title, make("span", "note", spec.unit), chart.now), legend, chart.host, note ? make("p", "note", note) : null);
  return chart;
}

function toggle(chart, i, entry) {
  const show = chart.hidden.delete(i);
  if (!show) chart.hidden.add(i);
  entry.setAttribute("aria-pressed", String(show));
  for (const place of chart.places?.[i] ?? []) chart.plot.setSeries(place, { show });
}

function move(chart, event) {
  const u = chart.plot, last = u ? u.data[0].length - 1 : 0;
  const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
  if (!u || (jump === undefined && event.key !== "Escape")) return;
  event.preventDefault();
  if (event.key === "Escape") { zoom = null; applyZoom(); return; }
  const at = Math.max(0, Math.min(last, (u.cursor.idx ?? (jump > 0 ? -1 : last + 1)) + jump));
  u.setCursor({ left: u.valToPos(u.data[0][at], "x"), top: u.bbox.height / devicePixelRatio / 2 });
  $("live").textContent = `step ${whole(u.data[0][at])}: ` + chart.lines.map((line, i) => `${line.label} ${chart.values[i].textContent} ${chart.steps[i].textContent}`).join(", ");
}

function showCharts() {
  const specs = specifications();
  if (!specs.length) {
    $("charts").append(empty(runs.some(run => run.last_step !== null) ? "No metric has a number." : "Nothing was logged yet: there are no curves to show."));
    $("curves-hint").hidden = true;
    return;
  }
  const seen = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) {
      seen.unobserve(target);
      build(charts.find(chart => chart.card === target));
    }
  }, { rootMargin: "400px 0px" });
  const sizes = new ResizeObserver(entries => {
    for (const { target } of entries) {
      const chart = charts.find(one => one.host === target);
      if (chart.plot && target.clientWidth > 60) chart.plot.setSize({ width: target.clientWidth, height: target.clientHeight });
    }
  });
  for (const [group, title] of Object.entries(GROUPS)) {
    const grid = make("div", "grid");
    for (const spec of specs) if (spec.group === group) {
      const chart = chartCard(spec);
      charts.push(chart);
      grid.append(chart.card);
      chart.host.addEventListener("dblclick", () => { zoom = null; applyZoom(); });
    }
    if (grid.children.length) $("charts").append(make("div", "group", make("h3", "", title), grid));
  }
  for (const chart of charts) { seen.observe(chart.card); sizes.observe(chart.host); }
}

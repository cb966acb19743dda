// The head of the page, the tools of its bar, themes and printing.
const STATES = { completed: "Completed", running: "Running", preempted: "Stopped, resumable", failed: "Failed" };
const SILENT_SECONDS = 900;

const stateOf = ({ status }) => make("span", "state " + (STATES[status.state] ? status.state : ""), STATES[status.state] ?? "State unknown");
const reachedBy = run => Math.max(run.status.step ?? 0, run.last_step ?? 0);
const progressOf = run => run.total_steps ? `${whole(reachedBy(run))} of ${whole(run.total_steps)}` : whole(reachedBy(run));

function showHead() {
  if (several) { showRuns(); return; }
  const [run] = runs, tiles = make("dl", "tiles");
  $("head").append(make("div", "title", make("h1", "", run.name), stateOf(run)), facts(run));
  if (run.total_steps && run.status.state !== "completed") {
    const bar = make("div", "progress"), fill = make("i");
    fill.style.width = `${Math.min(100, 100 * reachedBy(run) / run.total_steps)}%`;
    bar.append(fill);
    $("head").append(bar);
  }
  for (const tile of run.tiles) tiles.append(make("div", "tile card", make("dt", "", tile.label), make("dd", "", format(tile.kind, tile.value)), before(tile, "dd")));
  $("head").append(...alerts(run));
  if (run.tiles.length) $("head").append(tiles);
}

function before(tile, tag) {
  if (!tile || tile.before === undefined) return null;
  const node = make(tag, "from", `from ${format(tile.kind, tile.before)}`);
  node.title = `step ${whole(tile.steps[0])} and step ${whole(tile.steps[1])}`;
  return node;
}

function showRuns() {
  const labels = [...new Set(runs.flatMap(run => run.tiles.map(tile => tile.label)))];
  const rows = runs.map((run, i) => {
    const cells = labels.map(label => {
      const tile = run.tiles.find(one => one.label === label);
      return make("td", "", tile ? format(tile.kind, tile.value) : "–", before(tile, "span"));
    });
    const row = tableRow("", [make("td", "", stateOf(run)), progressOf(run), ...cells]);
    row.firstChild.append(dotOf(i), labelOf(run));
    return row;
  });
  $("head").append(make("h1", "", `${plural(runs.length, "run")} side by side`), make("div", "card overview", table("Runs", "", ["run", "state", "step", ...labels], rows)));
  for (const run of runs) $("head").append(...alerts(run));
}

function facts(run) {
  const config = run.config, node = make("div", "facts"), add = (label, value) => value && node.append(make("span", "", label + " ", make("b", "", value)));
  add("model", config["model.name_or_path"]);
  add("data", config["data.sources"]?.length ? config["data.sources"].map(one => one.path).join(", ") : config["data.train_path"]);
  add("step", progressOf(run));
  add("parameters", run.manifest.trainable_parameters ? compact(run.manifest.trainable_parameters) : "");
  add("processes", run.manifest.num_processes > 1 ? String(run.manifest.num_processes) : "");
  add("last written", run.last_line ? when(run.last_line) : "");
  add("export", run.manifest.best?.step ? `step ${whole(run.manifest.best.step)}, the best ${run.manifest.best.metric}` : "");
  add("reload check", run.status.reload_check);
  return node;
}

function alerts(run) {
  const found = [], { state, error, exit_code: code, resume_command: command } = run.status, name = several ? labelOf(run) + ": " : "";
  const resume = () => {
    const text = make("code", "", command), copy = button("Copy", "tool", () => copyText(text, copy));
    return make("div", "command", text, copy);
  };
  const silent = run.last_line ? data.made - run.last_line : 0, gone = state === "running" && silent > SILENT_SECONDS;
  if (state === "failed" || state === "preempted" || gone) {
    const title = gone ? `running, but nothing was written for ${duration(silent)}: it may have been killed` : `${STATES[state]}${code === null || code === undefined ? "" : `, exit status ${code}`}`;
    found.push(make("div", "alert " + (state === "failed" ? "bad" : "odd"), make("h3", "", name + title), error ? make("pre", "", error) : null, command ? resume() : null));
  } else if (state === "running") {
    found.push(make("div", "alert calm", make("p", "", `${name}training went on when this page was made; cs336-sft report makes a newer one.`)));
  }
  if (run.troubles.length) found.push(make("div", "alert odd", ...run.troubles.map(text => make("p", "", name + text))));
  return found;
}

async function copyText(node, copy) {
  try { await navigator.clipboard.writeText(node.textContent); copy.textContent = "Copied"; } catch { getSelection().selectAllChildren(node); copy.textContent = "Selected"; }
}

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const remembered = { get() { try { return localStorage.getItem("cs336-theme"); } catch { return null; } }, set(value) { try { localStorage.setItem("cs336-theme", value); } catch { /* a page from a file may have no storage */ } } };
let theme = THEMES[remembered.get()] ? remembered.get() : "auto";

function applyTheme(name, save = true) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  if (!save) { rebuild(); return; }
  theme = name;
  $("theme").textContent = `Theme: ${THEMES[name]}`;
  remembered.set(name);
  rebuild();
}

function print() {
  // Paper is light, and holds all charts, not only those that were seen.
  applyTheme("light", false);
  for (const chart of charts) if (!chart.plot) build(chart);
  for (const chart of charts) chart.plot.setSize({ width: 310, height: 190 });
}

function unprint() {
  applyTheme(theme, false);
}

function watchSections() {
  const links = [...document.querySelectorAll("#bar nav a")];
  const mark = () => {
    let current = links[0];
    for (const link of links) if (document.querySelector(link.hash).getBoundingClientRect().top < 140) current = link;
    for (const link of links) link === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  };
  document.addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });
  mark();
}

showHead();
showCharts();
showGenerations();
showMetrics();
showLedger();
showConfig();
showManifest();
$("foot").textContent = `Made ${when(data.made)} from the files of ${runs.map(run => run.folder).join(", ")}. The page loads nothing.`;
function showSmoothing() {
  $("smooth").value = smoothing;
  $("smooth-value").textContent = smoothing ? fixed(smoothing, 2) : "off";
}
showSmoothing();
$("smooth").addEventListener("input", () => { smoothing = Number($("smooth").value); showSmoothing(); rebuild(); });
$("log").addEventListener("click", () => { logScale = !logScale; $("log").setAttribute("aria-pressed", String(logScale)); rebuild(); });
$("unzoom").addEventListener("click", () => { zoom = null; applyZoom(); });
$("theme").addEventListener("click", () => { const names = Object.keys(THEMES); applyTheme(names[(names.indexOf(theme) + 1) % names.length]); });
applyTheme(theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
addEventListener("beforeprint", print);
addEventListener("afterprint", unprint);
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", $("bar").offsetHeight + "px")).observe($("bar"));
watchSections();

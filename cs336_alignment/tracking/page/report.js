// The head of the page, the tools of its bar, themes and printing.
const STATES = { completed: "Completed", running: "Running", preempted: "Stopped, resumable", failed: "Failed" };
const SILENT_MINUTES = 15;

function showHead() {
  runs.forEach((run, i) => {
    const state = run.status.state ?? "unknown", config = run.config, block = make("div", "run");
    const name = make(several ? "h2" : "h1", "", several ? dotOf(i) : null, several ? " " + labelOf(run) : run.name);
    block.append(make("div", "title", name, make("span", "state " + (STATES[state] ? state : ""), STATES[state] ?? "State unknown")), facts(run, config));
    const done = run.status.step ?? 0, reached = Math.max(done, run.last_step ?? 0);
    if (run.total_steps && state !== "completed") {
      const bar = make("div", "progress"), fill = make("i");
      fill.style.width = `${Math.min(100, 100 * reached / run.total_steps)}%`;
      bar.append(fill);
      block.append(bar);
    }
    block.append(...alerts(run, state));
    const tiles = make("dl", "tiles");
    for (const tile of run.tiles) {
      const before = tile.before === undefined ? null : make("dd", "from", `from ${format(tile.kind, tile.before)}`);
      if (before) before.title = `step ${whole(tile.steps[0])} and step ${whole(tile.steps[1])}`;
      const node = make("div", "tile card", make("dt", "", tile.label), make("dd", "", format(tile.kind, tile.value)), before);
      tiles.append(node);
    }
    if (run.tiles.length) block.append(tiles);
    $("head").append(block);
  });
  if (several) $("head").prepend(make("h1", "", `${plural(runs.length, "run")} side by side`));
}

function facts(run, config) {
  const node = make("div", "facts"), add = (label, value) => value && node.append(make("span", "", label + " ", make("b", "", value)));
  const reached = Math.max(run.status.step ?? 0, run.last_step ?? 0);
  add("model", config["model.name_or_path"]);
  add("data", config["data.sources"]?.length ? config["data.sources"].map(one => one.path).join(", ") : config["data.train_path"]);
  add("step", run.total_steps ? `${whole(reached)} of ${whole(run.total_steps)}` : whole(reached));
  add("parameters", run.manifest.trainable_parameters ? compact(run.manifest.trainable_parameters) : "");
  add("processes", run.manifest.num_processes > 1 ? String(run.manifest.num_processes) : "");
  add("last line", run.last_line ? when(run.last_line) : "");
  add("export", run.manifest.best?.step ? `step ${whole(run.manifest.best.step)}, the best ${run.manifest.best.metric}` : "");
  add("reload check", run.status.reload_check);
  return node;
}

function alerts(run, state) {
  const found = [], { error, exit_code: code, resume_command: command } = run.status;
  if (state === "failed" || state === "preempted") {
    const node = make("div", "alert " + (state === "failed" ? "bad" : "odd"));
    node.append(make("h3", "", `${STATES[state]}${code === null || code === undefined ? "" : `: exit status ${code}`}`));
    if (error) node.append(make("pre", "", error));
    if (command) {
      const text = make("code", "", command), copy = button("Copy", "tool", () => copyText(text, copy));
      node.append(make("div", "command", text, copy));
    }
    found.push(node);
  }
  const silent = run.last_line ? (data.made - run.last_line) / 60 : 0;
  const notes = [...run.troubles];
  if (state === "running") notes.push(silent > SILENT_MINUTES
    ? `The last line is ${duration(60 * silent)} older than this page: the run may have been killed. Its command goes on: ${command ?? ""}`
    : "The run went on when this page was made; cs336-sft report makes a newer one.");
  if (notes.length) found.push(make("div", "alert odd", ...notes.map(text => make("p", "", text))));
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
$("smooth").addEventListener("input", () => {
  smoothing = Number($("smooth").value);
  $("smooth-value").textContent = smoothing ? fixed(smoothing, 2) : "off";
  rebuild();
});
$("log").addEventListener("click", () => { logScale = !logScale; $("log").setAttribute("aria-pressed", String(logScale)); rebuild(); });
$("unzoom").addEventListener("click", () => { zoom = null; applyZoom(); });
$("theme").addEventListener("click", () => { const names = Object.keys(THEMES); applyTheme(names[(names.indexOf(theme) + 1) % names.length]); });
applyTheme(theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
addEventListener("beforeprint", print);
addEventListener("afterprint", unprint);
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", $("bar").offsetHeight + "px")).observe($("bar"));
watchSections();

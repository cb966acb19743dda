// Tables: metrics, the data ledger, config and manifest; with several runs a column each.
const runHeads = () => runs.map((run, i) => [dotOf(i), labelOf(run)]);
const shown = value => value === undefined ? "–" : value === null ? "null" : typeof value === "string" ? value : JSON.stringify(value);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function kindOf(metric) {
  for (const panel of data.panels) if (panel.metrics[metric]) return panel.kind;
  return metric === "perf/run_seconds" ? "duration" : "number";
}

function point(kind, at) {
  const cell = make("td", "", at ? format(kind, at[1]) : "–");
  if (at) cell.append(make("span", "at", `at ${whole(at[0])}`));
  return cell;
}

function showMetrics() {
  const names = [...new Set(runs.flatMap(run => Object.keys(run.metrics)))].sort();
  const place = $("metrics-table");
  if (!names.length) { place.append(empty("No metric yet.")); return; }
  const rows = names.map(name => {
    const kind = kindOf(name);
    if (several) return tableRow(name, runs.map(run => point(kind, run.metrics[name]?.last)));
    const facts = runs[0].metrics[name];
    const odd = facts.not_finite ? `${whole(facts.count)}, ${whole(facts.not_finite)} not finite` : whole(facts.count);
    return tableRow(name, [point(kind, facts.first), point(kind, facts.last), point(kind, facts.least), point(kind, facts.greatest), format(kind, facts.median), odd]);
  });
  const head = several ? ["last value of", ...runHeads()] : ["metric", "first", "last", "least", "greatest", "median", "points"];
  place.append(make("div", "card", table("Metrics", "", head, rows)));
}

const LEDGER = [["rows_read", "rows read"], ["bad_rows", "bad rows"], ["kept", "kept"], ["truncated", "truncated"], ["split", "split"], ["pieces", "pieces of these"]];

function showLedger() {
  const place = $("ledger-tables");
  place.className = "tables";
  runs.forEach((run, i) => {
    for (const [split, total] of Object.entries(run.ledger)) place.append(ledgerCard(run, i, split, total));
  });
  if (!place.children.length) place.append(empty("No data ledger: the run has not read its data yet."));
}

function ledgerCard(run, index, split, total) {
  const sources = total.sources?.length > 1 ? [...total.sources, { ...total, source: "all" }] : total.sources?.length ? total.sources : [total];
  const reasons = [...new Set(sources.flatMap(one => Object.keys(one.dropped ?? {})))];
  const counts = LEDGER.filter(([key]) => ["rows_read", "kept"].includes(key) || sources.some(one => one[key]));
  const findings = [...new Set(sources.flatMap(one => Object.keys(one.findings?.counts ?? {})))];
  const head = ["source", ...counts.map(([, label]) => label), ...reasons.map(reason => "dropped: " + reason.replaceAll("_", " ")),
    "tokens", "trained tokens", "median length", "longest", "end with a stop token", ...findings.map(name => "found: " + name.replaceAll("_", " "))];
  const number = n => n === undefined || n === null ? "–" : whole(n);
  const rows = sources.map(one => tableRow(one.source, [
    ...counts.map(([key]) => number(one[key])), ...reasons.map(reason => number(one.dropped?.[reason] ?? 0)),
    number(one.tokens), `${number(one.response_tokens)} (${format("share", one.tokens ? one.response_tokens / one.tokens : null)})`,
    number(one.lengths?.percentiles?.["50"]), number(one.longest), format("share", one.kept ? one.ends_with_stop / one.kept : null),
    ...findings.map(name => number(one.findings?.counts?.[name] ?? 0)),
  ]));
  const title = make("h3", "", several ? dotOf(index) : null, (several ? labelOf(run) + ": " : "") + (split === "train" ? "Training data" : split === "eval" ? "Held-out data" : split));
  const block = make("div", "card block", title, make("p", "note", total.format ?? ""));
  const bars = total.lengths?.histogram;
  if (bars) {
    const most = Math.max(...bars.counts), graph = make("div", "bars");
    graph.setAttribute("role", "img");
    graph.setAttribute("aria-label", `Lengths of the examples, from ${bars.edges[0]} to ${bars.edges.at(-1)} tokens`);
    bars.counts.forEach((count, i) => {
      const bar = make("i");
      bar.style.height = `${count ? Math.max(3, 100 * count / most) : 0}%`;
      bar.title = `${bars.edges[i]} to ${bars.edges[i + 1]} tokens: ${plural(count, "example")}`;
      graph.append(bar);
    });
    block.append(graph, make("div", "ends", make("span", "", `${whole(bars.edges[0])} tokens`), make("span", "", "length of an example, prompt and response"), make("span", "", `${whole(bars.edges.at(-1))} tokens`)));
  }
  block.append(table(`Rows of the ${split} data`, "", head, rows));
  if (total.bad_places?.length) block.append(make("p", "note", `bad rows: ${total.bad_places.join(", ")}`));
  return block;
}

function showConfig() {
  const place = $("config-table"), keys = [...new Set(runs.flatMap(run => Object.keys(run.config)))];
  if (!keys.length) { place.append(empty("No config: the run failed before it was written.")); return; }
  const search = make("input"), only = make("input"), status = make("span", "count"), body = make("div", "card");
  search.type = "search";
  search.placeholder = "Search keys and values";
  search.setAttribute("aria-label", "Search the config");
  only.type = "checkbox";
  only.checked = several;
  status.setAttribute("role", "status");
  const known = key => Object.hasOwn(data.defaults, key);
  const changed = key => several ? runs.some(run => !same(run.config[key], runs[0].config[key])) : !known(key) || !same(runs[0].config[key], data.defaults[key]);
  const refreshTable = () => {
    const words = search.value.toLowerCase();
    const rows = keys.filter(key => (!only.checked || changed(key))
      && (!words || [key, ...runs.map(run => shown(run.config[key]))].some(text => text.toLowerCase().includes(words)))).map(key => {
      const cells = runs.map((run, i) => make("td", several && i && !same(run.config[key], runs[0].config[key]) ? "other" : "", shown(run.config[key])));
      return tableRow(key, [...cells, make("td", "muted", known(key) ? shown(data.defaults[key]) : "must be given")], changed(key) ? "differs" : "");
    });
    const nothing = several && only.checked && !words ? "The runs have the same config." : "No key fits.";
    body.replaceChildren(rows.length ? table("Config", "left", ["key", ...(several ? runHeads() : ["value"]), "default"], rows) : make("p", "empty", nothing));
    status.textContent = `${whole(rows.length)} of ${plural(keys.length, "key")}; ${whole(keys.filter(changed).length)} ${several ? "differ between the runs" : "differ from the defaults"}`;
  };
  search.addEventListener("input", refreshTable);
  only.addEventListener("change", refreshTable);
  place.append(make("div", "filters", search, make("label", "tool", only, several ? "only what differs between the runs" : "only what differs from the defaults"), status), body);
  refreshTable();
}

function flat(value, prefix = "") {
  return Object.entries(value).flatMap(([key, inner]) => inner && typeof inner === "object" && !Array.isArray(inner) && Object.keys(inner).length
    ? flat(inner, `${prefix}${key}.`) : [[prefix + key, inner]]);
}

function showManifest() {
  const flats = runs.map(run => new Map(flat(run.manifest))), keys = [...new Set(flats.flatMap(one => [...one.keys()]))];
  if (!keys.length) { $("manifest-table").append(empty("No manifest: the run has not begun to train.")); return; }
  const rows = keys.map(key => {
    const values = flats.map(one => one.get(key)), differs = values.some(value => !same(value, values[0]));
    return tableRow(key, values.map((value, i) => make("td", i && !same(value, values[0]) ? "other" : "", shown(value))), differs ? "differs" : "");
  });
  $("manifest-table").append(make("div", "card", table("Versions and hashes", "left", ["", ...(several ? runHeads() : ["value"])], rows)));
}

// Responses: a card a prompt, with a column for each run, or for two evaluations of one run.
const VERDICTS = { correct: "correct", wrong: "wrong", "no-format": "no format" };
const PAGE = 20;
let responses = [];  // of each run: the rows as objects
let columns = [], query = null, cards = [], drawn = 0;

function readResponses(run) {
  const { fields, rows, prompts, evaluations, prefix } = run.generations;
  return rows.map(values => {
    const row = Object.fromEntries(fields.map((name, i) => [name, values[i]]));
    const [rest, cutPrompt, truth] = prompts[row.prompt];
    row.step = evaluations[row.evaluation].step;
    Object.assign(row, { prefix, rest, cutPrompt, truth, key: JSON.stringify([prefix + rest, truth, row.sample]) });
    row.verdict = row.answer_reward > 0 ? "correct" : row.format_reward > 0 ? "wrong" : "no-format";
    row.ending = row.stopped === "length" ? "cut" : "stopped";
    return row;
  });
}

function showGenerations() {
  responses = runs.map(readResponses);
  const place = $("generations"), there = runs.map((run, i) => i).filter(i => responses[i].length);
  if (!there.length) {
    place.append(empty(`No generations in ${several ? "these runs" : "this run"}: evaluation.generation_steps=0 makes some at start and end.`));
    return;
  }
  columns = there.map(run => ({ run, step: String(runs[run].generations.evaluations.at(-1).step), verdict: "", ending: "" }));
  place.append(make("div", "filters"), make("div", "", make("p", "note"), make("p", "note printed")), make("div", "cards"));
  const more = button("Show more", "tool more", () => draw());
  place.append(more);
  new IntersectionObserver(entries => { if (entries[0].isIntersecting) draw(); }, { rootMargin: "600px 0px" }).observe(more);
  showFilters();
  refresh();
}

function showFilters() {
  const bar = document.querySelector("#generations .filters");
  const search = make("input");
  search.type = "search";
  search.id = "search";
  search.placeholder = "Search prompts, responses and answers";
  search.setAttribute("aria-label", search.placeholder);
  search.value = query?.words ?? "";
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { query = searchFor(search.value); if (query) query.words = search.value; refresh(); }, 120); });
  bar.replaceChildren(search, ...columns.map(columnTools));
  if (columns.length === 1 && runs[columns[0].run].generations.evaluations.length > 1) {
    bar.append(button("Compare with another step", "tool", () => {
      const [column] = columns, first = runs[column.run].generations.evaluations[0].step;
      columns = [{ ...column, step: String(first), verdict: "" }, { ...column, step: column.step === "all" ? String(runs[column.run].generations.evaluations.at(-1).step) : column.step }];
      showFilters();
      refresh();
    }));
  } else if (!several && columns.length === 2) {
    bar.append(button("One step", "tool", () => { columns = [columns[1]]; showFilters(); refresh(); }));
  }
  bar.append(make("span", "count"));
  bar.lastChild.setAttribute("role", "status");
  $("search").addEventListener("keydown", event => event.key === "Escape" && event.target.blur());
}

function columnTools(column, i) {
  const { evaluations } = runs[column.run].generations, alone = columns.length === 1;
  const name = several ? labelOf(runs[column.run]) : alone ? "" : i ? "after" : "before";
  const steps = evaluations.map(({ step }) => [String(step), `step ${whole(step)}`]).reverse();
  const change = field => value => { column[field] = value; refresh(); };
  const title = several ? make("b", "", dotOf(column.run), name) : name ? make("b", "", name) : null;
  const of = name ? ` of ${name}` : "";
  const tools = make("div", "column-tools", title,
    select("Step" + of, alone && steps.length > 1 ? [...steps, ["all", "every step"]] : steps, column.step, change("step")),
    select("Verdict" + of, [["", "any verdict"], ...Object.entries(VERDICTS)], column.verdict, change("verdict")),
    select("Ending" + of, [["", "any ending"], ["stopped", "stopped"], ["cut", "truncated"]], column.ending, change("ending")));
  tools.setAttribute("role", "group");
  tools.setAttribute("aria-label", name || "Filter");
  return tools;
}

const fits = (row, column) => (!column.verdict || row.verdict === column.verdict) && (!column.ending || row.ending === column.ending);
const holds = row => !query || [row.rest, row.response, row.truth].some(text => text.search(query) >= 0);

function refresh() {
  const parts = columns.map(column => responses[column.run].filter(row => column.step === "all" || String(row.step) === column.step));
  let total;
  if (columns.length === 1) {
    total = parts[0].length;
    cards = parts[0].filter(row => fits(row, columns[0]) && holds(row)).map(row => [row]);
  } else {
    const byKey = new Map();
    parts.forEach((rows, i) => rows.forEach(row => {
      if (!byKey.has(row.key)) byKey.set(row.key, Array(columns.length).fill(null));
      byKey.get(row.key)[i] = row;
    }));
    // What all columns answered comes first.
    const all = [...byKey.values()].sort((a, b) => b.filter(Boolean).length - a.filter(Boolean).length);
    total = all.length;
    cards = all.filter(rows => rows.every((row, i) => row ? fits(row, columns[i]) : !columns[i].verdict && !columns[i].ending) && rows.some(row => row && holds(row)));
  }
  document.querySelector("#generations .count").textContent = `${whole(cards.length)} of ${plural(total, columns.length === 1 ? "response" : "prompt")}`;
  document.querySelector("#generations .note").replaceChildren(...shownOf());
  const place = document.querySelector("#generations .cards");
  place.replaceChildren(...(cards.length ? [] : [empty("No response fits.")]));
  drawn = 0;
  draw();
}

function shownOf() {
  // How many of how many: nothing is left out silently.
  const lines = [];
  for (const run of new Set(columns.map(column => column.run))) {
    const { evaluations, left_out: leftOut } = runs[run].generations, name = several ? labelOf(runs[run]) + ": " : "";
    const chosen = columns.filter(column => column.run === run).map(column => column.step);
    const parts = [];
    for (const one of evaluations) {
      if (!chosen.includes(String(one.step)) && !chosen.includes("all")) continue;
      if (one.shown < one.of) parts.push(`step ${whole(one.step)}: the first ${whole(one.shown)} of ${whole(one.of)} are on this page, all are in ${one.file}`);
      if (one.unreadable) parts.push(`${plural(one.unreadable, "line")} of ${one.file} cannot be read`);
    }
    if (leftOut) parts.push(`${whole(evaluations.length)} of ${plural(evaluations.length + leftOut, "evaluation")} are on this page, evenly spaced; all are in generations/`);
    if (parts.length) lines.push(make("span", "", name + parts.slice(0, 6).join("; ") + (parts.length > 6 ? `; and ${parts.length - 6} more` : "") + ". "));
  }
  return lines;
}

function draw() {
  const place = document.querySelector("#generations .cards");
  place.append(...cards.slice(drawn, drawn + PAGE).map(card));
  drawn = Math.min(cards.length, drawn + PAGE);
  document.querySelector("#generations .printed").textContent = `${whole(drawn)} of ${plural(cards.length, "response")} are printed.`;
  document.querySelector("#generations .more").hidden = drawn >= cards.length;
}

function cutNote(count) {
  return count ? make("span", "sign", ` … ${plural(count, "character")} more in the file`) : null;
}

function card(rows) {
  const first = rows.find(Boolean), question = make("div", "text");
  if (first.prefix) {
    const fold = make("details", "", make("summary", "", `template, ${whole(first.prefix.length)} characters … `)), inner = make("span");
    write(inner, first.prefix);
    fold.append(inner);
    question.append(fold);
  }
  write(question, first.rest, query);
  question.append(...[cutNote(first.cutPrompt)].filter(Boolean));
  const truth = make("div", "truth");
  write(truth, first.truth, query);
  const number = first.sample ? `Prompt ${whole(first.index + 1)}, sample ${whole(first.sample + 1)}` : `Prompt ${whole(first.index + 1)}`;
  const ask = make("div", "ask", make("div", "", make("h4", "", number), question), make("div", "", make("h4", "", "Truth"), truth));
  return make("article", "card sample", ask, make("div", "answers", ...rows.map(answer)));
}

function answer(row, i) {
  const node = make("div", "answer"), column = columns[i];
  const line = make("div", "line");
  if (several) line.append(make("b", "", dotOf(column.run), labelOf(runs[column.run])));
  if (!row) {
    node.append(line, make("p", "muted", "not on this page"));
    return node;
  }
  line.append(make("span", `badge ${row.verdict}`, VERDICTS[row.verdict]));
  if (row.ending === "cut") line.append(make("span", "badge cut", "truncated"));
  else if (row.stopped) line.append(make("span", "", row.stopped === "eos" ? "ended by EOS" : "ended by a stop string"));
  line.append(make("span", "", `step ${whole(row.step)}`));
  if (row.length !== null) line.append(make("span", "", plural(row.length, "token")));
  if (row.token_entropy !== null) line.append(make("span", "", `entropy ${format("number", row.token_entropy)}`));
  const rewards = ["reward", "format_reward", "answer_reward"].map(name => short(row[name]));
  line.append(make("span", "", `reward ${rewards[0]} (format ${rewards[1]}, answer ${rewards[2]})`));
  if (row.error) {
    const failed = make("span", "", "the reward failed, which counts as 0: ");
    write(failed, row.error);
    line.append(failed);
  }
  const text = make("div", "text");
  if (row.response) write(text, row.response, query);
  else text.append(make("span", "sign", "an empty response"));
  if (row.response.length > 1000) text.tabIndex = 0;  // it may scroll
  text.append(...[cutNote(row.cut)].filter(Boolean));
  node.append(line, text);
  return node;
}

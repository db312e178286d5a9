// Two to six checkpoints side by side: what differs in how they were made, every figure, what is kept of each layer.

const MARKS = { better: "▲ better", worse: "▼ worse", noise: "≈ noise", same: "= same" };
const signed = value => (value === null ? "?" : `${value > 0 ? "+" : ""}${value}`);

function drawComparison() {
  const { picked } = state;
  const full = picked.length === MOST_COMPARED ? "; six are the most" : "";
  document.getElementById("chosen").textContent = picked.length > 1 ? `${picked.length} checkpoints are compared${full}` :
    picked.length ? `${checkpoints.name[picked[0]]} is ticked: tick another one` :
      "Tick two to six checkpoints in the table, or click them in the chart.";
  const parts = picked.length > 1 ? [metricsTable(), untested(), optionsTable(), plansTable()] : [];
  document.getElementById("comparison").replaceChildren(...parts.filter(Boolean).flat());
}

/** Its name; with that of its run where two have one name. */
function fullName(place) {
  const { picked } = state;
  const alike = picked.some(each => each !== place && checkpoints.name[each] === checkpoints.name[place]);
  return alike ? `${checkpoints.spec[place]}: ${checkpoints.name[place]}` : checkpoints.name[place];
}

function heads(corner, withControls = false) {
  return element("thead", {}, element("tr", {}, element("th", { scope: "col" }, corner), state.picked.map(place =>
    element("th", { scope: "col" }, fullName(place), withControls && controls(place)))));
}

function controls(place) {
  const radio = element("input", { type: "radio", name: "reference", checked: state.reference === place,
    onchange: () => { state.reference = place; drawComparison(); document.querySelector("input[name=reference]:checked").focus(); } });
  return [
    element("span", { className: "links quiet" }, checkpoints.spec[place]),
    linksOf(place),
    element("span", { className: "links" }, element("label", {}, radio, " reference")),
    element("button", { type: "button", onclick: () => { pick(place); document.getElementById("compare").focus(); },
      "aria-label": `Leave ${checkpoints.name[place]} out` }, "Leave out"),
  ];
}

function optionsTable() {
  const texts = Object.entries(ways.options).map(([path, coded]) =>
    [path, state.picked.map(place => (coded.codes[place] < 0 ? "" : coded.words[coded.codes[place]]))]);
  const given = texts.filter(([, values]) => values.some(Boolean));
  const differing = given.filter(([, values]) => new Set(values).size > 1);
  const same = given.filter(([, values]) => new Set(values).size === 1);
  const lines = rows => element("tbody", {}, rows.map(([path, values]) => {
    const differs = new Set(values).size > 1;
    const usual = values[state.picked.indexOf(state.reference)];
    return element("tr", { className: differs ? "differs" : "" }, element("th", { scope: "row" }, path),
      values.map(value => element("td", { className: `long${differs && value !== usual ? " other" : ""}` }, value || "–")));
  }));
  const caption = differing.length ? "Options that differ; marked: not as in the reference" : "No option differs";
  return [
    element("h3", {}, "What was asked for"),
    scrollBox("Options that differ", element("table", { id: "options" }, element("caption", {}, caption), heads("option"), lines(differing)), true),
    same.length && element("details", {}, element("summary", {}, `${same.length} options are the same`),
      scrollBox("Options that are the same", element("table", {}, element("caption", {}, "Options that are the same"), heads("option"), lines(same)), true)),
  ].filter(Boolean);
}

function metricsTable() {
  const columns = data.columns.map((column, index) => [column, index]);
  const rows = [...columns.filter(([column]) => column.board), ...columns.filter(([column]) => !column.board)]
    .filter(([column]) => state.picked.some(place => column.values[place] !== null))
    .map(([column, index]) => element("tr", {}, element("th", { scope: "row", title: column.name }, column.heading,
      column.better && element("span", { className: "links quiet" }, `${column.better === "high" ? "higher" : "lower"} is better`)),
    state.picked.map(place => metricCell(column, index, place))));
  const caption = `Figures; verdicts against ${fullName(state.reference)} on the same items, at level ${data.alpha} after Holm's correction. ` +
    "The pointer over a figure shows all its digits.";
  return [
    element("h3", {}, "What it is worth"),
    scrollBox("Figures side by side", element("table", { id: "metrics" }, element("caption", {}, caption), heads("figure", true), element("tbody", {}, rows))),
  ];
}

function metricCell(column, index, place) {
  const value = column.values[place];
  if (value === null) return element("td", { className: "number quiet" }, "–");
  const parts = [column.texts[place]];
  const known = place === state.reference ? undefined : verdictsBeside(place, state.reference)?.figures.get(index);
  if (known) {
    const flips = known.lost === null ? "" : `; lost ${known.lost}, gained ${known.gained}`;
    parts.push(element("span", { className: "verdict" }, element("span", { className: known.verdict }, MARKS[known.verdict]), ` ${signed(known.difference)}`));
    parts.push(element("span", { className: "verdict" }, `[${signed(known.low)}, ${signed(known.high)}], p ${known.p}`));
    parts.push(element("span", { className: "verdict" }, `${known.items} items${flips}`));
  }
  return element("td", { className: "number", title: String(value) }, parts);
}

/** A sentence for each two that no test was made of, with the command that makes it. */
function untested() {
  const reference = state.reference;
  const name = place => `${data.runs.key[checkpoints.run[place]]}:${checkpoints.name[place]}`;
  const quoted = text => (/^[\w.:+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const lines = state.picked.filter(place => place !== reference).flatMap(place => {
    const known = verdictsBeside(place, reference);
    if (known) return known.problems.map(problem => element("li", {}, problem));
    const command = `slimline compare ${quoted(name(place))} ${quoted(name(reference))}`;
    return [element("li", {}, `${fullName(place)} and ${fullName(reference)} were not tested against each other here: `, element("code", {}, command))];
  });
  return lines.length ? element("ul", { id: "untested" }, lines) : null;
}

function plansTable() {
  if (!data.plans) return null;
  const plans = state.picked.map(place => data.plans[place]);
  if (!plans.some(Boolean)) return null;
  const layers = Math.max(...plans.filter(Boolean).map(plan => Math.max(plan[0].length, plan[2].length)));
  const cell = (kept, total) => {
    if (kept === null || kept === undefined) return element("td", { className: "number quiet" }, "–");
    const text = kept === 0 ? "none" : `${kept} / ${total}`;
    return element("td", { className: "number bar", style: `--share: ${(100 * kept) / total}%` }, text);
  };
  const rows = Array.from({ length: layers }, (_, layer) => element("tr", {}, element("th", { scope: "row" }, String(layer)),
    plans.flatMap(plan => (plan ? [cell(plan[0][layer], plan[1][layer]), cell(plan[2][layer], plan[3][layer])] :
      [element("td", { className: "number quiet" }, "all"), element("td", { className: "number quiet" }, "all")]))));
  const head = element("thead", {},
    element("tr", {}, element("th", { scope: "col", rowspan: "2" }, "layer"), state.picked.map(place =>
      element("th", { scope: "colgroup", colspan: "2" }, fullName(place)))),
    element("tr", {}, state.picked.map(() => [element("th", { scope: "col", className: "number" }, "heads"),
      element("th", { scope: "col", className: "number" }, "channels")])));
  const caption = "Heads and FFN channels kept in each layer, of how many; kv heads where whole groups of heads go";
  return [
    element("h3", {}, "What is kept"),
    scrollBox("Heads and channels kept per layer", element("table", { id: "plans" }, element("caption", {}, caption), head, element("tbody", {}, rows)), true),
  ];
}

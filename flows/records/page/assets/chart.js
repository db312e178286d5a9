// The chart of any two figures, with the checkpoints that no other beats in both; and the same as a table.

// Okabe and Ito's colours, which the colour-blind can tell apart; markers differ as well
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A7A7A"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagon"];
const MOST_IN_SVG = 2000;
const axes = { x: null, y: null, logX: null, logY: null };

/** Plotly reads some tags in texts. */
const plotText = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** A colour that depends on the theme, as the browser paints it. */
function painted(name) {
  const probe = element("span", { style: `color: var(${name})` });
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

const isFinitePair = place => Number.isFinite(axes.x.values[place] ?? NaN) && Number.isFinite(axes.y.values[place] ?? NaN);

function buildAxes() {
  const usable = data.columns.filter(column => column.values.some(value => value !== null && Number.isFinite(value)));
  const form = document.getElementById("axes");
  if (usable.length < 2) {
    document.getElementById("plot").replaceWith(element("p", { className: "quiet" }, "A chart needs two figures that were measured."));
    return false;
  }
  const known = column => column.values.filter(value => value !== null).length;
  const sizes = usable.filter(column => column.name === "size/num_parameters" || column.name === "sparsity_asked");
  axes.x = sizes.sort((one, other) => known(other) - known(one) || (one.better ? -1 : 1))[0] ?? usable[0];
  axes.y = usable.find(column => /\/ppl@/.test(column.name)) ?? usable.find(column => column !== axes.x && column.better) ?? usable[1];
  const select = axis => element("select", { id: `axis-${axis}`, onchange: event => {
    axes[axis] = usable[Number(event.target.value)];
    suggestLog();
    drawChart();
  } }, usable.map((column, index) => element("option", { value: String(index), selected: axes[axis] === column }, column.heading)));
  const log = axis => element("input", { type: "checkbox", id: `log-${axis}`, onchange: drawChart });
  form.append(element("label", {}, "Across", select("x")), element("label", { className: "beside" }, log("x"), "logarithmic"),
    element("label", {}, "Up", select("y")), element("label", { className: "beside" }, log("y"), "logarithmic"));
  form.addEventListener("submit", event => event.preventDefault());
  suggestLog();
  return true;
}

/** Logarithmic where the values span more than a factor of twenty. */
function suggestLog() {
  for (const axis of ["x", "y"]) {
    const values = axes[axis].values.filter(value => value !== null && Number.isFinite(value));
    const least = values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    document.getElementById(`log-${axis}`).checked = least > 0 && most > 20 * least;
  }
}

/** Costs that differ by less, relative to one of them, are the same, as in the view `pareto`. */
const SAME_COST = 0.005;

/** Those that no other beats in both; a figure of which nobody knows what is better counts as a cost. */
function frontOf(places) {
  const cost = (column, place) => (column.better === "high" || isShare(column) ? -1 : 1) * column.values[place];
  const ordered = [...places].sort((a, b) => cost(axes.x, a) - cost(axes.x, b) || cost(axes.y, a) - cost(axes.y, b));
  const front = [];
  let best = Infinity;
  for (const place of ordered) {
    const mine = cost(axes.y, place);
    const twin = front.length && mine === best && cost(axes.x, place) === cost(axes.x, front[front.length - 1]);
    if (mine < best || twin) {
      front.push(place);
      best = mine;
    }
  }
  const beats = (other, place) => cost(axes.y, other) < cost(axes.y, place)
    && cost(axes.x, other) <= cost(axes.x, place) + SAME_COST * Math.abs(cost(axes.x, place));
  return front.filter(place => !front.some(other => beats(other, place)));
}

/** What was removed: more of it is smaller. */
const isShare = column => column.name === "sparsity_asked" || column.name === "sparsity";

function hover(place) {
  const lines = [checkpoints.name[place], checkpoints.spec[place], checkpoints.model[place]].map(plotText);
  lines[0] = `<b>${lines[0]}</b>`;
  for (const column of [axes.x, axes.y]) lines.push(plotText(`${column.heading}: ${column.texts[place]} (${column.values[place]})`));
  return lines.join("<br>");
}

function trace(name, places, index, type, mode = "markers") {
  return {
    type, mode, name: plotText(name), x: places.map(place => axes.x.values[place]), y: places.map(place => axes.y.values[place]),
    customdata: places, text: places.map(hover), hovertemplate: "%{text}<extra></extra>",
    marker: { size: 10, color: COLOURS[index % COLOURS.length], symbol: SYMBOLS[index % SYMBOLS.length] },
  };
}

/** What the chart tells apart by colour and marker. */
const kindOf = place => [checkpoints.method[place] || "dense", checkpoints.recovery[place]].filter(Boolean).join(" + ");
const kinds = [...new Set(checkpoints.key.map((_, place) => kindOf(place)))];

function traces(places, front) {
  const type = places.length > MOST_IN_SVG ? "scattergl" : "scatter";
  const groups = new Map(kinds.map(kind => [kind, []]));
  for (const place of places) groups.get(kindOf(place)).push(place);
  const made = [...groups].filter(([, group]) => group.length).map(([kind, group]) => trace(kind, group, kinds.indexOf(kind), type));
  const line = trace("no other is better in both", front, 0, type, "lines");
  made.push({ ...line, hoverinfo: "skip", hovertemplate: undefined, line: { dash: "dot", width: 2, color: painted("--text") } });
  const picked = state.picked.filter(isFinitePair);
  if (picked.length) {
    made.push({ ...trace("ticked", picked, 0, type), hoverinfo: "skip", hovertemplate: undefined,
      marker: { size: 18, symbol: "circle-open", color: painted("--text"), line: { width: 2 } } });
  }
  return made;
}

function chartLayout(x, y) {
  const axis = (title, log) => ({ title: { text: plotText(title), standoff: 12 }, type: log ? "log" : "linear", automargin: true,
    gridcolor: painted("--grid"), zerolinecolor: painted("--line"), linecolor: painted("--line"), exponentformat: "SI" });
  return {
    xaxis: axis(...x), yaxis: axis(...y), paper_bgcolor: painted("--page"), plot_bgcolor: painted("--page"),
    font: { color: painted("--text"), family: "system-ui, sans-serif", size: 13 }, margin: { t: 20, r: 15, b: 60, l: 60 },
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0 }, hoverlabel: { align: "left" }, hovermode: "closest",
    clickmode: "event", autosize: true,
  };
}

const PLOT_OPTIONS = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const directed = column => {
  const better = column.better === "high" ? "higher is better" : column.better === "low" ? "lower is better" : "";
  return better ? `${column.heading} (${better})` : column.heading;
};

function drawChart() {
  const places = state.shown.filter(isFinitePair);
  const front = frontOf(places);
  const plot = document.getElementById("plot");
  const log = axis => document.getElementById(`log-${axis}`).checked;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `Chart of ${axes.y.heading} over ${axes.x.heading}; the table below has its front`);
  const drawn = traces(places, front);
  const layout = chartLayout([directed(axes.x), log("x")], [directed(axes.y), log("y")]);
  if (window.innerWidth < 640) {
    // on a phone the legend stands below, a line for each kind
    layout.legend = { orientation: "h", yanchor: "top", y: -0.2, x: 0 };
    layout.height = 430 + 20 * drawn.length;
  }
  Plotly.react(plot, drawn, layout, PLOT_OPTIONS);
  if (!plot.dataset.listens) {
    plot.dataset.listens = "yes";
    plot.on("plotly_click", event => {
      const place = event.points[0]?.customdata;
      if (Number.isInteger(place)) pick(place);
    });
  }
  drawFront(front, state.shown.length - places.length);
}

/** The chart for those who cannot see it. */
function drawFront(front, missing) {
  const rows = front.map(place => element("tr", {}, element("th", { scope: "row" }, checkpoints.name[place]),
    element("td", { className: "long" }, checkpoints.spec[place]),
    [axes.x, axes.y].map(column => element("td", { className: "number", title: String(column.values[place]) }, column.texts[place]))));
  const head = element("tr", {}, element("th", { scope: "col" }, "checkpoint"), element("th", { scope: "col" }, "run"),
    [axes.x, axes.y].map(column => element("th", { scope: "col", className: "number" }, column.heading)));
  const table = element("table", {}, element("caption", {}, "The front of the chart: no other checkpoint is better in both figures"),
    element("thead", {}, head), element("tbody", {}, rows.slice(0, 100)));
  const note = missing ? `${missing} of the checkpoints have no finite value of both and are not drawn. ` : "";
  document.getElementById("front").replaceChildren(
    element("p", { className: "quiet" }, `${note}A click on a point ticks its checkpoint; figures of different protocols have columns of their own.`),
    scrollBox("Front of the chart", table));
}

// What changed in a night, and one figure night after night.

function drawNight() {
  const { night } = data;
  if (!night) return;
  const holder = document.getElementById("changes");
  if (night.changes.length) {
    const heads = ["", "cell", "checkpoint", "figure", "before", "now", "p", "gate"];
    const table = element("table", {}, element("caption", {}, `Figures that changed: ${night.changes.length}`),
      element("thead", {}, element("tr", {}, heads.map(head => element("th", { scope: "col" }, head || "verdict")))),
      element("tbody", {}, night.changes.map(([verdict, ...cells]) => element("tr", {},
        element("td", { className: verdict }, MARKS[verdict] ?? verdict),
        cells.map((cell, index) => element("td", { className: index > 2 ? "number" : "long" }, cell || "–"))))));
    holder.append(scrollBox("Figures that changed", table, night.changes.length > 15));
  }
  if (night.figures.length && night.nights.length > 1) buildHistory();
}

function buildHistory() {
  const { night } = data;
  const changed = new Set(night.changes.map(change => change.slice(1, 4).join(" · ")));
  const notDense = figure => figure.split(" · ")[1] !== "dense";
  const first = Math.max(0, night.figures.findIndex(changed.size ? figure => changed.has(figure) : notDense));
  const select = element("select", { id: "history-figure", onchange: drawHistory },
    night.figures.map((figure, index) => element("option", { value: String(index), selected: index === first }, figure)));
  document.getElementById("history").append(element("h3", {}, "History"),
    element("form", { onsubmit: event => event.preventDefault() }, element("label", {}, "Figure, night after night", select)),
    element("div", { id: "history-plot", className: "history-plot" }), element("div", { id: "history-table" }));
}

function drawHistory() {
  const { night } = data;
  const select = document.getElementById("history-figure");
  if (!select) return;
  const points = night.points.filter(point => point[0] === Number(select.value)).sort((a, b) => a[1] - b[1]);
  const when = points.map(point => night.nights[point[1]][1].replace(" UTC", ""));
  const values = points.map(point => number(point[2]));
  const worse = points.map(point => point[4] === "worse");
  const plot = document.getElementById("history-plot");
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `Chart of ${night.figures[Number(select.value)]} over the nights; the table below has its points`);
  const marker = { size: worse.map(each => (each ? 14 : 9)), symbol: worse.map(each => (each ? "x" : "circle")),
    color: worse.map(each => (each ? painted("--bad") : COLOURS[0])) };
  const text = points.map(point => plotText(`${night.nights[point[1]][0]}: ${point[3]}, ${point[4]}`));
  Plotly.react(plot, [{ type: "scatter", mode: "lines+markers", x: when, y: values, text, hovertemplate: "%{text}<extra></extra>",
    marker, line: { color: COLOURS[0] }, showlegend: false }],
  { ...chartLayout(["night (UTC)", false], [night.figures[Number(select.value)].split(" · ").at(-1), false]), xaxis: {
    ...chartLayout(["night (UTC)", false], ["", false]).xaxis, type: "date" } }, PLOT_OPTIONS);
  const rows = points.map(point => element("tr", {}, element("th", { scope: "row" }, night.nights[point[1]][1]),
    element("td", { className: "long" }, night.nights[point[1]][0]), element("td", { className: "number" }, point[3]),
    element("td", { className: point[4] }, MARKS[point[4]] ?? point[4])));
  document.getElementById("history-table").replaceChildren(scrollBox("History of the figure", element("table", {},
    element("caption", {}, "The same as a table; a cross in the chart: worse than the good night before"),
    element("thead", {}, element("tr", {}, ["night", "id", "value", "verdict"].map(head => element("th", { scope: "col" }, head)))),
    element("tbody", {}, rows)), points.length > 15));
}

// Puts the page together, and draws anew what is slow only when the reader has stopped typing.

let waiting = null;
let hasChart = false;

function drawSlow() {
  if (hasChart) drawChart();
  drawLineage();
}

function drawLater() {
  clearTimeout(waiting);
  waiting = setTimeout(drawSlow, 150);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function drawTheme() {
  document.getElementById("theme").setAttribute("aria-pressed", String(isDark()));
  if (hasChart) drawChart();
  drawHistory();
}

/** What the reader chose last time; some browsers keep nothing for files. */
function remembered(theme) {
  try {
    if (theme) localStorage.setItem("slimline-theme", theme);
    return localStorage.getItem("slimline-theme");
  } catch {
    return null;
  }
}

function buildTheme() {
  const known = remembered();
  if (known === "dark" || known === "light") document.documentElement.dataset.theme = known;
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    remembered(document.documentElement.dataset.theme);
    drawTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTheme);
}

buildTheme();
buildFilters();
drawHead();
drawBoard();
drawComparison();
drawNight();
// the table can be used while the chart is drawn
setTimeout(() => {
  hasChart = buildAxes();
  drawSlow();
  drawTheme();
  document.documentElement.dataset.ready = "yes";
}, 0);

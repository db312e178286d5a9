// The table of checkpoints: filters, sorting, pages, and which are ticked.

const ROWS_PER_PAGE = 50;
const board = boardColumns();
const haystacks = checkpoints.key.map((key, place) => [
  checkpoints.name[place], checkpoints.spec[place], checkpoints.model[place], checkpoints.method[place],
  checkpoints.recovery[place], checkpoints.variant[place], key, data.runs.key[checkpoints.run[place]],
].join("\n").toLowerCase());
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const filters = [
  { label: "Model", texts: checkpoints.model, none: "" },
  { label: "Method", texts: checkpoints.method, none: "none (dense)" },
  { label: "Sparsity", texts: sparsity, none: "none" },
  { label: "Recovery", texts: checkpoints.recovery, none: "none" },
];

/** Choices that tell checkpoints apart; one that all share is none. */
function buildFilters() {
  const form = document.getElementById("filters");
  for (const filter of filters) {
    const values = [...new Set(filter.texts)].sort(collator.compare);
    if (values.length < 2) continue;
    filter.select = element("select", { onchange: applyFilters }, element("option", { value: "all" }, "all"),
      values.map((value, index) => element("option", { value: String(index) }, value || filter.none)));
    filter.values = values;
    document.getElementById("choices").append(element("label", {}, filter.label, filter.select));
  }
  document.getElementById("search").addEventListener("input", applyFilters);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(applyFilters));
}

function applyFilters() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = filters.filter(filter => filter.select && filter.select.value !== "all")
    .map(filter => [filter.texts, filter.values[Number(filter.select.value)]]);
  state.shown = [];
  for (let place = 0; place < size; place += 1) {
    if (wanted.every(([texts, value]) => texts[place] === value) && words.every(word => haystacks[place].includes(word))) {
      state.shown.push(place);
    }
  }
  sortShown();
  state.page = 0;
  drawBoard();
  drawLater();
}

/** By the chosen column; what has no value comes last in both directions, NaN just before it. */
function sortShown() {
  const { column, descending } = state.sort;
  if (column === null) return;
  const { values, texts } = board[column];
  const sign = descending ? -1 : 1;
  const rank = value => (value === null ? 2 : Number.isNaN(value) ? 1 : 0);
  state.shown.sort((one, other) => {
    if (!values) {
      if (!texts[one] !== !texts[other]) return texts[one] ? -1 : 1;
      return sign * collator.compare(texts[one], texts[other]) || one - other;
    }
    const [a, b] = [values[one], values[other]];
    if (rank(a) || rank(b)) return rank(a) - rank(b) || one - other;
    return a === b ? one - other : sign * (a < b ? -1 : 1);
  });
}

function sortBy(column) {
  const { sort } = state;
  state.sort = { column, descending: sort.column === column ? !sort.descending : board[column].better === "high" };
  state.page = 0;
  sortShown();
  drawBoard();
}

function drawHead() {
  const cells = board.map((column, index) => element("th", {
    scope: "col", className: [column.isName && "name", column.values && "number"].filter(Boolean).join(" "),
    title: column.name ?? null,
  }, element("button", { type: "button", onclick: () => sortBy(index) }, column.heading)));
  document.querySelector("#board thead").replaceChildren(element("tr", {}, cells, element("th", { scope: "col" }, "links")));
}

function drawBoard() {
  document.querySelectorAll("#board thead th").forEach((cell, index) => {
    if (index >= board.length) return;
    const direction = state.sort.descending ? "descending" : "ascending";
    cell.setAttribute("aria-sort", state.sort.column === index ? direction : "none");
  });
  const first = state.page * ROWS_PER_PAGE;
  const rows = state.shown.slice(first, first + ROWS_PER_PAGE).map(row);
  document.querySelector("#board tbody").replaceChildren(...rows);
  const sorted = state.sort.column === null ? "" :
    `, sorted by ${board[state.sort.column].heading}, ${state.sort.descending ? "highest" : "lowest"} first`;
  document.getElementById("count").textContent =
    (state.shown.length === size ? `All ${size} checkpoints` : `${state.shown.length} of ${size} checkpoints`) + sorted;
  drawPager();
}

function row(place) {
  const picked = state.picked.includes(place);
  const name = checkpoints.name[place];
  const cells = board.map(column => {
    if (column.isName) {
      const box = element("input", { type: "checkbox", checked: picked, disabled: !picked && state.picked.length >= MOST_COMPARED,
        "data-place": place, onchange: () => pick(place) });
      const failed = data.runs.status[checkpoints.run[place]] === "failed";
      return element("th", { scope: "row", className: "name" }, element("label", {}, box, element("span", {}, name)),
        failed && element("span", { className: "links failed", title: data.runs.message[checkpoints.run[place]] }, "its run failed"));
    }
    const text = column.texts[place];
    const exact = column.values && column.values[place] !== null ? String(column.values[place]) : null;
    return element("td", { className: column.values ? "number" : column.long ? "long" : "", title: exact }, text || "–");
  });
  return element("tr", { className: picked ? "picked" : "" }, cells, element("td", {}, linksOf(place)));
}

function drawPager() {
  const pages = Math.max(1, Math.ceil(state.shown.length / ROWS_PER_PAGE));
  const turn = (label, page) => element("button", { type: "button", disabled: page < 0 || page >= pages || page === state.page,
    onclick: () => { state.page = page; drawBoard(); focusPager(label); }, "data-turn": label }, label);
  document.getElementById("pager").replaceChildren(...(pages === 1 ? [] : [
    turn("First", 0), turn("Previous", state.page - 1),
    element("span", {}, `Page ${state.page + 1} of ${pages}`),
    turn("Next", state.page + 1), turn("Last", pages - 1),
  ]));
}

/** The pager is drawn anew: whoever turns pages by keyboard stays where he was. */
function focusPager(label) {
  const enabled = document.querySelector(`#pager [data-turn="${label}"]:not(:disabled)`);
  (enabled ?? document.querySelector("#pager button:not(:disabled)"))?.focus();
}

/** Tick or untick a checkpoint. */
function pick(place) {
  const { picked } = state;
  if (picked.includes(place)) state.picked = picked.filter(each => each !== place);
  else if (picked.length < MOST_COMPARED) state.picked = [...picked, place];
  if (!state.picked.includes(state.reference)) state.reference = state.picked[0] ?? null;
  drawBoard();
  document.querySelector(`#board input[data-place="${place}"]`)?.focus({ preventScroll: true });
  drawComparison();
  drawLater();
}

// What the page is about, decoded from the JSON inside it, and what the reader has chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const size = data.checkpoints.key.length;
const MOST_COMPARED = 6;

/** A number that JSON cannot hold comes as a word; null stays null. */
const number = value => (value === null ? null : Number(value));

/** Texts that were written as numbers of words. */
const decoded = coded => coded.codes.map(code => (code < 0 ? "" : coded.words[code]));

const checkpoints = {
  ...data.checkpoints,
  spec: decoded(data.checkpoints.spec),
  model: decoded(data.checkpoints.model),
  method: decoded(data.checkpoints.method),
  recovery: decoded(data.checkpoints.recovery),
  variant: decoded(data.checkpoints.variant),
};
const ways = { ...data.ways, action: decoded(data.ways.action), plugin: decoded(data.ways.plugin) };

/** Verdicts by checkpoint, then by the checkpoint that it is set beside. */
const verdicts = new Map();
for (const [checkpoint, reference, rows, problems, recorded] of data.verdicts ?? []) {
  const figures = new Map(rows.map(([column, difference, low, high, p, verdict, items, lost, gained]) => [
    column, { difference: number(difference), low: number(low), high: number(high), p: number(p), verdict, items, lost, gained },
  ]));
  if (!verdicts.has(checkpoint)) verdicts.set(checkpoint, new Map());
  verdicts.get(checkpoint).set(reference, { figures, problems, recorded });
}

const OTHER_WAY = { better: "worse", worse: "better", noise: "noise", same: "same" };

/** What is known of one checkpoint beside another, or undefined; turned round if it was tested the other way round. */
function verdictsBeside(checkpoint, reference) {
  const known = verdicts.get(checkpoint)?.get(reference);
  if (known) return known;
  const turned = verdicts.get(reference)?.get(checkpoint);
  if (!turned) return undefined;
  const figures = new Map([...turned.figures].map(([column, each]) => [column, {
    difference: -each.difference, low: -each.high, high: -each.low, p: each.p, verdict: OTHER_WAY[each.verdict],
    items: each.items, lost: each.gained, gained: each.lost,
  }]));
  return { ...turned, figures };
}

/** The checkpoint that a checkpoint was made from in the end: its dense model. */
function rootOf(place) {
  const seen = new Set();
  while (ways.source[place] >= 0 && !seen.has(place)) {
    seen.add(place);
    place = ways.source[place];
  }
  return place;
}

/** How its figures stand against the dense model's: a text, and a number to sort by. */
function againstDense(place) {
  const root = rootOf(place);
  const known = root === place ? undefined : verdicts.get(place)?.get(root);
  if (!known || !known.figures.size) return { text: "", value: null };
  const counts = { worse: 0, better: 0, noise: 0, same: 0 };
  for (const each of known.figures.values()) counts[each.verdict] += 1;
  const text = Object.entries(counts).filter(([, count]) => count).map(([word, count]) => `${count} ${word}`).join(", ");
  return { text, value: counts.worse - counts.better };
}

/** Columns of the table: texts and values by place; numeric ones have values. */
function boardColumns() {
  const text = (heading, texts, long = false) => ({ heading, texts, values: null, long });
  const several = texts => new Set(texts).size > 1;
  const some = texts => texts.some(each => each !== "");
  const columns = [{ ...text("checkpoint", checkpoints.name), isName: true }];
  if (several(checkpoints.model)) columns.push(text("model", checkpoints.model, true));
  if (some(checkpoints.method)) columns.push(text("method", checkpoints.method));
  if (some(checkpoints.recovery)) columns.push(text("recovery", checkpoints.recovery));
  if (some(checkpoints.variant)) columns.push(text("variant", checkpoints.variant));
  for (const column of data.columns) if (column.board) columns.push(column);
  const against = checkpoints.key.map((_, place) => againstDense(place));
  if (against.some(each => each.text)) {
    columns.push({ heading: "against dense", texts: against.map(each => each.text), values: against.map(each => each.value) });
  }
  if (several(checkpoints.spec)) columns.push(text("run", checkpoints.spec, true));
  return columns;
}

for (const column of data.columns) column.values = column.values.map(number);
const sparsity = data.columns.find(column => column.name === "sparsity_asked")?.texts ?? checkpoints.key.map(() => "");

const state = {
  shown: checkpoints.key.map((_, place) => place),
  sort: { column: null, descending: false },
  page: 0,
  picked: [],
  reference: null,
};

/** An element with attributes and children; texts are texts, whatever stands in them. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "className") made.className = value;
    else if (name in made && typeof value === "boolean") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return made;
}

/** Seconds for people. */
function duration(seconds) {
  if (seconds === null) return "";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A box in which a wide table scrolls, by keyboard too. */
const scrollBox = (label, table, tall = false) =>
  element("div", { className: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": `${label}, can be scrolled` }, table);

/** Links to what else there is of a checkpoint. */
function linksOf(place) {
  const run = checkpoints.run[place];
  const links = [];
  if (data.runs.mlflow[run]) {
    links.push(element("a", { href: data.runs.mlflow[run], rel: "noreferrer", "aria-label": `MLflow run of ${checkpoints.name[place]}` }, "MLflow"));
  }
  links.push(element("a", { href: `${data.folder}/${encodeURIComponent(checkpoints.key[place])}/`, title: checkpoints.key[place],
    "aria-label": `Artifact folder of ${checkpoints.name[place]}` }, "folder"));
  return element("span", { className: "links" }, links.flatMap((link, index) => (index ? [" · ", link] : [link])));
}

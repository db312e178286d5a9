// Which checkpoint was made from which: a tree of the checkpoints that the filters leave, with all on the way to them.

const MOST_NODES = 200;
let nodesShown = MOST_NODES;

function drawLineage() {
  const wanted = new Set();
  for (const place of state.shown) {
    for (let at = place; at >= 0 && !wanted.has(at); at = ways.source[at]) wanted.add(at);
  }
  const children = new Map();
  const roots = [];
  for (let place = 0; place < size; place += 1) {
    if (!wanted.has(place)) continue;
    const source = ways.source[place];
    if (source < 0) roots.push(place);
    else if (children.has(source)) children.get(source).push(place);
    else children.set(source, [place]);
  }
  let left = nodesShown;
  const branch = places => {
    const items = [];
    for (const place of places) {
      if (left <= 0) break;
      left -= 1;
      const below = children.get(place);
      items.push(element("li", {}, node(place), below && branch(below)));
    }
    return element("ul", {}, items);
  };
  const tree = branch(roots);
  const rest = wanted.size - (nodesShown - left);
  document.getElementById("tree").replaceChildren(tree, ...(rest > 0 ? [element("button", { type: "button", onclick: () => {
    nodesShown += MOST_NODES;
    drawLineage();
    document.querySelector("#tree > button")?.focus();
  } }, `Show more (${rest} are left)`)] : []));
}

function node(place) {
  const step = [ways.plugin[place] || ways.action[place], sparsity[place] && ways.action[place] === "prune" && sparsity[place]].filter(Boolean).join(" ");
  const total = ways.total[place];
  const costs = [duration(ways.seconds[place]),
    ways.source[place] >= 0 && total !== null && total !== ways.seconds[place] && `${duration(total)} from the beginning`].filter(Boolean).join("; ");
  const runs = checkpoints.runs[place];
  const of = runs.length > 1 ? `${runs.length} runs` : checkpoints.spec[place];
  return element("span", {}, element("strong", {}, checkpoints.name[place]), ` `,
    element("span", { className: "quiet" }, `${step}${costs ? `, ${costs}` : ""} · ${ways.source[place] < 0 ? checkpoints.model[place] : of}`));
}

"use strict";
// Rows as experiment/results_page.py writes them: each with what differs from the row before. All of their text reaches
// the page as text, never as HTML.
const rows = [];
for (const changed of JSON.parse(document.getElementById("data").textContent)) rows.push({ ...rows.at(-1), ...changed });
for (const row of rows) {
  row.published = row.origin === "published";
  row.title = row.record && `${row.origin}/${row.record}`;
}
const SHOWN = {{ shown | tojson }};
const MOST_NAMES = 12; // of curves that are shown without a click
const WIDTH = 560, HEIGHT = 340, LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 40;

// -- filters and the table

const filters = [...document.querySelectorAll("#filters select")];
const published = document.getElementById("published");
const body = document.querySelector("#table tbody");

function fillFilters() {
  for (const select of filters) {
    const field = select.dataset.field;
    const values = [...new Set(rows.map((row) => row[field]))].filter((value) => value !== "published").sort();
    for (const value of ["", ...values]) select.add(new Option(value || "all", value));
    select.value = SHOWN[field] || "";
    select.addEventListener("change", show);
  }
  published.addEventListener("change", show);
  document.getElementById("filters").hidden = false;
}

// Published points are in no folder.
function chosen() {
  const fits = (row, field, value) => !value || row[field] === value || (field === "origin" && row.published);
  return rows.filter((row) => filters.every((one) => fits(row, one.dataset.field, one.value)) && (published.checked || !row.published));
}

// Numbers by size, text by the alphabet; what has no value comes last in both directions.
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return direction * order;
}

function sortBy(head) {
  const field = head.dataset.field;
  const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const lines = [...body.rows];
  lines.sort((a, b) => compare(rows[a.dataset.row][field], rows[b.dataset.row][field], direction));
  body.append(...lines);
}

function makeSortable() {
  for (const head of document.querySelectorAll("#table th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sortBy(head));
    head.replaceChildren(button);
  }
}

// -- plots

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function grouped(list, key) {
  const groups = new Map();
  for (const row of list) groups.set(key(row), [...(groups.get(key(row)) || []), row]);
  return groups;
}

// Colours a golden angle apart, so that any number of curves differ; they hold on light and dark.
function colourOf(i) {
  return `hsl(${(210 + i * 137.5) % 360} 65% ${i % 2 ? 48 : 56}%)`;
}

// About `count` round numbers that lie in the range: 1, 2 or 5 times a power of ten apart.
function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(Number((i * step).toPrecision(6)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const one of [1, 2, 5]) ticks.push(Number((one * 10 ** power).toPrecision(6)));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 2 ? inside : linearTicks(low, high, 5);
}

function scales(list, field) {
  const costs = list.map((row) => row[field]);
  const tops = list.flatMap((row) => [row.top1 - (row.std || 0), row.top1 + (row.std || 0)]);
  const left = Math.min(...costs) / 1.15, right = Math.max(...costs) * 1.15;
  const gap = Math.max(0.5, 0.05 * (Math.max(...tops) - Math.min(...tops)));
  const low = Math.min(...tops) - gap, high = Math.max(...tops) + gap;
  return {
    x: (cost) => LEFT + (WIDTH - LEFT - RIGHT) * Math.log(cost / left) / Math.log(right / left),
    y: (top) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (top - low) / (high - low),
    costs: logTicks(left, right), tops: linearTicks(low, high, 6),
  };
}

function drawAxes(plot, at, unit) {
  for (const tick of at.costs) {
    plot.append(svg("line", { class: "grid", x1: at.x(tick), x2: at.x(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
    plot.append(svg("text", { x: at.x(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, tick));
  }
  for (const tick of at.tops) {
    plot.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at.y(tick), y2: at.y(tick) }));
    plot.append(svg("text", { x: LEFT - 6, y: at.y(tick) + 4, "text-anchor": "end" }, tick));
  }
  plot.append(svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, `${unit}; top-1 in % upwards`));
}

function drawLine(plot, list, at, field, colour, kind) {
  const points = list.map((row) => `${at.x(row[field])},${at.y(row.top1)}`).join(" ");
  plot.append(svg("polyline", { class: kind, points, fill: "none", stroke: colour, "stroke-width": 1.6 }));
}

function dot(x, y, colour, published) {
  const fill = published ? "var(--card)" : colour;
  return svg("circle", { cx: x, cy: y, r: 4, fill, stroke: colour, "stroke-width": 1.6 });
}

function drawDot(plot, row, at, field, colour) {
  const x = at.x(row[field]);
  if (row.std !== null) {
    plot.append(svg("line", { x1: x, x2: x, y1: at.y(row.top1 - row.std), y2: at.y(row.top1 + row.std), stroke: colour }));
  }
  const circle = dot(x, at.y(row.top1), colour, row.published);
  circle.append(svg("title", {}, `${row.title || row.network}, ${row.way}: ${row.top1.toFixed(2)} % at ${row[field].toPrecision(4)}\n${row.source}`));
  plot.append(circle);
}

function drawCurve(plot, list, at, field, colour) {
  const exits = list.filter((row) => row.kind === "exit");
  if (field === "macs") {
    if (exits.length > 1) drawLine(plot, exits, at, field, colour, "exits");
    const front = list.filter((row) => row.kind === "front");
    if (front.length > 1) drawLine(plot, front, at, field, colour, "front");
  }
  for (const row of list) if (row.kind !== "front") drawDot(plot, row, at, field, colour);
}

// `list` has the rows to draw, `colours` the colour of every curve of the page's choice.
function draw(id, list, field, unit, colours) {
  const figure = document.getElementById(id);
  if (!list.length) return figure.replaceChildren(document.createTextNode("Nothing that was chosen has been timed so."));
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `top-1 accuracy against ${unit}` });
  const legend = document.createElement("ul"), at = scales(list, field), curves = grouped(list, (row) => row.curve);
  legend.className = "legend";
  drawAxes(plot, at, unit);
  for (const [curve, points] of curves) {
    const colour = colours.get(curve), { title, network, regime, published } = points[0];
    drawCurve(plot, points, at, field, colour);
    const item = document.createElement("li"), swatch = svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
    swatch.append(dot(6, 6, colour, published));
    item.append(swatch, `${title || network}, ${regime}${published ? " (published)" : ""}`);
    legend.append(item);
  }
  const folded = document.createElement("details"), summary = document.createElement("summary");
  summary.textContent = curves.size === 1 ? "1 curve" : `${curves.size} curves`;
  folded.open = curves.size <= MOST_NAMES;
  folded.append(summary, legend);
  figure.replaceChildren(plot, folded);
}

function show() {
  const list = chosen(), picked = new Set(list);
  const lines = [...body.rows];
  for (const line of lines) line.hidden = !picked.has(rows[line.dataset.row]);
  const colours = new Map([...grouped(list, (row) => row.curve).keys()].map((curve, i) => [curve, colourOf(i)]));
  // Ways that were timed are on some of the test images: in the plot of latency alone.
  draw("cost", list.filter((row) => row.published || row.kind !== "point"), "macs", "multiply-adds per image, M", colours);
  draw("latency", list.filter((row) => row.ms !== null && row.kind !== "front"), "ms", "ms per image", colours);
  document.getElementById("count").textContent = `${lines.filter((line) => !line.hidden).length} of ${lines.length} rows`;
}

fillFilters();
makeSortable();
show();

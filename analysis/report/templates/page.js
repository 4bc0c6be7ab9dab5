"use strict";
// A link #trace=N, or #cells=ID,ID from a curve, leads from a number to its cells; the run names there lead to files.
const data = JSON.parse(document.getElementById("data").textContent);
const names = Object.keys(data.columns);
const cells = Array.from({ length: data.count }, (_, i) => {
  const cell = {};
  for (const name of names) {
    const { values, words } = data.columns[name];
    cell[name] = words ? (values[i] == null ? null : words[values[i]]) : values[i];
  }
  cell.run_id ??= cell.cell_id;
  return cell;
});
const place = new Map(cells.map((cell, i) => [cell, i]));
const CONSTANT = new Set(names.filter((name) => new Set(cells.map((c) => c[name])).size < 2));
const SCHEDULE = CONSTANT.has("schedule") ? [] : ["schedule"];
const CURVE = ["method", "mode", ...SCHEDULE];
const FILTERS = ["backend", "model", "task", ...CURVE, "status"].filter((name) => data.columns[name]);
// Metrics by their own names; accuracy has the values of a task's primary one.
const OTHERS = ["acc", "acc_norm", "exact_match_strict", "exact_match_flexible", "f1"]
  .filter((name) => cells.some((c) => c[name] != null && c.primary_metric !== name));
const SHOWN = ["run_id", ...[...FILTERS, "seed"].filter((name) => !CONSTANT.has(name)), "sparsity",
  ...names.filter((name) => name.startsWith("axis/")), "accuracy", "perplexity",
  "warnings", "accuracy_before_tuning", "primary_metric", ...OTHERS, "calibration", "calibration_order",
  "calibration_tokens_seen", "eval_loss", "train_examples_per_second", "error"]
  .filter((name) => data.columns[name] && cells.some((c) => c[name] != null));
const METRICS = [["accuracy", "accuracy (fraction right)"], ["perplexity", "perplexity (per token)"],
  ...OTHERS.map((name) => [name, name]), ["eval_loss", "eval loss (nats per token)"], ["train_examples_per_second", "training rate (examples/s)"],
  ["inference_flops", "inference FLOPs at 2,048 tokens"]].filter(([name]) => cells.some((c) => c[name] != null));
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const DASHES = { "sparse-to-sparse": "6 4", "dense": "2 3", "masked-finetuning": "8 3 2 3" };
const PAGE = 100;

function distinct(name, of = cells) { return [...new Set(of.map((c) => c[name]))].filter((v) => v != null); }
function mean(values) { return values.reduce((a, b) => a + b, 0) / values.length; }
function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "g", "text", "title"].includes(tag) || attributes.svg;
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name !== "svg") made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
function decimals(error) { return error > 0 ? Math.max(0, -Math.floor(Math.log10(error))) : 3; }
function number(value, error) {
  if (value == null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (error > 0) return value.toFixed(decimals(error));
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  return Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3 ? value.toExponential(2)
    : Number(value.toPrecision(3)).toLocaleString("en");
}
// The binomial error is 0 where all or no answers are right; one example more or less is then the least doubt.
function errorOf(cell, name) {
  if (cell[`${name}_stderr`] != null && !name.startsWith("accuracy")) return cell[`${name}_stderr`];
  if (!name.startsWith("accuracy") && !name.startsWith("perplexity")) return null;
  const error = cell[name.split("_")[0] + "_stderr"];
  return error || (cell.n_examples && name.startsWith("accuracy") ? 1 / cell.n_examples : null);
}
// Of several seeds the standard deviation between them, of one the standard error over its examples.
function spreadOf(of, name) {
  if (of.length < 2) return errorOf(of[0], name) ?? 0;
  const middle = mean(of.map((c) => c[name]));
  return Math.sqrt(of.reduce((sum, c) => sum + (c[name] - middle) ** 2, 0) / (of.length - 1));
}
function traced(of) { return `#cells=${of.map((c) => place.get(c)).join(",")}`; }
function choice(label, values, changed, any) {
  const select = element("select", { onchange: changed, name: label });
  if (any) select.append(element("option", { value: "" }, any));
  values.forEach((v) => select.append(element("option", { value: v }, String(v).replaceAll("_", " "))));
  return element("label", {}, label.replaceAll("_", " "), select);
}

// --- curves -------------------------------------------------------------------------------------------------------
const curveControls = document.getElementById("curve-controls");
const hidden = new Set();
if (METRICS.length) {
  curveControls.append(choice("model", distinct("model"), draw), choice("task", distinct("task"), draw),
    choice("metric", METRICS.map(([name]) => name), draw));
  if (distinct("backend").length > 1) curveControls.append(choice("backend", distinct("backend"), draw));
}
function chosen(name) { return curveControls.querySelector(`[name=${name}]`)?.value; }

// A colour for each method, or of each of its schedules where there are several; modes differ by their dashes.
function hueOf(cell) { return [cell.method, ...SCHEDULE.map((name) => cell[name])].join(", "); }
const HUES = [...new Set(cells.map(hueOf))];

function curvesOf(panel, metric) {
  const groups = new Map();
  for (const cell of panel) {
    const key = CURVE.map((name) => cell[name]).join(", ");
    if (!groups.has(key)) groups.set(key, { key, hue: hueOf(cell), mode: cell.mode, points: new Map() });
    const points = groups.get(key).points;
    if (!points.has(cell.sparsity)) points.set(cell.sparsity, []);
    points.get(cell.sparsity).push(cell);
  }
  return [...groups.values()].map((group) => ({ ...group,
    points: [...group.points].sort((a, b) => a[0] - b[0]).map(([sparsity, of]) => ({ sparsity, of,
      value: mean(of.map((c) => c[metric])), error: spreadOf(of, metric),
      beforeTuning: mean(of.map((c) => c[`${metric}_before_tuning`] ?? NaN)) })) }));
}

function draw() {
  const plot = document.getElementById("plot"), legend = document.getElementById("legend");
  plot.replaceChildren(); legend.replaceChildren();
  if (!METRICS.length) { plot.append("No cell is done: there is nothing to draw."); return; }
  const metric = chosen("metric"), label = METRICS.find(([name]) => name === metric)[1];
  const panel = cells.filter((c) => c.model === chosen("model") && c.task === chosen("task") && c[metric] != null &&
    (!chosen("backend") || c.backend === chosen("backend")));
  const curves = curvesOf(panel, metric);
  const colour = (curve) => COLOURS[HUES.indexOf(curve.hue) % COLOURS.length];
  for (const curve of curves) {
    const sample = element("svg", { width: 34, height: 10 }, element("line", { x1: 0, y1: 5, x2: 34, y2: 5,
      stroke: colour(curve), "stroke-width": 2.5, "stroke-dasharray": DASHES[curve.mode] ?? "" }));
    legend.append(element("button", { type: "button", "aria-pressed": String(!hidden.has(curve.key)), onclick: () => {
      if (!hidden.delete(curve.key)) hidden.add(curve.key);
      draw();
    } }, sample, ` ${curve.key}`));
  }
  const seen = curves.filter((curve) => !hidden.has(curve.key));
  if (!panel.length) { plot.append("No cell of this choice is done."); return; }
  const W = 860, H = 420, L = 74, R = 16, T = 12, B = 48;
  const all = seen.flatMap((c) => c.points.flatMap((p) => [p.value - p.error, p.value + p.error, p.beforeTuning]))
    .filter(Number.isFinite);
  const logarithmic = metric === "perplexity";
  const low = metric === "accuracy" || !logarithmic ? Math.min(0, ...all) : Math.min(...all);
  const high = metric === "accuracy" ? 1 : Math.max(...all, low + 1e-9) * 1.04;
  const scale = (v) => (logarithmic ? Math.log(v) : v);
  const wide = Math.max(...panel.map((c) => c.sparsity), 0.1);
  const x = (s) => L + (W - L - R) * (s / wide);
  const y = (v) => H - B - (H - T - B) * ((scale(v) - scale(low)) / (scale(high) - scale(low)));
  const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label} over sparsity` });
  const text = (tx, ty, anchor, words, more = {}) =>
    svg.append(element("text", { x: tx, y: ty, "text-anchor": anchor, "font-size": 13, fill: "#3b4652", ...more }, words));
  const ticks = 5;
  for (let i = 0; i <= ticks; i++) {
    const v = logarithmic ? Math.exp(scale(low) + (i / ticks) * (scale(high) - scale(low))) : low + (i / ticks) * (high - low);
    svg.append(element("line", { x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: "#e6eaee" }));
    text(L - 8, y(v) + 4, "end", metric === "accuracy" ? v.toFixed(1) : number(v));
  }
  for (const s of distinct("sparsity", panel).sort((a, b) => a - b)) text(x(s), H - B + 18, "middle", number(s));
  text((L + W - R) / 2, H - 8, "middle", "sparsity (fraction of zeros)");
  text(16, (T + H - B) / 2, "middle", label, { transform: `rotate(-90 16 ${(T + H - B) / 2})` });
  const across = (v, stroke, dash) => svg.append(element("line", { x1: L, x2: W - R, y1: y(v), y2: y(v), stroke,
    "stroke-dasharray": dash, "stroke-width": 1.2 }));
  if (metric === "accuracy" && panel[0].chance_accuracy != null) across(panel[0].chance_accuracy, "#8a949e", "");
  const dense = panel.filter((c) => c.sparsity === 0).map((c) => c[metric]);
  if (dense.length && seen.length) across(mean(dense), "#000", "9 3 2 3");
  const line = (points, value) => points.filter((p) => Number.isFinite(value(p)))
    .map((p, i) => `${i ? "L" : "M"}${x(p.sparsity).toFixed(1)},${y(value(p)).toFixed(1)}`).join("");
  for (const curve of seen) {
    const c = colour(curve), back = [...curve.points].reverse();
    if (curve.points.some((p) => p.error)) svg.append(element("path", { fill: c, opacity: 0.13,
      d: `${line(curve.points, (p) => p.value + p.error)}${line(back, (p) => p.value - p.error).replace("M", "L")}Z` }));
    svg.append(element("path", { d: line(curve.points, (p) => p.beforeTuning), fill: "none", stroke: c, "stroke-dasharray": "2 3" }));
    svg.append(element("path", { d: line(curve.points, (p) => p.value), fill: "none", stroke: c, "stroke-width": 2,
      "stroke-dasharray": DASHES[curve.mode] ?? "" }));
  }
  for (const curve of seen) for (const p of curve.points) {
    const seeds = p.of.length > 1 ? `, ${p.of.length} seeds` : "";
    const shown = `${number(p.value, p.error)}${p.error ? ` ± ${number(p.error, p.error)}` : ""}${seeds}`;
    svg.append(element("a", { svg: true, href: traced(p.of) },
      element("circle", { cx: x(p.sparsity), cy: y(p.value), r: 4, fill: colour(curve) },
        element("title", {}, `${curve.key}, sparsity ${p.sparsity}: ${shown}`))));
  }
  plot.append(svg);
}

// --- every setting at a glance --------------------------------------------------------------------------------------
function shade(fraction) {
  const mix = (a, b) => Math.round(a + (b - a) * fraction);
  const [r, g, b] = [mix(0, 255), mix(32, 233), mix(77, 70)];
  return [`rgb(${r},${g},${b})`, 0.3 * r + 0.59 * g + 0.11 * b > 130 ? "#000" : "#fff"];
}
function drawHeat() {
  const heat = document.getElementById("heat");
  for (const metric of ["accuracy", "perplexity"]) {
    const done = cells.filter((c) => c[metric] != null);
    const levels = distinct("sparsity", done).sort((a, b) => a - b);
    const settings = new Map();
    for (const cell of done) {
      const key = [cell.backend, cell.model, cell.task, ...CURVE.map((name) => cell[name])].join("\u0000");
      if (!settings.has(key)) settings.set(key, new Map());
      const row = settings.get(key);
      if (!row.has(cell.sparsity)) row.set(cell.sparsity, []);
      row.get(cell.sparsity).push(cell);
    }
    if (!settings.size) continue;
    const several = distinct("backend").length > 1, heads = ["model", "task", ...CURVE];
    const table = element("table", { class: "heat" }, element("thead", {}, element("tr", {},
      ...[...(several ? ["backend"] : []), ...heads, ...levels.map((level) => number(level))].map((h) => element("th", {}, h)))));
    const body = element("tbody");
    for (const [key, row] of settings) {
      const line = element("tr", {}, ...key.split("\u0000").slice(several ? 0 : 1).map((h) => element("th", {}, h)));
      for (const level of levels) {
        const of = row.get(level);
        if (!of) { line.append(element("td", {}, "–")); continue; }
        const value = mean(of.map((c) => c[metric])), error = spreadOf(of, metric);
        const [back, ink] = metric === "accuracy" ? shade(value) : ["none", "inherit"];
        line.append(element("td", { style: `background:${back};color:${ink}` },
          element("a", { href: traced(of) }, number(value, error))));
      }
      body.append(line);
    }
    table.append(body);
    heat.append(element("h3", {}, `${metric}, by sparsity`), element("div", { class: "wide" }, table));
  }
  if (!heat.childElementCount) heat.append("No cell is done.");
}

// --- the table of cells -----------------------------------------------------------------------------------------------
const filters = document.getElementById("filters");
const body = document.querySelector("#table tbody");
let sorted = null, descending = false, limit = PAGE, traceOf = null;
const refilter = () => { limit = PAGE; fill(); };
for (const name of FILTERS) filters.append(choice(name, distinct(name), refilter, "all"));
for (const [name, label] of [["least", "sparsity from"], ["most", "to"], ["text", "name or reason has"]])
  filters.append(element("label", {}, label, element("input", { name, size: name === "text" ? 24 : 4, oninput: refilter })));
filters.append(element("label", {}, "\u00a0", element("button", { type: "button", id: "clear", onclick: () => {
  filters.querySelectorAll("select, input").forEach((field) => { field.value = ""; });
  history.replaceState(null, "", "#cells");
  traceOf = null;
  refilter();
} }, "Show all")));

function matching() {
  const value = (name) => filters.querySelector(`[name=${name}]`).value;
  const wanted = FILTERS.map((name) => [name, value(name)]).filter(([, v]) => v !== "");
  const least = parseFloat(value("least")), most = parseFloat(value("most")), text = value("text").toLowerCase();
  const found = cells.filter((c) => (!traceOf || traceOf.has(c)) &&
    wanted.every(([name, v]) => c[name] === v) && !(c.sparsity < least) && !(c.sparsity > most) &&
    (!text || [c.cell_id, c.run_id, c.error, c.warnings].some((t) => t?.toLowerCase().includes(text))));
  if (sorted) found.sort((a, b) => {
    const [p, q] = [a[sorted], b[sorted]];
    if (p == null || q == null) return (p == null) - (q == null);
    return (p < q ? -1 : p > q ? 1 : 0) * (descending ? -1 : 1);
  });
  return found;
}

function fileLink(cell, file, words) {
  return cell.root != null ? element("a", { href: `${data.roots[cell.root]}/${cell.run_id}/${file}`, onclick: (e) => e.stopPropagation() }, words) : words;
}

function detail(cell) {
  const fields = element("div", { class: "fields" });
  for (const name of names) if (cell[name] != null && name !== "root")
    fields.append(element("div", {}, `${name.replaceAll("_", " ")}: ${cell[name]}`));
  const files = element("p", {}, "The record: ");
  for (const file of cell.root != null ? ["result.json", "config.yaml", "validation_report.json", "metrics.jsonl",
    "train.log"] : []) files.append(fileLink(cell, file, file), " ");
  if (cell.shared_with) files.append(` The run is shared: ${cell.shared_with} owns it.`);
  return element("tr", { class: "detail" }, element("td", { colspan: SHOWN.length }, files, fields));
}

function fill() {
  const found = matching();
  const rows = found.slice(0, limit).map((cell) => {
    const row = element("tr", { class: "cell", tabindex: 0 });
    for (const name of SHOWN) row.append(element("td", { class: name },
      name === "run_id" ? fileLink(cell, "result.json", cell.run_id) : number(cell[name], errorOf(cell, name))));
    const toggle = () => {
      if (row.nextSibling?.classList.contains("detail")) row.nextSibling.remove(); else row.after(detail(cell));
    };
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (e) => { if (e.key === "Enter" && e.target === row) toggle(); });
    return row;
  });
  body.replaceChildren(...rows);
  if (found.length === 1) body.append(detail(found[0]));
  document.getElementById("shown").textContent = `${found.length} of ${cells.length} cells` +
    `${traceOf ? ", those behind the number that led here" : ""}. A run's name opens its record, a row shows all of it.`;
  document.getElementById("more").hidden = found.length <= limit;
}

document.querySelector("#table thead").append(element("tr", {}, ...SHOWN.map((name) => {
  const head = element("th", { onclick: () => {
    descending = sorted === name && !descending;
    sorted = name;
    document.querySelectorAll("#table th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    fill();
  } }, name === "run_id" ? "run" : name.replaceAll("_", " "));
  return head;
})));
document.getElementById("more").addEventListener("click", () => { limit += PAGE; fill(); });

function follow() {
  const [, kind, ids] = /^#(trace|cells)=([\d,]+)$/.exec(location.hash) ?? [];
  if (!kind) return;
  filters.querySelectorAll("select, input").forEach((field) => { field.value = ""; });
  traceOf = new Set();
  const ranges = kind === "trace" ? data.traces[Number(ids)] ?? [] : ids.split(",").flatMap((id) => [Number(id), Number(id)]);
  for (let i = 0; i < ranges.length; i += 2)
    for (let at = ranges[i]; at <= ranges[i + 1]; at++) if (cells[at]) traceOf.add(cells[at]);
  refilter();
  document.getElementById("cells").scrollIntoView();
}
window.addEventListener("hashchange", follow);
draw(); drawHeat(); fill(); follow();
document.documentElement.dataset.ready = "yes";

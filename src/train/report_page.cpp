#include "train/report_page.h"

namespace krait {

const char* const kReportStyle = R"css(
:root { color-scheme: light dark;
  --bg: #fbfbfa; --panel: #ffffff; --ink: #1c1e21; --quiet: #6b7078; --line: #e3e4e6; --grid: #eeeff1; --mark: #fff3d6;
  --c0: #2563c9; --c1: #d9630f; --c2: #128a74; --c3: #b3308f; --c4: #7a5ad0; --c5: #a07d00; --c6: #c0343c; --c7: #4d7f1f; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #15171a; --panel: #1c1f23; --ink: #e6e7e9; --quiet: #9299a3; --line: #32363c; --grid: #272b30; --mark: #3d3420;
  --c0: #6ea8ff; --c1: #ff9d52; --c2: #4fd1b5; --c3: #f083d2; --c4: #b59cff; --c5: #e0c04a; --c6: #ff8087; --c7: #9ed35f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 14px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; padding: 22px 28px 6px; max-width: 1240px; margin: auto; }
h1 { font-size: 21px; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
main { padding: 8px 28px 48px; max-width: 1240px; margin: auto; }
.quiet, small { color: var(--quiet); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
div.numbers { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
.numbers table { width: 100%; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 500; font-size: 12.5px; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
#controls { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; margin: 18px 0 10px; }
#controls label, .legend button { display: inline-flex; align-items: center; gap: 6px; }
.group { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden; background: var(--panel); }
.group button { border: 0; background: none; color: inherit; font: inherit; padding: 4px 12px; cursor: pointer; }
.group button + button { border-left: 1px solid var(--line); }
.group button[aria-pressed=true] { background: var(--ink); color: var(--panel); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; }
.legend button { border: 0; background: none; color: inherit; font: inherit; padding: 2px 0; cursor: pointer; }
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
input[type=range] { width: 110px; accent-color: var(--c0); }
#charts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; }
.chart { position: relative; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 12px 6px; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
.chart h2 { font-size: 14px; font-weight: 600; margin: 0 0 2px 4px; }
.chart h2 span { font-weight: 400; color: var(--quiet); margin-left: 8px; font-size: 12.5px; }
svg { display: block; width: 100%; touch-action: pan-y; }
svg text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.tip { position: absolute; pointer-events: none; background: var(--panel); border: 1px solid var(--line); border-radius: 7px;
  box-shadow: 0 4px 16px rgb(0 0 0 / .14); padding: 6px 10px; font-size: 12.5px; white-space: nowrap; z-index: 2; font-variant-numeric: tabular-nums; }
.tip b { font-weight: 600; } .tip div { display: flex; gap: 12px; justify-content: space-between; }
.empty { color: var(--quiet); padding: 40px 0; text-align: center; }
details { margin-top: 22px; } summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
.settings th, .settings td { text-align: left; padding: 4px 14px 4px 0; white-space: normal; overflow-wrap: anywhere; font-size: 13px; }
.settings tbody th { font-weight: 400; color: var(--quiet); white-space: nowrap; padding-left: 8px; }
.settings td { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: 12.5px; }
.settings tr.differs > * { background: var(--mark); }
@media (max-width: 900px) { #charts { grid-template-columns: 1fr; } header, main { padding-left: 14px; padding-right: 14px; } }
)css";

const char* const kReportScript = R"js(
(() => {
"use strict";
const runs = window.runs;
const axes = { step: ["Steps", "step"], tokens: ["Tokens", "tokens"], time: ["Time", "elapsed_s"] };
const longest = Math.max(1, ...runs.map(r => r.train.step.length));
const view = { x: "step", log: false, smooth: Math.min(0.9, Math.max(0, +(1 - 20 / longest).toFixed(2))), hidden: new Set() };
const charts = [
  { title: "Loss", note: "nats per token; thin: each step, bold: smoothed, dots: validation", wide: true, height: 380, logs: true,
    series: [{ from: "train", key: "loss", label: "train", smooth: true }, { from: "eval", key: "val_loss", label: "validation", dots: true }] },
  { title: "Learning rate", height: 190, zero: true, series: [{ from: "train", key: "lr", label: "lr" }] },
  { title: "Gradient norm", note: "before clipping", height: 190, log: true, series: [{ from: "train", key: "grad_norm", label: "norm", smooth: true }] },
  { title: "Tokens per second", height: 190, zero: true, series: [{ from: "train", key: "tokens_per_s", label: "tokens/s", smooth: true }] },
];
if (runs.some(r => r.eval.accuracy.some(v => v !== null)))  // of a synthetic task
  charts.splice(1, 0, { title: "Accuracy", note: "share of right answers in validation", wide: true, height: 240, zero: true,
    series: [{ from: "eval", key: "accuracy", label: "answers", dots: true }] });
const colour = i => `var(--c${i % 8})`;
const element = (tag, attributes = {}, text) => {
  const e = document.createElement(tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return e;
};
const svgElement = (parent, tag, attributes, text) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  parent.appendChild(e);
  return e;
};
const short = v => {
  const a = Math.abs(v);
  if (a >= 1e9) return +(v / 1e9).toPrecision(4) + "G";
  if (a >= 1e6) return +(v / 1e6).toPrecision(4) + "M";
  if (a >= 1e4) return +(v / 1e3).toPrecision(4) + "k";
  if (a !== 0 && a < 1e-3) return v.toExponential(a < 1e-3 ? 2 : 0).replace(/\.?0+e/, "e");
  return String(+v.toPrecision(4));
};
const clock = s => s >= 3600 ? `${Math.floor(s / 3600)} h ${String(Math.floor(s / 60) % 60).padStart(2, "0")}` :
  s >= 60 ? `${Math.floor(s / 60)} min ${String(Math.round(s) % 60).padStart(2, "0")}` : `${+s.toFixed(1)} s`;
const xText = v => view.x === "time" ? clock(v) : v.toLocaleString("en-US");
const xShort = v => view.x === "time" ? clock(v) : short(v);

// Exponential moving average that starts unbiased; gaps stay gaps.
function smoothed(values) {
  if (!view.smooth) return values;
  let sum = 0, weight = 0;
  return values.map(v => {
    if (v === null) return null;
    sum = view.smooth * sum + (1 - view.smooth) * v;
    weight = view.smooth * weight + (1 - view.smooth);
    return sum / weight;
  });
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const list = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; ++i) list.push(i * step);
  return list;
}
function logTicks(low, high) {
  let list = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); ++e)
    for (const m of [1, 2, 5]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) list.push(m * 10 ** e);
  if (list.length > 8) list = list.filter(v => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9);
  return list.length >= 2 ? list : ticks(low, high, 5);
}
function gather(chart) {
  const lines = [];
  runs.forEach((run, i) => {
    if (view.hidden.has(i)) return;
    for (const s of chart.series) {
      const xs = run[s.from][axes[view.x][1]], raw = run[s.from][s.key];
      if (!raw.some((v, k) => v !== null && xs[k] !== null)) continue;
      lines.push({ run: i, s, xs, raw, ys: s.smooth ? smoothed(raw) : raw });
    }
  });
  return lines;
}
// What the axis covers: the smoothed curves and validation in full, of the raw values all but the wildest 2 %.
function range(lines, chart, log) {
  let low = Infinity, high = -Infinity;
  const take = v => { if (v !== null && (!log || v > 0)) { low = Math.min(low, v); high = Math.max(high, v); } };
  for (const l of lines) {
    const raw = l.raw.filter(v => v !== null && (!log || v > 0)).sort((a, b) => a - b);
    if (raw.length) { take(raw[Math.floor((raw.length - 1) * (l.s.smooth ? 0.01 : 0))]); take(raw[Math.ceil((raw.length - 1) * (l.s.smooth ? 0.99 : 1))]); }
    l.ys.forEach(take);
  }
  if (!isFinite(low)) return null;
  if (chart.zero) low = Math.min(0, low);
  if (log) return [low / 1.08, high * 1.08];
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [chart.zero ? low : low - pad, high + pad];
}
function path(xs, ys, sx, sy, log) {
  let d = "", pen = false;
  for (let k = 0; k < ys.length; ++k) {
    if (ys[k] === null || xs[k] === null || (log && ys[k] <= 0)) { pen = false; continue; }
    d += `${pen ? "L" : "M"}${sx(xs[k]).toFixed(1)} ${sy(ys[k]).toFixed(1)}`;
    pen = true;
  }
  return d;
}
let clips = 0;
function draw(chart) {
  const box = chart.box, width = Math.max(box.clientWidth - 24, 160), height = chart.height;
  const pad = { left: 52, right: 14, top: 10, bottom: 26 }, log = chart.log || (chart.logs && view.log);
  box.querySelectorAll("svg, .empty, .tip").forEach(e => e.remove());
  const lines = gather(chart), yr = range(lines, chart, log);
  if (!yr) { box.appendChild(element("div", { class: "empty" }, "no values yet")); return; }
  let x0 = Infinity, x1 = -Infinity;
  for (const l of lines) for (const v of l.xs) if (v !== null) { x0 = Math.min(x0, v); x1 = Math.max(x1, v); }
  if (x1 === x0) x1 = x0 + 1;
  const f = log ? Math.log : v => v;
  const sx = v => pad.left + (v - x0) / (x1 - x0) * (width - pad.left - pad.right);
  const sy = v => height - pad.bottom - (f(v) - f(yr[0])) / (f(yr[1]) - f(yr[0])) * (height - pad.top - pad.bottom);
  const svg = svgElement(box, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title });
  for (const v of log ? logTicks(...yr) : ticks(...yr, Math.max(3, Math.round(height / 65)))) {
    svgElement(svg, "line", { x1: pad.left, x2: width - pad.right, y1: sy(v), y2: sy(v), stroke: "var(--grid)" });
    svgElement(svg, "text", { x: pad.left - 8, y: sy(v) + 4, "text-anchor": "end" }, short(v));
  }
  for (const v of ticks(x0, x1, Math.max(2, Math.round(width / 130))))
    svgElement(svg, "text", { x: sx(v), y: height - 7, "text-anchor": sx(v) > width - 34 ? "end" : "middle" }, xShort(v));
  svgElement(svg, "line", { x1: pad.left, x2: width - pad.right, y1: height - pad.bottom, y2: height - pad.bottom, stroke: "var(--line)" });
  const id = "clip" + ++clips;
  svgElement(svgElement(svg, "clipPath", { id }), "rect", { x: pad.left - 5, y: pad.top - 6, width: width - pad.left - pad.right + 10, height: height - pad.top - pad.bottom + 8 });
  const plot = svgElement(svg, "g", { "clip-path": `url(#${id})`, fill: "none", "stroke-linejoin": "round" });
  for (const l of lines) if (l.s.smooth && view.smooth) svgElement(plot, "path", { d: path(l.xs, l.raw, sx, sy, log), stroke: colour(l.run), "stroke-width": 1, opacity: 0.25 });
  for (const l of lines) {
    const g = svgElement(plot, "g", { stroke: colour(l.run) });
    svgElement(g, "path", { d: path(l.xs, l.ys, sx, sy, log), "stroke-width": 2, "stroke-dasharray": l.s.dots ? "5 4" : "none" });
    if (l.s.dots) l.ys.forEach((v, k) => { if (v !== null && l.xs[k] !== null) svgElement(g, "circle", { cx: sx(l.xs[k]), cy: sy(v), r: l.ys.length > 80 ? 2 : 3.5, fill: "var(--panel)", "stroke-width": 2 }); });
  }
  hover(chart, svg, lines, { sx, sy, x0, x1, width, height, pad });
}
function nearest(xs, x) {
  let best = -1;
  for (let k = 0; k < xs.length; ++k) if (xs[k] !== null && (best < 0 || Math.abs(xs[k] - x) < Math.abs(xs[best] - x))) best = k;
  return best;
}
function hover(chart, svg, lines, g) {
  const rule = svgElement(svg, "line", { y1: g.pad.top, y2: g.height - g.pad.bottom, stroke: "var(--quiet)", "stroke-dasharray": "2 3", visibility: "hidden" });
  const marks = svgElement(svg, "g", {});
  const tip = element("div", { class: "tip", hidden: "" });
  chart.box.appendChild(tip);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); marks.replaceChildren(); });
  svg.addEventListener("pointermove", e => {
    const r = svg.getBoundingClientRect(), px = (e.clientX - r.left) * g.width / r.width;
    const x = g.x0 + (px - g.pad.left) / (g.width - g.pad.left - g.pad.right) * (g.x1 - g.x0);
    marks.replaceChildren();
    const rows = [];
    let at = null;
    for (const l of lines) {
      const k = nearest(l.xs, x);
      if (k < 0 || Math.abs(g.sx(l.xs[k]) - px) > Math.max(30, g.width / l.xs.length)) continue;
      if (at === null || !l.s.dots) at = l.xs[k];
      if (l.ys[k] !== null) svgElement(marks, "circle", { cx: g.sx(l.xs[k]), cy: g.sy(l.ys[k]), r: 4, fill: colour(l.run) });
      rows.push([l, l.raw[k]]);
    }
    if (at === null) { tip.hidden = true; return; }
    tip.replaceChildren(element("b", {}, `${view.x} ${xText(at)}`));
    for (const [l, v] of rows) {
      const row = element("div"), name = element("span");
      name.append(element("i", { class: "swatch", style: `background:${colour(l.run)}` }), (runs.length > 1 ? runs[l.run].name + " " : "") + l.s.label);
      row.append(name, element("span", {}, v === null ? "not finite" : short(v)));
      tip.append(row);
    }
    rule.setAttribute("x1", g.sx(at)); rule.setAttribute("x2", g.sx(at)); rule.setAttribute("visibility", "visible");
    tip.hidden = false;
    const left = g.sx(at) * r.width / g.width + 12;
    tip.style.left = (left + 24 + tip.offsetWidth > chart.box.clientWidth ? left - tip.offsetWidth - 2 : left + 22) + "px";
    tip.style.top = Math.max(4, e.clientY - r.top - 10) + "px";
  });
}
const drawAll = () => charts.forEach(draw);

function buttons(parent, options, current, change) {
  const group = element("div", { class: "group" });
  for (const [key, text] of options) {
    const b = element("button", { type: "button", "aria-pressed": String(key === current()) }, text);
    b.onclick = () => { change(key); group.querySelectorAll("button").forEach((o, i) => o.setAttribute("aria-pressed", String(options[i][0] === current()))); drawAll(); };
    group.append(b);
  }
  parent.append(group);
}
const controls = document.getElementById("controls");
buttons(controls, Object.entries(axes).map(([k, v]) => [k, v[0]]), () => view.x, k => { view.x = k; });
buttons(controls, [[false, "Linear"], [true, "Log"]], () => view.log, k => { view.log = k; });
const label = element("label", {}, "Smoothing");
const slider = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smooth });
slider.oninput = () => { view.smooth = +slider.value; drawAll(); };
label.append(slider);
controls.append(label);
if (runs.length > 1) {
  const legend = element("div", { class: "legend" });
  runs.forEach((run, i) => {
    const b = element("button", { type: "button", "aria-pressed": "true" });
    b.append(element("i", { class: "swatch", style: `background:${colour(i)};margin:0` }), run.name);
    b.onclick = () => {
      if (view.hidden.has(i)) view.hidden.delete(i); else view.hidden.add(i);
      b.setAttribute("aria-pressed", String(!view.hidden.has(i)));
      drawAll();
    };
    legend.append(b);
  });
  controls.append(legend);
}
const holder = document.getElementById("charts");
for (const chart of charts) {
  chart.box = element("section", { class: "chart" + (chart.wide ? " wide" : "") });
  const head = element("h2", {}, chart.title);
  if (chart.note) head.append(element("span", {}, chart.note));
  chart.box.append(head);
  holder.append(chart.box);
}
drawAll();
let waiting = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(drawAll); });
})();
)js";

}  // namespace krait

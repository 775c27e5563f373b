"""How the report page looks, light and dark, and the few lines that make it answer the mouse."""

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root:not([data-theme=light]) {
    --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --rule: #30363d; --card: #161b22; } }
:root[data-theme=dark] {
  --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --rule: #30363d; --card: #161b22; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1040px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
header { display: flex; justify-content: space-between; align-items: start; gap: 16px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 6px; }
p { margin: 4px 0; color: var(--soft); }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: 4px 12px; cursor: pointer; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px; }
.tiles b { display: block; font-size: 20px; font-weight: 600; }
.tiles span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; margin: 6px 0; }
svg text { font-size: 12px; fill: var(--soft); }
svg .row { text-anchor: end; }
svg .tick { text-anchor: middle; }
svg .axis { stroke: var(--rule); fill: none; }
svg .grid { stroke: var(--rule); stroke-dasharray: 2 4; fill: none; }
svg .border { stroke: var(--ink); stroke-dasharray: 3 3; fill: none; }
svg .line { stroke: #0072b2; stroke-width: 1.6; fill: none; }
svg .cells { shape-rendering: crispEdges; }
.dense { fill: #56b4e9; background: #56b4e9; } .experts { fill: #0072b2; background: #0072b2; }
.plan { fill: #999999; background: #999999; } .wait { fill: #d55e00; background: #d55e00; }
.disk { fill: #009e73; background: #009e73; } .copy { fill: #cc79a7; background: #cc79a7; }
.garbage { fill: #e69f00; background: #e69f00; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; color: var(--soft); font-size: 13px;
  gap: 16px; min-height: 20px; }
.scale i { display: inline-block; width: 16px; height: 10px; }
.share { display: flex; height: 26px; border-radius: 6px; overflow: hidden; margin: 8px 0; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; font-size: 14px; }
th, td { text-align: left; padding: 4px 10px; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; font-weight: 400; }
thead th { color: var(--soft); }
td.number { font-variant-numeric: tabular-nums; }
details { margin-top: 24px; }
summary { cursor: pointer; font-size: 17px; font-weight: 700; }
@media print { button { display: none; } details { display: block; } }
"""

SCRIPT = """
"use strict";
document.querySelector("button").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = getComputedStyle(root).getPropertyValue("--paper").trim() === "#0d1117";
  root.dataset.theme = isDark ? "light" : "dark";
});
for (const heat of document.querySelectorAll("svg.heat")) {
  const cells = JSON.parse(heat.dataset.cells);
  const said = heat.parentElement.querySelector("output");
  heat.addEventListener("mousemove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(heat.getScreenCTM().inverse());
    const layer = Math.floor(at.y / cells.row);
    const column = Math.floor((at.x - cells.left) / cells.across);
    const hits = cells.hits[layer]?.[column];
    if (hits === undefined) { said.value = ""; return; }
    const all = hits + cells.misses[layer][column];
    const first = column * cells.forwards;
    const last = Math.min(first + cells.forwards, cells.last) - 1;
    const when = first === last ? `forward ${first}` : `forwards ${first} to ${last}`;
    said.value = `layer ${layer}, ${when}: ${hits} of ${all} held`;
  });
  heat.addEventListener("mouseleave", () => { said.value = ""; });
}
"""

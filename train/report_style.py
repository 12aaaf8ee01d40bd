"""How a report page looks, and what it does under a pointer: a style sheet and a script that need nothing else."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #23262b; --soft: #656b75; --rule: #e4e4df; --code: #f3f3ef;
  --good: #22764a; --warn: #96590a; --bad: #b3312c;
  --c0: #2666ad; --c1: #c8581c; --c2: #2c8a5b; --c3: #8b50bd;
  --c4: #a8810c; --c5: #bf3d74; --c6: #17899b; --c7: #6a6a6a;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #17191c; --card: #1f2226; --ink: #e3e5e8; --soft: #9ba2ac; --rule: #343940; --code: #282c31;
  --good: #6cc795; --warn: #e5ae5c; --bad: #f08a82;
  --c0: #75aef0; --c1: #f09a63; --c2: #6ccb98; --c3: #c498ee;
  --c4: #dcbb52; --c5: #f088b3; --c6: #5cc9d8; --c7: #b0b0b0;
} }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-top: .9rem; font-size: .9rem; }
.soft, figcaption small { color: var(--soft); } .note { font-size: .88rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.tiles div, figure, .box { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tiles div { padding: .6rem .9rem; }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tiles dd small { display: block; color: var(--soft); font-size: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 1.1rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; } .whole { white-space: nowrap; }
td, th { overflow-wrap: break-word; } td { min-width: 4.5rem; } td:has(.state) { min-width: 11rem; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { margin: 0; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--code);
  border-radius: 8px; }
.copy { position: relative; margin: .5rem 0; }
.copy button { position: absolute; top: .45rem; right: .45rem; font: inherit; font-size: .8rem; padding: .1rem .6rem;
  color: var(--ink); background: var(--card); border: 1px solid var(--rule); border-radius: 6px; cursor: pointer; }
.copy pre { padding-right: 5rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--soft); }
details.box { padding: .6rem 1rem; } details.box > summary { color: var(--ink); font-weight: 500; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .9rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .9rem;
  align-items: start; margin: .9rem 0; }
.pictures .wide { grid-column: 1 / -1; }
figure { margin: 0; padding: .7rem .8rem; position: relative; min-width: 0; }
.charts figure { display: flex; flex-direction: column; justify-content: space-between; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 3rem; }
figcaption { font-size: .92rem; font-weight: 500; margin-bottom: .35rem; }
figcaption small { display: block; font-weight: 400; font-size: .8rem; }
.pictures img { display: block; max-width: 100%; height: auto; margin: 0 auto; padding: 4px; background: #fff;
  border-radius: 4px; }
.wide img { min-width: 40rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 10.5px; font-family: inherit; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .pointer { stroke: var(--soft); stroke-dasharray: 2 2; pointer-events: none; }
svg .resumed { stroke: var(--soft); stroke-dasharray: 1 4; } svg .nonfinite { stroke: var(--bad); stroke-opacity: .45; }
svg path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
svg path.band { stroke-width: 1.3; stroke-opacity: .3; } svg circle { fill: currentColor; }
svg .dashed path:not(.band) { stroke-dasharray: 5 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 .8rem; padding: 0; list-style: none;
  font-size: .9rem; }
.swatch { display: inline-block; width: 1.1em; margin-right: .45em; border-top: 3px solid currentColor;
  vertical-align: .25em; }
.swatch.dashed { border-top-style: dashed; }
figure .legend { gap: .1rem .9rem; margin: .1rem 0; font-size: .8rem; font-weight: 400; }
.tip { position: absolute; z-index: 1; padding: .3rem .55rem; pointer-events: none; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; box-shadow: 0 2px 8px #0003; font-size: .8rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
footer { margin-top: 3.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.4rem; } h2 { margin-top: 2.2rem; } }
@media print { body { max-width: none; } .copy button, nav { display: none; } figure { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const told = value => Number.isInteger(value) && Math.abs(value) < 1e9 ? value.toLocaleString("en") :
  Math.abs(value) >= 1e-4 && Math.abs(value) < 1e5 ? String(+value.toPrecision(4)) : value.toExponential(2);
for (const svg of document.querySelectorAll("svg[data-last]")) {
  const [left, right, width] = svg.dataset.area.split(" ").map(Number), last = Number(svg.dataset.last);
  const curves = [...svg.querySelectorAll("g[data-points]")].map(group => ({
    colour: group.getAttribute("class"), label: group.dataset.label, points: JSON.parse(group.dataset.points)}));
  const figure = svg.parentElement, line = svg.querySelector(".pointer"), tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const show = event => {
    const box = svg.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) * width / box.width - left) / (right - left) * last;
    let nearest = null;
    for (const {points: [steps]} of curves) for (const step of steps)
      if (nearest === null || Math.abs(step - wanted) < Math.abs(nearest - wanted)) nearest = step;
    if (nearest === null) return;
    const x = left + nearest / last * (right - left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.setAttribute("visibility", "visible");
    tip.replaceChildren(`step ${nearest.toLocaleString("en")}`);
    for (const {colour, label, points: [steps, middle, low, high]} of curves) {
      let at = -1;
      steps.forEach((step, i) => { if (at < 0 || Math.abs(step - nearest) < Math.abs(steps[at] - nearest)) at = i; });
      // a curve has nothing to say before it begins and after it ends
      if (at < 0 || nearest < steps[0] || nearest > steps.at(-1)) continue;
      const row = document.createElement("div"), swatch = document.createElement("span");
      swatch.className = "swatch " + colour;
      const range = (low ? ` (${told(low[at])} to ${told(high[at])})` : "") +
        (steps[at] === nearest ? "" : `, at ${steps[at].toLocaleString("en")}`);
      row.append(swatch, (curves.length > 1 ? label + ": " : "") + told(middle[at]) + range);
      tip.append(row);
    }
    tip.hidden = false;
    const origin = figure.getBoundingClientRect(), place = box.left - origin.left + x * box.width / width;
    const fits = place + tip.offsetWidth + 14 < figure.clientWidth;
    tip.style.left = Math.max(fits ? place + 10 : place - tip.offsetWidth - 10, 2) + "px";
    tip.style.top = box.top - origin.top + 8 + "px";
  };
  const hide = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
for (const box of document.querySelectorAll(".copy")) {
  const button = document.createElement("button"), text = box.querySelector("pre");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  box.append(button);
}
"""

"""The page's own script: draws the figures, changes their x axis and colours, hides trials, opens details of rows.

It makes no element from text and takes nothing from outside the page.
"""

from __future__ import annotations

SCRIPT = """
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colours = new Map(Object.entries(page.dark));
  const hidden = new Set();
  const config = {
    displaylogo: false,
    responsive: true,
    plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],  // not the one that sends charts away
  };
  let axis = "step";

  function recoloured(value) {
    if (typeof value === "string") return (dark.matches && colours.get(value)) || value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value.slice() : value.map(recoloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, recoloured(part)]));
  }

  function draw(chart) {
    const element = document.getElementById(chart.id);
    const data = recoloured(chart.data);
    const layout = recoloured(chart.layout);
    const places = chart.axes[axis];
    if (places) {
      data.forEach((trace, i) => { trace.x = places[i]; });
      layout.xaxis.title.text = page.axes[axis];
    }
    for (const trace of data) if (hidden.has(trace.meta)) trace.visible = false;
    return Plotly.react(element, data, layout, config);
  }

  // A box drawn over the parallel coordinates keeps the lines of its points.
  function pick(element, chosen) {
    const usual = (trace) => (trace.meta < page.own ? 1 : 0.45);
    const opacity = element.data.map((trace, i) => (chosen && !chosen.has(i) ? 0.06 : usual(trace)));
    return Plotly.restyle(element, { opacity });
  }
  function listen() {
    const element = document.getElementById("parallel-coordinates");
    if (element === null) return;
    element.on("plotly_selected", (event) => {
      if (event) pick(element, new Set(event.points.map((point) => point.curveNumber)));
    });
    element.on("plotly_deselect", () => pick(element, null));
  }

  let drawing = 0;
  async function drawAll() {
    const turn = ++drawing;
    document.documentElement.dataset.drawn = "";
    for (const chart of page.charts) {
      await draw(chart);
      await new Promise((next) => setTimeout(next));  // the page stays usable between two charts
      if (turn !== drawing) return;
    }
    document.documentElement.dataset.drawn = axis;
  }

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      axis = button.dataset.axis;
      for (const other of document.querySelectorAll("[data-axis]"))
        other.setAttribute("aria-pressed", String(other === button));
      drawAll();
    });
  }
  for (const button of document.querySelectorAll("[data-trial]")) {
    button.addEventListener("click", () => {
      const trial = Number(button.dataset.trial);
      if (!hidden.delete(trial)) hidden.add(trial);
      button.setAttribute("aria-pressed", String(!hidden.has(trial)));
      drawAll();
    });
  }
  for (const button of document.querySelectorAll("[aria-controls]")) {
    button.addEventListener("click", () => {
      const row = document.getElementById(button.getAttribute("aria-controls"));
      row.hidden = !row.hidden;
      button.setAttribute("aria-expanded", String(!row.hidden));
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll().then(listen);
})();
"""

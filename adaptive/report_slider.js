"use strict";
{
  const stops = JSON.parse(document.getElementById("stops").textContent);
  const slider = document.getElementById("slider");
  const marker = document.getElementById("marker");
  const interval = document.getElementById("interval");
  const each = (selector, change) => document.querySelectorAll(selector).forEach(change);
  const set = (element, values) => {
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
  };
  const show = () => {
    const stop = stops[slider.value];
    each("[data-show]", (element) => { element.textContent = stop[element.dataset.show]; });
    each("[data-threshold]", (element, k) => { element.textContent = stop.thresholds[k]; });
    each("[data-share]", (element, k) => { element.textContent = stop.shares[k]; });
    each("[data-width]", (element, k) => { element.style.width = stop.widths[k]; });
    set(marker, { cx: stop.x, cy: stop.y });
    set(interval, { x1: stop.x, x2: stop.x, y1: stop.low, y2: stop.high });
    set(slider, { "aria-valuetext": stop.spoken });
  };
  slider.addEventListener("input", show);
  document.getElementById("control").hidden = false;
  show();
}

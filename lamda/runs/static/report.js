"use strict";
// Under a pointer, the values of a chart's curves at that place.
const tell = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });

for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const pointer = svg.querySelector(".pointer");
  const values = svg.parentElement.querySelector(".values");

  const nearest = (curve, x) => {
    let low = 0;
    let high = curve.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (curve.x[middle] < x) low = middle;
      else high = middle;
    }
    return x - curve.x[low] < curve.x[high] - x ? low : high;
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * chart.width;
    const share = Math.min(1, Math.max(0, (place - chart.left) / (chart.right - chart.left)));
    const x = chart.low + share * (chart.high - chart.low);
    const found = chart.curves.filter((curve) => curve.x.length).map((curve) => [curve, nearest(curve, x)]);
    if (!found.length) return;
    const [first, index] = found[0];
    const at = chart.left + ((first.x[index] - chart.low) / (chart.high - chart.low)) * (chart.right - chart.left);
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
    pointer.setAttribute("visibility", "visible");
    const shown = found.map(([curve, i]) => {
      const value = curve.y[i] === null ? "not finite" : tell.format(curve.y[i]);
      return found.length > 1 ? `${curve.name} ${value}` : value;
    });
    values.textContent = `${tell.format(first.x[index])} tokens: ${shown.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    pointer.setAttribute("visibility", "hidden");
    values.textContent = "";
  });
}

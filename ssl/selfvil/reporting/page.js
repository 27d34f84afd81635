// Shows the values of a chart's lines at the pointer, and opens what is folded before printing. The page is complete
// without it. Values are found from the drawn paths, by the axes in the chart's data-attributes.
"use strict";
document.documentElement.classList.add("scripted");
const box = document.getElementById("value");
const numbers = text => text.split(" ").map(Number);
const digits = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));

function values(svg, event) {
  const [left, top, width, height] = numbers(svg.dataset.plot);
  const [x0, x1] = numbers(svg.dataset.x), [y0, y1] = numbers(svg.dataset.y), log = svg.dataset.log === "1";
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const x = Math.min(Math.max(at.x - left, 0), width);
  const lines = [`${digits(x0 + x / width * (x1 - x0))} ${svg.dataset.unit}`];
  for (const path of svg.querySelectorAll("path.line")) {
    const points = path.getAttribute("d").slice(1).split("L").map(numbers);
    const nearest = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    if (x > points[points.length - 1][0] + 6) continue;  // this run had ended
    const share = 1 - nearest[1] / height;
    lines.push(`${path.dataset.letter} ${digits(log ? y0 * (y1 / y0) ** share : y0 + share * (y1 - y0))}`.trim());
  }
  return lines.join("\n");
}

for (const svg of document.querySelectorAll("svg[data-plot]")) {
  const show = event => {
    box.textContent = values(svg, event);
    box.hidden = false;
    const side = event.clientX > innerWidth / 2 ? -box.offsetWidth - 14 : 14;
    box.style.left = `${Math.max(4, event.clientX + side)}px`;
    box.style.top = `${Math.max(4, event.clientY - box.offsetHeight - 10)}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { box.hidden = true; });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));

// Draw the charts of the report in the colors of the page, again when the color scheme changes.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const printing = matchMedia("print");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 640;

  // Replace the names of CSS variables in a figure by their values.
  const colored = (value, style) => {
    if (typeof value === "string" && value.startsWith("--")) {
      return style.getPropertyValue(value).trim() || value;
    }
    if (Array.isArray(value)) return value.map((one) => colored(one, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, one]) => [key, colored(one, style)]));
    }
    return value;
  };

  const axis = (given, style, isX) => ({
    fixedrange: true, zeroline: false, automargin: true, ticks: "",
    gridcolor: style.getPropertyValue("--grid").trim(),
    linecolor: style.getPropertyValue("--line").trim(),
    showgrid: !isX, showline: isX,
    ...given,
    title: isX && given.title ? { ...given.title, standoff: 10 } : undefined,
  });

  const draw = (element, isPrinting) => {
    const style = getComputedStyle(document.documentElement);
    const figure = colored(figures[element.id.slice("plot-".length)], style);
    const ink = style.getPropertyValue("--ink-2").trim();
    const layout = {
      ...figure.layout,
      xaxis: axis(figure.layout.xaxis, style, true),
      yaxis: axis(figure.layout.yaxis, style, false),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 14, t: 12, b: 44 },
      showlegend: false, dragmode: false, hovermode: "closest",
      height: Number(element.dataset.height),
      width: isPrinting ? PRINT_WIDTH : element.clientWidth,
    };
    return Plotly.react(element, figure.data, layout,
      { displayModeBar: false, responsive: false, scrollZoom: false });
  };

  const drawAll = (isPrinting) => Promise.all(
    [...document.querySelectorAll(".plot")].map((element) => draw(element, isPrinting)));
  const redraw = () => drawAll(printing.matches);

  redraw().then(() => { document.documentElement.dataset.drawn = "yes"; });
  dark.addEventListener("change", redraw);
  printing.addEventListener("change", redraw);
  addEventListener("beforeprint", () => drawAll(true));
  addEventListener("afterprint", () => drawAll(false));
  let waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(redraw);
  });
})();

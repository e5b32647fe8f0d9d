// The value of the nearest point, under a pointer or by the arrow keys.
const number = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(5));
const quantity = (axis, v) => `${axis.name} ${number(v)} ${axis.unit}`.trim();

// Where a value is between the ends of a frame, in pixels; null outside.
const along = ([a, b, from, to], logarithmic, value) => {
  const f = logarithmic ? Math.log : v => v;
  const at = from + (f(value) - f(a)) / (f(b) - f(a)) * (to - from);
  return at > Math.min(from, to) - 1 && at < Math.max(from, to) + 1 ? at : null;
};

for (const figure of document.querySelectorAll("figure.chart")) {
  const { axes, y, names, traces, places, views } = JSON.parse(figure.querySelector("script").textContent);
  const points = traces.flatMap(trace => trace.y.map((_, i) => ({ trace, i })));
  const series = points.map(({ trace }) => trace.series);
  const plot = figure.querySelector(".plot");
  const [mark, tip] = plot.querySelectorAll(".mark, output");
  let current = -1;

  const hide = () => { mark.hidden = tip.hidden = true; };

  // The drawing that is shown, its scale, and the points that are seen on it.
  const view = () => {
    const svg = [...plot.querySelectorAll(".view")].find(one => one.getClientRects().length);
    const off = new Set([...figure.querySelectorAll(".key input:not(:checked)")].map(one => +one.value));
    const frame = views[svg.id];
    const at = points.map(({ trace, i }) => [
      along(frame.x, axes[frame.axis].logarithmic, places[trace.x[frame.axis]][i]),
      along(frame.y, frame.logarithmic, trace.y[i]),
    ]);
    const seen = [...at.keys()].filter(i => !at[i].includes(null) && !off.has(series[i]));
    return { at, seen, scale: svg.getBoundingClientRect().width / svg.viewBox.baseVal.width };
  };

  const text = ({ trace, i }) => [
    `${names[trace.series]}, ${trace.label}`,
    quantity(y, trace.y[i]) + (trace.low ? ` (${number(trace.low[i])} to ${number(trace.high[i])})` : ""),
    axes.map((axis, k) => quantity(axis, places[trace.x[k]][i])).join(", "),
  ].join("\n");

  const show = (i, { at, scale }) => {
    current = i;
    const [x, y] = at[i].map(one => one * scale);
    mark.hidden = tip.hidden = false;
    mark.style.color = `var(--series-${series[i] % COLOURS})`;
    mark.style.left = `${x}px`;
    mark.style.top = `${y}px`;
    tip.textContent = text(points[i]);
    tip.style.left = `${Math.max(0, Math.min(x + 14, plot.clientWidth - tip.offsetWidth))}px`;
    const below = y < tip.offsetHeight + 14;
    tip.style.top = `${below ? y + 14 : y - tip.offsetHeight - 14}px`;
  };

  const point = event => {
    const found = view(), box = plot.getBoundingClientRect();
    const distance = i => Math.hypot(
      found.at[i][0] * found.scale - (event.clientX - box.left),
      found.at[i][1] * found.scale - (event.clientY - box.top));
    if (!found.seen.length) return hide();
    show(found.seen.reduce((best, i) => (distance(i) < distance(best) ? i : best)), found);
  };

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  figure.addEventListener("change", hide);
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const found = view(), { seen } = found;
    if (!seen.length) return;
    show(seen.at((seen.indexOf(current) + step) % seen.length), found);
  });
}

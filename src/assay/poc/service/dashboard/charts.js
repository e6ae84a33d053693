// Three small charts, drawn at the size they have, so that their type keeps its size on every screen.

const SVG = "http://www.w3.org/2000/svg";
const BAND_STEPS = 64;

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, typeof value === "number" ? value.toFixed(2) : value);
  made.append(...children);
  return made;
}

function label(text, x, y, attributes = {}) {
  return element("text", { x, y, ...attributes }, text);
}

/** A frame to draw in: the size of the element less the margins, with linear scales. */
function frame(svg, [top, right, bottom, left]) {
  const { clientWidth: width, clientHeight: height } = svg;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return { left, top, right: width - right, bottom: height - bottom };
}

function scale(low, high, start, end) {
  return (value) => start + ((value - low) / (high - low || 1)) * (end - start);
}

/** Round values between low and high, about `wanted` of them. */
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9) || 0; i * step <= high + step * 1e-9; i += 1) found.push(i * step); // never -0
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The next of 1, 2, 3, 5, 7 times a power of ten: an axis that seldom changes. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 7, 10].map((factor) => factor * power).find((size) => size >= value * (1 - 1e-9));
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
}

function area(upper, lower) {
  return `${path(upper)}L${path([...lower].reverse()).slice(1)}Z`;
}

/** An empty frame in the place of a chart. */
function drawNothing(svg) {
  const box = frame(svg, [8, 12, 24, 12]);
  const line = (y, kind) => element("path", { d: path([[box.left, y], [box.right, y]]), class: kind });
  const middle = (box.top + box.bottom) / 2;
  svg.replaceChildren(line(box.top, "grid"), line(middle, "grid"), line(box.bottom, "axis"));
}

/** Rate over time. history: [[seconds, rate], ...], ascending; span: seconds that are shown. */
function drawSpark(svg, history, span) {
  const box = frame(svg, [4, 5, 1, 0]);
  const now = history.at(-1)?.[0] ?? 0;
  const x = scale(now - span, now, box.left, box.right);
  const y = scale(0, roundUp(Math.max(1e-9, ...history.map(([, rate]) => rate))), box.bottom, box.top);
  const floor = element("path", { d: path([[box.left, box.bottom], [box.right, box.bottom]]), class: "axis" });
  const points = history.map(([time, rate]) => [x(time), y(rate)]);
  if (!points.length) return svg.replaceChildren(floor);
  const base = [[points[0][0], box.bottom], [points.at(-1)[0], box.bottom]];
  return svg.replaceChildren(
    element("path", { d: area(points, base), class: "fill" }),
    floor,
    element("path", { d: path(points), class: "line" }),
    element("circle", { cx: points.at(-1)[0], cy: points.at(-1)[1], r: 3, class: "dot" }),
  );
}

/**
 * The measured share over the nonces checked, and how far chance alone may carry it from the law of the block.
 * history: [[checked, share], ...], ascending; the last one is now. lawError: error of the law at so many nonces, a part of
 * which, that of the block, more nonces do not reduce.
 */
function drawFunnel(svg, history, law, lawError) {
  const box = frame(svg, [8, 12, 24, 54]);
  const [checked, share] = history.at(-1);
  const most = roundUp(Math.max(checked, 100));
  const ofBlock = Math.max(0, lawError ** 2 - (law * (1 - law)) / checked);
  const error = (n) => Math.sqrt(ofBlock + (law * (1 - law)) / n);
  const half = Math.max(5 * error(most), roundUp(1.2 * Math.abs(share - law) + 1e-9));
  const [low, high] = [Math.max(0, law - half), Math.min(1, law + half)];
  const x = scale(0, most, box.left, box.right);
  const y = scale(low, high, box.bottom, box.top);
  const sizes = Array.from({ length: BAND_STEPS }, (_, i) => most * ((i + 1) / BAND_STEPS) ** 2);
  const edge = (k) => sizes.map((n) => [x(n), y(law + k * error(n))]);
  const clip = element("clipPath", { id: "funnel-clip" }, element("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }));
  // The first few nonces are all noise: a line through them would leave the picture up and down.
  const settled = history.filter(([n]) => n >= most / 100);
  const inside = element("g", { "clip-path": "url(#funnel-clip)" },
    element("path", { d: area(edge(2), edge(-2)), class: "band" }),
    element("path", { d: area(edge(1), edge(-1)), class: "band" }),
    element("path", { d: path([[box.left, y(law)], [box.right, y(law)]]), class: "law" }),
    element("path", { d: path(settled.map(([n, value]) => [x(n), y(value)])), class: "line" }),
  );
  const { found, digits } = ticks(100 * low, 100 * high, 4);
  svg.replaceChildren(
    clip,
    ...found.map((tick) => element("path", { d: path([[box.left, y(tick / 100)], [box.right, y(tick / 100)]]), class: "grid" })),
    ...found.map((tick) => label(`${tick.toFixed(digits)}${THIN}%`, box.left - 8, y(tick / 100) + 4, { "text-anchor": "end" })),
    inside,
    element("circle", { cx: x(checked), cy: Math.min(box.bottom, Math.max(box.top, y(share))), r: 4, class: "dot" }),
    ...nonceAxis(x, most, box),
  );
}

function nonceAxis(x, most, box) {
  const { found } = ticks(0, most, (box.right - box.left) / 100);
  const end = (tick) => (tick === 0 ? "start" : tick > 0.97 * most ? "end" : "middle");
  return found.map((tick) => label(count(tick), x(tick), box.bottom + 18, { "text-anchor": end(tick) }));
}

/** Counts per bin over what the law of the block expects of so many nonces; `target` parts valid from not valid. */
function drawHistogram(svg, { low, high, counts, expected, expected_errors: errors }, target) {
  const box = frame(svg, [20, 12, 24, 12]);
  const spread = errors.map((error) => 2 * error);
  const top = Math.max(1, ...counts, ...expected.map((mean, i) => mean + spread[i]));
  const x = scale(low, high, box.left, box.right);
  const y = scale(0, top, box.bottom, box.top);
  const width = (high - low) / counts.length;
  const centre = (i) => low + (i + 0.5) * width;
  const bars = counts.map((n, i) => element("rect", {
    x: x(low + i * width) + 0.5,
    y: y(n),
    width: Math.max(1, x(low + width) - x(low) - 1),
    height: Math.max(0, box.bottom - y(n)),
    class: centre(i) < target ? "bar" : "rest",
  }));
  const edge = (sign) => expected.map((mean, i) => [x(centre(i)), y(Math.max(0, mean + sign * spread[i]))]);
  const { found, digits } = ticks(low, high, (box.right - box.left) / 60);
  svg.replaceChildren(
    ...bars,
    ...[1, -1].map((sign) => element("path", { d: path(edge(sign)), class: "edge" })),
    element("path", { d: path(expected.map((mean, i) => [x(centre(i)), y(mean)])), class: "law" }),
    element("path", { d: path([[box.left, box.bottom], [box.right, box.bottom]]), class: "axis" }),
    ...found.map((tick) => label(tick.toFixed(digits), x(tick), box.bottom + 18, { "text-anchor": "middle" })),
    ...targetMark(x, box, low, high, target),
  );
}

function targetMark(x, box, low, high, target) {
  if (target <= low || target >= high) return [];
  const at = x(target);
  const left = at > (box.left + box.right) / 2;
  return [
    element("path", { d: path([[at, box.top - 14], [at, box.bottom]]), class: "target" }),
    label(`r_target ${target}`, at + (left ? 6 : -6), box.top - 6, { "text-anchor": left ? "start" : "end" }),
  ];
}

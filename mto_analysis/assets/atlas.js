(() => {
  const $ = (id) => document.getElementById(id);
  const { checkpoints, scores } = JSON.parse($("data").textContent);
  const body = document.querySelector("#checkpoints tbody");
  const rows = [...body.rows];
  const boxOf = (row) => row.querySelector("input");
  const of = (row) => checkpoints[row.dataset.row];
  const COLOURS = 8, DASHES = ["", "7 4", "2 3", "9 3 2 3"];

  const number = (value) => {
    if (value === undefined) return "";
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const words = (measure) => measure.replaceAll("_", " ");

  // ---- a measure of a checkpoint, and its summaries over depth ----
  const curveOf = (checkpoint) => checkpoint.measures[$("measure").value];
  const SUMMARIES = {
    first: ({ depth, value }) => (depth[0] === 0 ? value[0] : undefined),  // some measures begin later
    last: ({ depth, value }, { layers }) => (depth.at(-1) === layers ? value.at(-1) : undefined),
    min: ({ value }) => Math.min(...value),
    max: ({ value }) => Math.max(...value),
  };
  const summary = (checkpoint, name) => {
    const curve = curveOf(checkpoint);
    return curve && SUMMARIES[name](curve, checkpoint);
  };

  // ---- table: filter, sort, choose ----
  const isShown = (row) => !row.hidden;
  function filter() {
    const asked = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const { label, family, backbone, layout, style, basis } = of(row);
      const text = `${label} ${family} ${backbone} ${layout}`.toLowerCase();
      row.hidden = !(asked.every((word) => text.includes(word))
        && [["family", family], ["style", style], ["evidence", basis]].every(
          ([id, value]) => !$(id).value || $(id).value === value));
    }
    draw();
  }

  const KEYS = {
    label: (c) => c.label, family: (c) => c.family, backbone: (c) => c.backbone, epochs: (c) => c.epochs,
    layers: (c) => c.layers, loss: (c) => c.loss, evidence: (c) => c.evidence,
    first: (c) => summary(c, "first"), min: (c) => summary(c, "min"), last: (c) => summary(c, "last"),
  };
  const heads = [...document.querySelectorAll("#checkpoints th[data-key]")];
  function sort() {
    const head = heads.find((each) => each.hasAttribute("aria-sort"));
    if (!head) return;
    const key = KEYS[head.dataset.key], sign = head.getAttribute("aria-sort") === "ascending" ? 1 : -1;
    const lacks = (value) => value === undefined || value === null || value === "";
    rows.sort((a, b) => {
      const [x, y] = [key(of(a)), key(of(b))];
      if (lacks(x) || lacks(y)) return lacks(x) - lacks(y);  // last in both directions
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
    body.append(...rows);
  }
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      sort();
      draw();
    });
  }

  // ---- drawing ----
  const NS = "http://www.w3.org/2000/svg";
  function add(parent, tag, attributes, text) {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }
  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at++) found.push(at * step);
    return found;
  }
  /** An empty drawing as wide as its place, so that letters keep their size. */
  function blank(svg) {
    const width = Math.max(280, Math.min(992, svg.parentElement.clientWidth)), height = width < 500 ? 300 : 380;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    return { left: 66, right: width - 16, top: 12, bottom: height - 54 };
  }
  const sayIn = (svg, frame, text) =>
    add(svg, "text", { x: (frame.left + frame.right) / 2, y: frame.bottom / 2, "text-anchor": "middle" }, text);
  /** Axes with ticks; gives what maps numbers to places. */
  function axes(svg, frame, xs, ys, xWords, yWords) {
    const widen = (values) => {
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const room = (high - low || Math.abs(high) || 1) * 0.04;
      return [low - room, high + room];
    };
    const [x0, x1] = widen(xs), [y0, y1] = widen(ys);
    const x = (value) => frame.left + (value - x0) / (x1 - x0) * (frame.right - frame.left);
    const y = (value) => frame.bottom - (value - y0) / (y1 - y0) * (frame.bottom - frame.top);
    for (const at of ticks(x0, x1, frame.right < 500 ? 4 : 8)) {
      add(svg, "line", { class: "axis", x1: x(at), x2: x(at), y1: frame.top, y2: frame.bottom });
      add(svg, "text", { x: x(at), y: frame.bottom + 18, "text-anchor": "middle" }, number(at));
    }
    for (const at of ticks(y0, y1, 5)) {
      add(svg, "line", { class: "axis", x1: frame.left, x2: frame.right, y1: y(at), y2: y(at) });
      add(svg, "text", { x: frame.left - 8, y: y(at) + 4, "text-anchor": "end" }, number(at));
    }
    const middle = (frame.top + frame.bottom) / 2;
    add(svg, "text", { x: (frame.left + frame.right) / 2, y: frame.bottom + 42, "text-anchor": "middle" }, xWords);
    add(svg, "text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, yWords);
    return [x, y];
  }

  /** How a line looks, for a legend. */
  function sample(at, dash) {
    const key = document.createElementNS(NS, "svg");
    for (const [name, value] of [["viewBox", "0 0 36 10"], ["aria-hidden", "true"], ["class", `colour${at % COLOURS}`]]) {
      key.setAttribute(name, value);
    }
    add(key, "path", { d: "M0,5H36", "stroke-dasharray": dash });
    return key;
  }

  const chosen = () => rows.filter((row) => boxOf(row).checked && curveOf(of(row)));
  function drawCurves() {
    const svg = $("curves"), measure = words($("measure").value), fraction = $("scale").value === "fraction";
    const shown = chosen().map(of), frame = blank(svg);
    $("legend").replaceChildren();
    svg.classList.remove("dimmed");
    svg.setAttribute("aria-label", shown.length
      ? `${measure} over ${fraction ? "the fraction of layers" : "layer depth"} of ${shown.map((c) => c.label).join(", ")}`
      : "Nothing chosen");
    if (!shown.length) {
      sayIn(svg, frame, "Choose checkpoints in the table.");
      drawNumbers(shown, measure);
      return;
    }
    const place = ({ depth, value }, i) => fraction ? depth[i] / Math.max(depth[value.length - 1], 1) : depth[i];
    const all = shown.map(curveOf), banded = $("bands").checked;
    const ys = all.flatMap(({ value, low, high }) => banded ? [...value, ...low, ...high] : value).filter((v) => v !== null);
    const [x, y] = axes(svg, frame, all.flatMap((curve) => curve.depth.map((_, i) => place(curve, i))), ys,
      fraction ? "fraction of all layers" : "layer depth", measure);
    shown.forEach((checkpoint, number_) => {
      const curve = curveOf(checkpoint), { depth, value, low, high } = curve;
      const dash = DASHES[Math.floor(number_ / COLOURS) % DASHES.length];
      const group = add(svg, "g", { class: `curve colour${number_ % COLOURS}` });
      const points = depth.map((_, i) => [x(place(curve, i)), i]);
      const bounded = points.filter(([, i]) => low[i] !== null && high[i] !== null);
      if (banded && bounded.length > 1) {
        const edge = (values, list) => list.map(([at, i]) => `${at},${y(values[i])}`);
        add(group, "polygon", { points: [...edge(high, bounded), ...edge(low, [...bounded].reverse())].join(" ") });
      }
      add(group, "path", { d: `M${points.map(([at, i]) => `${at},${y(value[i])}`).join("L")}`, "stroke-dasharray": dash });
      for (const [at, i] of points) {
        const interval = low[i] === null ? "" : ` (${number(low[i])} to ${number(high[i])})`;
        const dot = add(group, "circle", { cx: at, cy: y(value[i]), r: 3.5 });
        add(dot, "title", {}, `${checkpoint.label}, layer depth ${depth[i]}: ${number(value[i])}${interval}`);
      }
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.append(sample(number_, dash), checkpoint.label);
      const light = (on) => { svg.classList.toggle("dimmed", on); group.classList.toggle("lit", on); };
      for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]]) {
        button.addEventListener(event, () => light(on));
      }
      item.append(button);
      $("legend").append(item);
    });
    drawNumbers(shown, measure);
  }

  function drawNumbers(shown, measure) {
    const table = $("numbers").querySelector("table");
    const cell = (tag, text, scope) => Object.assign(document.createElement(tag), { textContent: text, ...(scope && { scope }) });
    const line = (...cells) => { const row = document.createElement("tr"); row.append(...cells); return row; };
    table.caption.textContent = shown.length ? `${measure} at each layer depth` : "Nothing chosen";
    table.tHead.replaceChildren(line(cell("th", "Layer depth", "col"), ...shown.map((c) => cell("th", c.label, "col"))));
    const depths = [...new Set(shown.flatMap((c) => curveOf(c).depth))].sort((a, b) => a - b);
    table.tBodies[0].replaceChildren(...depths.map((depth) => line(cell("th", depth, "row"),
      ...shown.map((c) => cell("td", number(curveOf(c).value[curveOf(c).depth.indexOf(depth)]))))));
  }

  function drawScatter() {
    const svg = $("scatter");
    if (!svg) return;
    const frame = blank(svg);
    $("point").textContent = "";
    $("families").replaceChildren();
    const task = $("task").value, measure = words($("measure").value);
    const points = rows.filter(isShown).map(of).map((checkpoint) => ({
      checkpoint, x: summary(checkpoint, $("summary").value), y: scores[task][checkpoint.checkpoint],
    })).filter(({ x, y }) => x !== undefined && y !== undefined);
    svg.setAttribute("role", points.length ? "group" : "img");
    svg.setAttribute("aria-label", `${task} against ${measure} of ${points.length} checkpoint${points.length === 1 ? "" : "s"}`);
    if (!points.length) {
      sayIn(svg, frame, "No checkpoint shown has both.");
      return;
    }
    const at = $("summary").selectedOptions[0].textContent;
    const [x, y] = axes(svg, frame, points.map((p) => p.x), points.map((p) => p.y), `${measure}, ${at}`, task);
    const families = [...new Set(points.map(({ checkpoint }) => checkpoint.family))].sort();
    families.forEach((family, at) => {
      const item = document.createElement("li");
      item.append(sample(at, ""), family);
      $("families").append(item);
    });
    // One stop of the tab key; arrow keys go from left to right.
    const dots = points.sort((a, b) => a.x - b.x).map((point, i) => {
      const text = `${point.checkpoint.label} (${point.checkpoint.family}): ${measure} ${number(point.x)}, ${task} ${number(point.y)}`;
      const dot = add(svg, "circle", {
        class: `colour${families.indexOf(point.checkpoint.family) % COLOURS}`, cx: x(point.x), cy: y(point.y), r: 6,
        tabindex: i ? -1 : 0, role: "img", "aria-label": text,
      });
      const show = () => { $("point").textContent = text; };
      dot.addEventListener("mouseenter", show);
      dot.addEventListener("focus", show);
      dot.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const next = dots[i + step];
        if (!next) return;
        event.preventDefault();
        dot.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
      return dot;
    });
  }

  function draw() {
    for (const row of rows) {
      for (const cell of row.querySelectorAll("[data-value]")) cell.textContent = number(summary(of(row), cell.dataset.value));
    }
    for (const row of rows) document.querySelector(`[data-about="${row.dataset.row}"]`).hidden = !boxOf(row).checked;
    const shown = rows.filter(isShown).length, picked = rows.filter((row) => boxOf(row).checked).length;
    const lacking = picked - chosen().length;
    $("count").textContent = `${shown} of ${rows.length} shown, ${picked} chosen`
      + (lacking ? `, ${lacking} without ${words($("measure").value)}` : "");
    drawCurves();
    drawScatter();
  }

  // ---- events ----
  $("search").addEventListener("input", filter);
  for (const id of ["family", "style", "evidence"]) $(id).addEventListener("change", filter);
  for (const id of ["scale", "bands"]) $(id).addEventListener("change", drawCurves);
  for (const id of ["task", "summary"]) $(id)?.addEventListener("change", drawScatter);
  $("measure").addEventListener("change", () => { sort(); draw(); });
  body.addEventListener("change", draw);
  const choose = (rule) => { rows.forEach((row) => { boxOf(row).checked = rule(row); }); draw(); };
  $("choose").addEventListener("click", () => choose((row) => boxOf(row).checked || isShown(row)));
  $("clear").addEventListener("click", () => choose(() => false));
  rows.slice(0, 4).forEach((row) => { boxOf(row).checked = true; });
  filter();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) draw();
    width = innerWidth;
  });
})();

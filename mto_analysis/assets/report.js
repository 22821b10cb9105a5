"use strict";
(() => {
  const $ = (id) => document.getElementById(id);

  const { models, images, colours } = JSON.parse($("data").textContent);
  if (!models.length) return;

  // ---- numbers: all follow from the stored dot products ----
  /** Dot products of all pairs of patches, num_patches x num_patches, patches in row-major order. */
  function unpack({ mask, low, step, levels }) {
    const n = mask.length, bytes = atob(levels), products = new Float64Array(n * n);
    for (let i = 0, k = 0; i < n; i++) {
      for (let j = 0; j <= i; j++, k += 3) {
        const level = bytes.charCodeAt(k) | bytes.charCodeAt(k + 1) << 8 | bytes.charCodeAt(k + 2) << 16;
        products[i * n + j] = products[j * n + i] = low + step * level;
      }
    }
    return products;
  }

  /** Softmax and its entropy, from logits by the log-sum-exp form. */
  function softmax(logits) {
    const top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
    const weights = logits.map((z) => Math.exp(z - top));
    const total = weights.reduce((a, b) => a + b, 0);
    const drop = logits.reduce((sum, z, i) => sum + weights[i] * (z - top), 0);
    return { weights: weights.map((w) => w / total), entropy: Math.log(total) - drop / total };
  }

  const prepared = new WeakMap();
  /** What one image at one layer depth shows: masked and visible patches, H of each masked patch, their mean. */
  function prepare(depth) {
    if (!prepared.has(depth)) {
      const n = depth.mask.length, all = [...Array(n).keys()], products = unpack(depth);
      const masked = all.filter((i) => depth.mask[i] === "1"), visible = all.filter((i) => depth.mask[i] === "0");
      const entropies = masked.map((i) => softmax(visible.map((j) => products[i * n + j])).entropy);
      const entropy = new Map(masked.map((i, at) => [i, entropies[at]]));
      prepared.set(depth, { n, masked, visible, entropy, mean: entropies.reduce((a, b) => a + b, 0) / masked.length });
    }
    return prepared.get(depth);
  }

  // ---- state ----
  const state = { model: 0, image: 0, at: 0, patch: -1 };
  const model = () => models[state.model];
  const shown = () => model().images[state.image];
  const depth = () => shown().depths[state.at];
  /** Columns of a grid of n patches; its rows are n over that. */
  const columns = (n) => Math.round(Math.sqrt(n * model().aspect));
  const place = (patch, n) => `row ${Math.floor(patch / columns(n)) + 1}, column ${patch % columns(n) + 1}`;
  const number = (value) => {
    const size = Math.abs(value);
    if (size < 1e-6) return value ? "≈ 0" : "0";
    return size < 1e-3 || size >= 1e4 ? value.toExponential(2) : value.toPrecision(4);
  };

  /** The chosen patch stays where it is; where it is not masked, the first masked patch takes its place. */
  function keepPatchMasked(before) {
    const { n, entropy, masked } = prepare(depth());
    if (before && before !== n && state.patch >= 0) {
      const [from, to] = [columns(before), columns(n)];
      const row = Math.floor(Math.floor(state.patch / from) * to / from), column = Math.floor(state.patch % from * to / from);
      state.patch = row * to + column;
    }
    if (!entropy.has(state.patch)) state.patch = masked[0];
  }

  // ---- drawing ----
  const loaded = images.map((source) => Object.assign(new Image(), { src: source }));
  const grey = new Map();
  /** The image without its colours, which are left to the weights. */
  function greyImage(image) {
    if (!grey.has(image)) {
      const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      for (let k = 0; k < pixels.data.length; k += 4) {
        const light = 0.3 * pixels.data[k] + 0.59 * pixels.data[k + 1] + 0.11 * pixels.data[k + 2];
        pixels.data.fill(light, k, k + 3);
      }
      context.putImageData(pixels, 0, 0);
      grey.set(image, canvas);
    }
    return grey.get(image);
  }

  function drawChosen({ n, masked, visible }, shares) {
    const image = loaded[shown().image], cells = columns(n), cell = Math.max(8, Math.round(560 / Math.max(cells, n / cells)));
    const canvas = $("image"), context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [cells * cell, n / cells * cell];
    canvas.parentElement.style.aspectRatio = model().aspect;
    if (!image.complete || !image.naturalWidth) return image.addEventListener("load", show, { once: true });
    context.imageSmoothingEnabled = image.naturalWidth > 96;
    context.drawImage(greyImage(image), 0, 0, canvas.width, canvas.height);
    const square = (patch) => context.fillRect(patch % cells * cell, Math.floor(patch / cells) * cell, cell, cell);
    context.fillStyle = $("through").checked ? "rgb(120 126 136 / 45%)" : "rgb(120 126 136)";
    masked.forEach(square);
    visible.forEach((patch, at) => {
      context.fillStyle = `rgb(242 104 12 / ${(80 * shares[at]).toFixed(1)}%)`;
      square(patch);
    });
  }

  document.querySelector(".bar.map").style.background = `linear-gradient(90deg, ${colours.map((c) => `rgb(${c})`)})`;
  function colour(share) {
    const at = Math.min(share * (colours.length - 1), colours.length - 1 - 1e-9), low = Math.floor(at);
    return colours[low].map((value, k) => value + (colours[low + 1][k] - value) * (at - low));
  }

  const DECADES = 4;
  /** N x N, rows and columns masked first, then visible; min-max scaled for display only. */
  function drawMap({ n, masked, visible }, products) {
    const kind = $("kind").value, order = [...masked, ...visible], values = new Float64Array(n * n);
    order.forEach((i, row) => {
      const logits = order.map((j) => products[i * n + j]);
      const line = kind === "dot" ? logits
        : kind !== "cosine" ? softmax(logits).weights
        : logits.map((z, at) => z / Math.sqrt(products[i * n + i] * products[order[at] * n + order[at]]));
      values.set(line, row * n);
    });
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    const canvas = $("map"), context = canvas.getContext("2d");
    canvas.width = canvas.height = n;
    const pixels = context.createImageData(n, n);
    const share = kind === "log" ? (value) => Math.max(0, 1 + Math.log10(value / high) / DECADES)
      : (value) => (value - low) / (high - low || 1);
    values.forEach((value, k) => pixels.data.set([...colour(share(value)), 255], 4 * k));
    context.putImageData(pixels, 0, 0);

    const cut = 100 * masked.length / n, row = masked.indexOf(state.patch);
    document.querySelector(".border.across").style.top = document.querySelector(".border.down").style.left = `${cut}%`;
    for (const [quadrant, left, bottom] of [["q1", 0, 100 - cut], ["q2", cut, 100 - cut], ["q3", 0, 0], ["q4", cut, 0]]) {
      Object.assign(document.querySelector(`.${quadrant}`).style, { left: `${left}%`, bottom: `${bottom}%` });
    }
    Object.assign($("map-row").style, { top: `${100 * row / n}%`, height: `${100 / n}%` });
    $("map-row").dataset.row = row;
    for (const axis of ["keys", "queries"]) {
      $(`${axis}-masked`).textContent = `${axis}: ${masked.length} masked`;
      $(`${axis}-visible`).textContent = `${visible.length} visible`;
    }
    $("keys-masked").style.width = $("queries-masked").style.height = $("queries-visible").style.top = `${cut}%`;
    $("keys-visible").style.width = $("queries-visible").style.height = `${100 - cut}%`;
    const name = $("kind").selectedOptions[0].textContent;
    const range = `${number(kind === "log" ? high / 10 ** DECADES : low)}${kind === "log" ? " or less" : ""} to ${number(high)}`;
    $("map-legend").textContent = `${name}: ${range}. Row of the chosen patch framed.`;
    canvas.setAttribute("aria-label", `Map of ${n} by ${n} patches, ${name}, ${range}; ` +
      `rows are queries and columns keys, masked first; the chosen patch is row ${row + 1}.`);
  }

  /** H of the chosen patch and of the image over layer depth. */
  function drawDepths() {
    const all = shown().depths.map((each) => ({ depth: each.depth, ...prepare(each) }));
    const last = Math.max(model().num_depths, 1), bound = Math.max(...all.map((each) => Math.log(each.visible.length)), 1e-9);
    const x = (d) => 34 + 250 * d / last, y = (h) => 104 - 92 * h / bound;
    const same = all.filter((each) => each.n === prepare(depth()).n && each.entropy.has(state.patch));
    const line = (points, stroke, dash) => `<polyline fill="none" stroke="${stroke}" stroke-width="2" stroke-dasharray="${dash}" points="${points}"/>`;
    const here = x(depth().depth);
    $("depths").innerHTML = `<title id="depths-title">H over layer depth of the chosen patch (solid) and of the image (dashed)</title>
      <line x1="34" y1="104" x2="284" y2="104" stroke="var(--quiet)"/>${line(all.map((each) => `${x(each.depth)},${y(Math.log(each.visible.length))}`).join(" "), "var(--quiet)", "1 3")}
      <line x1="${here}" y1="12" x2="${here}" y2="104" stroke="var(--quiet)" stroke-width="1"/>
      ${line(all.map((each) => `${x(each.depth)},${y(each.mean)}`).join(" "), "var(--quiet)", "5 3")}
      ${line(same.map((each) => `${x(each.depth)},${y(each.entropy.get(state.patch))}`).join(" "), "var(--weight)", "")}
      ${same.map((each) => `<circle cx="${x(each.depth)}" cy="${y(each.entropy.get(state.patch))}" r="${each.depth === depth().depth ? 4.5 : 2.5}" fill="var(--weight)"/>`).join("")}
      <text x="30" y="107" text-anchor="end">0</text><text x="30" y="16" text-anchor="end">${bound.toFixed(2)}</text>
      <text x="34" y="118" text-anchor="middle">0</text><text x="284" y="118" text-anchor="middle">${last}</text>`;
  }

  function show() {
    const now = prepare(depth()), { n, visible } = now, products = unpack(depth());
    const { weights, entropy } = softmax(visible.map((j) => products[state.patch * n + j]));
    const largest = Math.max(...weights), least = $("scale").value === "range" ? Math.min(...weights) : 0;
    drawChosen(now, weights.map((w) => (w - least) / (largest - least || 1)));
    drawMap(now, products);
    drawDepths();

    const length = (i) => Math.sqrt(products[i * n + i]);
    const ranked = visible.map((patch, at) => ({ patch, weight: weights[at] })).sort((a, b) => b.weight - a.weight);
    $("top").replaceChildren(...ranked.slice(0, 5).map(({ patch, weight }) => {
      const row = document.createElement("tr");
      row.dataset.patch = patch;
      for (const text of [place(patch, n), number(weight), (products[state.patch * n + patch] / (length(state.patch) * length(patch))).toFixed(3)]) {
        row.insertCell().textContent = text;
      }
      return row;
    }));
    const rank = new Map(ranked.slice(0, 3).map(({ patch }, at) => [patch, at + 1]));
    const weightOf = new Map(ranked.map(({ patch, weight }) => [patch, weight]));
    for (const cell of document.querySelectorAll(".patch")) {
      const patch = Number(cell.dataset.patch);
      cell.setAttribute("aria-selected", String(patch === state.patch));
      cell.setAttribute("aria-label", weightOf.has(patch)
        ? `visible patch, ${place(patch, n)}, weight ${number(weightOf.get(patch))}` : `masked patch, ${place(patch, n)}`);
      if (rank.has(patch)) cell.dataset.rank = rank.get(patch); else delete cell.dataset.rank;
    }
    $("weights-legend").textContent = `Weight from ${number(least)} to ${number(largest)}; all alike would be ${number(1 / visible.length)}. ` +
      "Hatched: masked. Framed: chosen. 1 to 3: largest weights.";
    $("depth").setAttribute("aria-valuetext", `layer depth ${depth().depth} of ${model().num_depths}`);
    $("depth-shown").textContent = `${depth().depth} of ${model().num_depths}`;
    const bound = Math.log(visible.length);
    say(`${model().label}, image ${shown().name}, layer depth ${depth().depth} of ${model().num_depths}. ` +
      `Masked patch in ${place(state.patch, n)}: H ${entropy.toFixed(4)} nats, ${(100 * entropy / bound).toFixed(1)} % of its bound ` +
      `(log ${visible.length} = ${bound.toFixed(4)}). H of the image here: ${now.mean.toFixed(4)}. Resembles most: ` +
      `${ranked.slice(0, 3).map(({ patch, weight }) => `${place(patch, n)} (${number(weight)})`).join("; ")}.`);
  }

  const say = (text) => { $("said").textContent = text; };

  // ---- controls ----
  let gridOf = "";
  /** One button per patch, one of them in the tab order; made anew only where the mask is another. */
  function layPatches() {
    if (gridOf === depth().mask) return;
    gridOf = depth().mask;
    const cells = columns(gridOf.length), rows = gridOf.length / cells, grid = $("patches");
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${cells}, 1fr)`;
    grid.replaceChildren(...Array.from({ length: rows }, (_, row) => {
      const line = document.createElement("div");
      line.setAttribute("role", "row");
      line.append(...Array.from({ length: cells }, (_, column) => {
        const patch = row * cells + column, button = document.createElement("button");
        button.type = "button";
        button.className = gridOf[patch] === "1" ? "patch masked" : "patch";
        button.setAttribute("role", "gridcell");
        button.dataset.patch = patch;
        button.tabIndex = patch === state.patch ? 0 : -1;
        return button;
      }));
      return line;
    }));
  }

  function focusPatch(patch, { move = true } = {}) {
    for (const cell of document.querySelectorAll(".patch[tabindex='0']")) cell.tabIndex = -1;
    const cell = document.querySelector(`.patch[data-patch="${patch}"]`);
    cell.tabIndex = 0;
    if (move) cell.focus();
  }

  function choose(patch) {
    const { n, entropy } = prepare(depth());
    if (!entropy.has(patch)) return say(`The patch in ${place(patch, n)} is visible. Choose a masked one, which is hatched.`);
    state.patch = patch;
    focusPatch(patch, { move: $("patches").contains(document.activeElement) });
    show();
  }

  function layImages() {
    $("images").replaceChildren(...model().images.map(({ name, image }, at) => {
      const label = document.createElement("label"), radio = document.createElement("input"), thumb = new Image();
      Object.assign(radio, { type: "radio", name: "image", value: at, checked: at === state.image });
      radio.setAttribute("aria-label", `image ${name}`);
      Object.assign(thumb, { src: images[image], alt: "" });
      label.title = name;
      label.append(radio, thumb);
      return label;
    }));
  }

  function update(before) {
    $("depth").max = shown().depths.length - 1;
    state.at = Math.min(state.at, shown().depths.length - 1);
    $("depth").value = state.at;
    keepPatchMasked(before);
    layPatches();
    focusPatch(state.patch, { move: false });
    show();
  }

  function updateModel() {
    layImages();
    const skipped = model().left_out;
    $("left-out").hidden = !skipped.length;
    $("left-out").textContent = `Layer depths ${skipped.join(", ")} have token grids too large for this file and are left out.`;
    update();
  }

  $("model").append(...models.map(({ label }, at) => new Option(label, at)));
  $("model").addEventListener("change", (event) => { state.model = Number(event.target.value); updateModel(); });
  $("images").addEventListener("change", (event) => { state.image = Number(event.target.value); update(); });
  $("depth").addEventListener("input", (event) => {
    const before = depth().mask.length;
    state.at = Number(event.target.value);
    update(before);
  });
  for (const id of ["kind", "scale", "through"]) $(id).addEventListener("change", show);
  $("patches").addEventListener("click", (event) => {
    const cell = event.target.closest(".patch");
    if (cell) choose(Number(cell.dataset.patch));
  });
  $("patches").addEventListener("keydown", (event) => {
    const n = depth().mask.length, cells = columns(n), patch = Number(event.target.dataset.patch), column = patch % cells;
    const to = {
      ArrowLeft: column ? patch - 1 : patch, ArrowRight: column < cells - 1 ? patch + 1 : patch,
      ArrowUp: patch - cells, ArrowDown: patch + cells, Home: patch - column, End: patch - column + cells - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < n) focusPatch(to);
  });
  $("map").addEventListener("click", (event) => {
    const { n, masked, visible } = prepare(depth());
    const row = Math.min(n - 1, Math.floor(event.offsetY / event.target.clientHeight * n));
    choose([...masked, ...visible][row]);
  });
  updateModel();
})();

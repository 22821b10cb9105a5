"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const { models, images, colours, title } = JSON.parse($("data").textContent);

  // ---- copies: a figure with its caption, on white as on paper ----
  const tell = (text) => { $("told").textContent = text; };

  /** Images in rows, each row with its own caption below; the caption is also the text of the copy. */
  function compose(rows) {
    const side = 560, gap = 24, size = 22, width = Math.max(...rows.map(({ parts }) => parts.length)) * (side + gap) + gap;
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d"), font = `${size}px system-ui, sans-serif`;
    const lines = (text) => {
      context.font = font;
      return text.split(" ").reduce((found, word) => {
        const longer = `${found.at(-1)} ${word}`.trim();
        return context.measureText(longer).width < width - 2 * gap ? [...found.slice(0, -1), longer] : [...found, word];
      }, [""]);
    };
    const laid = rows.map(({ parts, caption }) => ({ parts, words: lines(caption), height: Math.max(...parts.map((part) => side * part.height / part.width)) }));
    canvas.width = width;
    canvas.height = laid.reduce((sum, row) => sum + row.height + 2 * gap + 1.4 * size * row.words.length, gap);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.font = font;
    context.textBaseline = "top";
    context.imageSmoothingEnabled = false;
    let y = gap;
    for (const { parts, words, height } of laid) {
      parts.forEach((part, at) => context.drawImage(part, gap + at * (side + gap), y, side, side * part.height / part.width));
      context.fillStyle = "#1b1f24";
      words.forEach((line, at) => context.fillText(line, gap, y + height + gap / 2 + 1.4 * size * at));
      y += height + 2 * gap + 1.4 * size * words.length;
    }
    return canvas;
  }

  async function copy(canvas, caption) {
    const png = await new Promise((done) => canvas.toBlob(done, "image/png"));
    try {
      const text = new Blob([caption], { type: "text/plain" });
      await navigator.clipboard.write([new ClipboardItem({ "image/png": png, "text/plain": text })]);
      tell("Copied: the figure as an image, its caption as text.");
    } catch {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(png), download: "figure.png" });
      link.click();
      URL.revokeObjectURL(link.href);
      tell("The browser does not let this page copy. The figure with its caption is saved as figure.png.");
    }
  }

  /** A button below every drawn figure. */
  for (const figure of document.querySelectorAll("figure.drawn")) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy figure" });
    const label = figure.querySelector("[role=img]").getAttribute("aria-label");
    const caption = figure.querySelector("figcaption")?.textContent.trim() || label;
    button.setAttribute("aria-label", `Copy figure: ${label.slice(0, 60)}`);
    button.addEventListener("click", async () => {
      const svg = figure.querySelector("svg"), { width, height } = svg.viewBox.baseVal, picture = new Image();
      const text = new XMLSerializer().serializeToString(svg);
      picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
      await picture.decode();
      const canvas = Object.assign(document.createElement("canvas"), { width: 3 * width, height: 3 * height });
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(picture, 0, 0, canvas.width, canvas.height);
      copy(canvas, caption);
    });
    figure.append(button);
  }

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
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
      const n = depth.mask.length, products = unpack(depth), all = [...Array(n).keys()];
      const masked = all.filter((i) => depth.mask[i] === "1"), visible = all.filter((i) => depth.mask[i] === "0");
      const entropies = masked.map((i) => softmax(visible.map((j) => products[i * n + j])).entropy);
      const entropy = new Map(masked.map((i, at) => [i, entropies[at]]));
      const mean = entropies.reduce((a, b) => a + b, 0) / masked.length;
      prepared.set(depth, { n, products, masked, visible, order: [...masked, ...visible], entropy, mean, maps: {} });
    }
    return prepared.get(depth);
  }

  const cosine = ({ n, products }, i, j) => products[i * n + j] / Math.sqrt(products[i * n + i] * products[j * n + j]);

  /** Values of a map with masked patches first, and their range. */
  function mapOf(now, kind) {
    const { n, products, order, maps } = now;
    if (!maps[kind]) {
      const values = new Float64Array(n * n);
      order.forEach((i, row) => {
        const logits = order.map((j) => products[i * n + j]);
        values.set(kind === "dot" ? logits : kind === "cosine" ? order.map((j) => cosine(now, i, j)) : softmax(logits).weights, row * n);
      });
      maps[kind] = { values, low: values.reduce((a, b) => Math.min(a, b)), high: values.reduce((a, b) => Math.max(a, b)) };
    }
    return maps[kind];
  }

  // ---- state: all of it is in the address, so that a link shows what is shown ----
  const NONE = -1;
  const state = { shown: [0, models.length > 1 && matchMedia("(min-width: 48rem)").matches ? 1 : NONE], image: 0, depth: 0, place: null };
  const choices = { map: "kind", colours: "scale" };

  function writeState() {
    const first = models[state.shown[0]], entries = { model: first.label, image: first.images[state.image].name, depth: state.depth };
    if (models.length > 1) entries.with = state.shown[1] === NONE ? "" : models[state.shown[1]].label;
    if (state.place) entries.patch = state.place.map((share) => share.toFixed(4)).join(",");
    for (const [name, id] of Object.entries(choices)) entries[name] = $(id).value;
    if ($("through").checked) entries.through = 1;
    history.replaceState(null, "", `#${new URLSearchParams(entries)}`);
  }

  function readState() {
    const given = new URLSearchParams(location.hash.slice(1)), find = (list, key, name) => list.findIndex((each) => each[key] === name);
    if (given.has("model")) state.shown[0] = Math.max(0, find(models, "label", given.get("model")));
    if (given.has("with")) state.shown[1] = find(models, "label", given.get("with"));
    if (given.has("image")) state.image = Math.max(0, find(models[state.shown[0]].images, "name", given.get("image")));
    if (given.has("depth")) state.depth = Math.max(0, Math.round(Number(given.get("depth"))) || 0);
    const place = (given.get("patch") || "").split(",").map(Number);
    state.place = place.length === 2 && place.every((share) => share >= 0 && share < 1) ? place : state.place;
    for (const [name, id] of Object.entries(choices)) {
      if ([...$(id).options].some((option) => option.value === given.get(name))) $(id).value = given.get(name);
    }
    if (given.has("through")) $("through").checked = given.get("through") === "1";
  }

  const number = (value) => {
    const size = Math.abs(value);
    if (size < 1e-6) return value ? "≈ 0" : "0";
    return size < 1e-3 || size >= 1e4 ? value.toExponential(2) : value.toPrecision(4);
  };

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

  function colour(share) {
    const at = Math.min(share * (colours.length - 1), colours.length - 1 - 1e-9), low = Math.floor(at);
    return colours[low].map((value, k) => value + (colours[low + 1][k] - value) * (at - low));
  }

  const DECADES = 4;
  /** A map onto a canvas, a pixel per pair; min-max scaled for display only. */
  function paint(canvas, { values, low, high }, n, kind) {
    const context = canvas.getContext("2d");
    canvas.width = canvas.height = n;
    const pixels = context.createImageData(n, n);
    const share = kind === "log" ? (value) => Math.max(0, 1 + Math.log10(value / high) / DECADES)
      : (value) => (value - low) / (high - low || 1);
    values.forEach((value, k) => pixels.data.set([...colour(share(value)), 255], 4 * k));
    context.putImageData(pixels, 0, 0);
  }

  // ---- one model: its image, its map and its numbers; two of these go in step ----
  function makeView(which) {
    const root = $("view").content.firstElementChild.cloneNode(true), parts = {};
    root.id = `view-${which + 1}`;
    for (const element of root.querySelectorAll("[data-part]")) {
      parts[element.dataset.part] = element;
      element.id = which ? `${element.dataset.part}-${which + 1}` : element.dataset.part;
    }
    parts.heading.id = `heading-${which + 1}`;
    root.setAttribute("aria-labelledby", parts.heading.id);
    $("views").append(root);
    parts["bar-map"].style.background = `linear-gradient(90deg, ${colours.map((c) => `rgb(${c})`)})`;

    const model = () => models[state.shown[which]];
    const shown = () => model().images[Math.min(state.image, model().images.length - 1)];
    /** The layer depth in step with the other model, or this one's last. */
    const at = () => Math.max(0, shown().depths.findLastIndex((each) => each.depth <= state.depth));
    const depth = () => shown().depths[at()];
    /** Columns of a grid of n patches; its rows are n over that. */
    const columns = (n) => Math.round(Math.sqrt(n * model().aspect));
    const place = (patch, n) => `row ${Math.floor(patch / columns(n)) + 1}, column ${patch % columns(n) + 1}`;
    const kindOf = (patch) => depth().mask[patch] === "1" ? "masked" : "visible";

    /** The chosen place in this model's grid; where it is not masked, the first masked patch. */
    function chosen() {
      const { n, entropy, masked } = prepare(depth()), cells = columns(n);
      const patch = state.place ? Math.floor(state.place[0] * n / cells) * cells + Math.floor(state.place[1] * cells) : NONE;
      return entropy.has(patch) ? patch : masked[0];
    }

    function drawImages({ n, masked, visible }, shares) {
      const image = loaded[shown().image], cells = columns(n), cell = Math.max(8, Math.round(560 / Math.max(cells, n / cells)));
      for (const [name, source] of [["original", image], ["image", image]]) {
        [parts[name].width, parts[name].height] = [cells * cell, n / cells * cell];
        parts[name].parentElement.style.aspectRatio = model().aspect;
      }
      parts.original.setAttribute("aria-label", `Image ${shown().name}`);
      if (!image.complete || !image.naturalWidth) return image.addEventListener("load", show, { once: true });
      for (const [name, source] of [["original", image], ["image", greyImage(image)]]) {
        const context = parts[name].getContext("2d");
        context.imageSmoothingEnabled = image.naturalWidth > 96;
        context.drawImage(source, 0, 0, parts[name].width, parts[name].height);
      }
      const frame = parts.original.getContext("2d"), here = chosen();
      Object.assign(frame, { strokeStyle: "#00a8ff", lineWidth: 5 });
      frame.strokeRect(here % cells * cell + 2, Math.floor(here / cells) * cell + 2, cell - 4, cell - 4);
      const context = parts.image.getContext("2d");
      const square = (patch) => context.fillRect(patch % cells * cell, Math.floor(patch / cells) * cell, cell, cell);
      context.fillStyle = $("through").checked ? "rgb(120 126 136 / 45%)" : "rgb(120 126 136)";
      masked.forEach(square);
      visible.forEach((patch, k) => {
        context.fillStyle = `rgb(242 104 12 / ${(80 * shares[k]).toFixed(1)}%)`;
        square(patch);
      });
    }

    function drawMap(now, patch) {
      const kind = $("kind").value, map = mapOf(now, kind === "log" ? "softmax" : kind), { n, masked, visible } = now;
      paint(parts.map, map, n, kind);
      const cut = 100 * masked.length / n, row = masked.indexOf(patch);
      parts.across.style.top = parts.down.style.left = `${cut}%`;
      for (const [quadrant, left, bottom] of [["q1", 0, 100 - cut], ["q2", cut, 100 - cut], ["q3", 0, 0], ["q4", cut, 0]]) {
        Object.assign(parts[quadrant].style, { left: `${left}%`, bottom: `${bottom}%` });
      }
      Object.assign(parts["map-row"].style, { top: `${100 * row / n}%`, height: `${100 / n}%` });
      parts["map-row"].dataset.row = row;
      for (const axis of ["keys", "queries"]) {
        parts[`${axis}-masked`].textContent = `${axis}: ${masked.length} masked`;
        parts[`${axis}-visible`].textContent = `${visible.length} visible`;
      }
      parts["keys-masked"].style.width = parts["queries-masked"].style.height = parts["queries-visible"].style.top = `${cut}%`;
      parts["keys-visible"].style.width = parts["queries-visible"].style.height = `${100 - cut}%`;
      const name = $("kind").selectedOptions[0].textContent;
      const range = `${number(kind === "log" ? map.high / 10 ** DECADES : map.low)}${kind === "log" ? " or less" : ""} to ${number(map.high)}`;
      parts["map-legend"].textContent = `${name}: ${range}. Row of the chosen patch framed.`;
      parts.map.setAttribute("aria-label", `Map of ${n} by ${n} patches, ${name}, ${range}; ` +
        `rows are queries and columns keys, masked first; the chosen patch is row ${row + 1}.`);
    }

    let stripOf = "";
    /** A thumbnail of the map of every layer depth, which is also the button for it. */
    function drawLayers() {
      const kind = $("kind").value, key = [state.shown[which], state.image, kind].join();
      if (stripOf !== key) {
        stripOf = key;
        parts.layers.replaceChildren(...shown().depths.map((each) => {
          const button = document.createElement("button"), canvas = document.createElement("canvas"), now = prepare(each);
          paint(canvas, mapOf(now, kind === "log" ? "softmax" : kind), now.n, kind);
          button.type = "button";
          button.dataset.depth = each.depth;
          button.setAttribute("aria-label", `Layer depth ${each.depth}`);
          button.append(canvas, String(each.depth));
          return button;
        }));
      }
      for (const button of parts.layers.children) {
        if (Number(button.dataset.depth) === depth().depth) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
      }
    }

    /** H of the chosen patch and of the image over layer depth. */
    function drawDepths(patch) {
      const all = shown().depths.map((each) => ({ depth: each.depth, ...prepare(each) }));
      const last = Math.max(model().num_depths, 1), bound = Math.max(...all.map((each) => Math.log(each.visible.length)), 1e-9);
      const same = all.filter((each) => each.n === prepare(depth()).n && each.entropy.has(patch));
      // Curves near the bound have a range of their own, as in the figures.
      const lowest = Math.min(...all.map((each) => each.mean), ...same.map((each) => each.entropy.get(patch)));
      const base = lowest > bound / 2 && lowest < bound ? lowest : 0, digits = bound - base < 0.05 ? 4 : 2, left = base ? 48 : 34;
      const x = (d) => left + (284 - left) * d / last, y = (h) => 104 - 92 * (h - base) / (bound - base);
      const line = (points, stroke, dash) => `<polyline fill="none" stroke="${stroke}" stroke-width="2" stroke-dasharray="${dash}" points="${points}"/>`;
      const here = x(depth().depth), heading = `${parts.depths.id}-title`;
      parts.depths.setAttribute("aria-labelledby", heading);
      parts.depths.innerHTML = `<title id="${heading}">H over layer depth of the chosen patch (solid) and of the image (dashed)</title>
        <line x1="${left}" y1="104" x2="284" y2="104" stroke="var(--quiet)"/>${line(all.map((each) => `${x(each.depth)},${y(Math.log(each.visible.length))}`).join(" "), "var(--quiet)", "1 3")}
        <line x1="${here}" y1="12" x2="${here}" y2="104" stroke="var(--quiet)" stroke-width="1"/>
        ${line(all.map((each) => `${x(each.depth)},${y(each.mean)}`).join(" "), "var(--quiet)", "5 3")}
        ${line(same.map((each) => `${x(each.depth)},${y(each.entropy.get(patch))}`).join(" "), "var(--weight)", "")}
        ${same.map((each) => `<circle cx="${x(each.depth)}" cy="${y(each.entropy.get(patch))}" r="${each.depth === depth().depth ? 4.5 : 2.5}" fill="var(--weight)"/>`).join("")}
        <text x="${left - 4}" y="107" text-anchor="end">${base ? base.toFixed(digits) : 0}</text><text x="${left - 4}" y="16" text-anchor="end">${bound.toFixed(digits)}</text>
        <text x="${left}" y="118" text-anchor="middle">0</text><text x="284" y="118" text-anchor="middle">${last}</text>`;
    }

    const say = (text) => { parts.said.textContent = text; };
    const hover = (text) => { parts.hover.textContent = text; };

    function show() {
      const now = prepare(depth()), { n, visible, products } = now, patch = chosen();
      const { weights, entropy } = softmax(visible.map((j) => products[patch * n + j]));
      const largest = Math.max(...weights), least = $("scale").value === "range" ? Math.min(...weights) : 0;
      parts.heading.textContent = model().label;
      root.style.setProperty("--model", model().colour);
      drawImages(now, weights.map((w) => (w - least) / (largest - least || 1)));
      drawMap(now, patch);
      drawLayers();
      drawDepths(patch);

      const ranked = visible.map((other, k) => ({ other, weight: weights[k] })).sort((a, b) => b.weight - a.weight);
      parts.top.replaceChildren(...ranked.slice(0, 5).map(({ other, weight }) => {
        const row = document.createElement("tr");
        row.dataset.patch = other;
        for (const text of [place(other, n), number(weight), cosine(now, patch, other).toFixed(3)]) row.insertCell().textContent = text;
        return row;
      }));
      const rank = new Map(ranked.slice(0, 3).map(({ other }, k) => [other, k + 1]));
      const weightOf = new Map(ranked.map(({ other, weight }) => [other, weight]));
      for (const cell of root.querySelectorAll(".patch")) {
        const other = Number(cell.dataset.patch);
        cell.setAttribute("aria-selected", String(other === patch));
        cell.setAttribute("aria-label", weightOf.has(other)
          ? `visible patch, ${place(other, n)}, weight ${number(weightOf.get(other))}` : `masked patch, ${place(other, n)}`);
        if (rank.has(other)) cell.dataset.rank = rank.get(other); else delete cell.dataset.rank;
      }
      parts["weights-legend"].textContent = `Weight from ${number(least)} to ${number(largest)}; uniform would be ${number(1 / visible.length)}. ` +
        "Hatched: masked. Framed: chosen. 1 to 3: largest weights.";
      const bound = Math.log(visible.length);
      say(`${model().label}, image ${shown().name}, layer depth ${depth().depth} of ${model().num_depths}. ` +
        `Masked patch in ${place(patch, n)}: H ${entropy.toFixed(4)} nats, ${(100 * entropy / bound).toFixed(1)} % of its bound ` +
        `(log ${visible.length} = ${bound.toFixed(4)}). H of the image here: ${now.mean.toFixed(4)}. Resembles most: ` +
        `${ranked.slice(0, 3).map(({ other, weight }) => `${place(other, n)} (${number(weight)})`).join("; ")}.`);
      const skipped = model().left_out;
      parts["left-out"].hidden = !skipped.length;
      parts["left-out"].textContent = `Layer depths ${skipped.join(", ")} have token grids too large for this file and are left out.`;
    }

    // ---- patches ----
    let gridOf = "";
    /** One cell per patch, one of them in the tab order; made anew only where the mask is another. */
    function layPatches() {
      const mask = depth().mask, key = `${state.shown[which]} ${mask}`;
      if (gridOf === key) return;
      gridOf = key;
      const cells = columns(mask.length), rows = mask.length / cells, grid = parts.patches;
      grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${cells}, 1fr)`;
      grid.setAttribute("aria-label", `Patches of the image, ${model().label}`);
      grid.replaceChildren(...Array.from({ length: rows }, (_, row) => {
        const line = document.createElement("div");
        line.setAttribute("role", "row");
        line.append(...Array.from({ length: cells }, (_, column) => {
          const patch = row * cells + column, cell = document.createElement("div");
          cell.className = mask[patch] === "1" ? "patch masked" : "patch";
          cell.setAttribute("role", "gridcell");
          cell.dataset.patch = patch;
          cell.tabIndex = -1;
          return cell;
        }));
        return line;
      }));
    }

    function focusPatch(patch, { move = true } = {}) {
      for (const cell of root.querySelectorAll(".patch[tabindex='0']")) cell.tabIndex = -1;
      const cell = root.querySelector(`.patch[data-patch="${patch}"]`);
      cell.tabIndex = 0;
      if (move) cell.focus();
    }

    function choose(patch) {
      const { n, entropy } = prepare(depth()), cells = columns(n);
      if (!entropy.has(patch)) return say(`The patch in ${place(patch, n)} is visible. Choose a masked one, which is hatched.`);
      // The middle of the patch, so that grids of other sizes find it.
      state.place = [(Math.floor(patch / cells) + 0.5) / (n / cells), (patch % cells + 0.5) / cells];
      const move = parts.patches.contains(document.activeElement);
      update();
      focusPatch(patch, { move });
    }

    parts.patches.addEventListener("click", (event) => {
      const cell = event.target.closest(".patch");
      if (cell) choose(Number(cell.dataset.patch));
    });
    parts.patches.addEventListener("keydown", (event) => {
      const n = depth().mask.length, cells = columns(n), patch = Number(event.target.dataset.patch), column = patch % cells;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        return choose(patch);
      }
      const to = {
        ArrowLeft: column ? patch - 1 : patch, ArrowRight: column < cells - 1 ? patch + 1 : patch,
        ArrowUp: patch - cells, ArrowDown: patch + cells, Home: patch - column, End: patch - column + cells - 1,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (to >= 0 && to < n) focusPatch(to);
    });
    parts.patches.addEventListener("pointerover", (event) => {
      const cell = event.target.closest(".patch"), now = prepare(depth());
      if (!cell) return;
      const other = Number(cell.dataset.patch), masked = now.entropy.has(other);
      hover(`${cell.getAttribute("aria-label")}, cosine ${cosine(now, chosen(), other).toFixed(4)}` + (masked ? `, H ${now.entropy.get(other).toFixed(4)}` : ""));
    });
    const cellUnder = (event) => {
      const now = prepare(depth()), { n } = now, { offsetX, offsetY, target } = event;
      const [column, row] = [[offsetX, target.clientWidth], [offsetY, target.clientHeight]].map(([at, side]) => Math.min(n - 1, Math.max(0, Math.floor(at / side * n))));
      return { now, n, row, column };
    };
    parts.map.addEventListener("pointermove", (event) => {
      const { now, n, row, column } = cellUnder(event), [i, j] = [now.order[row], now.order[column]], kind = $("kind").value;
      const value = mapOf(now, kind === "log" ? "softmax" : kind).values[row * n + column];
      hover(`query: ${kindOf(i)}, ${place(i, n)}; key: ${kindOf(j)}, ${place(j, n)}: ${number(value)}`);
    });
    for (const part of ["map", "patches"]) parts[part].addEventListener("pointerleave", () => hover(""));
    parts.map.addEventListener("click", (event) => {
      const { now, row } = cellUnder(event);
      choose(now.order[row]);
    });
    parts.layers.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) goTo(Number(button.dataset.depth));
    });

    /** A canvas larger, with what the page lays over it drawn in: frames of chosen patch or row, borders of quadrants. */
    function withFrames(name) {
      const side = 560, source = parts[name], canvas = document.createElement("canvas"), context = canvas.getContext("2d");
      [canvas.width, canvas.height] = [side, Math.round(side * source.height / source.width)];
      context.imageSmoothingEnabled = false;
      context.drawImage(source, 0, 0, canvas.width, canvas.height);
      const { n, masked, order } = prepare(depth()), cells = columns(n), patch = chosen(), cell = side / cells;
      const frame = (x, y, width, height) => Object.assign(context, { strokeStyle: "#00a8ff", lineWidth: 4 }).strokeRect(x, y, width, height);
      if (name === "map") {
        for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
          Object.assign(context, { fillStyle: colour });
          context.fillRect(0, side * masked.length / n - width / 2, side, width);
          context.fillRect(side * masked.length / n - width / 2, 0, width, side);
        }
        frame(2, side * order.indexOf(patch) / n, side - 4, Math.max(side / n, 4));
      } else if (name === "image") frame(patch % cells * cell + 2, Math.floor(patch / cells) * cell + 2, cell - 4, cell - 4);
      return canvas;
    }

    return {
      last: () => shown().depths.at(-1).depth,
      row: () => ({
        parts: ["original", "map", "image"].map(withFrames),
        caption: `${parts.said.textContent} Left: the image. Middle: the affinity map, masked patches first, ${parts["map-legend"].textContent} ` +
          `Right: weights of the chosen patch over visible ones; masked ones are grey. ${parts["weights-legend"].textContent.split(" Hatched")[0]}`,
      }),
      quieten: (quiet) => parts.said.setAttribute("aria-live", quiet ? "off" : "polite"),
      update() {
        root.hidden = state.shown[which] === NONE;
        if (root.hidden) return;
        layPatches();
        focusPatch(chosen(), { move: false });
        show();
      },
    };
  }

  // ---- controls ----
  const views = [makeView(0), makeView(1)];
  const used = () => views.filter((_, which) => state.shown[which] !== NONE);

  function layImages() {
    const names = models[state.shown[0]].images;
    state.image = Math.min(state.image, names.length - 1);
    $("images").replaceChildren(...names.map(({ name, image }, at) => {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "radio", name: "image", value: at, checked: at === state.image });
      input.setAttribute("aria-label", `image ${name}`);
      label.append(input, Object.assign(document.createElement("img"), { src: images[image], alt: "" }));
      return label;
    }));
  }

  function update() {
    const last = Math.max(...used().map((view) => view.last()));
    state.depth = Math.min(state.depth, last);
    Object.assign($("depth"), { max: last, value: state.depth });
    $("depth").setAttribute("aria-valuetext", `layer depth ${state.depth} of ${last}`);
    $("depth-shown").textContent = `${state.depth} of ${last}`;
    document.body.classList.toggle("two", used().length > 1);
    views.forEach((view) => view.update());
    writeState();
  }

  function goTo(depth) {
    state.depth = depth;
    update();
  }

  let playing = 0;
  function play(on) {
    clearInterval(playing);
    playing = on ? setInterval(() => goTo(state.depth < Number($("depth").max) ? state.depth + 1 : 0), 900) : 0;
    $("play").textContent = on ? "Pause" : "Play";
    $("play").setAttribute("aria-label", on ? "Pause" : "Play the layers one after the other");
    views.forEach((view) => view.quieten(on));
  }

  const options = () => models.map(({ label }, at) => new Option(label, at));
  $("model").append(...options());
  $("with").append(new Option("none", NONE), ...options());
  $("with-label").hidden = models.length < 2;
  $("model").addEventListener("change", (event) => { state.shown[0] = Number(event.target.value); layImages(); update(); });
  $("with").addEventListener("change", (event) => { state.shown[1] = Number(event.target.value); update(); });
  $("images").addEventListener("change", (event) => { state.image = Number(event.target.value); update(); });
  $("depth").addEventListener("input", (event) => { play(false); goTo(Number(event.target.value)); });
  $("play").addEventListener("click", () => play(!playing));
  $("copy").addEventListener("click", () => {
    const rows = used().map((view) => view.row());
    copy(compose(rows), [title, ...rows.map(({ caption }) => caption)].join("\n\n"));
  });
  for (const id of ["kind", "scale", "through"]) $(id).addEventListener("change", update);

  function start() {
    readState();
    [$("model").value, $("with").value] = state.shown;
    layImages();
    update();
  }
  addEventListener("hashchange", start);
  start();
})();

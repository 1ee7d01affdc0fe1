"use strict";
// Galleries: sort, filter, thresholds, heat, and one image at a time. Without it the page has the same images.
(() => {
  const SHOWN = 48; // tiles before "show all"
  const zoom = document.getElementById("zoom");
  const colors = document.body.dataset.heat.split(" ").map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const heatTop = Number(document.body.dataset.heatTop);
  const percent = (count, of) => (of ? `${count} of ${of} (${((100 * count) / of).toFixed(1)} %)` : "none");

  // The 8-bit map of a tile, decoded once: {values, columns, rows}, values in the map's own units.
  function readMap(tile) {
    tile.map ??= (async () => {
      const image = new Image();
      image.src = tile.dataset.map;
      await image.decode();
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
      const values = Float32Array.from({ length: bytes.length / 4 }, (_, k) => (bytes[4 * k] / 255) * tile.scale);
      return { values, columns: canvas.width, rows: canvas.height };
    })();
    return tile.map;
  }

  // Marching squares: the line on which the map crosses the level, as an SVG path. Outside the map is 0.
  function trace({ values, columns, rows }, level, [width, height]) {
    const at = (x, y) => (x < 0 || y < 0 || x >= columns || y >= rows ? 0 : values[y * columns + x]);
    const place = (value, count, size) => Math.min(Math.max(((value + 0.5) * size) / count, 0), size).toFixed(1);
    const point = ([x, y]) => `${place(x, columns, width)} ${place(y, rows, height)}`;
    let path = "";
    for (let y = -1; y < rows; y++) {
      for (let x = -1; x < columns; x++) {
        const [a, b, c, d] = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)];
        const inside = [a, b, c, d].map((value) => value > level);
        if (inside.every((one) => one === inside[0])) continue;
        const cut = (p, q) => (level - p) / (q - p);
        const ends = []; // top, right, bottom, left
        if (inside[0] !== inside[1]) ends.push([x + cut(a, b), y]);
        if (inside[1] !== inside[2]) ends.push([x + 1, y + cut(b, c)]);
        if (inside[2] !== inside[3]) ends.push([x + cut(d, c), y + 1]);
        if (inside[3] !== inside[0]) ends.push([x, y + cut(a, d)]);
        if (ends.length === 4 && inside[0]) ends.unshift(ends.pop()); // a saddle: cut off the corners that are inside
        for (let k = 0; k < ends.length; k += 2) path += `M${point(ends[k])}L${point(ends[k + 1])}`;
      }
    }
    return path;
  }

  // Heat on a scale that ends at heatTop times the threshold; seeThrough: the lower, the clearer.
  function paint(canvas, { values, columns, rows }, end, seeThrough) {
    [canvas.width, canvas.height] = [columns, rows];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(columns, rows);
    values.forEach((value, k) => {
      const u = Math.min(Math.max(value / end, 0), 1);
      const low = Math.min(Math.floor(u * (colors.length - 1)), colors.length - 2);
      const part = u * (colors.length - 1) - low;
      for (let c = 0; c < 3; c++) image.data[4 * k + c] = colors[low][c] + part * (colors[low + 1][c] - colors[low][c]);
      image.data[4 * k + 3] = seeThrough ? 255 * 0.7 * u : 255;
    });
    context.putImageData(image, 0, 0);
  }

  class Gallery {
    constructor(root) {
      this.root = root;
      this.list = root.querySelector(".tiles");
      this.tiles = [...this.list.children];
      this.form = root.querySelector("form");
      this.inputs = this.form.elements;
      this.chosen = { image: Number(root.dataset.image), pixel: Number(root.dataset.pixel) };
      this.all = false;
      const seen = (entries) => entries.forEach((one) => { one.target.seen = one.isIntersecting; if (one.isIntersecting) this.draw(one.target); });
      this.watch = new IntersectionObserver(seen, { rootMargin: "200px" });
      for (const tile of this.tiles) this.prepare(tile);
      this.form.hidden = false;
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.form.addEventListener("input", (event) => this.change(event.target));
      this.form.addEventListener("reset", () => requestAnimationFrame(() => this.change(null)));
      this.more = root.querySelector(".more");
      this.more.addEventListener("click", () => { this.all = true; this.update(); });
      this.change(null);
    }

    prepare(tile) {
      tile.scale = Number(this.root.dataset.scale);
      tile.score = Number(tile.dataset.score);
      tile.size = tile.dataset.size.split(" ").map(Number);
      tile.found = tile.querySelector(".found");
      tile.original = tile.found.getAttribute("d");
      const view = tile.querySelector(".view");
      Object.assign(view, { tabIndex: 0, onclick: () => this.open(tile) });
      view.setAttribute("role", "button");
      view.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.open(tile); } };
      this.watch.observe(tile);
    }

    get threshold() { return this.inputs.image ? Number(this.inputs.image.value) : NaN; }
    get level() { return this.inputs.pixel ? Number(this.inputs.pixel.value) : NaN; }
    get end() { return this.level ? heatTop * this.level : this.tiles[0].scale; }

    change(input) {
      const { image, pixel } = this.inputs;
      if (!input) { // as chosen from validation images
        if (image) image.value = this.chosen.image;
        if (pixel) pixel.value = this.chosen.pixel;
      } else if (input === image && pixel) pixel.value = (this.chosen.pixel * image.value) / this.chosen.image;
      this.update();
    }

    // Outcomes, counts, order and filters; outlines only of the tiles in view.
    update() {
      const { type, outcome, order, image, pixel } = this.inputs;
      for (const input of [image, pixel]) if (input) {
        input.nextElementSibling.value = Number(input.value).toPrecision(3);
        input.setAttribute("aria-valuetext", Number(input.value).toPrecision(3));
      }
      const counts = { found: 0, missed: 0, "false positive": 0, passed: 0 };
      for (const tile of this.tiles) {
        tile.outcome = tile.dataset.outcome;
        if (image && this.threshold !== this.chosen.image) {
          const words = tile.dataset.label === "defective" ? ["missed", "found"] : ["passed", "false positive"];
          tile.outcome = words[Number(tile.score > this.threshold)];
        }
        counts[tile.outcome]++;
        const word = tile.querySelector(".outcome");
        word.textContent = tile.outcome;
        word.dataset.outcome = tile.outcome;
        tile.dirty = true;
      }
      if (image) {
        const [missed, stopped] = this.form.querySelectorAll(".counts b");
        missed.textContent = percent(counts.missed, counts.missed + counts.found);
        stopped.textContent = percent(counts["false positive"], counts["false positive"] + counts.passed);
      }
      const keys = {
        high: (a, b) => b.score - a.score,
        low: (a, b) => a.score - b.score,
        near: (a, b) => Math.abs(a.score - this.threshold) - Math.abs(b.score - this.threshold),
        name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
      };
      const wanted = (tile) => (!type.value || tile.dataset.type === type.value) && (!outcome.value || tile.outcome === outcome.value);
      this.shown = this.tiles.filter(wanted).sort(keys[order.value]);
      const placed = [...this.shown, ...this.tiles.filter((tile) => !wanted(tile))];
      if (placed.some((tile, k) => tile !== this.list.children[k])) this.list.append(...placed);
      const limit = this.all ? Infinity : SHOWN;
      placed.forEach((tile, k) => { tile.hidden = k >= Math.min(this.shown.length, limit); });
      this.more.hidden = this.shown.length <= limit;
      this.more.textContent = `Show all ${this.shown.length}`;
      this.root.querySelector(".nothing").hidden = this.shown.length > 0;
      this.tiles.filter((tile) => tile.seen && !tile.hidden).forEach((tile) => this.draw(tile));
    }

    outline(tile, map) {
      return !this.level || this.level === this.chosen.pixel ? tile.original : trace(map, this.level, tile.size);
    }

    async draw(tile) {
      const heat = this.inputs.heat.checked;
      if (!tile.dirty) return;
      tile.dirty = false;
      const view = tile.querySelector(".view");
      const map = await readMap(tile);
      tile.found.setAttribute("d", this.outline(tile, map));
      let canvas = view.querySelector("canvas");
      if (!canvas && heat) view.insertBefore(canvas = document.createElement("canvas"), view.querySelector("svg"));
      if (canvas) canvas.hidden = !heat;
      if (heat) paint(canvas, map, this.end, true);
    }

    async open(tile) {
      const map = await readMap(tile);
      zoom.gallery = this;
      zoom.tile = tile;
      const photo = tile.querySelector("img");
      zoom.querySelector("h3").textContent = `${tile.dataset.name} · ${tile.dataset.type}`;
      zoom.querySelector(".state").textContent = `score ${tile.score.toFixed(3)}${tile.outcome && ` · ${tile.outcome}`} · ${this.shown.indexOf(tile) + 1} of ${this.shown.length}`;
      zoom.style.setProperty("--ratio", tile.size[0] / tile.size[1]);
      for (const image of zoom.querySelectorAll("img")) [image.src, image.alt] = [photo.src, photo.alt];
      for (const drawing of zoom.querySelectorAll("svg")) drawing.setAttribute("viewBox", `0 0 ${tile.size.join(" ")}`);
      for (const path of zoom.querySelectorAll(".truth")) path.setAttribute("d", tile.querySelector(".truth").getAttribute("d"));
      zoom.querySelector(".found").setAttribute("d", this.outline(tile, map));
      paint(zoom.querySelector("canvas"), map, this.end, false);
      if (!zoom.open) zoom.showModal();
    }

    step(by) {
      const count = this.shown.length;
      const place = this.shown.indexOf(zoom.tile);
      if (count) this.open(this.shown[(place + by + count) % count]);
    }
  }

  for (const root of document.querySelectorAll(".gallery")) new Gallery(root);
  if (!zoom) return;
  zoom.querySelector(".previous").onclick = () => zoom.gallery.step(-1);
  zoom.querySelector(".next").onclick = () => zoom.gallery.step(1);
  zoom.querySelector(".close").onclick = () => zoom.close();
  zoom.onclick = (event) => { if (event.target === zoom) zoom.close(); };
  zoom.onclose = () => { zoom.tile.hidden = false; zoom.tile.querySelector(".view").focus(); };
  zoom.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); zoom.gallery.step(by); }
  });
})();

// Curves that answer, in the place of a figure's image: values and bands of seeds under the pointer, one type alone by a
// click in the legend, another model or unit. Data: the figure's <script class="curves">. No libraries, no network.
(() => {
  "use strict";
  const DASHES = { "-": "", "--": "7 3", ":": "1.5 3", "-.": "7 3 1.5 3" };
  const star = (n, inner) => Array.from({ length: 2 * n }, (_, i) => {
    const r = i % 2 ? inner : 1.3, a = (Math.PI * i) / n - Math.PI / 2;
    return [r * Math.cos(a), r * Math.sin(a)];
  });
  const MARKS = { // outlines around the origin, about one unit wide
    s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]], D: [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]],
    "^": [[0, -1.1], [1.1, 0.9], [-1.1, 0.9]], v: [[0, 1.1], [1.1, -0.9], [-1.1, -0.9]],
    X: star(4, 0.6).map(([x, y]) => [(x - y) * 0.8, (x + y) * 0.8]), P: star(4, 0.6), "*": star(5, 0.55), h: star(6, 1.1),
  };
  const mark = (shape, x, y, size) => {
    if (!MARKS[shape]) return shape ? `<circle cx="${x}" cy="${y}" r="${size}"/>` : "";
    return `<polygon points="${MARKS[shape].map(([u, v]) => `${(x + size * u).toFixed(1)},${(y + size * v).toFixed(1)}`).join(" ")}"/>`;
  };
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]));
  const number = (v) => String(Math.abs(v) >= 1000 ? Math.round(v) : Number(v.toPrecision(4))).replace("-", "−"); // on the axes
  const value = (panel, v) => { // with the decimals that three digits of the panel's range need
    const digits = Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(panel.range || 1))));
    return Number(v.toFixed(digits)).toFixed(digits).replace("-", "−");
  };
  const unique = (values) => [...new Set(values)];
  const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const nearest = (values, v) => values.reduce((best, u, i) => (Math.abs(u - v) < Math.abs(values[best] - v) ? i : best), 0);

  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const by = [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough);
    const first = Math.ceil(low / by - 1e-9);
    return Array.from({ length: Math.floor(high / by + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * by).toPrecision(12)));
  }

  let figures = 0;
  function answer(figure) {
    const views = JSON.parse(figure.querySelector("script.curves").textContent);
    const id = `curves-${++figures}`;
    const models = unique(views.map((view) => view.model)), units = unique(views.map((view) => view.unit));
    let view = views[0];
    const alone = new Set(); // the names that are looked at; none: all
    const seen = (series) => !alone.size || alone.has(series.name);

    const root = document.createElement("div");
    root.className = "curves";
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Curves with values; the table after them has the numbers");
    root.innerHTML = `<div class="curves-controls">
      ${models.length > 1 ? `<label>Model <select id="${id}-model">${models.map((m) => `<option>${escaped(m)}</option>`).join("")}</select></label>` : ""}
      ${units.length > 1 ? `<div role="radiogroup" aria-label="Nats">Nats, ${units.map((u, i) =>
        `<label><input type="radio" name="${id}-unit" value="${u}"${i ? "" : " checked"}> ${u}</label>`).join("")}</div>` : ""}
      </div><div class="curves-legend" role="group" aria-label="Show these alone"></div>
      <div class="curves-grid"></div>
      <details><summary>Table</summary><div class="scroll"><table></table></div></details>`;
    const image = figure.querySelector("img");
    image.classList.add("curves-static");
    image.after(root);
    const [legend, grid, table] = ["div.curves-legend", "div.curves-grid", "table"].map((name) => root.querySelector(name));

    // --- what does not depend on the width ---
    function choose() {
      const select = root.querySelector("select"), unit = root.querySelector("input:checked");
      const model = select ? select.value : view.model;
      const there = views.filter((v) => v.model === model);
      view = there.find((v) => unit && v.unit === unit.value) || there[0];
      for (const input of root.querySelectorAll("input")) {
        input.disabled = !there.some((v) => v.unit === input.value);
        input.checked = input.value === view.unit;
      }
      for (const panel of view.panels) {
        const [low, high] = extent(panel.series.flatMap((one) => one.y));
        panel.range = high - low;
      }
      const series = new Map(view.panels.flatMap((panel) => panel.series.map((one) => [one.name, one])));
      for (const name of alone) if (!series.has(name)) alone.delete(name);
      legend.innerHTML = [...series.values()].map((one) =>
        `<button type="button" data-name="${escaped(one.name)}" aria-pressed="${alone.has(one.name)}" style="--c:${one.color}">
          <svg width="30" height="12" aria-hidden="true"><path class="line" d="M0 6H30" stroke-dasharray="${DASHES[one.dash]}"/>
          <g class="mark">${mark(one.mark, 15, 6, 3.5)}</g></svg>${escaped(one.name)}</button>`).join("");
      grid.style.setProperty("--columns", 1 + Math.max(...view.panels.map((panel) => panel.column)));
      grid.innerHTML = view.panels.map((panel) => `<div class="curves-panel"><p class="curves-title">${escaped(panel.title)}
        <span>${escaped(panel.y)}</span></p><div class="curves-plot" role="slider" tabindex="0" aria-valuemin="0" aria-valuenow="0"
        aria-label="${escaped(`${panel.title || panel.y}: left and right go along ${panel.x}, up and down from curve to curve`)}"></div>
        <div class="curves-tip" aria-hidden="true" hidden></div></div>`).join("");
      grid.querySelectorAll(".curves-plot").forEach((plot, n) => listen(plot, view.panels[n]));
      table.innerHTML = `<caption>${escaped([view.model, view.panels[0].y].filter(Boolean).join(": "))}</caption>
        <thead><tr>${["panel", "curve", "start", "end", "lowest", "highest"].map((h) => `<th scope="col">${h}</th>`).join("")}</tr></thead>
        <tbody>${view.panels.flatMap((panel) => panel.series.map((one) => `<tr><td>${escaped(panel.title)}</td><th scope="row">${escaped(one.name)}</th>${
          [one.y[0], one.y.at(-1), ...extent(one.y)].map((v) => `<td>${value(panel, v)}</td>`).join("")}</tr>`)).join("")}</tbody>`;
      draw();
    }

    // --- the plots ---
    const scales = new WeakMap(); // plot -> from data to pixels
    function draw() {
      grid.querySelectorAll(".curves-plot").forEach((plot, n) => {
        const panel = view.panels[n], width = Math.max(200, plot.clientWidth), height = Math.min(260, Math.max(170, width * 0.62));
        const left = 46, right = width - 8, top = 8, bottom = height - 36;
        const [x0, x1] = extent(panel.series.flatMap((one) => one.x));
        let [y0, y1] = extent(panel.series.flatMap((one) => [...one.y, ...(one.low || []), ...(one.high || [])]));
        const room = (y1 - y0 || 1) * 0.05;
        [y0, y1] = [y0 - room, y1 + room];
        const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (right - left), y = (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - top);
        const at = (u, v) => `${x(u).toFixed(1)} ${y(v).toFixed(1)}`;
        scales.set(plot, { x, y, top, bottom });
        const grids = ticks(y0, y1, 5).map((t) => `<line class="${t ? "grid" : "zero"}" x1="${left}" x2="${right}" y1="${y(t)}" y2="${y(t)}"/>
          <text x="${left - 6}" y="${y(t) + 4}" text-anchor="end">${number(t)}</text>`);
        const along = ticks(x0, x1, Math.min(6, width / 60)).map((t) => `<text x="${x(t)}" y="${bottom + 15}" text-anchor="middle">${number(t)}</text>`);
        const marks = panel.marks.map((u) => `<line class="mark-line" x1="${x(u)}" x2="${x(u)}" y1="${top}" y2="${bottom}"/>`);
        const curves = panel.series.map((one) => {
          const steps = one.x.map((u, i) => i), every = Math.ceil(one.x.length / 8);
          const band = one.low && one.x.length > 1 ? `<path class="band" d="M${steps.map((i) => at(one.x[i], one.low[i])).join("L")}L${
            steps.reverse().map((i) => at(one.x[i], one.high[i])).join("L")}Z"/>` : "";
          return `<g class="series" data-name="${escaped(one.name)}" style="--c:${one.color}">${band}
            <path class="line" stroke-dasharray="${DASHES[one.dash]}" d="M${one.x.map((u, i) => at(u, one.y[i])).join("L")}"/>
            <g class="mark">${one.x.map((u, i) => (i % every ? "" : mark(one.mark, x(u), y(one.y[i]), 2.8))).join("")}</g></g>`;
        });
        plot.innerHTML = `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" aria-hidden="true">${grids.join("")}${along.join("")}${marks.join("")}
          <text x="${(left + right) / 2}" y="${height - 4}" text-anchor="middle">${escaped(panel.x)}</text>${curves.join("")}<g class="here"></g></svg>`;
      });
      fade();
    }

    function fade() {
      for (const group of grid.querySelectorAll("g.series")) group.classList.toggle("faded", alone.size > 0 && !alone.has(group.dataset.name));
      for (const button of legend.children) button.setAttribute("aria-pressed", alone.has(button.dataset.name));
    }

    // --- what stands under the pointer, or where the arrow keys have gone ---
    const range = (panel, one, i) => (one.low && one.low[i] !== one.high[i] ? `${value(panel, one.low[i])} to ${value(panel, one.high[i])}` : "");
    const where = (panel, u) => `${panel.x.split(";")[0]} ${number(u)}${panel.steps ? `, step ${Math.round(u * panel.steps)}` : ""}`;

    function tell(plot, panel, series, i) {
      const one = panel.series[series], u = one.x[i], { x, y, top, bottom } = scales.get(plot), tip = plot.nextElementSibling;
      const rows = panel.series.filter(seen).map((other) => {
        const j = nearest(other.x, u);
        return `<tr${other === one ? ' class="this"' : ""} style="--c:${other.color}"><th>${escaped(other.name)}</th><td>${value(panel, other.y[j])}</td><td>${range(panel, other, j)}</td></tr>`;
      });
      const seeds = panel.seeds > 1 ? `range of ${panel.seeds} seeds` : "one run";
      tip.innerHTML = `<p>${escaped(where(panel, u))}</p><table>${rows.join("")}</table><p>${seeds}</p>`;
      tip.hidden = false;
      const width = plot.clientWidth;
      tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth, x(u) > width / 2 ? x(u) - tip.offsetWidth - 12 : x(u) + 12))}px`;
      plot.querySelector("g.here").innerHTML = `<line x1="${x(u)}" x2="${x(u)}" y1="${top}" y2="${bottom}"/><circle cx="${x(u)}" cy="${y(one.y[i])}" r="5" style="--c:${one.color}"/>`;
      plot.setAttribute("aria-valuemax", one.x.length - 1);
      plot.setAttribute("aria-valuenow", i);
      plot.setAttribute("aria-valuetext", `${one.name}, ${where(panel, u)}: ${value(panel, one.y[i])}${range(panel, one, i) && `, ${seeds} ${range(panel, one, i)}`}`);
    }

    function quiet(plot) {
      plot.nextElementSibling.hidden = true;
      plot.querySelector("g.here").innerHTML = "";
    }

    function listen(plot, panel) {
      let series = 0, i = 0;
      plot.setAttribute("aria-valuemax", panel.series[0].x.length - 1);
      plot.setAttribute("aria-valuetext", `${panel.series[0].name}: ${value(panel, panel.series[0].y[0])}`);
      const point = (event) => {
        const box = plot.getBoundingClientRect(), { x, y } = scales.get(plot);
        const candidates = panel.series.map((one, n) => ({ n, one, at: nearest(one.x.map(x), event.clientX - box.left) })).filter(({ one }) => seen(one));
        if (!candidates.length) return quiet(plot);
        const away = ({ one, at }) => Math.abs(y(one.y[at]) - (event.clientY - box.top));
        const best = candidates.reduce((a, b) => (away(b) < away(a) ? b : a));
        [series, i] = [best.n, best.at];
        tell(plot, panel, series, i);
      };
      plot.addEventListener("pointermove", point);
      plot.addEventListener("pointerdown", point);
      plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && quiet(plot));
      plot.addEventListener("blur", () => quiet(plot));
      plot.addEventListener("keydown", (event) => {
        const there = panel.series.map((one, n) => n).filter((n) => seen(panel.series[n]));
        if (event.key === "Escape") return quiet(plot);
        const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -Infinity], End: [0, Infinity] };
        if (!moves[event.key] || !there.length) return;
        event.preventDefault();
        const place = Math.max(0, there.indexOf(series)), [down, on] = moves[event.key];
        series = there[(place + down + there.length) % there.length];
        i = Math.min(panel.series[series].x.length - 1, Math.max(0, i + on));
        tell(plot, panel, series, i);
      });
    }

    root.addEventListener("change", choose);
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      alone.has(button.dataset.name) ? alone.delete(button.dataset.name) : alone.add(button.dataset.name);
      fade();
    });
    choose();
    let width = grid.clientWidth;
    new ResizeObserver(() => grid.clientWidth !== width && ((width = grid.clientWidth), draw())).observe(grid);
  }

  for (const script of document.querySelectorAll("figure script.curves")) answer(script.closest("figure"));
})();

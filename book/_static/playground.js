// The squeezing playground of chapter 4: one exact step on a softmax over 50 labels. No libraries, no network.
(() => {
  "use strict";
  const V = 50;
  const STRENGTHS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100];
  const root = document.getElementById("playground");
  if (!root) return;

  // --- the mathematics, as in lddyn/squeezing.py ---
  const softmax = (z) => {
    const top = Math.max(...z);
    const e = z.map((v) => Math.exp(v - top));
    const sum = e.reduce((a, b) => a + b);
    return e.map((v) => v / sum);
  };
  const zipf = (s) => Array.from({ length: V }, (_, i) => -s * Math.log(i + 1));
  const entropy = (p) => -p.reduce((a, v) => a + (v > 0 ? v * Math.log(v) : 0), 0);

  function step({ peakiness, pushed, pulled, strength, sign }) {
    const z = zipf(peakiness);
    const p = softmax(z);
    const down = sign !== "positive", up = sign !== "negative";
    const y = down ? pushed : pulled;
    const e = (i, label) => (i === label ? 1 : 0);
    const after = softmax(z.map((v, i) =>
      v + strength * ((down ? p[i] - e(i, pushed) : 0) - (up ? p[i] - e(i, pulled) : 0))));
    let top = y === 0 ? 1 : 0; // labels are ranked, so y* is the first one that is not y
    if (sign === "both") while (top === pushed || top === pulled) top++;
    const others = p.map((_, i) => i).filter((i) => !(down && i === pushed) && !(up && i === pulled));
    const gain = after[top] - p[top];
    const fromPushed = p[y] - after[y];
    return {
      p, after, y, top, others,
      rising: others.filter((i) => Math.log(after[i] / p[i]) > 1e-12).length,
      bar: p.reduce((a, v) => a + v * v, 0) - p[y],
      share: sign === "negative" ? Math.min(1, Math.max(0, (gain - fromPushed) / gain)) : null,
    };
  }

  // --- the page ---
  const slider = (id, label, min, max, by, value) =>
    `<label for="pg-${id}">${label} <output id="pg-${id}-value" for="pg-${id}"></output></label>
     <input type="range" id="pg-${id}" min="${min}" max="${max}" step="${by}" value="${value}">`;
  const radio = (value, label) =>
    `<label for="pg-${value}"><input type="radio" name="pg-sign" id="pg-${value}" value="${value}"> ${label}</label>`;
  const number = (id, label) =>
    `<tr><th scope="row">${label}</th><td id="pg-${id}-before"></td><td id="pg-${id}-after"></td></tr>`;
  const fact = (id, label) => `<tr><th scope="row">${label}</th><td colspan="2" id="pg-${id}"></td></tr>`;

  root.innerHTML = `
    <div class="pg-presets" role="group" aria-label="Start from a case of the figure">Case
      ${["A", "B", "C", "D", "E"].map((c) => `<button type="button" id="pg-case-${c}">${c}</button>`).join("")}
    </div>
    <fieldset class="pg-signs"><legend>The step</legend>
      ${radio("negative", "push down")}${radio("positive", "pull up")}${radio("both", "both, same force")}
    </fieldset>
    <p class="pg-legend"><span class="pg-before"></span> before <span class="pg-up"></span> after, rises
      <span class="pg-down"></span> after, falls <span class="pg-mark">▲▼</span> has a force on it</p>
    <svg id="pg-linear" role="img"></svg>
    <svg id="pg-log" role="img"></svg>
    <div class="pg-sliders">
      ${slider("peakiness", "Peakiness (0: uniform, 1: like words, 3: peaky):", 0, 6, 0.1, 2.6)}
      ${slider("pushed", "Pushed label, likely to unlikely: rank", 1, V, 1, V)}
      ${slider("pulled", "Pulled label, likely to unlikely: rank", 1, V, 1, 41)}
      ${slider("strength", "Size of the step |η′|:", 0, STRENGTHS.length - 1, 1, STRENGTHS.indexOf(3))}
    </div>
    <table aria-live="polite"><thead><tr><th></th><th scope="col">before</th><th scope="col">after</th></tr></thead><tbody>
      ${number("py", "p of the pushed label")}${number("ptop", "p of y*, the likeliest other")}
      ${number("entropy", "entropy (nats)")}
      ${fact("rising", "other labels that rise")}${fact("bar", "the bar ‖p‖² − p_y (small steps)")}
      ${fact("share", "who pays for the gain of y*")}
    </tbody></table>`;
  const $ = (id) => root.querySelector(`#pg-${id}`);
  const show = (v) => (v >= 0.01 ? v.toFixed(4) : v.toExponential(2));
  const percent = (v) => `${(100 * v).toFixed(0)}%`;

  const cases = {
    A: ["positive", 0.2, 50, 26], B: ["negative", 0.2, 26, 41], C: ["negative", 2.6, 3, 41],
    D: ["negative", 2.6, 50, 41], E: ["both", 2.6, 50, 41],
  };

  function read() {
    return {
      sign: root.querySelector("input[name=pg-sign]:checked").value,
      peakiness: Number($("peakiness").value),
      pushed: Number($("pushed").value) - 1,
      pulled: Number($("pulled").value) - 1,
      strength: STRENGTHS[Number($("strength").value)],
    };
  }

  function draw(svg, state, result, title, height) {
    const { p, after } = result;
    const width = Math.max(280, svg.clientWidth || root.clientWidth), left = 44, bottom = 30, top = 22;
    const slot = (width - left - 4) / V, floor = 1e-8, log = svg.id === "pg-log";
    const high = log ? 1 : Math.min(1, Math.max(...p, ...after) * 1.05);
    const y = (v) => {
      const share = log ? 1 - Math.log(Math.max(v, floor)) / Math.log(floor) : v / high;
      return top + (height - top - bottom) * (1 - share);
    };
    const base = height - bottom;
    const ticks = log ? [1, 1e-2, 1e-4, 1e-6, 1e-8] : [0, high / 2, high];
    const name = (v) => (log ? (v === 1 ? "1" : v.toExponential(0).replace("e-", "e−")) : v.toFixed(2));
    let out = `<text class="pg-title" x="${left}" y="13">${title}</text>`;
    for (const t of ticks)
      out += `<line class="pg-grid" x1="${left}" x2="${width}" y1="${y(t)}" y2="${y(t)}"/>` +
        `<text x="${left - 5}" y="${y(t) + 4}" text-anchor="end">${name(t)}</text>`;
    p.forEach((v, i) => {
      const x = left + i * slot, up = after[i] > v;
      out += `<rect class="pg-${up ? "up" : "down"}" x="${x + slot * 0.15}" width="${slot * 0.7}" y="${y(after[i])}" height="${Math.max(0, base - y(after[i]))}"/>`;
      out += `<line class="pg-before" x1="${x}" x2="${x + slot}" y1="${y(v)}" y2="${y(v)}"/>`;
    });
    const marked = [];
    if (state.sign !== "positive") marked.push([state.pushed, "▼"]);
    if (state.sign !== "negative") marked.push([state.pulled, "▲"]);
    for (const [i, sign] of marked)
      out += `<text class="pg-mark" x="${left + (i + 0.5) * slot}" y="${base + 13}" text-anchor="middle">${sign}</text>`;
    out += `<text x="${(left + width) / 2}" y="${height - 4}" text-anchor="middle">labels by rank, the likeliest on the left</text>`;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", `${title}: probabilities of ${V} labels before and after the step`);
    svg.innerHTML = out;
  }

  function update() {
    const state = read();
    if (state.sign === "both" && state.pulled === state.pushed) state.pulled = (state.pushed + V - 1) % V;
    const r = step(state);
    $("peakiness-value").textContent = state.peakiness.toFixed(1);
    $("pushed-value").textContent = `${state.pushed + 1}, p = ${show(r.p[state.pushed])}`;
    $("pulled-value").textContent = `${state.pulled + 1}, p = ${show(r.p[state.pulled])}`;
    $("strength-value").textContent = state.strength;
    for (const id of ["peakiness", "pushed", "pulled", "strength"])
      $(id).setAttribute("aria-valuetext", $(`${id}-value`).textContent);
    $("pushed").disabled = state.sign === "positive";
    $("pulled").disabled = state.sign === "negative";
    root.querySelector("#pg-py-before").previousElementSibling.textContent =
      state.sign === "positive" ? "p of the pulled label" : "p of the pushed label";
    const values = { py: [r.p[r.y], r.after[r.y]], ptop: [r.p[r.top], r.after[r.top]], entropy: [entropy(r.p), entropy(r.after)] };
    for (const [id, [before, after]] of Object.entries(values)) {
      $(`${id}-before`).textContent = show(before);
      $(`${id}-after`).textContent = show(after);
    }
    $("rising").textContent = `${r.rising} of ${r.others.length}`;
    $("bar").textContent = state.sign === "negative" ? show(r.bar) : "only for a push";
    $("share").textContent = r.share === null ? "only for a push"
      : `${percent(1 - r.share)} the pushed label, ${percent(r.share)} labels that nobody pushed`;
    draw($("linear"), state, r, "Linear axis", 160);
    draw($("log"), state, r, "Logarithmic axis", 190);
  }

  for (const [name, [sign, peakiness, pushed, pulled]] of Object.entries(cases))
    $(`case-${name}`).addEventListener("click", () => {
      $(sign).checked = true;
      $("peakiness").value = peakiness;
      $("pushed").value = pushed;
      $("pulled").value = pulled;
      $("strength").value = STRENGTHS.indexOf(3);
      update();
    });
  root.addEventListener("input", update);
  let width = 0; // the page is laid out after this script has run; a change of height is our own
  new ResizeObserver(() => root.clientWidth !== width && ((width = root.clientWidth), update())).observe(root);
  $("negative").checked = true;
  update();
})();

// The playground of chapter 4. One context: an exact step on a softmax over 50 labels. Two contexts: DPO on a softmax over
// 6 tokens, as chapter 5's ten lines. What is shown stands in the address, so that a link carries it. No libraries.
(() => {
  "use strict";
  const V = 50;
  const STRENGTHS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100];
  const START = [4, 2, 1, 0, -1, -2]; // logits of the six tokens; the first is y*

  // --- the mathematics, as in lddyn/theory/softmax.py and in the code of chapter 5 ---
  const logSoftmax = (z) => {
    const top = Math.max(...z);
    const sum = top + Math.log(z.reduce((a, v) => a + Math.exp(v - top), 0));
    return z.map((v) => v - sum);
  };
  const softmax = (z) => logSoftmax(z).map(Math.exp);
  const zipf = (s) => Array.from({ length: V }, (_, i) => -s * Math.log(i + 1));
  const entropy = (p) => -p.reduce((a, v) => a + (v > 0 ? v * Math.log(v) : 0), 0);
  const e = (i, label) => (i === label ? 1 : 0);

  function step({ peakiness, pushed, pulled, strength, sign }) {
    const z = zipf(peakiness);
    const p = softmax(z);
    const down = sign !== "positive", up = sign !== "negative";
    const y = down ? pushed : pulled;
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

  // Gradient descent on W for -log sigmoid(margin), with logits X W + start and features X = [[1, a], [a, 1]] of the two
  // contexts: it moves the logits by X X^T times their own gradients. Returns log p after every step: [step][context][token].
  function dpo({ overlap: a, chosen, rejected, raised, steps, rate = 0.1 }) {
    let z = [START.map((v, i) => v + raised * e(i, chosen)), [...START]];
    const [own, shared] = [1 + a * a, 2 * a];
    const path = [z.map(logSoftmax)];
    for (let t = 0; t < steps; t++) {
      const [plus, minus] = path[t];
      const margin = plus[chosen] - path[0][0][chosen] - (minus[rejected] - path[0][1][rejected]);
      const force = rate / (1 + Math.exp(margin));
      const pull = plus.map((v, i) => force * (e(i, chosen) - Math.exp(v)));
      const push = minus.map((v, i) => force * (Math.exp(v) - e(i, rejected)));
      z = [z[0].map((v, i) => v + own * pull[i] + shared * push[i]), z[1].map((v, i) => v + shared * pull[i] + own * push[i])];
      path.push(z.map(logSoftmax));
    }
    return path;
  }
  window.playground = { step, dpo }; // the tests compare them with torch

  const root = document.getElementById("playground");
  if (!root) return;

  // --- the page ---
  const slider = (id, label, min, max, by, value) =>
    `<label for="pg-${id}">${label} <output id="pg-${id}-value" for="pg-${id}"></output></label>
     <input type="range" id="pg-${id}" name="${id}" min="${min}" max="${max}" step="${by}" value="${value}">`;
  const radio = (name, value, label) =>
    `<label for="pg-${value}"><input type="radio" name="${name}" id="pg-${value}" value="${value}"> ${label}</label>`;
  const number = (id, label) =>
    `<tr><th scope="row">${label}</th><td id="pg-${id}-before"></td><td id="pg-${id}-after"></td></tr>`;
  const fact = (id, label) => `<tr><th scope="row">${label}</th><td colspan="2" id="pg-${id}"></td></tr>`;
  const buttons = (names, label) => `<div class="pg-presets" role="group" aria-label="${label}">${label}
    ${names.map(([id, name]) => `<button type="button" id="pg-case-${id}">${name}</button>`).join("")}</div>`;
  const legend = (marks) => `<p class="pg-legend"><span class="pg-before"></span> before <span class="pg-up"></span> after, rises
    <span class="pg-down"></span> after, falls <span class="pg-mark">${marks}</span> has a force on it</p>`;
  const KINDS = ["chosen", "rejected", "y*", "the others"];

  root.innerHTML = `
    <fieldset class="pg-signs"><legend>The scene</legend>
      ${radio("scene", "one", "one context, one step")}${radio("scene", "two", "two contexts, DPO")}
    </fieldset>
    <div id="pg-scene-one">
      ${buttons([..."ABCDE"].map((c) => [c, c]), "Case of the figure")}
      <fieldset class="pg-signs"><legend>The step</legend>
        ${radio("sign", "negative", "push down")}${radio("sign", "positive", "pull up")}${radio("sign", "both", "both, same force")}
      </fieldset>
      ${legend("▲▼")}
      <svg id="pg-linear" role="img"></svg>
      <svg id="pg-log" role="img"></svg>
      <div class="pg-sliders">
        ${slider("peakiness", "Peakiness (0: uniform, 1: like words, 3: peaky):", 0, 6, 0.1, 2.6)}
        ${slider("pushed", "Pushed label, likely to unlikely: rank", 1, V, 1, V)}
        ${slider("pulled", "Pulled label, likely to unlikely: rank", 1, V, 1, 41)}
        ${slider("strength", "Size of the step |η′|:", 0, STRENGTHS.length - 1, 1, STRENGTHS.indexOf(3))}
      </div>
      <table aria-live="polite"><thead><tr><td></td><th scope="col">before</th><th scope="col">after</th></tr></thead><tbody>
        ${number("py", "p of the pushed label")}${number("ptop", "p of y*, the likeliest other")}
        ${number("entropy", "entropy (nats)")}
        ${fact("rising", "other labels that rise")}${fact("bar", "the bar ‖p‖² − p_y (small steps)")}
        ${fact("share", "who pays for the gain of y*")}
      </tbody></table>
    </div>
    <div id="pg-scene-two">
      <p>DPO pulls the chosen token up in its context χ⁺ and pushes the rejected one down in another, χ⁻. The two share
        parameters as far as they overlap, so each also feels the other's force.</p>
      ${buttons([["far-unlikely", "chapter 5"], ["near-unlikely", "contexts alike"], ["far-likely", "chosen likely"], ["near-likely", "both"]], "Start from")}
      ${legend("▲▼")}
      <div class="pg-pair"><svg id="pg-plus" role="img"></svg><svg id="pg-minus" role="img"></svg></div>
      <svg id="pg-path" role="img"></svg>
      <div class="pg-sliders">
        ${slider("overlap", "Overlap of the contexts:", 0, 1, 0.05, 0.2)}
        ${slider("raised", "SFT before: logit of the chosen token in χ⁺ raised by", 0, 8, 0.5, 0)}
        ${slider("chosen", "Chosen token, likely to unlikely: rank", 1, 6, 1, 4)}
        ${slider("rejected", "Rejected token, likely to unlikely: rank", 1, 6, 1, 6)}
        ${slider("steps", "Steps of DPO (rate 0.1, β 1):", 0, 1000, 10, 300)}
      </div>
      <table><caption>Change of log π (nats)</caption><thead><tr><td></td><th scope="col">after χ⁺</th><th scope="col">after χ⁻</th></tr></thead><tbody>
        ${KINDS.map((kind, n) => `<tr><th scope="row">${kind}</th><td id="pg-kind-${n}-0"></td><td id="pg-kind-${n}-1"></td></tr>`).join("")}
      </tbody></table>
      <p id="pg-said" aria-live="polite"></p>
    </div>
    <p><a id="pg-link" href="#playground">Link to what is shown</a></p>`;
  const $ = (id) => root.querySelector(`#pg-${id}`);
  const show = (v) => (v >= 0.01 ? v.toFixed(4) : v.toExponential(2));
  const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(2);
  const percent = (v) => `${(100 * v).toFixed(0)}%`;
  const scene = () => root.querySelector("input[name=scene]:checked").value;
  const value = (id) => Number($(id).value);

  // --- the address ---
  const inputs = () => [...root.querySelectorAll(`#pg-scene-${scene()} input`)].filter((input) => input.type === "range" || input.checked);

  function address() {
    const state = inputs().map((input) => [input.name, input.name === "strength" ? STRENGTHS[input.value] : input.value]);
    return `#${new URLSearchParams([["playground", scene()], ...state])}`;
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1)), which = state.get("playground");
    if (which !== "one" && which !== "two") return false;
    $(which).checked = true;
    for (const [name, given] of state) {
      const named = [...root.querySelectorAll(`#pg-scene-${which} input`)].filter((input) => input.name === name);
      const input = named.find((one) => one.type === "range" || one.value === given);
      if (input?.type === "radio") input.checked = true;
      else if (input && Number.isFinite(Number(given))) // a slider keeps to its range
        input.value = name === "strength" ? STRENGTHS.indexOf(Number(given)) : given;
    }
    return true;
  }

  // --- drawing ---
  const frame = (svg, height, label, out) => {
    svg.setAttribute("viewBox", `0 0 ${svg.pgWidth} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", label);
    svg.innerHTML = out;
  };

  // p, after: by rank; marked: [label, sign] of those with a force; names: what stands under the bars, if not all the same
  function bars(svg, { p, after, marked, title, height, log, floor = 1e-8, names }) {
    const width = (svg.pgWidth = Math.max(150, svg.clientWidth || root.clientWidth)), left = 44, bottom = 30, top = 22;
    const slot = (width - left - 4) / p.length;
    const high = log ? 1 : Math.min(1, Math.max(...p, ...after) * 1.05);
    const y = (v) => {
      const share = log ? 1 - Math.log(Math.max(v, floor)) / Math.log(floor) : v / high;
      return top + (height - top - bottom) * (1 - share);
    };
    const base = height - bottom;
    const ticks = log ? [1, 1e-2, 1e-4, 1e-6, 1e-8].filter((t) => t >= floor) : [0, high / 2, high];
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
    for (const [i, sign] of marked)
      out += `<text class="pg-mark" x="${left + (i + 0.5) * slot}" y="${base + 13}" text-anchor="middle">${sign}</text>`;
    out += names
      ? names.map((n, i) => `<text x="${left + (i + 0.5) * slot}" y="${height - 4}" text-anchor="middle">${n}</text>`).join("")
      : `<text x="${(left + width) / 2}" y="${height - 4}" text-anchor="middle">labels by rank, the likeliest on the left</text>`;
    frame(svg, height, `${title}: probabilities of ${p.length} labels before and after`, out);
  }

  // curves: [name, context, values over the steps]
  function lines(svg, curves, at, height) {
    const width = (svg.pgWidth = Math.max(280, svg.clientWidth || root.clientWidth)), left = 44, right = 96, top = 22, bottom = 34;
    const values = curves.flatMap(([, , v]) => v), low = Math.min(0, ...values), high = Math.max(0, ...values), count = curves[0][2].length - 1;
    const x = (t) => left + (t / count) * (width - left - right), y = (v) => top + ((high - v) / (high - low || 1)) * (height - top - bottom);
    let out = `<text class="pg-title" x="${left}" y="13">Change of log π over the steps (nats)</text>`;
    for (const v of [low, 0, high]) out += `<line class="pg-grid" x1="${left}" x2="${width - right}" y1="${y(v)}" y2="${y(v)}"/><text x="${left - 5}" y="${y(v) + 4}" text-anchor="end">${v.toFixed(1)}</text>`;
    for (const t of [0, count / 2, count]) out += `<text x="${x(t)}" y="${height - 15}" text-anchor="middle">${t}</text>`;
    out += `<text x="${x(count / 2)}" y="${height - 2}" text-anchor="middle">steps</text>`;
    out += `<line class="pg-before" x1="${x(at)}" x2="${x(at)}" y1="${top}" y2="${height - bottom}"/>`;
    const labels = curves.map(([name, context, v], n) => ({ n, text: `${name}, ${context}`, y: y(v[count]) + 4 })).sort((a, b) => a.y - b.y);
    labels.forEach((label, n) => (label.y = Math.max(label.y, n ? labels[n - 1].y + 12 : 0))); // none on another
    curves.forEach(([name, context, v], n) => {
      const points = v.map((u, t) => (t % 5 ? "" : `${x(t).toFixed(1)},${y(u).toFixed(1)}`)).filter(Boolean).join(" ");
      const class_ = `pg-line pg-${{ chosen: "up", rejected: "down", "y*": "mark" }[name]}${context === "χ⁻" ? " pg-dashed" : ""}`;
      out += `<polyline class="${class_}" points="${points}"/><text x="${width - right + 6}" y="${labels.find((l) => l.n === n).y}">${labels.find((l) => l.n === n).text}</text>`;
    });
    frame(svg, height, `Change of log π over ${count} steps: ${curves.map(([name, context, v]) => `${name} after ${context} ${signed(v[count])}`).join(", ")}`, out);
  }

  function updateOne() {
    const state = {
      sign: root.querySelector("input[name=sign]:checked").value, peakiness: value("peakiness"),
      pushed: value("pushed") - 1, pulled: value("pulled") - 1, strength: STRENGTHS[value("strength")],
    };
    if (state.sign === "both" && state.pulled === state.pushed) state.pulled = (state.pushed + V - 1) % V;
    const r = step(state);
    $("peakiness-value").textContent = state.peakiness.toFixed(1);
    $("pushed-value").textContent = `${state.pushed + 1}, p = ${show(r.p[state.pushed])}`;
    $("pulled-value").textContent = `${state.pulled + 1}, p = ${show(r.p[state.pulled])}`;
    $("strength-value").textContent = state.strength;
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
    const marked = [];
    if (state.sign !== "positive") marked.push([state.pushed, "▼"]);
    if (state.sign !== "negative") marked.push([state.pulled, "▲"]);
    bars($("linear"), { ...r, marked, title: "Linear axis", height: 160 });
    bars($("log"), { ...r, marked, title: "Logarithmic axis", height: 190, log: true });
  }

  function updateTwo() {
    const chosen = value("chosen") - 1;
    let rejected = value("rejected") - 1;
    if (rejected === chosen) rejected = (chosen + START.length - 1) % START.length;
    const state = { overlap: value("overlap"), raised: value("raised"), chosen, rejected }, at = value("steps");
    const path = dpo({ ...state, steps: Number($("steps").max) }), [before, after] = [path[0], path[at]];
    const change = (context, i, t = at) => path[t][context][i] - path[0][context][i];
    const tops = before.map((logp) => logp.reduce((best, v, i) => (i !== rejected && i !== chosen && v > logp[best] ? i : best), [0, 1, 2].find((i) => i !== rejected && i !== chosen)));
    const rest = (context) => START.map((_, i) => i).filter((i) => i !== chosen && i !== rejected && i !== tops[context]);
    [0, 1].forEach((context) => {
      const others = rest(context), mean = others.reduce((sum, i) => sum + change(context, i), 0) / others.length;
      [change(context, chosen), change(context, rejected), change(context, tops[context]), mean].forEach((v, n) => ($(`kind-${n}-${context}`).textContent = signed(v)));
    });
    const similar = (2 * state.overlap) / (1 + state.overlap ** 2);
    $("overlap-value").textContent = `${state.overlap.toFixed(2)}, K(χ⁺, χ⁻) is ${percent(similar)} of K(χ⁺, χ⁺)`;
    $("raised-value").textContent = `${state.raised.toFixed(1)} nats`;
    $("chosen-value").textContent = `${chosen + 1}, p = ${show(Math.exp(before[0][chosen]))} after χ⁺`;
    $("rejected-value").textContent = `${rejected + 1}, p = ${show(Math.exp(before[1][rejected]))} after χ⁻`;
    $("steps-value").textContent = at;
    const moved = change(0, chosen), margin = moved - change(1, rejected);
    $("said").textContent = `After ${at} steps the margin has grown by ${margin.toFixed(2)} nats, and the chosen token ` +
      `${moved < 0 ? "has lost" : "has gained"} ${Math.abs(moved).toFixed(2)} nats in its own context: its probability went from ` +
      `${show(Math.exp(before[0][chosen]))} to ${show(Math.exp(after[0][chosen]))}.`;
    const names = START.map((_, i) => (i === chosen ? "chosen" : i === rejected ? "rej." : i === 0 ? "y*" : i + 1));
    const common = { height: 170, log: true, floor: 1e-6, names };
    bars($("plus"), { p: before[0].map(Math.exp), after: after[0].map(Math.exp), marked: [[chosen, "▲"]], title: "after χ⁺", ...common });
    bars($("minus"), { p: before[1].map(Math.exp), after: after[1].map(Math.exp), marked: [[rejected, "▼"]], title: "after χ⁻", ...common });
    const over = (name, context, i) => [name, context ? "χ⁻" : "χ⁺", path.map((_, t) => change(context, i, t))];
    lines($("path"), [over("chosen", 0, chosen), over("chosen", 1, chosen), over("rejected", 1, rejected), over("y*", 0, tops[0]), over("y*", 1, tops[1])], at, 210);
  }

  function update() {
    for (const name of ["one", "two"]) $(`scene-${name}`).hidden = scene() !== name;
    scene() === "one" ? updateOne() : updateTwo();
    for (const input of root.querySelectorAll("input[type=range]"))
      input.setAttribute("aria-valuetext", $(`${input.name}-value`).textContent || input.value);
    $("link").href = address();
  }

  function change() { // by the reader: also in the address
    update();
    history.replaceState(null, "", address());
  }
  const preset = (id, values) => $(`case-${id}`).addEventListener("click", () => {
    for (const [name, given] of Object.entries(values)) name === "sign" ? ($(given).checked = true) : ($(name).value = given);
    change();
  });
  const cases = { A: ["positive", 0.2, 50, 26], B: ["negative", 0.2, 26, 41], C: ["negative", 2.6, 3, 41], D: ["negative", 2.6, 50, 41], E: ["both", 2.6, 50, 41] };
  for (const [id, [sign, peakiness, pushed, pulled]] of Object.entries(cases)) preset(id, { sign, peakiness, pushed, pulled, strength: STRENGTHS.indexOf(3) });
  for (const [near, overlap] of [["far", 0.2], ["near", 0.9]])
    for (const [likely, raised] of [["unlikely", 0], ["likely", 5]]) preset(`${near}-${likely}`, { overlap, raised, chosen: 4, rejected: 6, steps: 300 });

  root.addEventListener("input", change);
  let width = 0; // the page is laid out after this script has run; a change of height is our own
  new ResizeObserver(() => root.clientWidth !== width && ((width = root.clientWidth), update())).observe(root);
  const arrive = () => restore() && (update(), root.scrollIntoView());
  window.addEventListener("hashchange", arrive);
  $("one").checked = $("negative").checked = true;
  update();
  arrive();
})();

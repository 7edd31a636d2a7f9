// The scorecard: filter by verdict, chapter and words, sort by a click on a column's head. No libraries, no network.
(() => {
  "use strict";
  const root = document.getElementById("claims-table");
  const table = root && root.querySelector("table.claims");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const distinct = (name) => [...new Set(rows.map((row) => row.dataset[name]))].sort();
  const select = (id, label, values) =>
    `<label for="sc-${id}">${label} <select id="sc-${id}"><option value="">all</option>${
      values.map((v) => `<option>${v}</option>`).join("")}</select></label>`;

  const controls = document.createElement("form");
  controls.className = "sc-controls";
  controls.innerHTML = `${select("verdict", "Verdict", distinct("verdict"))}
    ${select("chapter", "Chapter", distinct("chapter"))}
    <label for="sc-words">Words <input type="search" id="sc-words" placeholder="margin, y*, …"></label>
    <output id="sc-count" aria-live="polite"></output>`;
  controls.addEventListener("submit", (event) => event.preventDefault());
  root.prepend(controls);
  const $ = (id) => controls.querySelector(`#sc-${id}`);

  function filter() {
    const words = $("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const keep = ["verdict", "chapter"].every((name) => !$(name).value || row.dataset[name] === $(name).value)
        && words.every((word) => text.includes(word));
      row.hidden = !keep;
      shown += keep;
    }
    $("count").textContent = `${shown} of ${rows.length} claims`;
  }
  controls.addEventListener("input", filter);

  let sorted = 0, way = 1; // column and direction
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    return column === 0 ? Number(text) : text.toLowerCase();
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const label = head.textContent;
    head.innerHTML = `<button type="button">${label}</button>`;
    head.firstChild.addEventListener("click", () => {
      way = sorted === column ? -way : 1;
      sorted = column;
      const compare = (a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        return (x > y) - (x < y) || value(a, 0) - value(b, 0);
      };
      rows.sort((a, b) => way * compare(a, b));
      body.append(...rows);
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    });
  });
  filter();
})();

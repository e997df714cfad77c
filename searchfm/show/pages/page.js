// A trial has `id="trial-FIGURE-NUMBER"` in every figure and `data-trial` in every table. The trial under the pointer is
// highlighted in all of them, and described in a tooltip. Without this script the page has the same content.
(() => {
  "use strict";
  const tips = JSON.parse(document.getElementById("tips").textContent);
  const tip = document.getElementById("tip");
  const selector = '[id^="trial-"], [data-trial]';
  const numberOf = (mark) => mark.dataset.trial ?? mark.id.split("-").pop();
  const marks = new Map();
  for (const mark of document.querySelectorAll(selector)) {
    const number = numberOf(mark);
    marks.set(number, [...(marks.get(number) ?? []), mark]);
  }
  const near = [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3]]; // lines are thin
  const under = (x, y) =>
    near.map(([dx, dy]) => document.elementFromPoint(x + dx, y + dy)?.closest(selector)).find(Boolean);
  let lit = null;
  const show = (event) => {
    const mark = under(event.clientX, event.clientY);
    const number = mark ? numberOf(mark) : null;
    if (number !== lit) {
      for (const old of marks.get(lit) ?? []) old.classList.remove("lit");
      for (const now of marks.get(number) ?? []) now.classList.add("lit");
      lit = number;
    }
    tip.hidden = !(mark && mark.closest("svg") && tips[number]);
    if (tip.hidden) return;
    tip.textContent = tips[number];
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8)) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
})();


// A trial wears `id="trial-FIGURE-NUMBER"` in every picture and `data-trial` in every table: under the pointer it is lit
// in all of them, and told in words. Without this script the page says the same.
(() => {
  "use strict";
  const told = JSON.parse(document.getElementById("told").textContent);
  const tip = document.getElementById("tip");
  const what = '[id^="trial-"], [data-trial]';
  const number = (mark) => mark.dataset.trial ?? mark.id.split("-").pop();
  const marks = new Map();
  for (const mark of document.querySelectorAll(what)) {
    const one = number(mark);
    marks.set(one, [...(marks.get(one) ?? []), mark]);
  }
  const near = [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3]]; // lines are thin
  const under = (x, y) => near.map(([dx, dy]) => document.elementFromPoint(x + dx, y + dy)?.closest(what)).find(Boolean);
  let lit = null;
  const show = (event) => {
    const mark = under(event.clientX, event.clientY);
    const one = mark ? number(mark) : null;
    if (one !== lit) {
      for (const old of marks.get(lit) ?? []) old.classList.remove("lit");
      for (const now of marks.get(one) ?? []) now.classList.add("lit");
      lit = one;
    }
    tip.hidden = !(mark && mark.closest("svg") && told[one]);
    if (tip.hidden) return;
    tip.textContent = told[one];
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8)) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
})();

"use strict";
// Sort a table by the column whose heading is pressed: first in the order that suits the column, then in the reverse.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const other = now === "ascending" ? "descending" : "ascending";
      const order = now === "none" ? head.dataset.first : other;
      for (const one of heads) one.setAttribute("aria-sort", one === head ? order : "none");
      const sign = order === "ascending" ? 1 : -1;
      const numeric = head.dataset.kind === "number";
      const key = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (numeric ? x - y : x.localeCompare(y));
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
// Say where something scrolls sideways; frames that do not are no stops of the Tab key.
const frames = [...document.querySelectorAll(".scroll")];
for (const frame of frames) {
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "scroll sideways for more →";
  hint.hidden = true;
  frame.before(hint);
}
const look = (frame) => {
  const rest = frame.scrollWidth - frame.clientWidth;
  frame.previousElementSibling.hidden = rest < 2;
  frame.classList.toggle("more", rest - frame.scrollLeft > 1);
  if (rest < 2) frame.removeAttribute("tabindex");
  else frame.tabIndex = 0;
};
const watch = new ResizeObserver((entries) => entries.forEach((one) => look(one.target)));
for (const frame of frames) {
  watch.observe(frame);
  frame.addEventListener("scroll", () => look(frame), { passive: true });
}
// Open for printing what is not for the screen alone.
const closed = [];
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details:not([open]):not(.screen)")) {
    closed.push(one);
    one.open = true;
  }
});
addEventListener("afterprint", () => {
  for (const one of closed.splice(0)) one.open = false;
});

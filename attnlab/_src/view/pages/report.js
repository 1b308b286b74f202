"use strict";
// Tables that sort by a column and show the rows that hold a text.
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").onclick = () => {
      const order = head.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = order;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        // Cells without a value come last, whatever the order.
        if (a === "" || b === "") return (a === "") - (b === "");
        const both = [Number(a), Number(b)];
        const way = both.some(Number.isNaN) ? a.localeCompare(b) : both[0] - both[1];
        return order === "ascending" ? way : -way;
      };
      body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
    };
  });
  const filter = table.closest(".wide").previousElementSibling.querySelector(".filter");
  filter.oninput = () => {
    const text = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  };
}
const theme = document.getElementById("theme");
const dark = (on) => {
  document.documentElement.classList.toggle("dark", on);
  theme.textContent = on ? "Light" : "Dark";
};
theme.onclick = () => dark(!document.documentElement.classList.contains("dark"));
dark(matchMedia("(prefers-color-scheme: dark)").matches);
document.documentElement.dataset.ready = "yes";

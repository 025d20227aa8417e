// Sift and sort the ledger. Rows carry what they are sifted by: data-verdict, data-part.
(() => {
  const table = document.querySelector("table.ledger"), form = document.querySelector("form.sift");
  const body = table.tBodies[0], rows = [...body.rows], said = form.querySelector("output");

  function sift() {
    const find = form.elements.find.value.trim().toLowerCase();
    const fits = row => ["verdict", "part"].every(name => !form.elements[name].value || row.dataset[name] === form.elements[name].value)
      && row.textContent.toLowerCase().includes(find);
    for (const row of rows) row.hidden = !fits(row);
    const left = rows.filter(row => !row.hidden).length;
    said.textContent = left + (left === 1 ? " paper" : " papers");
  }

  function sort(column, head) {
    const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
    const key = row => row.cells[column].dataset.by ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!x || !y) return (x ? -1 : 1) * (x === y ? 0 : 1); // what has no value stays below
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.sort(order));
  }

  form.addEventListener("input", sift);
  form.addEventListener("submit", event => event.preventDefault());
  [...table.tHead.rows[0].cells].forEach((head, i) => head.firstElementChild.addEventListener("click", () => sort(i, head)));
  sift();
})();

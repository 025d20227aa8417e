// The moving parts of the frame: menu, theme, copying, search. A page without them can be read in full.
const page = document.documentElement, root = page.dataset.root;

// Menu, on a narrow screen
const menu = document.querySelector("nav.menu"), menuButton = document.querySelector(".menu-button");
menuButton.addEventListener("click", () => menuButton.setAttribute("aria-expanded", menu.classList.toggle("open")));
const current = menu.querySelector("[aria-current]");
if (current) menu.scrollTop = current.offsetTop - menu.clientHeight / 2;

// Theme: the system's until a reader chooses
document.querySelector(".theme-button").addEventListener("click", () => {
  const dark = (page.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  page.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", page.dataset.theme); } catch {}
});

// Copy buttons, and blocks that can be scrolled from the keyboard
for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
function reachable() {
  for (const box of document.querySelectorAll("pre, .wide, .formula, main table, math[display=block], [style*=overflow]")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
reachable();
addEventListener("resize", reachable);

// A link to a folded entry opens it
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
  target?.scrollIntoView();
}
if (location.hash) unfold();
addEventListener("hashchange", unfold);

// The section being read
const links = new Map([...document.querySelectorAll("aside a")].map(a => [decodeURIComponent(a.hash.slice(1)), a]));
if (links.size) {
  const heads = [...links.keys()].map(id => document.getElementById(id));
  const mark = () => {
    const at = heads.findLast(head => head.getBoundingClientRect().top < 120) ?? heads[0];
    for (const [id, a] of links) id === at.id ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current");
  };
  addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });
  mark();
}

// Search
const dialog = document.querySelector("dialog.search"), input = dialog.querySelector("input");
const list = dialog.querySelector("ul"), said = dialog.querySelector(".said");
let engine, asked = 0;

async function open() {
  dialog.showModal();
  input.select();
  if (location.protocol === "file:") { said.textContent = "Search needs a server: ptbook site --serve"; return; }
  engine ??= await import(new URL(root + "pagefind/pagefind.js", location.href));
}
const clean = text => { const p = document.createElement("p"); p.innerHTML = text; return p; };

async function search() {
  const turn = ++asked, words = input.value.trim();
  if (!engine || !words) { list.replaceChildren(); if (engine) said.textContent = ""; return; }
  const found = await engine.search(words);
  const pages = await Promise.all(found.results.slice(0, 8).map(result => result.data()));
  if (turn !== asked) return;
  said.textContent = found.results.length ? found.results.length + (found.results.length === 1 ? " page" : " pages") : "Nothing found";
  list.replaceChildren(...pages.map(data => {
    const best = data.sub_results.reduce((a, b) => (b.locations.length > a.locations.length ? b : a), data.sub_results[0]);
    const item = document.createElement("li"), link = document.createElement("a"), title = document.createElement("strong");
    link.href = new URL(root + data.raw_url.replace(/^\//, ""), location.href) + (best.url.includes("#") ? best.url.slice(best.url.indexOf("#")) : "");
    title.textContent = data.meta.title;
    link.append(title, clean(best.excerpt));
    item.append(link);
    return item;
  }));
}
input.addEventListener("input", search);
dialog.addEventListener("keydown", event => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Enter" && document.activeElement === input) { event.preventDefault(); list.querySelector("a")?.click(); }
  if (!step) return;
  event.preventDefault();
  const stops = [input, ...list.querySelectorAll("a")];
  stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(document.activeElement) + step))].focus();
});
list.addEventListener("click", event => { if (event.target.closest("a")) dialog.close(); });
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
document.querySelector(".search-button").addEventListener("click", open);
addEventListener("keydown", event => {
  const writing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !dialog.open) { event.preventDefault(); open(); }
});

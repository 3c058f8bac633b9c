"""How the HTML report looks, and what runs in it: its style, the form that filters its cases, its script."""

from __future__ import annotations

from fastconv.bench.plots import COLORS


def theme() -> str:
    """The colours as CSS variables, of a light page and of a dark one."""

    def variables(index: int) -> str:
        return "".join(f"--{name}:{colors[index]};" for name, colors in COLORS.items())

    return f":root{{{variables(0)}}}\n@media (prefers-color-scheme: dark){{:root{{{variables(1)}}}}}"


STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{margin:0;font-size:1.7rem;letter-spacing:-.02em}
h2{margin:2.6rem 0 .8rem;font-size:1.2rem;letter-spacing:-.01em}
a{color:var(--own)}
.device{margin:.1rem 0 1.2rem;color:var(--faint);font-size:1.05rem}
.hint{color:var(--faint);font-size:.85rem;max-width:48rem}
.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.6rem}
.tile{border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--faint);font-size:.8rem;line-height:1.3;display:block}
.tile.bad{border-color:var(--bad)}
.tile.bad b{color:var(--bad)}
dl{margin:1.2rem 0;display:grid;gap:.35rem;font-size:.88rem}
dl div{display:grid;grid-template-columns:11rem 1fr;gap:.2rem .8rem}
dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
.plots{columns:2 28rem;column-gap:1rem}
figure{margin:0 0 1rem;border:1px solid var(--line);border-radius:.6rem;padding:.5rem;break-inside:avoid;
max-width:44rem}
figure svg{display:block;width:100%;height:auto;overflow:hidden}
details{margin-bottom:1rem}
summary{cursor:pointer;color:var(--own);padding:.3rem 0;font-size:.9rem}
.filter{position:sticky;top:0;z-index:3;display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;padding:.6rem 0;
background:var(--paper);border-bottom:1px solid var(--line);margin-top:1.5rem}
.filter input{flex:1 1 9rem;min-width:0}
.filter input,.filter select{font:inherit;font-size:16px;color:inherit;background:transparent;
border:1px solid var(--line);border-radius:.4rem;padding:.35rem .6rem;max-width:100%}
.filter select option{color:var(--ink);background:var(--paper)}
.filter output{color:var(--faint);font-size:.85rem}
.scroll{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:.6rem;
overscroll-behavior-x:contain;isolation:isolate;scroll-margin-top:4rem}
section{scroll-margin-top:3rem}
table{border-collapse:collapse;font-size:.83rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.45rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
tr>:first-child{text-align:left;position:sticky;left:0;background:var(--paper);white-space:normal;min-width:9.5rem;
max-width:17rem;overflow-wrap:anywhere;font-weight:normal;border-right:1px solid var(--line)}
thead th{color:var(--faint);font-weight:normal;vertical-align:bottom;position:sticky;top:0;
background:var(--paper);z-index:1;border-bottom:0;box-shadow:inset 0 -1px var(--line)}
thead th:first-child{z-index:2}
thead button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit}
th[aria-sort] button{color:var(--ink);font-weight:bold}
th[aria-sort=descending] button::after{content:" \\2193"}
th[aria-sort=ascending] button::after{content:" \\2191"}
small{display:block;color:var(--faint);font-size:.92em;line-height:1.35}
.badge{display:inline-block;border:1px solid currentColor;border-radius:.3rem;padding:0 .35rem;margin-right:.3rem;
font-size:.75rem;white-space:nowrap;color:var(--faint)}
.badge.bad{color:var(--bad)}
.failed{display:block;color:var(--faint);font-size:.78rem;white-space:normal}
tr.red th{border-left:3px solid var(--bad)}
td.why{color:var(--bad);text-align:left;white-space:normal;min-width:14rem;overflow-wrap:anywhere}
@media (max-width:40rem){
main{padding:1rem .75rem 3rem}
dl div{grid-template-columns:1fr;gap:0}
figure{padding:.25rem}
tr>:first-child{min-width:7.5rem;max-width:9rem}
th,td{padding:.4rem .5rem}
}
@media print{.filter{display:none}.scroll{overflow:visible;max-height:none}}
"""

FILTER = """<form class="filter" role="search">
<input type="search" placeholder="filter cases: attention 8x512" aria-label="filter cases by words">
<select aria-label="which cases"><option value="">all cases</option><option value="missed">targets missed</option>
<option value="red">red</option><option value="broken">rivals that failed</option></select><output></output>
</form>
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column], value = cell && cell.dataset.v;
      return { row, number: value === undefined ? NaN : Number(value), text: column === 0 ? cell.textContent : "" };
    });
    rows.sort((a, b) => {
      if (column === 0) return (down ? -1 : 1) * a.text.localeCompare(b.text, undefined, { numeric: true });
      if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);
      return (down ? -1 : 1) * (a.number - b.number);
    });
    table.tBodies[0].append(...rows.map((found) => found.row));
  });
}
const form = document.querySelector("form.filter"), cases = document.querySelectorAll("tr.case");
const choose = () => {
  const words = form.querySelector("input").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const kind = form.querySelector("select").value;
  let shown = 0;
  for (const row of cases) {
    const fits = words.every((word) => row.dataset.case.includes(word)) && (!kind || row.classList.contains(kind));
    row.hidden = !fits;
    shown += fits;
  }
  for (const part of document.querySelectorAll("details.cases")) {
    if (shown < cases.length && part.querySelector("tr.case:not([hidden])")) part.open = true;
  }
  form.querySelector("output").textContent = shown === cases.length ? "" : shown + " of " + cases.length + " cases";
};
form.addEventListener("input", choose);
form.addEventListener("submit", (event) => event.preventDefault());
"""

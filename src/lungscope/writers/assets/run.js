"use strict";
// Whatever comes out of the films (names, messages, labels) is set as text, never as markup.
const PAGE = 100;
const MOST_PRINTED = 5000;
const SVG = "http://www.w3.org/2000/svg";
const find = (id) => document.getElementById(id);
const form = find("filter");
const { fields, rows } = JSON.parse(find("data").textContent);
const films = rows.map((row, number) => {
  const film = Object.fromEntries(fields.map((field, at) => [field, row[at]]));
  film.searched = `${film.path} ${film.code ?? ""} ${film.message ?? ""} ${film.warnings.join(" ")}`.toLowerCase();
  film.size = film.set ? film.set.length : null;
  film.number = number;
  return film;
});

const SHOWN = {
  all: () => true,
  done: (film) => !film.code,
  failed: (film) => film.code,
  unanswered: (film) => film.abstained,
  warned: (film) => film.warnings.length,
  contradictory: (film) => film.contradictory,
};

let sort = { key: "number", down: false };
let page = 0;
let found = films;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function filtered() {
  const { show, text, label, set, severity, probability } = Object.fromEntries(new FormData(form));
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return films.filter(
    (film) =>
      SHOWN[show](film) &&
      words.every((word) => film.searched.includes(word)) &&
      (!label || film.label === label) &&
      (!set || (film.size !== null && Math.min(film.size, 2) === Number(set))) &&
      (!severity || (film.severity !== null && film.severity >= Number(severity))) &&
      (!probability || (film.probability !== null && 100 * film.probability <= Number(probability))),
  );
}

const collator = new Intl.Collator(undefined, { numeric: true });

// Films without a value come last, whichever way the others go.
function sorted(list) {
  const { key, down } = sort;
  const order = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
  return list.sort((one, other) => {
    const a = one[key];
    const b = other[key];
    if (a === null || b === null) return (a === null) - (b === null) || one.number - other.number;
    return (down ? order(b, a) : order(a, b)) || one.number - other.number;
  });
}

function zones(scores) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "grid");
  svg.setAttribute("viewBox", "0 0 20 22");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", scores.map((score, at) => `${"ABCDEF"[at]} ${score ?? "not scored"}`).join(", "));
  scores.forEach((score, at) => {
    const box = document.createElementNS(SVG, "rect");
    const place = { x: at < 3 ? 0.5 : 10.5, y: 0.5 + 7 * (at % 3), width: 9, height: 6, class: `s${score}` };
    for (const [name, value] of Object.entries(place)) box.setAttribute(name, value);
    if (score === null) box.setAttribute("class", "none");
    svg.append(box);
  });
  return svg;
}

const number = (value, digits, unit = "") => (value === null ? "–" : value.toFixed(digits) + unit);

function line(film) {
  const name = film.href ? element("a", { href: film.href }, film.name) : film.name;
  const cell = element("td", { className: "name" }, name);
  cell.title = film.path;
  if (film.code) {
    const reason = element("td", { colSpan: 8 }, element("span", { className: "chip bad" }, film.code), " " + film.message);
    return element("tr", { className: "failed" }, cell, reason);
  }
  const notes = film.warnings.map((code) => element("span", { className: "chip warn" }, code));
  if (film.contradictory) notes.unshift(element("span", { className: "chip warn" }, "class and severity contradict"));
  if (notes.length) cell.append(element("div", { className: "chips" }, ...notes));
  const answer = film.abstained
    ? [element("span", { className: "unanswered" }, "No answer"), element("div", { className: "where" }, `${film.label} leads`)]
    : [film.label ?? "lungs only"];
  const set = film.set && film.set.map((label) => element("span", { className: "chip" }, label));
  const severity = film.severity === null ? "–" : `${film.severity}`;
  return element(
    "tr",
    {},
    cell,
    element("td", {}, ...answer),
    element("td", { className: "number" }, film.probability === null ? "–" : number(100 * film.probability, 1, " %")),
    element("td", { className: "second" }, ...(set ? [element("div", { className: "chips" }, ...(set.length ? set : ["none"]))] : ["–"])),
    element("td", { className: "number" }, severity),
    element("td", { className: "second" }, film.zones ? zones(film.zones) : "–"),
    element("td", { className: "second number" }, number(film.right, 0, " %")),
    element("td", { className: "second number" }, number(film.left, 0, " %")),
    element("td", { className: "second number" }, number(film.ms, 0)),
  );
}

function draw(from = page * PAGE, to = from + PAGE) {
  find("films").tBodies[0].replaceChildren(...found.slice(from, to).map(line));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  find("place").textContent = `Page ${page + 1} of ${pages}`;
  find("pages").hidden = pages === 1;
  find("previous").disabled = page === 0;
  find("next").disabled = page >= pages - 1;
}

function update() {
  page = 0;
  found = sorted(filtered());
  find("found").textContent = `${found.length.toLocaleString("en")} of ${films.length.toLocaleString("en")} films`;
  for (const button of document.querySelectorAll("#films th button")) {
    const state = button.dataset.key !== sort.key ? "none" : sort.down ? "descending" : "ascending";
    button.parentElement.setAttribute("aria-sort", state);
  }
  draw();
  // The choice stands in the address, so that it can be kept and is there again after a look at a film.
  const choice = new URLSearchParams([...new FormData(form)].filter(([name, value]) => value && !(name === "show" && value === "all")));
  if (sort.key !== "number") choice.set("sort", (sort.down ? "-" : "") + sort.key);
  const query = choice.toString();
  history.replaceState(null, "", query ? "#" + query : location.href.split("#")[0]);
}

function clear() {
  form.reset();
  sort = { key: "number", down: false };
}

function restore() {
  const choice = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of choice) {
    const field = form.elements.namedItem(name);
    if (field) field.value = value;
  }
  const key = (choice.get("sort") ?? "").replace(/^-/, "");
  if (document.querySelector(`#films th button[data-key="${CSS.escape(key)}"]`)) {
    sort = { key, down: choice.get("sort").startsWith("-") };
  }
}

function turn(by) {
  page += by;
  draw();
  find("found").scrollIntoView();
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", update);
// A "reset" event comes before the fields are empty, and nothing comes after.
form.querySelector("[type=reset]").addEventListener("click", (event) => {
  event.preventDefault();
  clear();
  update();
});
find("previous").addEventListener("click", () => turn(-1));
find("next").addEventListener("click", () => turn(1));
find("films").tHead.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { key, first } = button.dataset;
  sort = { key, down: sort.key === key ? !sort.down : first === "down" };
  update();
});
addEventListener("hashchange", () => {
  clear();
  restore();
  update();
});
addEventListener("beforeprint", () => draw(0, MOST_PRINTED));
addEventListener("afterprint", () => draw());
restore();
update();
find("list").hidden = false;

// The page: films in, results out. Everything that came out of a file is set as text, never as markup.

import { Viewer, measured } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 3;
const STAGES = {
  queued: "waiting",
  read: "reading",
  quality: "checking the film",
  segmentation: "finding the lungs",
  classification: "classifying",
  localization: "locating the evidence",
  severity: "grading the zones",
};

/** An element with properties, data and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/-|^(role|scope)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const listing = (words) => (words.length ? words.join(" or ") : "no class");
const say = (text) => ($("live").textContent = text);

// Films ---------------------------------------------------------------------------------------------------------------

const films = [];
let health = { upload_bytes: Infinity, demo: true };

class Refused extends Error {
  constructor({ code, message }, retry = 0) {
    super(message);
    Object.assign(this, { code, retry });
  }
}

async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Refused({
      code: "offline",
      message: "The server does not answer. Start `lungscope serve` again, then reload this page.",
    });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const problem = body?.error ?? { code: "internal", message: `The server answered with status ${response.status}.` };
  throw new Refused(problem, Number(response.headers.get("Retry-After")));
}

function add(name, send) {
  const film = { name, send, state: "waiting", stage: "queued", key: null, report: null, problem: null, blobs: null };
  film.row = makeRow(film);
  films.push(film);
  $("list").append(film.row);
  renderRow(film);
  pump();
  return film;
}

function addFiles(files) {
  for (const file of files) {
    add(file.name || "film", () => {
      if (file.size > health.upload_bytes) {
        const most = (health.upload_bytes / 2 ** 20).toFixed(0);
        throw new Refused({
          code: "too-large",
          message: `${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; at most ${most} MB are taken. Send a single film.`,
        });
      }
      const form = new FormData();
      form.append("file", file, file.name || "film");
      return ask("v1/analyses", { method: "POST", body: form });
    });
  }
}

/** Send what waits, a few at a time. */
function pump() {
  const running = films.filter((film) => film.state === "running").length;
  for (const film of films.filter((film) => film.state === "waiting").slice(0, Math.max(0, AT_ONCE - running))) {
    run(film).finally(pump);
  }
}

async function run(film) {
  film.state = "running";
  renderRow(film);
  try {
    const sent = await (await patiently(film.send)).json();
    film.key = sent.id;
    film.name = sent.name;
    if (film.removed) return forget(film);
    await follow(film);
    [film.report, film.blobs] = await Promise.all([fetchReport(film.key), fetchPictures(film.key)]);
    film.state = "done";
    say(`${film.name}: ${summary(film.report)}`);
  } catch (error) {
    film.state = "failed";
    film.problem = error instanceof Refused ? error : new Refused({ code: "internal", message: String(error) });
    say(`${film.name} failed: ${film.problem.message}`);
  }
  if (film.removed) return;
  renderRow(film);
  const replaces = film.state === "done" && viewers[active].film?.state === "failed";
  const free = viewers.find((viewer) => !viewer.film) ?? (replaces ? viewers[active] : null);
  if (free) await show(film, viewers.indexOf(free));
  else renderPanes();
}

/** Try again where the server says that it is busy, as long as it says so. */
async function patiently(send) {
  for (let tries = 0; ; tries++) {
    try {
      return await send();
    } catch (error) {
      if (error.code !== "busy" || tries === 9) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, error.retry)));
    }
  }
}

function follow(film) {
  return new Promise((resolve, reject) => {
    const source = new EventSource(`v1/analyses/${film.key}/events`);
    const end = (settle) => {
      source.close();
      settle();
    };
    source.addEventListener("progress", (event) => {
      film.stage = JSON.parse(event.data).stage ?? "queued";
      renderRow(film);
    });
    source.addEventListener("done", () => end(resolve));
    source.addEventListener("deleted", () =>
      end(() => reject(new Refused({ code: "not-found", message: "The film was removed." }))),
    );
    source.addEventListener("failed", () =>
      end(() => {
        ask(`v1/analyses/${film.key}`)
          .then((response) => response.json())
          .then(({ error }) => reject(new Refused(error)), reject);
      }),
    );
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED)
        reject(new Refused({ code: "offline", message: "The server broke off. Send the film again." }));
    };
  });
}

async function fetchReport(key) {
  return (await (await ask(`v1/analyses/${key}`)).json()).report;
}

async function fetchPictures(key) {
  const part = (name) => ask(`v1/analyses/${key}/${name}`);
  const [film, heat, shapes] = await Promise.all([
    part("film.png").then((response) => response.blob()),
    part("saliency.png").then(
      (response) => response.blob(),
      () => null,
    ),
    part("layers.json").then((response) => response.json()),
  ]);
  return { film, heat, shapes };
}

/** One request for all: a browser drops most of many, and all over 64 KiB, when the page is left. */
function forget(...gone) {
  const keys = gone.flatMap(({ key }) => key ?? []).slice(-2500);
  if (!keys.length) return;
  const headers = { "Content-Type": "application/json" };
  fetch("v1/analyses", { method: "DELETE", keepalive: true, headers, body: JSON.stringify(keys) }).catch(() => {});
}

async function remove(film) {
  film.removed = true;
  forget(film);
  const at = films.indexOf(film);
  films.splice(at, 1);
  film.row.remove();
  renderPanes();
  for (const viewer of viewers.filter((viewer) => viewer.film === film)) {
    await show(
      films.find((other) => other.state === "done" && !viewers.some((one) => one.film === other)) ?? null,
      viewers.indexOf(viewer),
    );
  }
  (films[Math.min(at, films.length - 1)]?.row.querySelector("button:enabled") ?? $("files")).focus();
}

function summary(report) {
  const answer = report.classification;
  const score = report.severity?.global;
  const words = !answer
    ? "lungs only"
    : answer.abstained
      ? "no answer"
      : `${answer.label} ${percent(answer.probability)}`;
  return score === null || score === undefined ? words : `${words}, severity ${score} of 18`;
}

/** A film's line in the list: the same elements for as long as it is there, so that clicks and focus outlast a change. */
function makeRow(film) {
  return make(
    "li",
    {},
    make(
      "button",
      { type: "button", className: "pick", onclick: () => show(film, active) },
      make("span", { className: "name" }),
      make("span", { className: "state" }),
    ),
    make("button", { type: "button", className: "drop-film", title: "Remove", onclick: () => remove(film) }, "✕"),
  );
}

function renderRow(film) {
  const [pick, drop] = film.row.children;
  const [name, state] = pick.children;
  const shown = viewers.some((viewer) => viewer.film === film);
  const busy = film.state === "running" || film.state === "waiting";
  film.row.className = [film.state, busy ? "busy" : "", shown ? "shown" : ""].join(" ");
  pick.disabled = busy;
  pick.setAttribute("aria-pressed", String(shown));
  drop.setAttribute("aria-label", `Remove ${film.name}`);
  name.textContent = film.name;
  state.textContent =
    film.state === "done"
      ? summary(film.report)
      : film.state === "failed"
        ? film.problem.message
        : film.state === "waiting"
          ? "waiting"
          : `${STAGES[film.stage] ?? film.stage} …`;
}

const renderList = () => films.forEach(renderRow);

// Viewers -------------------------------------------------------------------------------------------------------------

const layers = { lungs: 1, evidence: 0.75, zones: 0 };
const HINT = "Drop a chest film anywhere on this page, choose one, or use the demo film.";
const viewers = [];
let active = 0;
let linked = true;

function addPane() {
  const number = viewers.length;
  const canvas = make("canvas", {
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "film viewer",
    "aria-label": "No film",
  });
  const name = make("strong");
  const choice = make(
    "select",
    { "aria-label": `Film ${number + 1}`, onchange: () => show(choice.selectedOptions[0].film, number) },
    make("option", { disabled: true }, "Choose a film"),
  );
  const words = make("span");
  const caption = make("figcaption", {}, name, choice, words);
  const empty = make("p", { className: "empty" }, HINT);
  const pane = make(
    "figure",
    { className: "pane", onpointerdown: () => activate(number) },
    canvas,
    make("span", { className: "side right", title: "Patient's right", hidden: true }, "R"),
    make("span", { className: "side left", title: "Patient's left", hidden: true }, "L"),
    empty,
    caption,
  );
  pane.addEventListener("focusin", () => activate(number));
  const viewer = new Viewer(canvas, layers, (changed) => {
    if (linked) for (const other of viewers) if (other !== changed && other.picture) other.look(changed.view);
    renderTools();
  });
  Object.assign(viewer, { pane, caption, name, choice, words, empty, film: null });
  canvas.addEventListener("keydown", (event) => onKey(event, viewer));
  viewers.push(viewer);
  $("panes").append(pane);
}

function activate(number) {
  if (active === number) return;
  active = number;
  renderActive();
}

async function show(film, number) {
  const viewer = viewers[number];
  viewer.film = film;
  viewer.clear();
  active = number;
  renderList();
  renderPanes();
  if (film?.state !== "done") return;
  const { film: grey, heat, shapes } = film.blobs;
  const [bitmap, warm] = await Promise.all([createImageBitmap(grey), heat && createImageBitmap(heat)]);
  if (viewer.film !== film) return;
  viewer.show({ film: bitmap, heat: warm, shapes });
  renderPanes();
  performance.mark(`drawn ${film.name}`);
}

function renderPanes() {
  const compared = viewers.length > 1;
  $("panes").classList.toggle("compared", compared);
  $("compare").setAttribute("aria-pressed", String(compared));
  $("link").hidden = !compared;
  for (const viewer of viewers) {
    const { film, pane, caption, name, choice, words, canvas, empty } = viewer;
    const done = film?.state === "done";
    empty.hidden = film !== null && film.state !== "failed";
    empty.textContent = film ? `${film.name} can not be analysed.` : HINT;
    for (const side of pane.querySelectorAll(".side")) side.hidden = !done;
    pane.classList.toggle("mirrored", done && film.report.run.warnings.some(({ code }) => code === "mirrored"));
    canvas.setAttribute("aria-label", !film ? "No film" : !done ? `${film.name}: not shown` : describe(film));
    caption.hidden = !compared && !film;
    name.hidden = compared;
    name.textContent = film?.name ?? "";
    choice.hidden = !compared;
    if (compared) renderChoice(viewer);
    words.textContent = done ? summary(film.report) : "";
  }
  renderActive();
}

/** What does not change in a list that is open stays as it is. */
function renderChoice({ choice, film }) {
  for (const option of [...choice.options].slice(1)) if (option.film.removed) option.remove();
  films.forEach((one, at) => {
    const option = choice.options[at + 1] ?? choice.appendChild(make("option", { film: one }));
    if (option.text !== one.name) option.text = one.name;
    option.disabled = one.state !== "done";
  });
  choice.selectedIndex = films.indexOf(film) + 1;
}

function renderActive() {
  viewers.forEach(({ pane }, number) => pane.classList.toggle("active", number === active));
  renderTools();
  renderPanel(viewers[active].film);
}

function describe({ name, report }) {
  const seen = ["right", "left"].filter((side) => report.lungs[side].found);
  const parts = [`${seen.length === 2 ? "both lungs" : `the ${seen[0]} lung`} outlined`];
  if (report.saliency?.peak) parts.push(`evidence for ${report.saliency.label} as a heat map`);
  return `${name}: ${summary(report)}; ${parts.join(", ")}`;
}

function renderTools() {
  const viewer = viewers[active];
  const { window: width, level, invert } = viewer.tone;
  $("window").value = width;
  $("level").value = level;
  $("window-value").value = `${width} %`;
  $("level-value").value = `${level} %`;
  $("invert").setAttribute("aria-pressed", String(invert));
  $("link").setAttribute("aria-pressed", String(linked));
  $("drag").setAttribute("aria-pressed", String(viewer.dragsWindow));
}

function toggleCompare() {
  if (viewers.length > 1) {
    const kept = viewers[active].film;
    const gone = viewers.pop();
    gone.clear();
    gone.pane.remove();
    active = 0;
    if (viewers[0].film === kept) renderPanes();
    else show(kept, 0);
    renderList();
    return;
  }
  addPane();
  const other = films.find((film) => film.state === "done" && film !== viewers[0].film) ?? null;
  if (other) show(other, 1);
  else renderPanes();
}

function toggleLayer(name) {
  const box = $(`${name}-on`);
  box.checked = !box.checked;
  readLayers();
  say(`${name} ${box.checked ? "shown" : "hidden"}`);
}

function readLayers() {
  for (const name of Object.keys(layers)) {
    layers[name] = $(`${name}-on`).checked ? $(`${name}-opacity`).valueAsNumber / 100 : 0;
  }
  viewers.forEach((viewer) => viewer.draw());
}

const ACTIONS = {
  in: (viewer) => viewer.zoom(1.3),
  out: (viewer) => viewer.zoom(1 / 1.3),
  fit: (viewer) => viewer.whole(),
  reset: (viewer) => viewer.retone({ window: 100, level: 50, invert: false }),
};

function onKey(event, viewer) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 60;
  const keys = {
    ArrowLeft: () => viewer.pan(step, 0),
    ArrowRight: () => viewer.pan(-step, 0),
    ArrowUp: () => viewer.pan(0, step),
    ArrowDown: () => viewer.pan(0, -step),
    "+": () => ACTIONS.in(viewer),
    "=": () => ACTIONS.in(viewer),
    "-": () => ACTIONS.out(viewer),
    0: () => ACTIONS.fit(viewer),
    i: () => viewer.retone({ invert: !viewer.tone.invert }),
    "[": () => viewer.retone({ window: viewer.tone.window - 5 }),
    "]": () => viewer.retone({ window: viewer.tone.window + 5 }),
    ",": () => viewer.retone({ level: viewer.tone.level - 3 }),
    ".": () => viewer.retone({ level: viewer.tone.level + 3 }),
    r: () => ACTIONS.reset(viewer),
    c: toggleCompare,
    l: () => toggleLayer("lungs"),
    e: () => toggleLayer("evidence"),
    z: () => toggleLayer("zones"),
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || (!viewer.picture && event.key !== "c")) return;
  event.preventDefault();
  act();
}

// Results -------------------------------------------------------------------------------------------------------------

let inPanel;

/** A film ends before it is shown, so that its results are put there once, and what is opened in them stays open. */
function renderPanel(film) {
  if (film === inPanel) return;
  inPanel = film;
  const panel = $("panel");
  if (!film) {
    panel.replaceChildren(
      make(
        "div",
        { className: "card" },
        make("h3", {}, "Results"),
        make(
          "p",
          { className: "note" },
          "The class with its probability, the severity of each lung zone, warnings and files appear here.",
        ),
      ),
    );
  } else if (film.state === "failed") {
    panel.replaceChildren(
      make(
        "div",
        { className: "problem", role: "alert" },
        make("h3", {}, "This film can not be analysed"),
        make("p", {}, film.problem.message),
        make("p", { className: "note" }, `Code: ${film.problem.code}`),
      ),
    );
  } else if (film.report) {
    const { report } = film;
    panel.replaceChildren(
      ...[
        heading(film),
        warnings(report),
        contradiction(film),
        classCard(report.classification),
        severityCard(report.severity),
        lungsCard(report),
        filesCard(film),
        factsCard(report),
      ].filter(Boolean),
    );
  }
}

const card = (title, ...children) => make("section", { className: "card" }, make("h3", {}, title), ...children);
const pairs = (rows) =>
  make(
    "dl",
    { className: "pairs" },
    rows.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
  );

function heading({ name, report: { image, source } }) {
  const spacing = image.spacing_mm ? ` · ${image.spacing_mm.map((mm) => +mm.toFixed(3)).join(" × ")} mm` : "";
  return make(
    "div",
    {},
    make("h3", { className: "film-name" }, name),
    make("p", { className: "facts" }, `${image.width} × ${image.height} pixels · ${source.format}${spacing}`),
  );
}

function warnings({ run }) {
  if (!run.warnings.length) return null;
  return make(
    "section",
    { className: "card warnings" },
    make("h3", {}, "Check before you rely on this"),
    make(
      "ul",
      {},
      run.warnings.map((warning) => make("li", {}, warning.message)),
    ),
  );
}

function contradiction({ blobs }) {
  if (!blobs.shapes.contradicts) return null;
  return make(
    "section",
    { className: "card warnings" },
    make("h3", {}, "Class and severity contradict each other"),
    make("p", { className: "note" }, blobs.shapes.contradicts),
  );
}

function classCard(answer) {
  if (!answer) return card("Class", make("p", { className: "note" }, "This bundle only finds lungs."));
  const held = answer.conformal_set;
  const bars = Object.entries(answer.probabilities).map(([label, share]) => {
    const fill = make("span", { className: "fill" });
    fill.style.width = percent(share, 2).replace(" ", "");
    return make(
      "li",
      { className: label === answer.label ? "best" : "" },
      make("span", {}, label, held?.includes(label) ? make("span", { className: "tag" }, "not ruled out") : null),
      make("span", { className: "number" }, percent(share)),
      make("span", { className: "track", "aria-hidden": "true" }, fill),
    );
  });
  const note = held
    ? `Not ruled out at ${percent(answer.conformal_coverage, 0)} coverage: ${listing(held)}.`
    : "This bundle has no conformal sets.";
  return card(
    "Class",
    make("p", { className: "answer" }, answer.abstained ? "No answer" : answer.label),
    make("p", { className: "note" }, note),
    make("ul", { className: "bars" }, bars),
    make(
      "p",
      { className: "note" },
      `Calibrated probabilities, temperature ${+answer.temperature.toPrecision(3)}. The network knows no other classes than these: a film of anything else is put among them too.`,
    ),
  );
}

function severityCard(severity) {
  if (!severity) return null;
  const cell = (letter) => {
    const zone = severity.zones[letter];
    if (!zone) return make("td", { className: "none" }, make("b", {}, letter), "none");
    return make("td", { className: `s${zone.score}` }, make("b", {}, `${letter} · ${zone.score}`), measured(zone));
  };
  const rows = [
    ["Upper", "A", "D"],
    ["Middle", "B", "E"],
    ["Lower", "C", "F"],
  ];
  const extent = ["right", "left"]
    .filter((side) => severity.extent_percent[side] !== null)
    .map((side) => `${side} lung ${percent(severity.extent_percent[side] / 100, 0)}`);
  return card(
    "Severity",
    make("p", { className: "answer" }, severity.global === null ? "No global score" : `${severity.global} of 18`),
    severity.reason ? make("p", { className: "note" }, severity.reason) : null,
    make(
      "table",
      { className: "grades" },
      make(
        "caption",
        {},
        severity.basis === "grade"
          ? "Score 0 to 3 and the grade that it is cut from, by lung zone"
          : "Score 0 to 3 and the share involved, by lung zone",
      ),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          make("td", {}),
          make("th", { scope: "col" }, "Patient's right"),
          make("th", { scope: "col" }, "Patient's left"),
        ),
      ),
      make(
        "tbody",
        {},
        rows.map(([name, ...letters]) => make("tr", {}, make("th", { scope: "row" }, name), letters.map(cell))),
      ),
    ),
    extent.length ? make("p", { className: "note" }, `Involved: ${extent.join(", ")}.`) : null,
    make(
      "details",
      {},
      make("summary", {}, "How it is defined"),
      make("p", { className: "note" }, severity.definition),
    ),
  );
}

function lungsCard({ lungs, saliency }) {
  const rows = ["right", "left"].map((side) => {
    const { found, area_px: pixels, area_cm2: area } = lungs[side];
    const size = `${pixels.toLocaleString("en")} pixels`;
    return [`Patient's ${side} lung`, !found ? "not found" : area === null ? size : `${area.toFixed(0)} cm² (${size})`];
  });
  if (lungs.agreement !== null) rows.push(["Agreement of the networks", `Dice ${lungs.agreement.toFixed(3)}`]);
  if (saliency) {
    rows.push([
      "Evidence inside the lungs",
      saliency.fraction_in_lungs === null ? "none found" : percent(saliency.fraction_in_lungs, 0),
    ]);
    if (saliency.peak)
      rows.push([
        "Peak",
        `row ${saliency.peak.row}, column ${saliency.peak.col}: ${saliency.peak.value.toFixed(2)} logit units`,
      ]);
  }
  return card("Lungs and evidence", pairs(rows));
}

function filesCard({ key, report }) {
  // Asked first: a browser does not say why it could not save what is gone.
  const save = async (event) => {
    event.preventDefault();
    const { href } = event.currentTarget;
    try {
      await ask(`v1/analyses/${key}`);
      make("a", { href, download: "" }).click();
    } catch (error) {
      problem.textContent = error.message;
      files.append(problem);
    }
  };
  const link = (part, text) => make("a", { href: `v1/analyses/${key}/${part}`, download: "", onclick: save }, text);
  const evidence = report.saliency !== null;
  const problem = make("p", { className: "problem", role: "alert" });
  const files = card(
    "Files",
    make(
      "div",
      { className: "downloads" },
      link("overlay.png", "Overlay PNG"),
      link("lungs.png", "Lungs PNG"),
      link("report.html", "Report HTML"),
      link("report.json", "JSON"),
      evidence ? link("saliency.npy", "Evidence NPY") : null,
    ),
    make("h3", {}, "DICOM"),
    make(
      "div",
      { className: "downloads" },
      report.source.format === "DICOM" ? null : link("film.dcm", "Film SC"),
      link("lungs.dcm", "Lungs SEG"),
      evidence && report.saliency.peak ? link("saliency.dcm", "Evidence SEG") : null,
      link("overlay.dcm", "Overlay SC"),
      link("report.dcm", "Report SR"),
    ),
  );
  return files;
}

function factsCard({ run, source }) {
  const total = Object.values(run.timings_ms).reduce((sum, ms) => sum + ms, 0);
  const code = (text) => make("code", {}, text);
  return make(
    "section",
    { className: "card" },
    make(
      "details",
      {},
      make("summary", {}, "How this was made"),
      pairs([
        ["Made", run.created],
        ["Bundle", `${run.bundle.name} ${run.bundle.version}`],
        ["Device", `${run.device}, ${run.precision}`],
        [
          "Time",
          `${total.toFixed(0)} ms: ${Object.entries(run.timings_ms)
            .map(([stage, ms]) => `${stage} ${ms.toFixed(0)}`)
            .join(", ")}`,
        ],
        [
          "Versions",
          Object.entries(run.versions)
            .map(([name, version]) => `${name} ${version}`)
            .join(", "),
        ],
        ["File's SHA-256", code(source.sha256)],
        ...Object.entries(run.bundle.weights).map(([name, digest]) => [name, code(digest)]),
        ...Object.entries(source.tags),
      ]),
    ),
  );
}

// Start ---------------------------------------------------------------------------------------------------------------

function start() {
  addPane();
  renderPanes();
  $("files").addEventListener("change", ({ target }) => {
    addFiles([...target.files]);
    target.value = "";
  });
  $("demo").addEventListener("click", () => add("demo film", () => ask("v1/analyses/demo", { method: "POST" })));
  for (const button of document.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => viewers[active].picture && ACTIONS[button.dataset.do](viewers[active]));
  }
  $("invert").addEventListener("click", () => viewers[active].retone({ invert: !viewers[active].tone.invert }));
  $("drag").addEventListener("click", () => {
    const on = !viewers[active].dragsWindow;
    for (const viewer of viewers) viewer.dragsWindow = on;
    renderTools();
  });
  $("compare").addEventListener("click", toggleCompare);
  $("link").addEventListener("click", () => {
    linked = !linked;
    renderTools();
  });
  for (const name of ["window", "level"]) {
    $(name).addEventListener("input", ({ target }) => viewers[active].retone({ [name]: target.valueAsNumber }));
  }
  for (const name of Object.keys(layers)) {
    for (const control of [$(`${name}-on`), $(`${name}-opacity`)]) control.addEventListener("input", readLayers);
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const themed = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const label = () => ($("theme").textContent = themed() === "dark" ? "Light" : "Dark");
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = themed() === "dark" ? "light" : "dark";
    label();
  });
  dark.addEventListener("change", label);
  label();

  let inside = 0;
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (change) => document.body.classList.toggle("over", (inside = change) > 0);
  window.addEventListener("dragenter", (event) => holdsFiles(event) && over(inside + 1));
  window.addEventListener("dragleave", (event) => holdsFiles(event) && over(Math.max(0, inside - 1)));
  window.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    over(0);
    addFiles([...event.dataTransfer.files]);
  });

  // The visit ends: nothing of it stays on the server. A page that comes back out of the browser's cache begins anew.
  window.addEventListener("pagehide", () => forget(...films));
  window.addEventListener("pageshow", (event) => event.persisted && location.reload());

  ask("healthz")
    .then(async (response) => {
      health = await response.json();
      $("demo").hidden = !health.demo;
      $("kept").textContent = +(health.kept_seconds / 60).toFixed(1);
      const {
        models: [model],
      } = await (await ask("v1/models")).json();
      $("model").textContent = `model ${model.name} ${model.version} on ${model.device}`;
    })
    .catch((error) => say(error.message));
}

start();

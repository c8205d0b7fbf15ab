// One key an answer. The server decides what comes next: each answer goes there, onto its disk, and the reply is shown.
"use strict";

const main = document.querySelector("main.labelling");
const vocabulary = JSON.parse(main.dataset.vocabulary);
const byName = Object.fromEntries(vocabulary.map((attribute) => [attribute.name, attribute]));
const $ = (id) => document.getElementById(id);
const FIELD_MM = 15;
const SETTLE_MS = 200; // a key meant for the last tile must not answer the next
const QUEUE = 12;      // keys kept while an answer is on its way

let state = JSON.parse(main.dataset.state);
let busy = false;      // a request is on its way, or a picture is not shown yet
let waiting = [];      // keys pressed meanwhile, for the same tile
let shownAt = 0;
let zoomed = false, ringed = false, focus = [0.5, 0.5];
let editing = null;    // the field being edited

function say(text, trouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

const words = (value) => value === null ? "cannot tell" : Array.isArray(value) ? value.join(", ") || "none" : value;
const question = (name = state.active) => state.questions.find((each) => each.name === name);

function element(kind, text, className) {
  const node = document.createElement(kind);
  if (text) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// ---------------------------------------------------------------- what is shown

function showOptions() {
  const attribute = byName[state.active], asked = question();
  $("title").textContent = attribute.title;
  $("help").textContent = attribute.help;
  const has = (value, name) => Array.isArray(value) ? value.includes(name) : value === name;
  const main = state.active === "other_colors" ? question("color").value : undefined;
  const options = attribute.values.map((value) => ({ ...value, on: asked.answered && has(asked.value, value.name),
    suggested: has(asked.suggestion, value.name), disabled: value.name === main }));
  if (attribute.many) {
    options.push({ name: "none", key: "0", help: "", half: true, on: asked.answered && asked.value?.length === 0,
      suggested: asked.suggestion?.length === 0 });
  }
  options.push({ name: "cannot tell", key: "U", help: "", on: asked.answered && asked.value === null, plain: true, half: attribute.many });
  $("options").replaceChildren(...options.map((option) => {
    const button = element("button", "", [option.suggested ? "suggested" : "", option.plain ? "plain" : "", option.half ? "half" : ""].join(" ").trim());
    button.type = "button";
    button.dataset.key = option.key;
    button.disabled = Boolean(option.disabled);
    button.setAttribute("aria-pressed", String(option.on));
    button.setAttribute("aria-keyshortcuts", option.key);
    const key = element("kbd", option.key);
    key.setAttribute("aria-hidden", "true");
    const tag = option.disabled ? "main colour" : !option.suggested ? "" : asked.unsure ? "suggested, unsure" : "suggested";
    button.append(key, element("span", option.name), element("span", tag, "tag"));
    if (option.help) button.append(element("span", option.help, "help"));
    return button;
  }));
  $("hint").textContent = attribute.many ? "One: its number. Several: Shift with each number, then Space." : "";
}

function showAnswers() {
  $("answers").replaceChildren(...state.questions.map((each) => {
    const item = element("li", "", each.answered ? "" : each.suggestion === null ? "open" : "proposed");
    const button = element("button");
    button.type = "button";
    button.dataset.name = each.name;
    if (each.name === state.active) button.setAttribute("aria-current", "true");
    const mark = element("span", each.answered ? (each.was === "corrected" ? "✎" : "✓") : "", "mark");
    mark.setAttribute("aria-hidden", "true");
    const value = each.answered ? words(each.value) : each.suggestion === null ? "–" : `${words(each.suggestion)}?`;
    button.append(mark, element("span", byName[each.name].title), element("span", value, "value"),
      element("span", each.answered ? each.was : each.suggestion === null ? "open" : "suggested", "aside"));
    item.append(button);
    return item;
  }));
}

function showHeader() {
  const among = state.filter === "all" ? "" : ` ${state.filter}`;
  const place = state.inside ? `Tile ${state.place} of ${state.members}${among}` : `Tile ${state.tile + 1} of ${state.total}`;
  $("place").textContent = place;
  document.title = place;
  $("progress").max = state.total;
  $("progress").value = state.done;
  const left = state.total - state.done;
  const time = state.seconds === null || !left ? "" : ` · ${state.seconds.toFixed(0)} s a tile · about ${duration(state.seconds * left)} left`;
  $("rate").textContent = `${state.done} labelled${time}`;
  $("filter").value = state.filter;
}

function duration(seconds) {
  return seconds < 90 ? "a minute" : seconds < 5400 ? `${Math.round(seconds / 60)} minutes` : `${(seconds / 3600).toFixed(1)} hours`;
}

function showRest() {
  if (editing !== "sentence") $("sentence").value = state.sentence;
  if (editing !== "comment") $("comment").value = state.comment;
  $("flag").setAttribute("aria-pressed", String(state.flagged));
  const open = state.questions.filter((each) => !each.answered);
  const action = (name) => main.querySelector(`[data-do=${name}]`);
  action("acceptAll").disabled = !state.complete && !open.some((each) => each.suggestion !== null);
  action("acceptAll").lastChild.textContent = state.complete ? " next open" : " accept all";
  action("acceptOne").disabled = question().suggestion === null && !question().answered;
  action("acceptOne").lastChild.textContent = question().answered ? " go on" : " accept one";
  action("undo").disabled = state.undo === null;
  action("previous").disabled = state.previous === null;
  action("next").disabled = state.next === null;
}

const address = (tile, kind) => `/picture/${tile}/${kind}.png?v=${encodeURIComponent(state.label + tile + main.dataset.run)}`;
main.dataset.run = crypto.getRandomValues(new Uint32Array(1))[0]; // pictures are cached for this page only
const kinds = () => state.normalised ? ["normalised", "original"] : ["original"];

async function showPictures() {
  $("normalised").hidden = !state.normalised;
  $("normalised").querySelector("figcaption").textContent = `normalised (${state.normalised})`;
  $("original").querySelector("figcaption").textContent = state.normalised ? "as photographed" : "";
  const name = `The ${state.label} tile ${state.name}`;
  await Promise.all(kinds().map(async (kind) => {
    const image = $(kind).querySelector("img"), box = $(kind).querySelector(".window");
    image.classList.add("waiting");
    image.alt = kind === "original" ? name : `${name}, colours normalised`;
    image.src = address(state.tile, kind);
    box.classList.remove("unreadable");
    try {
      await image.decode();
      image.classList.remove("waiting");
    } catch {
      const reply = await fetch(image.src, { headers: { Accept: "application/json" } }).catch(() => null);
      const reason = reply === null ? "no connection" : (await reply.json().catch(() => ({}))).error ?? "damaged";
      box.dataset.reason = `This picture cannot be read: ${reason}. Flag it (F) and go on (→).`;
      box.classList.add("unreadable");
    }
  }));
  layOut();
  for (const kind of kinds()) new Image().src = address(state.ahead, kind);
}

function layOut() { // whole screen pixels for each pixel of the tile, as large as fits
  const wide = window.innerWidth > 1000, stacked = window.innerWidth <= 620;
  const room = $("pictures").clientWidth - 34, count = stacked ? 1 : kinds().length;
  const most = Math.min((room - 20 * (count - 1)) / count, Math.max(256, window.innerHeight - (wide ? 370 : 760)), 720);
  for (const kind of kinds()) {
    const image = $(kind).querySelector("img"), box = $(kind).querySelector(".window"), ruler = $(kind).querySelector(".ruler");
    const native = image.naturalWidth || 128, ratio = window.devicePixelRatio || 1;
    const side = native * Math.max(1, Math.floor(most * ratio / native)) / ratio;
    const factor = zoomed ? 3 : 1, [x, y] = zoomed ? focus : [0, 0];
    const corner = (at) => zoomed ? Math.min(Math.max(at - 0.5 / factor, 0), 1 - 1 / factor) : 0;
    box.style.width = box.style.height = ruler.style.width = `${side}px`;
    box.classList.toggle("zoomed", zoomed);
    image.style.width = image.style.height = `${side * factor}px`;
    image.style.marginLeft = `${-corner(x) * side * factor}px`;
    image.style.marginTop = `${-corner(y) * side * factor}px`;
    const rings = box.querySelector(".rings");
    rings.hidden = !ringed;
    [3, 6, 9].forEach((mm, n) => {
      const ring = rings.children[n];
      ring.style.width = ring.style.height = `${mm / FIELD_MM * side * factor}px`;
      ring.style.left = `${(0.5 - corner(x)) * side * factor}px`;
      ring.style.top = `${(0.5 - corner(y)) * side * factor}px`;
    });
    drawRuler(ruler, FIELD_MM / factor);
  }
  main.querySelector("[data-do=zoom]").setAttribute("aria-pressed", String(zoomed));
  main.querySelector("[data-do=rings]").setAttribute("aria-pressed", String(ringed));
}

function drawRuler(ruler, span) { // a tick a millimetre
  if (ruler.dataset.span === String(span)) return;
  ruler.dataset.span = span;
  const parts = [];
  for (let mm = 0; mm <= span; mm++) {
    const tick = element("i", "", mm % 5 === 0 ? "long" : "");
    tick.style.left = `${100 * mm / span}%`;
    parts.push(tick);
    if (mm % 5 === 0) {
      const number = element("span", mm === span ? `${mm} mm` : String(mm));
      number.style.left = `${100 * mm / span}%`;
      parts.push(number);
    }
  }
  ruler.replaceChildren(...parts);
}

async function show(next, first = false) {
  const moved = first || next.tile !== state.tile;
  state = next;
  if (moved) {
    waiting = [];
    shownAt = Infinity; // no key answers a tile that is not on screen yet
    zoomed = false;
    focus = [0.5, 0.5];
  }
  showHeader();
  showOptions();
  showAnswers();
  showRest();
  const asked = question(), done = state.done === state.total;
  const spoken = asked.answered ? `${words(asked.value)}, ${asked.was}` : asked.suggestion === null ? "no suggestion" : `suggested ${words(asked.suggestion)}`;
  say(state.trouble || (done ? `All ${state.total} tiles are labelled and saved. You can go back to any, or close this page.` :
    `${moved ? $("place").textContent + ". " : ""}${byName[state.active].title}: ${spoken}.`), Boolean(state.trouble));
  if (moved) {
    await showPictures();
    shownAt = performance.now();
  } else {
    layOut();
  }
}

// ---------------------------------------------------------------- asking the server

const request = (id) => ({ id, tile: state.tile, revision: state.revision, filter: state.filter, active: state.active,
  seconds: Math.round(performance.now() - shownAt) / 1000 });

async function send(action, change) { // again and again with one id until it is on disk: it counts once
  const body = JSON.stringify({ ...request([...crypto.getRandomValues(new Uint32Array(3))].map((n) => n.toString(36)).join("-")), ...change });
  return talk(`/${action}`, { method: "POST", body, headers: { "Content-Type": "application/json", Accept: "application/json" } });
}

async function talk(url, settings = { headers: { Accept: "application/json" } }) {
  if (busy) return false;
  busy = true;
  try {
    for (let wait = 300; ; wait = Math.min(2 * wait, 4000)) {
      try {
        const reply = await fetch(url, settings);
        const next = await reply.json();
        if (reply.ok || reply.status === 409) {
          await show(next);
          if (next.error) {
            waiting = []; // meant for the questions that this answer would have brought
            say(`Not taken: ${next.error}.`, true);
          }
          return reply.ok;
        }
        if (reply.status < 500) {
          waiting = [];
          say(next.error, true);
          return false;
        }
        say(`Not saved yet: ${next.error}. Trying again…`, true);
      } catch {
        say("Not saved yet: no connection to the server. Please leave this page open, it tries again…", true);
      }
      waiting = [];
      await new Promise((done) => setTimeout(done, wait));
    }
  } finally {
    busy = false;
    if (waiting.length) setTimeout(() => { if (!busy && waiting.length) press(waiting.shift()); }, 0);
  }
}

// ---------------------------------------------------------------- what a person does

function answer(value, by, stay = false) {
  return send("answer", { answers: { [state.active]: value }, by, stay });
}

function choose(key, by, several) { // a number, 0 or U, of the attribute at hand
  const attribute = byName[state.active], asked = question();
  if (key === "U") return answer(null, by);
  if (key === "0") return attribute.many ? answer([], by) : say("0 is for other colours and surface; U says that you cannot tell.");
  const value = attribute.values.find((each) => each.key === key);
  if (!value) return say(`${attribute.title} has the numbers 1 to ${attribute.values.length}.`);
  if (!attribute.many) return answer(value.name, by);
  if (!several) return answer([value.name], by);
  const now = asked.value ?? [];
  const chosen = attribute.values.map((each) => each.name).filter((name) => (name === value.name) !== now.includes(name));
  return answer(chosen, by, true);
}

const actions = {
  acceptAll: () => state.complete ? go(state.ahead) : send("answer", { accept: true, by: "accept" }),
  acceptOne: () => question().answered ? step(1) : question().suggestion !== null ? answer(question().suggestion, "accept") :
    say("No suggestion here: answer with a number."),
  undo: () => state.undo === null ? say("Nothing to undo.") : send("undo", { undo: state.undo }),
  previous: () => state.previous === null ? say("This is the first tile here.") : go(state.previous),
  next: () => state.next === null ? say("This is the last tile here.") : go(state.next),
  up: () => step(-1),
  down: () => step(1),
  zoom: () => { zoomed = !zoomed; layOut(); },
  rings: () => { ringed = !ringed; layOut(); },
  flag: () => send("flag", { flagged: !state.flagged }),
  edit: () => $("sentence").focus(),
  comment: () => $("comment").focus(),
};

const go = (tile, filter = state.filter) => talk(`/state?filter=${filter}${tile === null ? "" : `&tile=${tile}`}`);

function step(by) { // to another attribute, without an answer
  const names = vocabulary.map((attribute) => attribute.name);
  const at = names.indexOf(state.active);
  const open = names.slice(at + 1).concat(names.slice(0, at + 1)).find((name) => !question(name).answered);
  if (by > 0 && question().answered && !state.complete) return look(open);
  return look(names[(at + by + names.length) % names.length]);
}

function look(name) {
  show({ ...state, active: name });
}

const KEYS = { Enter: "acceptAll", " ": "acceptOne", Backspace: "undo", ArrowLeft: "previous", ArrowRight: "next", ArrowUp: "up",
  ArrowDown: "down", z: "zoom", r: "rings", f: "flag", e: "edit", c: "comment" };

function press(key) {
  if (busy) {
    if (!$("status").classList.contains("trouble") && waiting.length < QUEUE) waiting.push(key);
    return;
  }
  if (key.digit || key.name === "u") choose(key.digit ?? "U", "key", key.shift);
  else actions[KEYS[key.name]]();
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("textarea, input, select") || event.metaKey || event.altKey) return;
  if (event.ctrlKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (!event.repeat) press({ name: "Backspace" });
    return;
  }
  if (event.ctrlKey || (event.target.matches("button") && document.activeElement === event.target
    && event.target.matches(":focus-visible") && [" ", "Enter"].includes(event.key))) return; // the button's own press
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1] ?? (/^\d$/.test(event.key) ? event.key : null);
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!digit && name !== "u" && !(name in KEYS)) return;
  event.preventDefault();
  const answers = digit || name === "u" || name === "Enter" || name === " ";
  if (event.repeat || (answers && performance.now() - shownAt < SETTLE_MS)) return;
  press({ name, digit, shift: event.shiftKey });
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.key) {
    if (!busy) choose(button.dataset.key, "button", byName[state.active].many && button.dataset.key !== "0");
  } else if (button?.dataset.name) {
    if (!busy) look(button.dataset.name);
  } else if (button?.dataset.do) {
    if (!busy) actions[button.dataset.do]();
  } else if (button?.id === "flag") {
    if (!busy) actions.flag();
  } else if (event.target.closest(".window")) {
    const area = event.target.closest(".window").getBoundingClientRect();
    focus = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
    zoomed = !zoomed;
    layOut();
  }
  if (button && event.detail) button.blur(); // a clicked button must not swallow the next Enter
});

$("filter").addEventListener("change", async () => {
  const chosen = $("filter").value;
  $("filter").blur();
  if (await go(null, chosen)) history.replaceState(null, "", `?filter=${chosen}`);
  else $("filter").value = state.filter;
});

function field(name, save) {
  const box = $(name);
  const leave = () => { editing = null; box.value = state[name]; $("sentence-help").hidden = true; box.blur(); };
  box.addEventListener("focus", () => { editing = name; $("sentence-help").hidden = name !== "sentence"; });
  box.addEventListener("keydown", async (event) => {
    if (event.key === "Escape") leave();
    if (event.key !== "Enter" || event.shiftKey || busy || event.repeat) return;
    event.preventDefault();
    event.stopPropagation();
    if (box.value === state[name] || await save(box.value)) leave();
  });
  box.addEventListener("blur", async () => {
    if (editing !== name) return;
    editing = null;
    $("sentence-help").hidden = true;
    if (box.value === state[name] || busy) return;
    if (!await save(box.value)) box.value = state[name]; // the message says why
  });
}
field("sentence", (text) => send("answer", { text, by: "sentence" }));
field("comment", (comment) => send("comment", { comment }));

window.addEventListener("resize", layOut);
window.addEventListener("beforeunload", (event) => {
  if (busy && $("status").classList.contains("trouble")) event.preventDefault(); // an answer is not on disk yet
});

busy = true;
show(state, true).finally(() => { busy = false; });

// One key an answer. The server decides what comes next: each answer goes there, onto its disk, and the reply is shown.
// label_view.js draws the tile, label_keys.js turns keys, clicks and fields into requests.
"use strict";

const main = document.querySelector("main.labelling");
const vocabulary = JSON.parse(main.dataset.vocabulary);
const byName = Object.fromEntries(vocabulary.map((attribute) => [attribute.name, attribute]));
const $ = byId;
const SETTLE_MS = 200; // a key meant for the last tile must not answer the next
const QUEUE = 12;      // keys kept while an answer is on its way

let state = JSON.parse(main.dataset.state);
let busy = false;      // a request is on its way, or a picture is not shown yet
let waiting = [];      // keys pressed meanwhile, for the same tile
let shownAt = 0;
let armed = false;     // a finished tile may be changed: the person stepped back to it, or chose an attribute
let editing = null;    // the field being edited

function say(text, trouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

const words = (value) => value === null ? "cannot tell" : Array.isArray(value) ? value.join(", ") || "none" : value;
const question = (name = state.active) => state.questions.find((each) => each.name === name);

// ---------------------------------------------------------------- what is shown
// Buttons are made once and filled anew, so that the focus stays where a keyboard or screen-reader user left it.

const pool = Array.from({ length: 8 }, () => {
  const button = node("button"), key = node("kbd");
  button.type = "button";
  key.setAttribute("aria-hidden", "true");
  button.append(key, node("i", "", "swatch"), node("span", "", "word"), node("span", "", "tag"), node("span", "", "help"));
  $("options").append(button);
  return button;
});
const lines = vocabulary.map((attribute) => {
  const item = node("li"), button = node("button"), mark = node("span", "", "mark");
  button.type = "button";
  button.dataset.name = attribute.name;
  mark.setAttribute("aria-hidden", "true");
  button.append(mark, node("span", attribute.title), node("span", "", "value"), node("span", "", "aside"));
  item.append(button);
  $("answers").append(item);
  return button;
});

function showOptions() {
  const attribute = byName[state.active], asked = question();
  $("title").textContent = attribute.title;
  $("help").textContent = attribute.help;
  const has = (value, name) => Array.isArray(value) ? value.includes(name) : value === name;
  const taken = state.active === "other_colors" ? question("color").value : undefined;
  const options = attribute.values.map((value) => ({ ...value, on: asked.answered && has(asked.value, value.name),
    suggested: has(asked.suggestion, value.name), off: value.name === taken }));
  if (attribute.many) {
    options.push({ name: "none", key: "0", half: true, on: asked.answered && asked.value?.length === 0,
      suggested: asked.suggestion?.length === 0 });
  }
  options.push({ name: "cannot tell", key: "U", on: asked.answered && asked.value === null, plain: true, half: attribute.many });
  pool.forEach((button, n) => {
    const option = options[n], focused = button === document.activeElement;
    button.hidden = !option;
    if (!option) {
      if (focused) pool[options.length - 1].focus();
      return;
    }
    button.className = ["suggested", "plain", "half"].filter((name) => option[name]).join(" ");
    button.dataset.key = option.key;
    button.setAttribute("aria-disabled", String(Boolean(option.off)));
    button.setAttribute("aria-pressed", String(Boolean(option.on)));
    button.setAttribute("aria-keyshortcuts", option.key);
    button.querySelector("kbd").textContent = option.key;
    button.querySelector(".word").textContent = option.name;
    button.querySelector(".tag").textContent = option.off ? "main colour" : !option.suggested ? "" : asked.unsure ? "suggested, unsure" : "suggested";
    button.querySelector(".help").textContent = option.help ?? "";
    button.querySelector(".swatch").hidden = !option.swatch;
    button.querySelector(".swatch").style.backgroundColor = option.swatch ?? "";
  });
  showHint();
}

function showHint() {
  $("hint").textContent = state.complete && !armed ? "Finished. To change it choose an attribute (click, or ↑). Enter: the next open tile." :
    byName[state.active].many ? "One: its number. Several: Shift with each number, then Space." : "";
}

function showAnswers() {
  lines.forEach((button, n) => {
    const each = state.questions[n];
    button.parentElement.className = each.answered ? "" : each.suggestion === null ? "open" : "proposed";
    if (each.name === state.active) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    const [mark, , value, aside] = button.children;
    mark.textContent = each.answered ? (each.was === "corrected" ? "✎" : "✓") : "";
    value.textContent = each.answered ? words(each.value) : each.suggestion === null ? "–" : `${words(each.suggestion)}?`;
    aside.textContent = each.answered ? each.was : each.suggestion === null ? "open" : each.unsure ? "suggested, unsure" : "suggested";
  });
}

function showHeader() {
  const among = state.filter === "all" ? "" : ` ${$("filter").querySelector(`option[value="${state.filter}"]`)?.textContent ?? state.filter}`;
  const spot = state.inside ? `Tile ${state.place} of ${state.members}${among}` : `Tile ${state.tile + 1} of ${state.total}`;
  $("place").textContent = spot;
  document.title = spot;
  $("identity").textContent = state.name;
  $("identity").href = `?tile=${encodeURIComponent(state.name)}`;
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
  const action = (name, off, text) => { // not `disabled`: a button in focus would lose it
    const button = main.querySelector(`[data-do=${name}]`);
    button.setAttribute("aria-disabled", String(off));
    if (text) button.lastChild.textContent = ` ${text}`;
  };
  action("acceptAll", !state.complete && !open.some((each) => each.suggestion !== null), state.complete ? "next open" : "accept all");
  action("acceptOne", question().suggestion === null && !question().answered, question().answered ? "go on" : "accept one");
  action("undo", state.undo === null);
  action("previous", state.previous === null);
  action("next", state.next === null);
}

const address = (tile, kind) => `picture/${tile}/${kind}.png?v=${encodeURIComponent(state.label + tile + main.dataset.run)}`;
main.dataset.run = crypto.getRandomValues(new Uint32Array(1))[0]; // pictures are cached for this page only
const everyKind = () => state.normalised ? ["normalised", "original"] : ["original"];

async function showPictures() {
  $("normalised").querySelector("figcaption").textContent = `normalised (${state.normalised})`;
  $("original").querySelector("figcaption").textContent = state.normalised ? "as photographed" : "";
  const name = `The ${state.label} tile ${state.name}`;
  await Promise.all(everyKind().map(async (kind) => {
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
  if (view.rings) findCentre();
  for (const kind of everyKind()) new Image().src = address(state.ahead, kind);
}

async function show(next, first = false) {
  const moved = first || next.tile !== state.tile;
  state = next;
  if (moved) {
    waiting = [];
    shownAt = Infinity; // no key answers a tile that is not on screen yet
    armed = false;
    resetView();
    if (!first && location.search.includes("tile=")) { // a reload goes on where the work is
      history.replaceState(null, "", state.filter === "all" ? location.pathname : `?filter=${encodeURIComponent(state.filter)}`);
    }
  }
  showHeader();
  showOptions();
  showAnswers();
  showRest();
  const asked = question(), done = state.done === state.total;
  const spoken = asked.answered ? `${words(asked.value)}, ${asked.was}` : asked.suggestion === null ? (state.blind ? "your answer" : "no suggestion") : `suggested ${words(asked.suggestion)}`;
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
  return talk(action, { method: "POST", body, headers: { "Content-Type": "application/json", Accept: "application/json" } });
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

// What a person does: keys, clicks, fields, swipes.
"use strict";

async function answer(value, by, stay = false) {
  const change = state.complete, taken = await send("answer", { answers: { [state.active]: value }, by, stay, change });
  if (stay) armed = true; // more values of this attribute may follow
  else if (change) armed = false;
  showHint();
  return taken;
}

function choose(key, by, several) { // a number, 0 or U, of the attribute at hand
  const attribute = byName[state.active], asked = question();
  if (state.complete && !armed && by === "key") {
    return say("This tile is finished. To change it choose an attribute first: click it, or press ↑. Enter goes on.");
  }
  if (state.complete) armed = true; // a click, or a step back before
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

const onward = () => state.ahead === state.tile ? say("No other tile is open here.") : go(state.ahead);
const actions = {
  acceptAll: (by = "accept") => state.complete ? onward() : send("answer", { accept: true, by }),
  acceptOne: () => state.complete ? onward() : question().answered ? step(1) :
    question().suggestion !== null ? answer(question().suggestion, "accept") : say("No suggestion here: answer with a number."),
  undo: () => state.undo === null ? say("Nothing to undo.") : send("undo", { undo: state.undo }),
  previous: async () => {
    if (state.previous === null) say("This is the first tile here.");
    else if (await go(state.previous)) arm(); // an explicit step back
  },
  next: () => state.next === null ? say("This is the last tile here.") : go(state.next),
  up: () => step(-1),
  down: () => step(1),
  flag: () => send("flag", { flagged: !state.flagged }),
  edit: () => $("sentence").focus(),
  comment: () => $("comment").focus(),
};
for (const name of Object.keys(looks)) actions[name] = () => look(name);

const go = (tile, filter = state.filter) => talk(`state?filter=${encodeURIComponent(filter)}${tile === null ? "" : `&tile=${tile}`}`);

function arm() {
  armed = true;
  showHint();
}

function swiped() { // from label_view.js: a finger went over the tile to the right
  if (!busy && performance.now() - shownAt >= SETTLE_MS && !state.complete) actions.acceptAll("swipe");
}

function step(by) { // to another attribute, without an answer
  const names = vocabulary.map((attribute) => attribute.name);
  const at = names.indexOf(state.active);
  const open = names.slice(at + 1).concat(names.slice(0, at + 1)).find((name) => !question(name).answered);
  if (by > 0 && question().answered && !state.complete) return turnTo(open);
  return turnTo(names[(at + by + names.length) % names.length]);
}

function turnTo(name) {
  armed = true;
  show({ ...state, active: name });
}

const KEYS = { Enter: "acceptAll", " ": "acceptOne", Backspace: "undo", ArrowLeft: "previous", ArrowRight: "next", ArrowUp: "up",
  ArrowDown: "down", z: "zoom", r: "rings", m: "measure", p: "pixels", n: "kind", f: "flag", e: "edit", c: "comment" };

function press(key) {
  if (busy) {
    if (!$("status").classList.contains("trouble") && waiting.length < QUEUE) waiting.push(key);
    return;
  }
  if (key.digit || key.name === "u") choose(key.digit ?? "U", "key", key.shift);
  else actions[KEYS[key.name]]();
}

let clicked = null; // the button a mouse or finger left in focus: Enter and Space there are the page's, not the button's
document.addEventListener("pointerdown", (event) => { clicked = event.target.closest("button"); });

document.addEventListener("keydown", (event) => {
  if (event.key === "Tab") clicked = null;
  if (keySheet.open || event.target.matches("textarea, input:not([type=range]), select") || event.metaKey || event.altKey) return;
  if (event.ctrlKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (!event.repeat) press({ name: "Backspace" });
    return;
  }
  if (event.ctrlKey) return;
  const character = event.key.length === 1 && event.key !== " ";
  if (character && !singleKeys) return;
  if ([" ", "Enter"].includes(event.key) && event.target.closest("button, a") && event.target.closest("button, a") !== clicked) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1] ?? (/^\d$/.test(event.key) ? event.key : null);
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (name === "/") {
    event.preventDefault();
    $("search").focus();
    return;
  }
  if (!digit && name !== "u" && !(name in KEYS)) return;
  event.preventDefault();
  const answers = digit || name === "u" || name === "Enter" || name === " ";
  if (event.repeat || (answers && performance.now() - shownAt < SETTLE_MS)) return;
  press({ name, digit, shift: event.shiftKey });
});
document.addEventListener("keyup", (event) => { // Firefox presses a button when Space is let go
  if (event.key === " " && clicked && event.target === clicked) event.preventDefault();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || busy) return;
  if (button.dataset.key) {
    if (button.getAttribute("aria-disabled") === "true") say(`${byName.color.title}: ${words(question("color").value)} already.`);
    else choose(button.dataset.key, "button", byName[state.active].many && button.dataset.key !== "0");
  } else if (button.dataset.name) {
    turnTo(button.dataset.name);
  } else if (button.dataset.do) {
    if (button.dataset.do === "acceptAll" && button.getAttribute("aria-disabled") === "true") say("No suggestion is left here: answer the attribute that is asked.");
    else actions[button.dataset.do]();
  } else if (button.id === "flag") {
    actions.flag();
  }
});

$("filter").addEventListener("change", async () => {
  const chosen = $("filter").value;
  if (await go(null, chosen)) history.replaceState(null, "", `?filter=${encodeURIComponent(chosen)}`);
  else $("filter").value = state.filter;
  if (clicked === null) return;
  $("filter").blur(); // chosen with the mouse: the next key is an answer again
});
$("filter").addEventListener("pointerdown", () => { clicked = $("filter"); });

$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("search").value.trim();
  if (text) talk(`state?filter=${encodeURIComponent(state.filter)}&find=${encodeURIComponent(text)}&after=${state.tile}`);
});
$("search").addEventListener("keydown", (event) => { if (event.key === "Escape") $("search").blur(); });

function field(name, save) {
  const box = $(name);
  let came = null; // where the focus was before: it goes back there
  const leave = () => {
    editing = null;
    box.value = state[name];
    $("sentence-help").hidden = true;
    if (came?.isConnected && !came.matches("input, textarea")) came.focus();
    else box.blur();
  };
  box.addEventListener("focus", (event) => { came = event.relatedTarget; editing = name; $("sentence-help").hidden = name !== "sentence"; });
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
field("sentence", (text) => send("answer", { text, by: "sentence", change: state.complete }));
field("comment", (comment) => send("comment", { comment }));

window.addEventListener("beforeunload", (event) => {
  if (busy && $("status").classList.contains("trouble")) event.preventDefault(); // an answer is not on disk yet
});

busy = true;
show(state, true).finally(() => { busy = false; });

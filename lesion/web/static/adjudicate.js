// Adjudication: one key decides which of the answers stands. A decision is on disk before the next case shows.
"use strict";

const main = document.querySelector("main.deciding");
const $ = (id) => document.getElementById(id);
const SETTLE_MS = 200; // a key meant for the last case must not decide the next
let state = JSON.parse(main.dataset.state);
let busy = false, shownAt = 0;

function say(text, trouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function showCase() {
  $("title").textContent = state.title;
  $("help").textContent = state.help;
  $("identity").textContent = `${state.name} · ${state.label} · 15 mm across`;
  const buttons = $("options").children;
  while (buttons.length > state.options.length) buttons[buttons.length - 1].remove();
  state.options.forEach((option, n) => {
    let button = buttons[n];
    if (!button) { // made once: the focus stays where it was
      button = document.createElement("button");
      button.type = "button";
      button.append(...["kbd", "b", "span"].map((kind) => document.createElement(kind)));
      button.firstChild.setAttribute("aria-hidden", "true");
      $("options").append(button);
    }
    button.dataset.option = n;
    button.setAttribute("aria-keyshortcuts", n + 1);
    button.setAttribute("aria-pressed", String(state.decided_now && same(option.value, state.decision)));
    const [key, answer, people] = button.children;
    key.textContent = n + 1;
    answer.textContent = option.words;
    people.textContent = option.people.join(", ");
  });
  $("other-label").hidden = !state.others.length;
  $("other").replaceChildren(new Option("choose…", ""), ...state.others.map((other, n) => new Option(other.words, n)));
  const chosen = state.others.findIndex((other) => state.decided_now && same(other.value, state.decision));
  $("other").value = chosen < 0 ? "" : chosen;
}

async function show(next) {
  const moved = next.at === null || next.tile !== state.tile || !$("tile").src;
  state = next;
  shownAt = Infinity;
  $("case").hidden = state.at === null;
  $("done").hidden = state.at !== null;
  $("progress").max = state.cases || 1;
  $("progress").value = state.decided;
  const place = state.at === null ? "Adjudication" : `Disagreement ${state.at + 1} of ${state.cases}`;
  $("place").textContent = document.title = place;
  main.querySelector("[data-do=undo]").setAttribute("aria-disabled", String(!state.undo));
  if (state.at === null) {
    say(state.cases ? `All ${state.cases} disagreements are decided and saved.` : "");
  } else {
    showCase();
    say(`${place}. ${state.title}: ${state.options.map((option, n) => `${n + 1} ${option.words}`).join(", ")}.${state.decided_now ? " Decided; decide again to change it." : ""}`);
    if (moved) {
      $("tile").classList.add("waiting");
      $("tile").alt = `The ${state.label} tile ${state.name}`;
      $("tile").src = `adjudicate/picture/${state.tile}/original.png`;
      await $("tile").decode().then(() => $("tile").classList.remove("waiting"), () => say("This picture cannot be read.", true));
    }
  }
  shownAt = performance.now();
}

async function talk(url, settings = { headers: { Accept: "application/json" } }) { // again and again until it is on disk
  if (busy) return;
  busy = true;
  try {
    for (let wait = 300; ; wait = Math.min(2 * wait, 4000)) {
      try {
        const reply = await fetch(url, settings), next = await reply.json();
        if (reply.ok || reply.status === 409) {
          await show(next);
          if (next.error) say(`Not taken: ${next.error}.`, true);
          return;
        }
        say(reply.status < 500 ? next.error : `Not saved yet: ${next.error}. Trying again…`, true);
        if (reply.status < 500) return;
      } catch {
        say("Not saved yet: no connection to the server. Please leave this page open, it tries again…", true);
      }
      await new Promise((done) => setTimeout(done, wait));
    }
  } finally {
    busy = false;
  }
}

function send(action, form) {
  const id = [...crypto.getRandomValues(new Uint32Array(3))].map((n) => n.toString(36)).join("-");
  return talk(`adjudicate/${action}`, { method: "POST", body: JSON.stringify({ id, ...form }),
    headers: { "Content-Type": "application/json", Accept: "application/json" } });
}

function decide(value) {
  if (performance.now() - shownAt < SETTLE_MS) return;
  send("decide", { tile: state.tile, attribute: state.attribute, value, revision: state.revision });
}

const goTo = (at) => at < 0 || at >= state.cases ? say(at < 0 ? "This is the first disagreement." : "This is the last disagreement.") :
  talk(`adjudicate/state?at=${at}`);
const actions = {
  undo: () => state.undo ? send("undo", { undo: state.undo }) : say("Nothing to undo."),
  previous: () => goTo(state.at === null ? state.cases - 1 : state.at - 1),
  next: () => state.at !== null && goTo(state.at + 1),
};
const KEYS = { Backspace: "undo", ArrowLeft: "previous", ArrowRight: "next" };

document.addEventListener("keydown", (event) => {
  if (keySheet.open || event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey || event.repeat || busy) return;
  const option = singleKeys && /^[1-9]$/.test(event.key) && state.at !== null ? state.options[event.key - 1] : null;
  if (!option && !(event.key in KEYS)) return;
  event.preventDefault();
  if (option) decide(option.value);
  else actions[KEYS[event.key]]();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || busy) return;
  if (button.dataset.do) actions[button.dataset.do]();
  else if (button.dataset.option) decide(state.options[button.dataset.option].value);
});
$("other").addEventListener("change", () => { if ($("other").value !== "") decide(state.others[$("other").value].value); });

show(state);

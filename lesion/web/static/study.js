// Keys, timing and unbroken reading on the tile page; single_keys.js lists the keys and switches them off.
// Without these files the form works too, one page load an answer.
"use strict";

const main = document.querySelector("main.reading");
const page = main.dataset.page;
const form = document.getElementById("answer");
const image = document.getElementById("tile");
const statusLine = document.getElementById("status");
const back = document.getElementById("back");
const SETTLE_MS = 250; // a second key press meant for the last picture must not answer the next

let state = JSON.parse(main.dataset.state);
let ready = false; // the picture is on screen and no answer is on its way
let shownAt = 0;
let seen = 0, visibleSince = null; // milliseconds the picture was visible: a page in the background does not count
let ahead = null; // { position, url } of the next picture, fetched while this one is read
form.noValidate = true;

function tick() { // adds what passed since the last call, if the picture was visible then
  const now = performance.now();
  if (visibleSince !== null) seen += now - visibleSince;
  visibleSince = document.visibilityState === "visible" && !keySheet.open ? now : null;
}

function startClock() {
  tick();
  seen = 0;
  shownAt = performance.now();
}

document.addEventListener("visibilitychange", tick);
for (const name of ["toggle", "close"]) keySheet.addEventListener(name, tick); // under the list of keys nobody reads

async function fetchTile(position) {
  const reply = await fetch(`${page}/tile/${position}`, { cache: "no-store" });
  if (!reply.ok) throw new Error("no picture");
  return URL.createObjectURL(await reply.blob());
}

async function fetchAhead() {
  const position = state.position + 1;
  ahead = null;
  if (position >= state.total) return;
  try {
    ahead = { position, url: await fetchTile(position) };
  } catch { /* it is fetched when its turn comes */ }
}

function say(text, trouble = false) {
  statusLine.textContent = text;
  statusLine.classList.toggle("trouble", trouble);
}

function mark() {
  for (const button of form.querySelectorAll("button[name=rating]")) {
    button.setAttribute("aria-pressed", String(Number(button.value) === state.rating));
  }
  for (const radio of form.querySelectorAll("input[name=malignant]")) {
    radio.checked = state.malignant !== null && (radio.value === "yes") === state.malignant;
  }
}

async function show(next, atStart = false) { // at the start the page has the picture already
  ready = false;
  state = next;
  if (state.done) {
    location.replace(page);
    return;
  }
  const place = `Picture ${state.position + 1} of ${state.total}`;
  document.title = place;
  document.getElementById("place").textContent = place;
  document.getElementById("progress").value = state.answered;
  form.elements.position.value = state.position;
  form.elements.revision.value = state.revision;
  back.hidden = !state.back;
  back.href = `${page}?at=${state.position}`;
  mark();
  image.classList.add("waiting");
  const old = image.src;
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    try {
      if (!atStart) image.src = ahead && ahead.position === state.position ? ahead.url : await fetchTile(state.position);
      await image.decode();
      break;
    } catch {
      ahead = null;
      atStart = false;
      say("The picture does not load. Trying again…", true);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  if (old.startsWith("blob:")) URL.revokeObjectURL(old);
  image.classList.remove("waiting");
  say(state.rating ? "You answered this one; answer again to change it." : "");
  document.getElementById("place").focus({ preventScroll: true }); // read out by a screen reader, seen by nobody
  startClock();
  ready = true;
  fetchAhead();
}

async function send(by) {
  ready = false;
  tick();
  const side = image.getBoundingClientRect().width;
  const answer = { position: state.position, revision: state.revision, rating: state.rating, client_s: (seen / 1000).toFixed(3),
    malignant: state.malignant === null ? null : state.malignant ? "yes" : "no", by, side_px: side, pixel_ratio: devicePixelRatio };
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    try {
      const reply = await fetch(form.action, { method: "POST", body: JSON.stringify(answer),
        headers: { "Content-Type": "application/json", Accept: "application/json" } });
      const next = await reply.json();
      if (reply.ok || reply.status === 409) {
        await show(next);
        if (next.error) say(`Not taken: ${next.error}. This is the next open picture.`, true);
        return;
      }
      say(`Not saved yet: ${next.error}. Trying again…`, true);
    } catch {
      say("Not saved yet: no connection to the study. Please leave this page open, it tries again…", true);
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}

function choose(change, by) {
  if (ready && performance.now() - shownAt >= SETTLE_MS) {
    Object.assign(state, change);
    if (state.rating && (!state.ask_malignant || state.malignant !== null)) {
      send(by);
    } else {
      say(state.rating ? "Benign or malignant?" : "Now: taken of a patient, or synthetic?");
    }
  }
  mark();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.submitter) choose({ rating: Number(event.submitter.value) }, "button");
});

form.addEventListener("change", (event) => {
  if (event.target.name === "malignant") choose({ malignant: event.target.value === "yes" }, "button");
});

document.addEventListener("keydown", (event) => {
  if (keySheet.open || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.length === 1 && !singleKeys) return;
  const key = event.key.toLowerCase();
  if (/^[1-6]$/.test(key)) {
    event.preventDefault();
    choose({ rating: Number(key) }, "key");
  } else if (state.ask_malignant && (key === "b" || key === "m")) {
    event.preventDefault();
    choose({ malignant: key === "m" }, "key");
  } else if (key === "arrowleft" && state.back && event.target.type !== "radio") {
    location.assign(back.href);
  }
});

window.addEventListener("beforeunload", (event) => {
  if (statusLine.classList.contains("trouble") && !ready) event.preventDefault(); // an answer is not on disk yet
});

show(state, true);

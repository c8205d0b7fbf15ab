// How the tile is looked at: its size, zoom, rings, ruler, brightness and contrast. Nothing here asks for or changes an answer.
"use strict";

const FIELD_MM = 15;
const SIDE_BY_SIDE = 0.8; // two pictures beside each other must keep this much of one picture's side
const view = { zoomed: false, rings: false, measuring: false, pixels: false, focus: [0.5, 0.5], line: null, kind: "original",
  both: false, centre: [0.5, 0.5], centres: new Map() };
const byId = (id) => document.getElementById(id);
const kinds = () => !state.normalised ? ["original"] : view.both ? ["normalised", "original"] : [view.kind];

function node(kind, text, className) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function press01(name, on) {
  const button = document.querySelector(`[data-do=${name}]`);
  button.setAttribute("aria-pressed", String(on));
}

function resetView() { // every tile begins plain: what helped on the last one may mislead on this one
  view.zoomed = false;
  view.focus = [0.5, 0.5];
  view.line = null;
  view.centre = [0.5, 0.5];
  byId("brightness").value = byId("contrast").value = 100;
}

function place(box, [x, y]) { // of the tile, as a share -> on the screen, in CSS pixels from the box's corner
  const { factor, corner, side } = box.geometry;
  return [(x - corner[0]) * side * factor, (y - corner[1]) * side * factor];
}

function share(box, event) { // the inverse: where on the tile a pointer is
  const { factor, corner, side } = box.geometry, area = box.getBoundingClientRect();
  return [corner[0] + (event.clientX - area.left) / (side * factor), corner[1] + (event.clientY - area.top) / (side * factor)];
}

function layOut() { // as large as the room the style sheet gives to the pictures
  const room = byId("pictures").querySelector(".views");
  const style = getComputedStyle(room), rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  const extra = rem * (state.normalised ? 3.5 : 2); // the ruler below, and the caption
  const wide = room.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const high = room.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom) - extra;
  const one = Math.max(96, Math.min(wide, high)), two = Math.max(96, Math.min((wide - 20) / 2, high));
  view.both = Boolean(state.normalised) && two >= SIDE_BY_SIDE * one;
  const most = view.both ? two : one, shown = kinds();
  for (const kind of ["normalised", "original"]) {
    byId(kind).hidden = !shown.includes(kind);
    if (byId(kind).hidden) continue;
    const box = byId(kind).querySelector(".window"), image = box.querySelector("img"), ruler = byId(kind).querySelector(".ruler");
    const native = image.naturalWidth || 128, ratio = window.devicePixelRatio || 1;
    const whole = native * Math.max(1, Math.floor(most * ratio / native)) / ratio;
    const side = view.pixels ? whole : Math.floor(most), factor = view.zoomed ? 3 : 1;
    const corner = view.focus.map((at) => view.zoomed ? Math.min(Math.max(at - 0.5 / factor, 0), 1 - 1 / factor) : 0);
    box.geometry = { factor, corner, side };
    box.style.width = box.style.height = ruler.style.width = `${side}px`;
    box.classList.toggle("zoomed", view.zoomed);
    box.classList.toggle("measuring", view.measuring);
    image.style.imageRendering = view.pixels ? "pixelated" : "auto";
    image.style.width = image.style.height = `${side * factor}px`;
    image.style.marginLeft = `${-corner[0] * side * factor}px`;
    image.style.marginTop = `${-corner[1] * side * factor}px`;
    image.style.filter = `brightness(${byId("brightness").value}%) contrast(${byId("contrast").value}%)`;
    drawRings(box);
    drawLine(box);
    drawRuler(ruler, FIELD_MM / factor, side);
  }
  press01("zoom", view.zoomed);
  press01("rings", view.rings);
  press01("measure", view.measuring);
  press01("pixels", view.pixels);
  document.querySelector("[data-do=kind]").hidden = !state.normalised || view.both;
  document.querySelector("[data-do=plain]").disabled = byId("brightness").value === "100" && byId("contrast").value === "100";
}

function drawRings(box) {
  const rings = box.querySelector(".rings"), [x, y] = place(box, view.centre), { side, factor } = box.geometry;
  rings.hidden = !view.rings;
  [3, 6, 9].forEach((mm, n) => {
    const ring = rings.children[n];
    ring.style.width = ring.style.height = `${mm / FIELD_MM * side * factor}px`;
    ring.style.left = `${x}px`;
    ring.style.top = `${y}px`;
  });
}

async function findCentre() { // of the lesion, as measured; asked for only while rings are shown
  const tile = state.tile;
  if (!view.centres.has(tile)) {
    const reply = await fetch(`centre/${tile}`, { headers: { Accept: "application/json" } }).catch(() => null);
    if (!reply?.ok) return;
    view.centres.set(tile, await reply.json());
  }
  if (tile !== state.tile) return;
  const { x, y } = view.centres.get(tile);
  view.centre = [x, y];
  layOut();
}

function drawLine(box) {
  const svg = box.querySelector(".measure"), length = box.querySelector(".length");
  svg.toggleAttribute("hidden", !view.line);
  length.hidden = !view.line;
  if (!view.line) return;
  const [[x1, y1], [x2, y2]] = view.line.map((point) => place(box, point));
  for (const line of svg.children) {
    for (const [name, value] of Object.entries({ x1, y1, x2, y2 })) line.setAttribute(name, value);
  }
  const [a, b] = view.line;
  length.textContent = `${(Math.hypot(a[0] - b[0], a[1] - b[1]) * FIELD_MM).toFixed(1)} mm`;
  const side = box.geometry.side;
  length.style.left = `${Math.min(Math.max((x1 + x2) / 2 + 10, 4), side - 76)}px`;
  length.style.top = `${Math.min(Math.max((y1 + y2) / 2 - 34, 4), side - 32)}px`;
}

function drawRuler(ruler, span, side) { // a tick a millimetre
  const key = `${span} ${side < 200}`; // a small one names 5 and 15 mm only
  if (ruler.dataset.key === key) return;
  ruler.dataset.key = key;
  const parts = [];
  for (let mm = 0; mm <= span; mm++) {
    const tick = node("i", "", mm % 5 === 0 ? "long" : "");
    tick.style.left = `${100 * mm / span}%`;
    parts.push(tick);
    if (mm % 5 === 0 && !(side < 200 && mm % 10 === 0 && mm)) {
      const number = node("span", mm === span ? `${mm} mm` : String(mm));
      number.style.left = `${100 * mm / span}%`;
      parts.push(number);
    }
  }
  ruler.replaceChildren(...parts);
}

const looks = {
  zoom: () => { view.zoomed = !view.zoomed; },
  rings: () => { view.rings = !view.rings; if (view.rings) findCentre(); },
  measure: () => { view.measuring = !view.measuring; view.line = null; },
  pixels: () => { view.pixels = !view.pixels; },
  kind: () => { view.kind = view.kind === "normalised" ? "original" : "normalised"; },
  plain: () => { byId("brightness").value = byId("contrast").value = 100; },
};

function look(name) {
  looks[name]();
  layOut();
  if (name === "measure" && view.measuring) say("Drag on the tile to measure; M again ends it.");
}

// A finger or mouse on the tile: drags measure (ruler) or move the part that is seen (zoom); a swipe to the right accepts;
// a tap or click zooms there.
let drag = null;
byId("pictures").addEventListener("pointerdown", (event) => {
  const box = event.target.closest(".window");
  if (!box || event.button) return;
  drag = { box, at: share(box, event), x: event.clientX, y: event.clientY, focus: [...view.focus], moved: false };
  if (event.pointerType === "mouse" || view.measuring || view.zoomed) box.setPointerCapture?.(event.pointerId);
});
byId("pictures").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  drag.moved ||= Math.hypot(dx, dy) > 6;
  if (!drag.moved) return;
  if (view.measuring) {
    view.line = [drag.at, share(drag.box, event).map((at) => Math.min(Math.max(at, 0), 1))];
    layOut();
  } else if (view.zoomed) {
    const { side, factor } = drag.box.geometry, reach = 0.5 / factor;
    view.focus = [dx, dy].map((d, n) => Math.min(Math.max(drag.focus[n] - d / (side * factor), reach), 1 - reach));
    layOut();
  }
});
byId("pictures").addEventListener("pointerup", (event) => {
  if (!drag) return;
  const { box, moved, at } = drag, dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  drag = null;
  if (!moved && !view.measuring) {
    view.focus = at;
    look("zoom");
  } else if (moved && !view.measuring && !view.zoomed && event.pointerType !== "mouse" && box
             && dx > 60 && Math.abs(dy) < dx / 2) {
    swiped();
  }
});
byId("pictures").addEventListener("pointercancel", () => { drag = null; });
for (const name of ["brightness", "contrast"]) byId(name).addEventListener("input", layOut);
new ResizeObserver(() => { if (typeof state !== "undefined") layOut(); }).observe(byId("pictures").querySelector(".views"));

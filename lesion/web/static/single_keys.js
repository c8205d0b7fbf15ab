// The list of keys, and its switch: letters, numbers, ? and / can be switched off (WCAG 2.1.4). The browser remembers it for
// all pages of this server; a page that takes single keys asks `singleKeys` and `keySheet.open` first.
"use strict";

const keySheet = document.getElementById("sheet-of-keys");
let singleKeys = true;

function setSingleKeys(on) {
  singleKeys = document.getElementById("single-keys").checked = on;
  document.querySelector("main").classList.toggle("no-single-keys", !on);
}

try {
  setSingleKeys(localStorage.getItem("lesion single keys") !== "off");
} catch { /* no storage: they are on */ }
document.getElementById("single-keys").addEventListener("change", (event) => {
  setSingleKeys(event.target.checked);
  try {
    localStorage.setItem("lesion single keys", singleKeys ? "on" : "off");
  } catch { /* for this page only */ }
});

document.getElementById("keys").hidden = false; // a page without scripts has no keys
document.getElementById("keys").addEventListener("click", (event) => {
  if (event.detail) event.currentTarget.blur(); // a mouse leaves Enter and Space to the page
  keySheet.showModal();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "?" || !singleKeys || keySheet.open || event.ctrlKey || event.metaKey || event.altKey ||
      event.target.matches("textarea, select, input:not([type=range], [type=radio])")) return;
  event.preventDefault();
  keySheet.showModal();
});

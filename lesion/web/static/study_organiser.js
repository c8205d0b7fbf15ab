"use strict";

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const address = new URL(button.dataset.path, location.href).href;
  const line = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(address);
    line.textContent = `Copied: ${address}`;
  } catch { // browsers allow the clipboard on https and localhost only
    line.textContent = address;
  }
});

"use strict";
// A word that is hovered, focused or chosen shows its map: a picture that darkens the rest.

for (const card of document.querySelectorAll(".card")) {
  const veil = card.querySelector(".veil");
  if (!veil) continue;
  const words = [...card.querySelectorAll(".word")];
  const share = card.querySelector(".share");

  const show = (word) => {
    for (const each of words) each.classList.toggle("on", each === word);
    veil.classList.toggle("on", Boolean(word));
    if (word) veil.setAttribute("href", "data:image/png;base64," + word.dataset.veil);
    if (share) share.textContent = (word || share).dataset.note;
  };
  const chosen = () => words.find((word) => word.querySelector("input").checked);

  for (const word of words) {
    word.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse") show(word);
    });
    word.addEventListener("pointerleave", () => show(chosen()));
    word.addEventListener("focusin", () => show(word));
    word.addEventListener("change", () => show(word));
  }
  const clear = () => {
    for (const word of words) word.querySelector("input").checked = false;
    show(null);
  };
  card.addEventListener("focusout", () => show(chosen()));
  card.addEventListener("keydown", (event) => event.key === "Escape" && clear());
  card.querySelector(".photograph").addEventListener("click", clear);
}

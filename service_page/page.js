// One picture at a time: taken from the person, sent to the service, shown with its captions.
// A word that is hovered, focused or chosen shows its map over the photograph.

import { captionFigure } from "./figure.js";
import { lightOfWords, ofPicture, paintVeil, placeOfLight, SIDE } from "./maps.js";

const find = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const EXPLAINED = {
  greedy: "Takes the likeliest word each time. The quickest, and not always the best sentence.",
  beam: "Follows several sentences at once, and keeps those that are likeliest as a whole.",
  sample: "Draws each word by chance, so that every try says something else.",
};
const DIGITS = { maximumSignificantDigits: 2 };
const MILLIONS = { ...DIGITS, notation: "compact", compactDisplay: "long" };
const MOST_ALTERNATIVES = 5; // of those that a beam has found
const READY_MS = 1000; // between two questions whether the model is loaded
const FADE_MS = 180;
const PLAY_MS = 380; // a word, of a short caption;
const LONGEST_PLAY_MS = 4800; // what moves by itself for five seconds needs a way to stop it

const shown = {
  model: "", // what it is made of
  file: null,
  answer: null, // of the service
  caption: null, // that of its captions whose words are shown
  light: [], // of each word, Float32Array of SIDE * SIDE
  word: null, // the place of the word whose map is shown
};

// -------------------------------------------------------------------------------- asking the service

/** What the service answered, as an object. Throws {message, again} in words for a person. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const reason = options?.body ? ", or it broke off: the file may be too large" : "";
    throw problem(`The service cannot be reached${reason}.`, true);
  }
  const answer = await response.json().catch(() => null); // it may break off in the body
  options?.signal?.throwIfAborted();
  if (response.ok && answer) return answer;
  const said = sentence(answer?.error || `the service answered ${response.status}, and not why`);
  const seconds = response.headers.get("Retry-After");
  const again = response.ok || response.status >= 500;
  throw problem(seconds ? `${said} Wait ${seconds} s.` : said, again);
}

const problem = (message, again) => Object.assign(new Error(message), { again });

/** What the service says begins small and ends without a full stop. */
function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Resolves once the model has answered a picture of its own.
 *
 * /model/info says so with a status of 200 where /ready would be a fault on the browser's console.
 */
async function meetModel() {
  for (;;) {
    const info = await ask("model/info", { cache: "no-store" }).catch(({ message }) => ({ fault: message }));
    if (info.ready) {
      if (!shown.model) searchAs(info.decoding);
      shown.model = [info.feature_extractor, info.decoder].filter(Boolean).join(" · ");
      return tellModel("ready", `Ready${shown.model && " · "}${shown.model}`);
    }
    tellModel("waiting", info.fault ? sentence(info.fault) : "The model is loading");
    await pause(READY_MS);
  }
}

function tellModel(state, text) {
  const line = find("model");
  line.dataset.state = state;
  if (line.textContent !== text) line.textContent = text;
}

// ------------------------------------------------------------------------------------------ a picture

let request = new AbortController();
let met = meetModel();

function take(files) {
  const file = files[0];
  if (!file) return;
  shown.file = file;
  const photograph = find("photograph");
  URL.revokeObjectURL(photograph.src);
  photograph.src = URL.createObjectURL(file);
  photograph.alt = "Your picture";
  clearAnswer();
  caption();
}

find("photograph").addEventListener("load", ({ target }) => {
  showStage(target.naturalWidth, target.naturalHeight);
  find("unseen").hidden = true;
});

find("photograph").addEventListener("error", () => {
  showStage(0, 0);
  find("unseen").hidden = false;
  find("unseen").textContent = `This browser cannot show ${shown.file.name || "the file"}.`;
});

function showStage(width, height) {
  find("picture").classList.toggle("full", width > 0);
  find("invitation").hidden = width > 0;
  find("frame").hidden = !width;
  if (width) find("frame").style.setProperty("--aspect", width / height);
}

function clearAnswer() {
  shown.answer = shown.caption = null;
  shown.light = [];
  showWord(null);
  find("result").hidden = true;
}

/** Ask for the picture's captions and show them, or why there are none. A new question ends the old one. */
async function caption() {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  stopPlaying();
  find("problem").hidden = find("placeholder").hidden = true;
  wait(find("model").dataset.state === "ready" ? "Looking at the picture" : "Waiting for the model");
  try {
    await met;
    if (signal.aborted) return;
    wait("Looking at the picture");
    showAnswer(await ask("predict", { method: "POST", body: question(), signal }));
  } catch (error) {
    if (signal.aborted) return;
    if (error.again === undefined) throw error;
    showProblem(error);
  }
  find("progress").hidden = true;
}

function wait(text) {
  find("progress").hidden = Boolean(shown.answer); // a caption that is there stays until the next
  find("progress").textContent = text;
}

/** The form that /predict takes: only what belongs to the search that was chosen. */
function question() {
  const body = new FormData();
  body.append("file", shown.file, shown.file.name || "pasted.png");
  const algorithm = find("search").elements.algorithm.value;
  body.append("algorithm", algorithm);
  body.append("attention", "true");
  for (const setting of document.querySelectorAll(".setting:not([hidden])")) {
    const input = setting.querySelector("input");
    body.append(input.name, input.value);
  }
  if (find("beam").checked) {
    body.append("num_captions", Math.min(MOST_ALTERNATIVES, find("beam_size").value));
  }
  return body;
}

function showProblem({ message, again }) {
  clearAnswer();
  find("problem").hidden = false;
  find("reason").textContent = message;
  find("retry").hidden = !again;
}

// ---------------------------------------------------------------------------------------- the captions

function showAnswer(answer) {
  shown.answer = answer;
  find("result").hidden = false;
  listAlternatives(answer.captions);
  showCaption(0);
  if (find("frame").hidden) showStage(0, 0);
  find("facts").textContent = facts(answer);
  find("announcement").textContent = `Caption: ${answer.captions[0].caption || "none"}`;
  if (!calm.matches) play();
}

function facts({ processing_time_seconds: seconds, image_size: [width, height] }) {
  const time = seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;
  return `Written in ${time}. The picture has ${width} × ${height} pixels.`;
}

function listAlternatives(captions) {
  const likeliest = Math.max(...captions.map((each) => each.log_prob));
  const items = captions.map((each, place) => {
    const item = document.createElement("li");
    const button = addTo(item, "button", "alternative");
    button.type = "button";
    addTo(button, "span", "", each.caption || "(an empty caption)");
    addTo(button, "span", "", probability(each.log_prob));
    const bar = addTo(button, "span", "bar");
    bar.style.setProperty("--share", Math.exp(each.log_prob - likeliest));
    button.addEventListener("click", () => showCaption(place));
    return item;
  });
  find("alternatives").replaceChildren(...items);
  find("others").hidden = captions.length < 2;
}

function addTo(parent, tag, className, text = "") {
  const child = document.createElement(tag);
  child.className = className;
  child.textContent = text;
  parent.append(child);
  return child;
}

/** e ** log_prob as people say it: 12%, or 1 in 4,300, or 1 in 1.2 million. */
function probability(logProb) {
  const share = Math.exp(logProb);
  if (share >= 0.01) return percent(share);
  if (share < 1e-12) return "less than 1 in a trillion";
  return `1 in ${(1 / share).toLocaleString("en", share > 1e-6 ? DIGITS : MILLIONS)}`;
}

function showCaption(place) {
  stopPlaying();
  const each = shown.answer.captions[place];
  shown.caption = each;
  shown.light = each.attention ? lightOfWords(each.attention) : [];
  showWord(null);
  find("photograph").alt = each.caption;
  find("caption").replaceChildren(each.attention ? wordsToChoose(each) : plainCaption(each));
  find("play").hidden = !each.attention;
  find("note").textContent = noteOfCaption(each);
  for (const [i, button] of [...document.querySelectorAll(".alternative")].entries()) {
    button.setAttribute("aria-pressed", i === place);
  }
}

function plainCaption({ caption }) {
  const line = document.createElement("p");
  line.textContent = caption || "(an empty caption)";
  return line;
}

function wordsToChoose({ words, attention }) {
  const list = document.createElement("fieldset");
  list.className = Object.keys(attention.beside).length ? "words shared" : "words";
  addTo(list, "legend", "hidden", "Where the model looked for each word");
  words.forEach((word, place) => {
    const item = addTo(list, "span", "word");
    const input = addTo(item, "input", "");
    Object.assign(input, { type: "radio", name: "word", id: `word-${place}` });
    const label = addTo(item, "label", "", word);
    label.htmlFor = input.id;
    label.style.setProperty("--share", ofPicture(attention, place));
    item.addEventListener("pointerenter", ({ pointerType }) => {
      if (pointerType === "mouse") choose(place);
    });
    item.addEventListener("pointerleave", ({ pointerType }) => {
      if (pointerType === "mouse") choose(checkedWord());
    });
    input.addEventListener("focus", () => choose(place));
    input.addEventListener("change", () => choose(place));
  });
  list.addEventListener("focusout", () => choose(checkedWord()));
  return list;
}

/** What the person does ends what moves by itself. */
function choose(place) {
  stopPlaying();
  showWord(place);
}

function checkedWord() {
  const place = [...document.querySelectorAll(".word input")].findIndex((input) => input.checked);
  return place < 0 ? null : place;
}

function clearWord() {
  for (const input of document.querySelectorAll(".word input")) input.checked = false;
  choose(null);
}

// ------------------------------------------------------------------------------- what a word looked at

const percent = (share) => `${Math.round(100 * share)}%`;

function noteOfCaption({ words, attention }) {
  if (!attention) return "This model has no attention: it does not tell where it looked.";
  if (!words.length) return "";
  const how = "Point at a word, tap it or use the arrow keys to see where the model looked.";
  if (!Object.keys(attention.beside).length) return how;
  const mean = words.reduce((sum, _, place) => sum + ofPicture(attention, place), 0) / words.length;
  return `${percent(mean)} comes from the picture, the rest from the words before. ${how}`;
}

function noteOfWord({ words, attention }, place) {
  const where = placeOfLight(attention, place);
  const others = Object.entries(attention.beside).map(
    ([name, shares]) => `${percent(shares[place])} from ${name}`,
  );
  if (!others.length) return `“${words[place]}”: it looked ${where}.`;
  const share = `${percent(ofPicture(attention, place))} from the picture`;
  return `“${words[place]}”: ${share}, ${where}; ${others.join(", ")}.`;
}

function showWord(place) {
  if (shown.word === place) return;
  shown.word = place;
  for (const [i, item] of [...document.querySelectorAll(".word")].entries()) {
    item.classList.toggle("on", i === place);
  }
  fadeTo(place === null ? null : shown.light[place]);
  if (!shown.caption) return;
  const { caption: each } = shown;
  find("note").textContent = place === null ? noteOfCaption(each) : noteOfWord(each, place);
}

const veil = { frame: 0, light: new Float32Array(SIDE * SIDE), strength: 0 }; // as on the screen

/** Let the veil become that of a word, or go. */
function fadeTo(target) {
  cancelAnimationFrame(veil.frame);
  const before = { light: veil.strength ? veil.light : target, strength: veil.strength };
  const start = performance.now();
  const draw = (now) => {
    const done = calm.matches ? 1 : Math.min(1, Math.max(0, now - start) / FADE_MS);
    if (target) veil.light = before.light.map((value, i) => value + done * (target[i] - value));
    veil.strength = before.strength + done * (Boolean(target) - before.strength);
    paintVeil(find("veil"), veil.light, veil.strength);
    if (done < 1) veil.frame = requestAnimationFrame(draw);
  };
  draw(start);
}

let playing = 0;

/** One word after the other, as the model wrote them; then the whole photograph again. */
function play() {
  const { words, attention } = shown.caption;
  if (!attention || !words.length) return;
  stopPlaying();
  const each = Math.min(PLAY_MS, LONGEST_PLAY_MS / words.length);
  const next = (place) => {
    showWord(place < words.length ? place : checkedWord());
    if (place < words.length) playing = setTimeout(next, each, place + 1);
  };
  find("note").ariaLive = "off"; // the caption was read out already
  next(0);
}

function stopPlaying() {
  clearTimeout(playing);
  find("note").ariaLive = "polite";
}

// ------------------------------------------------------------------------------------------ the search

/** Begin with the search that the model was tuned for. */
function searchAs(decoding) {
  for (const name of ["beam_size", "temperature", "top_k", "top_p"]) find(name).value = decoding[name];
  const choice = decoding.algorithm === "full_beam" ? "beam" : decoding.algorithm;
  if (choice === "beam") find("beam").value = decoding.algorithm; // which of the two is sent
  if (choice in EXPLAINED) find(choice).checked = true;
  showSearch();
}

function showSearch() {
  const choice = document.querySelector("[name=algorithm]:checked").id;
  find("explains").textContent = EXPLAINED[choice];
  for (const part of document.querySelectorAll("[data-of]")) part.hidden = part.dataset.of !== choice;
  find("again").hidden ||= !shown.file;
  for (const output of document.querySelectorAll("output")) {
    const input = find(output.htmlFor.value);
    output.value = input.ariaValueText = settingText(input);
  }
}

function settingText({ name, value }) {
  if (name === "top_k" && value === "0") return "all";
  if (name === "top_p") return percent(value);
  if (name === "temperature") return Number(value).toFixed(1);
  return value;
}

// ------------------------------------------------------------------------------------------- listening

for (const input of [find("choose"), find("shoot")]) {
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // so that the same file can be chosen again
    showSearch();
  });
}

document.addEventListener("paste", ({ clipboardData }) => {
  take(clipboardData.files);
  showSearch();
});

let inside = 0; // elements that the dragged picture has entered and not left
const over = (change) => {
  inside = Math.max(0, inside + change);
  find("picture").classList.toggle("over", inside > 0);
};
document.addEventListener("dragenter", () => over(1));
document.addEventListener("dragleave", () => over(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  over(-Infinity);
  const { files } = event.dataTransfer;
  if (files.length) take(files);
  else showProblem(problem("That was no file: save the picture first, or copy it and paste it here.", false));
  showSearch();
});

find("search").addEventListener("input", showSearch);
find("search").addEventListener("change", () => shown.file && caption());
find("search").addEventListener("submit", (event) => {
  event.preventDefault();
  if (shown.file) caption();
});
find("retry").addEventListener("click", () => {
  met = meetModel(); // it may have gone, or another may have come
  caption();
});
find("play").addEventListener("click", play);
find("frame").addEventListener("click", clearWord);
document.addEventListener("keydown", ({ key }) => key === "Escape" && clearWord());
find("download").addEventListener("click", async () => {
  const photograph = find("frame").hidden ? null : find("photograph");
  const blob = await captionFigure(shown, photograph);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${shown.caption.caption.replace(/[^\p{L}\p{N}]+/gu, "_").slice(0, 80) || "caption"}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});

showSearch();

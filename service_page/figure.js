// The figure that can be kept: the photograph, its caption, and what each word looked at.

import { ofPicture, paintVeil, SIDE } from "./maps.js";

const WIDTH = 1600;
const MARGIN = 64;
const GAP = 24;
const LINE_HEIGHT = 60;
const INK = "#1b1f24";
const SOFT = "#57606a";
const LINE = "#dfe3e8";
const ACCENT = "#0a62c4";

/** A PNG as a Blob. shown: caption, light and model as of page.js; photograph: an <img>, or null. */
export function captionFigure({ caption, light, model }, photograph) {
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  const pen = canvas.getContext("2d");
  const layout = plan(pen, caption, light, photograph);
  canvas.height = layout.height; // which clears it
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, WIDTH, layout.height);
  heading(pen, layout, caption, photograph, model);
  light.forEach((each, place) => panel(pen, layout, caption, place, each, photograph));
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const family = () => getComputedStyle(document.body).fontFamily;

function write(pen, text, x, y, size, weight = 400, colour = INK) {
  pen.font = `${weight} ${size}px ${family()}`;
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
}

/** Sizes and places in pixels. */
function plan(pen, caption, light, photograph) {
  const aspect = photograph ? photograph.naturalWidth / photograph.naturalHeight : 1;
  const inside = WIDTH - 2 * MARGIN;
  const large = fitted(aspect, 0.46 * inside, 480);
  pen.font = `600 46px ${family()}`;
  const lines = wrapped(pen, caption.caption, inside - large.width - 56);
  const columns = Math.max(5, Math.min(7, Math.ceil(light.length / 2)));
  const small = fitted(aspect, (inside - (columns - 1) * GAP) / columns, 340);
  const step = { x: small.width + GAP, y: small.height + 96 };
  const text = LINE_HEIGHT * lines.length + 84;
  const head = Math.max(large.height, text);
  const top = MARGIN + head + 56;
  const rows = Math.ceil(light.length / columns);
  const y = MARGIN + (head - text) / 2;
  return { large, small, lines, y, columns, step, top, height: top + rows * step.y + (rows ? 24 : 0) };
}

function fitted(aspect, width, height) {
  const narrow = Math.min(width, height * aspect);
  return { width: narrow, height: narrow / aspect };
}

function wrapped(pen, text, width) {
  const lines = [];
  for (const word of text.split(" ")) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && pen.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

function heading(pen, { large, lines, y }, caption, photograph, model) {
  draw(pen, photograph, MARGIN, MARGIN, large);
  const left = MARGIN + large.width + 56;
  lines.forEach((line, i) => write(pen, line, left, y + 44 + LINE_HEIGHT * i, 46, 600));
  const below = y + 44 + LINE_HEIGHT * lines.length;
  write(pen, `Log-probability ${caption.log_prob.toFixed(2)}`, left, below, 24, 400, SOFT);
  write(pen, model, left, below + 36, 24, 400, SOFT);
}

function panel(pen, { small, columns, step, top }, { words, attention }, place, light, photograph) {
  const x = MARGIN + (place % columns) * step.x;
  const y = top + Math.floor(place / columns) * step.y;
  const veil = document.createElement("canvas");
  veil.width = veil.height = SIDE;
  paintVeil(veil, light);
  draw(pen, photograph, x, y, small);
  pen.drawImage(veil, x, y, small.width, small.height);
  pen.save();
  pen.beginPath();
  pen.rect(x, y, small.width, small.height + 60);
  pen.clip(); // a long word stays in its own column
  write(pen, words[place], x, y + small.height + 32, 26, 600);
  pen.restore();
  if (!Object.keys(attention.beside).length) return;
  const share = ofPicture(attention, place);
  pen.fillStyle = LINE;
  pen.fillRect(x, y + small.height + 46, small.width, 5);
  pen.fillStyle = ACCENT;
  pen.fillRect(x, y + small.height + 46, share * small.width, 5);
}

function draw(pen, photograph, x, y, { width, height }) {
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = LINE;
  pen.fillRect(x, y, width, height);
  if (photograph) pen.drawImage(photograph, x, y, width, height);
}

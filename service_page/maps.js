// Attention over a grid of cells, as light over a photograph.
// The same as attention_visualization.py's `upsample_map` and `brightness`.

export const SIDE = 96; // pixels of a map, which the browser stretches over the photograph
const FULL = [4, 8]; // times uniform: least and most weight that full light asks for
const VEIL = [
  // red, green, blue, opacity: from no light to full light
  [10, 14, 30, 0.64],
  [72, 44, 36, 0.46],
  [212, 142, 62, 0.3],
  [255, 216, 130, 0.26],
];

/** A caption's maps -> for each word its light, Float32Array of SIDE * SIDE: 0 dimmed .. 1 bright.
 *
 * attention: grid [h, w], maps (T of h * w, each sums to 1), beside {name: T shares that no cell got}.
 */
export function lightOfWords(attention) {
  const cells = attention.grid[0] * attention.grid[1];
  const weights = attention.maps.map((_, place) => weightsOf(attention, place));
  const largest = Math.max(...weights.flat());
  const full = Math.min(Math.max(largest, FULL[0] / cells), Math.min(1, FULL[1] / cells));
  return weights.map((map) => {
    const [height, width] = attention.grid;
    const rows = range(height).map((row) => map.slice(row * width, (row + 1) * width));
    const smooth = transposed(stretched(transposed(stretched(rows, SIDE)), SIDE)).flat();
    return Float32Array.from(smooth, (weight) => brightness(weight, 1 / cells, full));
  });
}

/** The share of a word that comes from the picture. */
export function ofPicture({ beside }, place) {
  return 1 - Object.values(beside).reduce((sum, shares) => sum + shares[place], 0);
}

/** A word's map with what was left for the picture. */
function weightsOf(attention, place) {
  const left = ofPicture(attention, place);
  return attention.maps[place].map((weight) => weight * left);
}

/** 0 up to the weight `uniform`, then linearly to 1 at `full`. */
function brightness(weight, uniform, full) {
  return Math.min(1, Math.max(0, (weight - uniform) / Math.max(full - uniform, 1e-9)));
}

const range = (count) => Array.from({ length: count }, (_, i) => i);
const transposed = (rows) => rows[0].map((_, column) => rows.map((row) => row[column]));

/** n rows -> size rows: columns interpolated without peaks that the n lack (Fritsch and Butland 1984). */
function stretched(rows, size) {
  const cells = [rows[0], ...rows, rows.at(-1)];
  const rises = cells.slice(1).map((row, i) => row.map((value, j) => value - cells[i][j]));
  const flat = rows[0].map(() => 0);
  const slopes = [flat, ...rises.slice(1).map((row, i) => row.map((rise, j) => slope(rises[i][j], rise))), flat];
  return range(size).map((pixel) => {
    const position = ((pixel + 0.5) * rows.length) / size + 0.5;
    const i = Math.floor(position);
    return cells[i].map((cell, j) => between(cell, rises[i][j], slopes[i][j], slopes[i + 1][j], position - i));
  });
}

/** 0 at a peak, else the harmonic mean of the rises on both sides. */
function slope(before, after) {
  return before * after > 0 ? (2 * before * after) / (before + after) : 0;
}

function between(cell, rise, start, end, t) {
  return cell + t * (start + t * (3 * rise - 2 * start - end + t * (start + end - 2 * rise)));
}

/** Paint a canvas of SIDE * SIDE: night where there is no light, then a glow that grows warmer.
 *
 * strength: 0 leaves the photograph as it is, 1 shows the whole veil.
 */
export function paintVeil(canvas, light, strength = 1) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(SIDE, SIDE);
  light.forEach((value, i) => {
    const [red, green, blue, opacity] = colourOf(value);
    pixels.data.set([red, green, blue, 255 * opacity * strength], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

/** Red, green, blue and opacity of the veil at a light of 0..1. */
function colourOf(light) {
  const place = light * (VEIL.length - 1);
  const i = Math.min(VEIL.length - 2, Math.floor(place));
  return VEIL[i].map((value, channel) => value + (place - i) * (VEIL[i + 1][channel] - value));
}

const THIRDS = [
  ["at the top left", "at the top", "at the top right"],
  ["on the left", "in the middle", "on the right"],
  ["at the bottom left", "at the bottom", "at the bottom right"],
];

/** Where a word's map is heaviest, for those who cannot see it. */
export function placeOfLight({ grid: [height, width], maps }, place) {
  const map = maps[place];
  const peak = map.indexOf(Math.max(...map));
  if (map[peak] < 2 / map.length) return "nowhere in particular";
  const row = Math.floor((3 * (Math.floor(peak / width) + 0.5)) / height);
  const column = Math.floor((3 * ((peak % width) + 0.5)) / width);
  return `mostly ${THIRDS[row][column]}`;
}

// Functions of explorer.html and playground.html; pages.py puts them before the script of the page.

const data = JSON.parse(document.getElementById("data").textContent);
const { heat, levels: LEVELS } = data;
const $ = (selector, parent = document) => parent.querySelector(selector);

// ---- images and maps ----

function canInflate() {
  if (window.DecompressionStream) return true;
  $("#instruction").textContent =
    "This page needs DecompressionStream: Chrome 85, Safari 16.4, Firefox 113 or a later version.";
  return false;
}

async function inflate(text) {
  const compressed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

// Adds `maxima` (one per row) and `levels` (rows x M keys) to a layer; called once, when it is first needed.
async function decodeMaps(layer, rows) {
  const buffer = await inflate(layer.data);
  layer.maxima = new Float32Array(buffer, 0, rows);
  layer.levels = new Uint8Array(buffer, 4 * rows);
  layer.data = null;
}

function attention(layer, row, key) {
  return (layer.levels[row * layer.keySide ** 2 + key] / LEVELS) ** 2 * layer.maxima[row];
}

function cellAt(side, x, y) {
  return Math.floor(y * side) * side + Math.floor(x * side);
}

// ---- drawing ----

function drawScale() {
  $("#ramp").style.background = `linear-gradient(to right, ${heat.map((rgb) => `rgb(${rgb})`)})`;
}

function heatColor(strength) {
  const stop = Math.min(strength, 1) * (heat.length - 1);
  const below = Math.min(Math.floor(stop), heat.length - 2);
  return heat[below].map((low, channel) => low + (heat[below + 1][channel] - low) * (stop - below));
}

function imageData({ size, rgb }) {
  const pixels = new ImageData(size, size);
  for (let from = 0, to = 0; from < rgb.length; to++) {
    for (let c = 0; c < 3; c++) pixels.data[to++] = rgb[from++];
    pixels.data[to] = 255;
  }
  return pixels;
}

function drawImage(canvas, image) {
  canvas.width = canvas.height = image.size;
  canvas.getContext("2d").putImageData(imageData(image), 0, 0);
}

// The map in color over the image in gray, like `overlay` in figures.py; gray has Pillow's integer weights.
function drawMap(canvas, { size, rgb }, side, values, maximum) {
  const strength = values.map((value) => (maximum > 0 ? Math.sqrt(value / maximum) : 0));
  const colors = Array.from(strength, heatColor);
  const pixels = new ImageData(size, size);
  for (let y = 0, i = 0; y < size; y++) {
    for (let x = 0; x < size; x++, i++) {
      const gray = ((19595 * rgb[3 * i] + 38470 * rgb[3 * i + 1] + 7471 * rgb[3 * i + 2] + 32768) >> 16) / 255;
      const cell = Math.floor(y * side / size) * side + Math.floor(x * side / size);
      const dark = 140 * gray * (1 - strength[cell]), bright = strength[cell] * (0.6 + 0.4 * gray);
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = dark + colors[cell][c] * bright;
      pixels.data[4 * i + 3] = 255;
    }
  }
  if (canvas.width !== size) canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function outlineCell(marker, side, cell) {
  marker.hidden = cell === null;
  if (cell === null) return;
  const percentOf = (cells) => `${(100 / side) * cells}%`;
  marker.style.left = percentOf(cell % side);
  marker.style.top = percentOf(Math.floor(cell / side));
  marker.style.width = marker.style.height = percentOf(1);
}

// A figure for a layer's map: its name, a note beside it, the canvas and a line below.
function makeFigure(name, note) {
  const figure = document.createElement("figure");
  figure.innerHTML = `<figcaption><b></b><span class="muted"></span></figcaption>
    <div class="square"><canvas role="img"></canvas></div>
    <p class="facts"></p>`;
  $("b", figure).textContent = name;
  $("span", figure).textContent = note;
  return figure;
}

function writeFacts(figure, name, [factor, unit, details]) {
  $(".facts", figure).replaceChildren(bold(factor), unit, document.createElement("br"), details);
  $("canvas", figure).setAttribute("aria-label", `${name}: ${factor}${unit}, ${details}`);
}

// ---- texts ----

function bold(text) {
  return Object.assign(document.createElement("b"), { textContent: text });
}

function positionText(side, cell) {
  return `row ${Math.floor(cell / side) + 1}, column ${(cell % side) + 1}`;
}

function gridText(side) {
  return `${side} × ${side}`;
}

function percent(value) {
  if (value > 0 && value < 0.0001) return "< 0.01\u00a0%";
  return `${Number((100 * value).toPrecision(100 * value < 1 ? 2 : 3))}\u00a0%`;
}

// An attention value relative to uniform attention, 1/M.
function timesUniform(value, layer) {
  const factor = value * layer.keySide ** 2;
  return `${factor.toFixed(factor < 10 ? 1 : 0)}\u00a0×`;
}

let announceTimer;
function announce(makeText) {  // delayed until the position rests: a screen reader cannot keep up with a mouse
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => ($("#announcement").textContent = makeText()), 400);
}

// ---- input ----

function fractionsAt(element, event) {
  const { left, top, width, height } = element.getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
}

// Mouse: the position follows the pointer; a click pins it, a second click unpins it. Touch: a tap or drag moves and
// pins the position, a tap on it unpins it. Dragging moves a pinned position.
// `state` has x, y, fractions of the element, and pinned; `move(x, y, pressed)` changes x and y and draws.
function followPointer(element, state, move) {
  let press = null;  // where the pointer went down, and whether releasing it there unpins the position
  const distance = (event, { x, y }) => Math.hypot(event.clientX - x, event.clientY - y);  // in pixels
  const isOnPosition = (event) => {
    const { left, top, width, height } = element.getBoundingClientRect();
    return distance(event, { x: left + state.x * width, y: top + state.y * height }) < 16;
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const unpins = state.pinned && (event.pointerType === "mouse" || isOnPosition(event));
    press = { x: event.clientX, y: event.clientY, unpins, drag: false };
    element.setPointerCapture(event.pointerId);
    state.pinned = true;
    if (!unpins) move(...fractionsAt(element, event), true);
  });
  element.addEventListener("pointermove", (event) => {
    if (press && distance(event, press) > 8) press.drag = true;
    if (press ? press.drag : !state.pinned) move(...fractionsAt(element, event), false);
  });
  element.addEventListener("pointerup", (event) => {
    if (press?.unpins && !press.drag) {
      state.pinned = false;
      move(...fractionsAt(element, event), false);
    }
    press = null;
  });
  element.addEventListener("pointercancel", () => (press = null));
}

// The state (trace, selected tokens, layer, expert, theme), and how mouse and keyboard change it.

const data = JSON.parse($("data").textContent);
const traces = data.traces.map(prepare);

const palette = new Palette(data.palette);

// selection: {from, to, anchor}, null for all tokens; layer and focus (an expert): indices, null for all; relative:
// whether the colours show shares relative to the average.
const state = { number: 0, selection: null, layer: null, focus: null, relative: false };
const textView = new TextView($("text"));
const tip = new Tip($("tip"));
let theme, shares, coloured, means;

const current = () => traces[state.number];

// ------------------------------------------------------------------ drawing

function drawAll() {
  theme = themeColours();
  shares = sharesOf(current(), state.layer);
  coloured = state.relative ? againstAverage(shares, current().experts.length) : shares;
  textView.colour(current(), coloured, state.focus, palette, theme);
  $("relative").setAttribute("aria-pressed", String(state.relative));
  fillLegend($("legend"), current(), shares, state.focus, palette, toggleFocus);
  drawChosen();
}

function drawChosen() {
  const trace = current(), { selection, layer } = state;
  const { from, to } = selection ?? { from: 0, to: trace.size - 1 };
  means = layerMeans(trace, from, to);
  textView.mark(selection);
  $("chosen").textContent = titleOf(trace, selection);
  $("piece").textContent = excerpt(trace, selection);
  $("bars").replaceChildren(...barRows(trace, meanRows(shares, trace.experts.length, from, to), palette));
  $("facts").replaceChildren(...factRows(from === to ? describeToken(trace, from).slice(1) : predictionFacts(trace, from, to)));
  drawPositions($("positions"), trace, coloured, selection, palette, theme);
  $("gain-part").hidden = !trace.predicts;
  if (trace.predicts) drawGain($("gain"), trace, selection, theme);
  const most = drawHeat($("heat"), trace, means.weights, layer, palette, theme);
  const colours = layer === null ? "click a layer to colour the text by it" : `the text is coloured by ${visible(trace.layers[layer])}`;
  $("of").textContent = `mean weights of ${titleOf(trace, selection).toLowerCase()}, up to ${most.toFixed(2)} · ${colours}`;
  drawEntropy($("entropy"), trace, means.entropy, layer, theme);
  $("domains").hidden = trace.texts.length < 2;
  fillDomains($("domains").querySelector("table"), trace, shares, selection, palette, theme, (set) => choose(set.from, set.to));
}

let asked = false;
// Draw once per frame, for any number of mouse events.
function redrawSoon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    drawChosen();
  });
}

// ------------------------------------------------------------------ selection

function showTrace(number) {
  const before = current();
  state.number = number;
  const trace = current();
  if (state.selection && state.selection.to >= trace.size) state.selection = null;
  if (before.experts.length !== trace.experts.length) state.focus = null;
  if (before.layers.length !== trace.layers.length) state.layer = null;
  $("title").textContent = visible(trace.title || "trace");
  $("summary").textContent = visible(trace.summary);
  [...$("switch").children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === number)));
  textView.show(trace);
  drawAll();
  if (state.selection) textView.scrollTo(state.selection.to);
}

// Select the tokens between two positions; the first one is the anchor when the selection is extended.
function choose(anchor, other = anchor) {
  state.selection = { from: Math.min(anchor, other), to: Math.max(anchor, other), anchor };
  redrawSoon();
}

function chooseAll() {
  const narrowed = state.layer !== null || state.focus !== null;
  Object.assign(state, { selection: null, layer: null, focus: null });
  if (narrowed) drawAll();
  else redrawSoon();
}

function toggleFocus(expert) {
  state.focus = state.focus === expert ? null : expert;
  drawAll();
}

function toggleRelative() {
  state.relative = !state.relative;
  drawAll();
}

function toggleLayer(layer) {
  if (layer < 0 || layer >= current().layers.length) return;
  state.layer = state.layer === layer ? null : layer;
  drawAll();
}

function step(by, extend) {
  const last = current().size - 1, { selection } = state;
  const at = selection ? (selection.anchor === selection.from ? selection.to : selection.from) : by > 0 ? -1 : last + 1;
  const next = Math.max(0, Math.min(last, at + by));
  choose(extend && selection ? selection.anchor : next, next);
  textView.scrollTo(next);
}

function switchTheme() {
  otherTheme();
  drawAll();
}

// ------------------------------------------------------------------ mouse

// Select by dragging over an element with a token at each position; shift-click extends the selection.
function draggable(area, tokenOf) {
  let anchor = null;
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const token = tokenOf(event);
    if (token === null) return;
    anchor = event.shiftKey && state.selection ? state.selection.anchor : token;
    choose(anchor, token);
    if (area !== $("text")) area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", (event) => {
    const token = tokenOf(event);
    if (token === null) return tip.hide();
    if (anchor !== null && event.buttons & 1) choose(anchor, token);
    tip.show(event, ...tokenTip(current(), shares, token, palette));
  });
  window.addEventListener("pointerup", () => (anchor = null));
  area.addEventListener("pointerleave", () => tip.hide());
}

draggable($("text"), (event) => {
  const span = event.target.closest("[data-i]");
  return span ? Number(span.dataset.i) : null;
});
for (const canvas of [$("positions"), $("gain")]) draggable(canvas, (event) => (event.offsetX < LEFT ? null : tokenAt(canvas, current().size, event.offsetX)));

for (const canvas of [$("heat"), $("entropy")]) {
  const layerOf = (event) => {
    const layer = layerAt(canvas, current(), event.offsetX);
    return layer >= 0 && layer < current().layers.length ? layer : null;
  };
  canvas.addEventListener("click", (event) => {
    const layer = layerOf(event);
    if (layer !== null) toggleLayer(layer);
  });
  canvas.addEventListener("pointermove", (event) => {
    const layer = layerOf(event);
    if (layer === null) tip.hide();
    else tip.show(event, ...layerTip(current(), means, layer, palette));
  });
  canvas.addEventListener("pointerleave", () => tip.hide());
}

// ------------------------------------------------------------------ keys

const KEYS = {
  ArrowLeft: (event) => step(-1, event.shiftKey),
  ArrowRight: (event) => step(1, event.shiftKey),
  Home: (event) => step(-Infinity, event.shiftKey),
  End: (event) => step(Infinity, event.shiftKey),
  Escape: chooseAll,
  "[": () => toggleLayer(state.layer === null ? current().layers.length - 1 : state.layer - 1),
  "]": () => toggleLayer(state.layer === null ? 0 : state.layer + 1),
  e: () => {
    const next = state.focus === null ? 0 : state.focus + 1;
    state.focus = next < current().experts.length ? next : null;
    drawAll();
  },
  r: toggleRelative,
  t: switchTheme,
  "?": () => $("help").showModal(),
};

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const number = Number(event.key) - 1;
  if (number >= 0 && number < traces.length) showTrace(number);
  else if (KEYS[event.key]) KEYS[event.key](event);
  else return;
  event.preventDefault();
});

$("relative").addEventListener("click", toggleRelative);
$("theme").addEventListener("click", switchTheme);
$("keys").addEventListener("click", () => $("help").showModal());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
new ResizeObserver(redrawSoon).observe(document.querySelector("main"));

if (traces.length > 1) {
  $("switch").append(...traces.map((trace, number) => {
    const button = element("button", { type: "button", title: `key ${number + 1}` }, visible(trace.title || `trace ${number + 1}`));
    button.addEventListener("click", () => showTrace(number));
    return button;
  }));
}
showTrace(0);

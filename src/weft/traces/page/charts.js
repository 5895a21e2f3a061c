// The charts: shares over position, gain per token, the heat map of layers and experts, entropy per layer.

const LEFT = 92, RIGHT = 8, BOTTOM = 20;
const FONT = "11px system-ui, sans-serif";

// Clear a canvas and set it to the screen's resolution; returns its context, scaled to CSS pixels.
function surface(canvas, height) {
  const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.font = FONT;
  context.textBaseline = "middle";
  return { context, width, height, plot: width - LEFT - RIGHT };
}

function niceStep(count, room) {
  const least = Math.max(1, (count * 56) / Math.max(room, 1));
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least);
}

function shorten(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let kept = text.length;
  while (kept > 1 && context.measureText(`${text.slice(0, kept)}…`).width > room) kept--;
  return `${text.slice(0, kept)}…`;
}

// Stripes for experts with a colour that another expert has too.
function fillOf(context, rgb, again, theme) {
  if (!again) return css(rgb);
  const tile = element("canvas", { width: 6, height: 6 });
  const drawing = tile.getContext("2d");
  drawing.fillStyle = css(rgb);
  drawing.fillRect(0, 0, 6, 6);
  drawing.strokeStyle = css(theme.panel, 0.75);
  drawing.lineWidth = 1.5;
  drawing.beginPath();
  for (const shift of [-6, 0, 6]) {
    drawing.moveTo(shift - 1, 7);
    drawing.lineTo(shift + 7, -1);
  }
  drawing.stroke();
  return context.createPattern(tile, "repeat");
}

// The start of a token on the horizontal axis, and the token at a position of the axis.
const tokenX = (plot, size, token) => LEFT + (token * plot) / size;
const tokenAt = (canvas, size, x) => Math.max(0, Math.min(size - 1, Math.floor(((x - LEFT) * size) / (canvas.clientWidth - LEFT - RIGHT))));

function drawSelection(context, plot, size, selection, top, height, theme) {
  if (!selection) return;
  const from = tokenX(plot, size, selection.from);
  const width = Math.max(2, tokenX(plot, size, selection.to + 1) - from);
  context.fillStyle = css(theme.ink, 0.12);
  context.fillRect(from, top, width, height);
  context.strokeStyle = css(theme.ink);
  context.lineWidth = 1.5;
  context.strokeRect(from, top + 0.75, width, height - 1.5);
}

function drawPositions(canvas, trace, shares, selection, palette, theme) {
  const { context, width, height, plot } = surface(canvas, 170);
  const experts = trace.experts.length, columns = Math.max(1, Math.min(trace.size, Math.floor(plot)));
  const top = 6, tall = height - top - BOTTOM;
  const below = new Float64Array(columns);
  const means = Array.from({ length: columns }, (_, column) => {
    const from = Math.floor((column * trace.size) / columns);
    return meanRows(shares, experts, from, Math.max(from, Math.floor(((column + 1) * trace.size) / columns) - 1));
  });
  const x = (column) => LEFT + (column * plot) / columns;
  for (let expert = 0; expert < experts; expert++) {
    context.beginPath();
    context.moveTo(x(0), top + tall * (1 - below[0]));
    for (let column = 0; column < columns; column++) {
      const y = top + tall * (1 - below[column] - means[column][expert]);
      context.lineTo(x(column), y);
      context.lineTo(x(column + 1), y);
    }
    for (let column = columns - 1; column >= 0; column--) {
      context.lineTo(x(column + 1), top + tall * (1 - below[column]));
      context.lineTo(x(column), top + tall * (1 - below[column]));
      below[column] += means[column][expert];
    }
    context.fillStyle = fillOf(context, palette.of(trace, expert), palette.again(trace, expert), theme);
    context.fill();
  }
  context.fillStyle = css(theme.panel);
  for (const text of trace.texts.slice(1)) context.fillRect(tokenX(plot, trace.size, text.start) - 0.75, top, 1.5, tall);
  context.fillStyle = css(theme.muted);
  context.textAlign = "right";
  for (const share of [0, 0.5, 1]) context.fillText(percent(share), LEFT - 8, top + tall * (1 - share));
  drawTokenTicks(context, trace.size, plot, height, width);
  drawSelection(context, plot, trace.size, selection, top, tall, theme);
}

function drawTokenTicks(context, size, plot, height, width) {
  context.textAlign = "left";
  context.fillText("token", LEFT - 44, height - 9);
  context.textAlign = "center";
  const step = niceStep(size, plot);
  for (let token = 0; token < size; token += step) {
    const x = tokenX(plot, size, token + 0.5);
    if (x < width - 14) context.fillText(String(token), x, height - 9);
  }
}

function drawGain(canvas, trace, selection, theme) {
  const { context, height, plot } = surface(canvas, 64);
  const columns = Math.max(1, Math.min(trace.size, Math.floor(plot))), middle = height / 2;
  const gains = new Float64Array(columns);
  for (let column = 0; column < columns; column++) {
    const from = Math.floor((column * trace.size) / columns), to = Math.max(from + 1, Math.floor(((column + 1) * trace.size) / columns));
    let total = 0, count = 0;
    for (let token = from; token < to; token++) {
      const gain = trace.logProbs[token] - trace.baseLogProbs[token];
      if (!Number.isNaN(gain)) {
        total += gain;
        count++;
      }
    }
    gains[column] = count ? total / count : 0;
  }
  // The scale clips one token in fifty, so that the others are visible.
  const sorted = Array.from(gains, Math.abs).sort((a, b) => a - b);
  const most = Math.max(0.1, sorted[Math.floor(0.98 * (sorted.length - 1))]);
  const wide = plot / columns;
  gains.forEach((gain, column) => {
    const tall = Math.min(1, Math.abs(gain) / most) * (middle - 4);
    context.fillStyle = css(gain > 0 ? theme.up : theme.down);
    context.fillRect(LEFT + column * wide, gain > 0 ? middle - tall : middle, Math.max(1, wide - (wide > 3 ? 1 : 0)), tall);
  });
  context.fillStyle = css(theme.line);
  context.fillRect(LEFT, middle - 0.5, plot, 1);
  context.fillStyle = css(theme.muted);
  context.textAlign = "right";
  context.fillText(`+${most.toFixed(1)}`, LEFT - 8, 8);
  context.fillText(`−${most.toFixed(1)}`, LEFT - 8, height - 8);
  drawSelection(context, plot, trace.size, selection, 0, height, theme);
}

// ------------------------------------------------------------------ layers

const heatRow = (trace) => (trace.experts.length > 8 ? 16 : 24);
const layerAt = (canvas, trace, x) => Math.floor(((x - LEFT) * trace.layers.length) / (canvas.clientWidth - LEFT - RIGHT));

// The number of the decoder layer in a layer's name.
const blockOf = (name) => /(?:^|\.)(\d+)(?:\.|$)/.exec(name)?.[1] ?? null;

function drawHeat(canvas, trace, weights, layer, palette, theme) {
  const row = heatRow(trace), experts = trace.experts.length, layers = trace.layers.length;
  const { context, height, plot } = surface(canvas, row * experts + BOTTOM + 4);
  const most = Math.max(1e-6, weights.reduce((a, b) => Math.max(a, Math.abs(b)), 0)), wide = plot / layers;
  for (let expert = 0; expert < experts; expert++) {
    for (let at = 0; at < layers; at++) {
      const weight = weights[at * experts + expert];
      context.fillStyle = css(blend(theme.panel, weight < 0 ? theme.down : theme.ramp, Math.abs(weight) / most));
      context.fillRect(LEFT + at * wide, expert * row, wide + 0.4, row - 1);
    }
    context.fillStyle = fillOf(context, palette.of(trace, expert), palette.again(trace, expert), theme);
    context.fillRect(0, expert * row + row / 2 - 5, 10, 10);
    context.fillStyle = css(theme.ink);
    context.textAlign = "left";
    context.fillText(shorten(context, visible(trace.experts[expert]), LEFT - 24), 15, expert * row + row / 2);
  }
  drawBlockTicks(context, trace, plot, height, theme);
  drawLayerMark(context, layer, wide, 0, row * experts, theme);
  return most;
}

function drawBlockTicks(context, trace, plot, height, theme) {
  const layers = trace.layers.length;
  context.fillStyle = css(theme.muted);
  context.textAlign = "left";
  context.fillText(trace.layers.some(blockOf) ? "block" : "", LEFT - 44, height - 9);
  let before = null, free = -Infinity;
  trace.layers.forEach((name, at) => {
    const block = blockOf(name), x = LEFT + (at * plot) / layers;
    if (block !== null && block !== before && x >= free && x < LEFT + plot - 10) {
      context.fillText(block, x + 1, height - 9);
      context.fillRect(x, height - BOTTOM, 1, 4);
      free = x + 26;
    }
    before = block;
  });
}

function drawLayerMark(context, layer, wide, top, tall, theme) {
  if (layer === null) return;
  context.strokeStyle = css(theme.ink);
  context.lineWidth = 1.5;
  context.strokeRect(LEFT + layer * wide - 0.75, top + 0.75, wide + 1.5, tall - 1.5);
}

function drawEntropy(canvas, trace, entropy, layer, theme) {
  const { context, height, plot } = surface(canvas, 84);
  const layers = trace.layers.length, wide = plot / layers, top = 6, tall = height - top - BOTTOM;
  context.fillStyle = css(theme.line);
  for (const value of [0, 0.5, 1]) context.fillRect(LEFT, top + tall * (1 - value) - 0.5, plot, 1);
  context.fillStyle = css(theme.ramp, 0.85);
  entropy.forEach((value, at) => context.fillRect(LEFT + at * wide, top + tall * (1 - value), Math.max(1, wide - (wide > 3 ? 1 : 0)), tall * value));
  context.fillStyle = css(theme.muted);
  context.textAlign = "right";
  for (const value of [0, 1]) context.fillText(String(value), LEFT - 8, top + tall * (1 - value));
  drawBlockTicks(context, trace, plot, height, theme);
  drawLayerMark(context, layer, wide, 0, height - BOTTOM + 2, theme);
}

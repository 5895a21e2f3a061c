// Decodes the page's data to typed arrays, and computes the means for the views.

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

// scalings is [token, layer, expert] and entropy [token, layer], with one byte per value; shares is [token, expert].
function decode(raw) {
  return {
    ...raw,
    scalings: bytesOf(raw.scalings),
    entropy: bytesOf(raw.entropy),
    shares: floatsOf(raw.shares),
    logProbs: floatsOf(raw.logProbs),
    baseLogProbs: floatsOf(raw.baseLogProbs),
    size: raw.pieces.length,
    predicts: false,
  };
}

function prepare(raw) {
  const trace = decode(raw);
  trace.predicts = trace.logProbs.some((value) => !Number.isNaN(value));
  return trace;
}

// The weight that a byte of the scalings encodes.
const weightOf = (trace, byte) => trace.low + (byte * (trace.high - trace.low)) / 255;

// Each expert's share of each token: the mean over all layers, or in one layer.
function sharesOf(trace, layer) {
  if (layer === null) return trace.shares;
  const { scalings, size } = trace;
  const experts = trace.experts.length, layers = trace.layers.length;
  const shares = new Float32Array(size * experts);
  for (let token = 0; token < size; token++) {
    const from = (token * layers + layer) * experts;
    let total = 0;
    for (let expert = 0; expert < experts; expert++) total += Math.max(0, weightOf(trace, scalings[from + expert]));
    for (let expert = 0; expert < experts && total > 0; expert++) {
      shares[token * experts + expert] = Math.max(0, weightOf(trace, scalings[from + expert])) / total;
    }
  }
  return shares;
}

// Shares relative to each expert's mean in this trace: share / mean share, normalised to sum to 1 for each token.
function againstAverage(shares, experts) {
  const size = shares.length / experts, means = meanRows(shares, experts, 0, size - 1);
  const relative = shares.map((share, i) => (means[i % experts] > 0 ? share / means[i % experts] : 0));
  for (let token = 0; token < size; token++) {
    const row = relative.subarray(token * experts, (token + 1) * experts);
    const total = row.reduce((a, b) => a + b, 0);
    if (total > 0) row.forEach((value, expert) => (row[expert] = value / total));
  }
  return relative;
}

// Mean over the tokens from..to, for rows of `width` values.
function meanRows(values, width, from, to) {
  const sums = new Float64Array(width);
  for (let token = from, i = from * width; token <= to; token++) {
    for (let column = 0; column < width; column++) sums[column] += values[i++];
  }
  return sums.map((sum) => sum / (to - from + 1));
}

// Mean weights [layer * expert] and mean entropy [layer] of the tokens from..to.
function layerMeans(trace, from, to) {
  const width = trace.layers.length * trace.experts.length;
  return {
    weights: meanRows(trace.scalings, width, from, to).map((byte) => weightOf(trace, byte)),
    entropy: meanRows(trace.entropy, trace.layers.length, from, to).map((byte) => byte / 255),
  };
}

// Perplexity of the predicted tokens in from..to; null if there are none.
function perplexity(logProbs, from, to) {
  let total = 0, count = 0;
  for (let token = from; token <= to; token++) {
    if (!Number.isNaN(logProbs[token])) {
      total -= logProbs[token];
      count++;
    }
  }
  return count ? Math.exp(total / count) : null;
}

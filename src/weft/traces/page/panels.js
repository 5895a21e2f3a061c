// Text and numbers: bars of shares, facts of a token or span, tooltips, the legend, the data sets.

function factRows(rows) {
  return rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
}

// The probability of a token, or the perplexity of the tokens of a span.
function predictionFacts(trace, from, to) {
  if (!trace.predicts) return [];
  const one = from === to;
  if (one) {
    const rows = [["p under the mixture", probability(trace.logProbs[from])], ["p under the base", probability(trace.baseLogProbs[from])]];
    const gain = trace.logProbs[from] - trace.baseLogProbs[from];
    if (!Number.isNaN(gain)) rows.push(["mixture / base", `${gain >= 0 ? "×" : "÷"} ${Math.exp(Math.abs(gain)).toPrecision(3)}`]);
    return rows;
  }
  const [mixture, base] = [perplexity(trace.logProbs, from, to), perplexity(trace.baseLogProbs, from, to)];
  if (mixture === null) return [];
  const change = mixture / base - 1;
  return [
    ["perplexity, mixture", mixture.toFixed(2)],
    ["perplexity, base", base.toFixed(2)],
    ["perplexity is", Math.abs(change) < 0.005 ? "the same" : `${percent(Math.abs(change))} ${change < 0 ? "lower (better)" : "higher (worse)"}`],
  ];
}

function textOf(trace, token) {
  return trace.texts.find((text) => token < text.end);
}

function describeToken(trace, token) {
  const text = textOf(trace, token);
  const rows = [["token", `${token} (id ${trace.ids[token]})`], ...predictionFacts(trace, token, token)];
  if (text.name) rows.unshift(["data set", visible(text.name)]);
  if (text.prompt !== null) rows.push(["is", token - text.start < text.prompt ? "prompt" : "generated"]);
  return rows;
}

function titleOf(trace, selection) {
  if (!selection) return `All ${trace.size} tokens`;
  const { from, to } = selection;
  return from === to ? `Token ${from}` : `Tokens ${from}–${to} (${to - from + 1})`;
}

function excerpt(trace, selection) {
  if (!selection) return "";
  const { from, to } = selection;
  const pieces = to - from < 24 ? trace.pieces.slice(from, to + 1) : [...trace.pieces.slice(from, from + 12), " … ", ...trace.pieces.slice(to - 11, to + 1)];
  return quoted(pieces.join("") || "");
}

// ------------------------------------------------------------------ tooltips

function tokenTip(trace, shares, token, palette) {
  const experts = trace.experts.length;
  return [
    element("b", { class: "quoted" }, quoted(trace.pieces[token])),
    ...barRows(trace, shares.subarray(token * experts, (token + 1) * experts), palette),
    element("dl", {}, ...factRows(describeToken(trace, token))),
  ];
}

function layerTip(trace, means, layer, palette) {
  const experts = trace.experts.length;
  const weights = means.weights.slice(layer * experts, (layer + 1) * experts);
  return [
    element("b", { class: "quoted" }, visible(trace.layers[layer])),
    ...barRows(trace, weights, palette),
    element("dl", {}, ...factRows([["entropy", means.entropy[layer].toFixed(2)]])),
  ];
}

// ------------------------------------------------------------------ legend and data sets

function fillLegend(box, trace, shares, focus, palette, choose) {
  const experts = trace.experts.length, means = meanRows(shares, experts, 0, trace.size - 1);
  const leads = new Float64Array(experts);
  for (let token = 0; token < trace.size; token++) leads[largest(shares, token * experts, (token + 1) * experts)] += 1 / trace.size;
  box.replaceChildren(...trace.experts.map((name, expert) => {
    const button = element("button", { type: "button", "aria-pressed": String(focus === expert), title: `mean share ${percent(means[expert])}, leads ${percent(leads[expert])} of the tokens; click: colour by this expert alone` },
      swatch(trace, expert, palette), element("span", {}, visible(name)), element("small", {}, percent(means[expert])));
    button.addEventListener("click", () => choose(expert));
    return button;
  }));
}

// The data sets of a trace: name, first and last token. The texts of a data set are contiguous.
function dataSets(trace) {
  const sets = new Map();
  for (const text of trace.texts) {
    const set = sets.get(text.name) ?? { name: text.name, from: text.start, to: 0, texts: 0 };
    set.to = text.end - 1;
    set.texts++;
    sets.set(text.name, set);
  }
  return [...sets.values()];
}

function fillDomains(table, trace, shares, selection, palette, theme, choose) {
  const experts = trace.experts.length, sets = dataSets(trace);
  const rows = sets.map((set) => meanRows(shares, experts, set.from, set.to));
  const most = Math.max(...rows.map((row) => Math.max(...row)), 1e-6);
  const head = element("tr", {}, element("th", {}), element("th", {}, "tokens"),
    ...trace.experts.map((name, expert) => element("th", {}, swatch(trace, expert, palette), visible(name))),
    ...(trace.predicts ? [element("th", {}, "base ppl"), element("th", {}, "mixture ppl")] : []));
  const body = sets.map((set, at) => {
    const chosen = selection !== null && selection.from === set.from && selection.to === set.to;
    const cells = Array.from(rows[at], (share) => {
      const ground = blend(theme.panel, theme.ramp, share / most);
      return element("td", { style: `background:${css(ground)};color:${css(inkOn(ground))}` }, percent(share));
    });
    const values = trace.predicts ? [trace.baseLogProbs, trace.logProbs].map((logProbs) => element("td", { class: "plain" }, perplexity(logProbs, set.from, set.to)?.toFixed(2) ?? "–")) : [];
    const button = element("button", { type: "button", "aria-pressed": String(chosen) }, visible(set.name || "text"));
    const row = element("tr", { class: chosen ? "chosen" : null }, element("th", { scope: "row" }, button), element("td", { class: "plain" }, String(set.to - set.from + 1)), ...cells, ...values);
    row.addEventListener("click", () => choose(set));
    return row;
  });
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

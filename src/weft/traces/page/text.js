// The text: one span for each token, coloured by the expert with the largest share, or by one expert's share.

class TextView {
  constructor(panel) {
    this.panel = panel;
    this.spans = [];
    this.marked = null;
  }

  show(trace) {
    this.spans = trace.pieces.map((piece, token) => element("span", { "data-i": token, class: piece === "" ? "part" : null }, visible(piece)));
    const parts = trace.texts.map((text, number) => {
      const tokens = element("div", { class: "tokens", dir: "auto" });
      const begin = text.prompt === null ? -1 : text.start + text.prompt;
      for (let token = text.start; token < text.end; token++) {
        if (token === begin) tokens.append(element("i", { class: "begin", title: "from here on the text is generated" }, "generated"));
        tokens.append(this.spans[token]);
      }
      return trace.texts.length === 1 ? [tokens] : [element("h3", {}, visible(text.name || "text"), element("small", {}, ` ${number + 1}`)), tokens];
    });
    this.panel.replaceChildren(...parts.flat());
    this.panel.scrollTop = 0;
    this.marked = null;
  }

  colour(trace, shares, focus, palette, theme) {
    const experts = trace.experts.length;
    this.spans.forEach((span, token) => {
      const from = token * experts;
      const expert = focus === null ? largest(shares, from, from + experts) : focus;
      paint(span, trace, expert, shares[from + expert], palette, theme);
    });
  }

  mark(selection) {
    for (const [range, on] of [[this.marked, false], [selection, true]]) {
      if (range) for (let token = range.from; token <= range.to && token < this.spans.length; token++) this.spans[token].classList.toggle("chosen", on);
    }
    this.marked = selection;
  }

  scrollTo(token) {
    this.spans[token].scrollIntoView({ block: "nearest" });
  }
}

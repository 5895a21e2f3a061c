// Streamed answers: their numbers, and a span for each piece of text in the colour of its leading expert.

const MOST_IN_TIP = 6; // maximum number of experts in a tooltip
const MOST_OPAQUE = 0.4; // opacity of the background for a share of 1, so that the text stays readable

class Answer {
  constructor(experts) {
    this.pieces = [];
    this.text = "";
    this.tokens = 0;
    this.sums = new Float64Array(experts);
    this.waiting = [];
    this.first = null;
  }

  // Text of some tokens, and a row of shares for each token. A token without text is part of a character that a later
  // token completes; it belongs to that piece.
  take(text, rows) {
    this.last = performance.now();
    if (rows.length) this.first ??= { time: this.last, tokens: rows.length };
    this.tokens += rows.length;
    for (const row of rows) row.forEach((share, expert) => (this.sums[expert] += share));
    this.waiting.push(...rows);
    if (text === "") return null;
    const tokens = this.waiting.length;
    const shares = tokens ? this.sums.map((_, expert) => this.waiting.reduce((sum, row) => sum + row[expert], 0) / tokens) : null;
    const piece = { text, shares, tokens };
    this.waiting = [];
    this.text += text;
    this.pieces.push(piece);
    return piece;
  }

  means() {
    return this.tokens ? this.sums.map((sum) => sum / this.tokens) : this.sums;
  }

  // The numbers as text; tokens per second are without the first token, whose time includes the prompt.
  pace() {
    if (!this.tokens) return "";
    const seconds = (this.last - this.first.time) / 1000, counted = this.tokens - this.first.tokens;
    const speed = counted > 0 && seconds > 0 ? ` · ${(counted / seconds).toFixed(1)} tokens/s` : "";
    return `${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}${speed}`;
  }
}

const rowsOf = (choice, experts) => (choice.weft?.shares ?? []).map((shares) => experts.map((name) => Number(shares[name]) || 0));

// A panel with answers; one of their pieces can be selected.
class Answers {
  constructor(panel, group, palette, tip, changed) {
    Object.assign(this, { panel, group, palette, tip, changed, theme: themeColours(), top: 0 });
    this.clear();
    panel.addEventListener("scroll", () => this.scrolled());
    panel.addEventListener("keydown", (event) => this.key(event));
    panel.addEventListener("click", (event) => this.click(event));
    panel.addEventListener("pointermove", (event) => this.hover(event));
    panel.addEventListener("pointerleave", () => tip.hide());
  }

  clear() {
    this.panel.replaceChildren();
    this.spans = [];
    this.pieces = [];
    this.chosen = null;
    this.answer = null;
    this.follows = true;
  }

  // The user's message, above the answer.
  say(text) {
    for (const note of this.panel.querySelectorAll(".withdrawn")) note.remove();
    const said = element("div", { class: "said", dir: "auto" }, readable(text));
    this.panel.append(said);
    return said;
  }

  begin() {
    this.answer = new Answer(this.group.experts.length);
    this.box = element("div", { class: "tokens", dir: "auto" });
    this.panel.append(this.box);
    this.follows = true;
    return this.answer;
  }

  add(text, rows) {
    const piece = this.answer.take(text, rows);
    if (!piece) return;
    const span = element("span", { "data-i": this.pieces.length }, readable(piece.text));
    this.pieces.push(piece);
    this.spans.push(span);
    this.paint(piece, span);
    this.box.append(span);
  }

  // At the end of an answer: why it is incomplete.
  note(text, kind, role = null) {
    this.panel.append(element("p", { class: kind, role }, text));
  }

  // Remove the last message; the reason is shown until the next message.
  withdraw(said) {
    said.remove();
    this.box.remove();
    this.panel.lastElementChild.classList.add("withdrawn");
  }

  paint(piece, span) {
    if (!piece.shares) return;
    const leading = largest(piece.shares), share = Math.max(0, Math.min(1, piece.shares[leading]));
    paint(span, this.group, leading, MOST_OPAQUE * share, this.palette, this.theme);
    span.style.textDecorationColor = css(this.palette.of(this.group, leading), share.toFixed(3));
  }

  repaint() {
    this.theme = themeColours();
    this.spans.forEach((span, at) => this.paint(this.pieces[at], span));
  }

  // ---------------------------------------------------------------- scrolling

  // Scroll to the newest text, unless the user has scrolled away from it.
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.panel;
    const atEnd = scrollTop + clientHeight > scrollHeight - 30;
    if (atEnd || scrollTop < this.top - 1) this.follows = atEnd;
    this.top = scrollTop;
    this.tip.hide();
  }

  follow() {
    if (!this.follows) return;
    this.panel.scrollTop = this.panel.scrollHeight;
    this.top = this.panel.scrollTop;
  }

  // ---------------------------------------------------------------- selection

  choose(at) {
    if (this.chosen !== null) this.spans[this.chosen].classList.remove("chosen");
    this.chosen = at;
    if (at !== null) {
      this.follows = false;
      this.spans[at].classList.add("chosen");
      this.spans[at].scrollIntoView({ block: "nearest" });
    }
    this.changed();
  }

  key(event) {
    const last = this.pieces.length - 1, { chosen } = this;
    const places = { ArrowRight: (chosen ?? -1) + 1, ArrowLeft: (chosen ?? last + 1) - 1, Home: 0, End: last };
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || last < 0 || places[event.key] === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, places[event.key])));
  }

  at(event) {
    const span = event.target.closest("[data-i]");
    return span ? Number(span.dataset.i) : null;
  }

  click(event) {
    if (!getSelection().isCollapsed) return; // the user selects text
    const at = this.at(event);
    if (at === null && this.chosen === null) return;
    this.choose(at === this.chosen ? null : at);
    this.hover(event); // touch screens have no hover
  }

  hover(event) {
    const at = this.at(event);
    if (at === null) this.tip.hide();
    else this.tip.show(event, ...this.told(this.pieces[at]));
  }

  told({ text, shares, tokens }) {
    const title = element("b", { class: "quoted" }, quoted(text));
    if (!shares) return [title];
    const ranked = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]);
    const shown = ranked.slice(0, MOST_IN_TIP), more = ranked.length - shown.length;
    const part = { experts: shown.map((expert) => this.group.experts[expert]), colours: shown.map((expert) => this.group.colours[expert]) };
    const notes = [...(more > 0 ? [`${more} more experts in the list`] : []), ...(tokens > 1 ? [`mean of ${tokens} tokens`] : [])];
    return [title, ...barRows(part, shown.map((expert) => shares[expert]), this.palette), ...notes.map((note) => element("p", { class: "note" }, note))];
  }
}

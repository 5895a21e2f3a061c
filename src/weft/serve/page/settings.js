// The options of a request: the model, the gate or fixed weights, and the sampling.

class Settings {
  constructor(info, group, palette) {
    this.info = info;
    this.rows = barRows(group, new Float64Array(group.experts.length), palette);
    this.sliders = group.experts.map((name, expert) => {
      const input = element("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": `Weight of ${visible(name)}`, style: `--c:${css(palette.of(group, expert))}` });
      const output = element("output");
      const line = element("div", { class: "weight", hidden: "" }, input, output);
      const slider = { input, output, line, weight: 0 };
      input.addEventListener("input", () => this.weigh(slider, Number(input.value)));
      this.rows[expert].append(line);
      return slider;
    });
    $("bars").replaceChildren(...this.rows);
    this.equal();
    $("equal").addEventListener("click", () => this.equal());
    $("who").addEventListener("change", () => this.arrange());
    $("model").addEventListener("change", () => this.arrange());
    this.fillChoices();
    this.arrange();
  }

  fillChoices() {
    const { name, experts } = this.info;
    const models = [[name, "The mixture"], ...experts.map((expert) => [`${name}:${expert}`, `${visible(expert)} alone`]), [`${name}:base`, "The base model"]];
    $("model").replaceChildren(...models.map(([value, text]) => element("option", { value }, text)));
    const counts = experts.map((_, at) => element("option", { value: at + 1 }, `${at + 1} of ${experts.length}`));
    $("top-k").replaceChildren(element("option", { value: "" }, "as trained"), ...counts);
  }

  // A weight may be between the steps of the slider, such as 1/3.
  weigh(slider, weight) {
    slider.weight = slider.input.value = weight;
    slider.output.textContent = Number(weight.toFixed(3));
  }

  equal() {
    for (const slider of this.sliders) this.weigh(slider, 1 / this.sliders.length);
  }

  get mixed() {
    return $("model").value === this.info.name;
  }

  get constant() {
    return $("who").querySelector(":checked").value === "weights";
  }

  // For a single expert or the base model there are no weights; with fixed weights there is no top-k.
  arrange() {
    const weights = this.mixed && this.constant;
    for (const { line } of this.sliders) line.hidden = !weights;
    $("equal").hidden = !weights;
    for (const radio of $("who").querySelectorAll("input")) radio.disabled = !this.mixed;
    $("top-k").disabled = !this.mixed || weights;
  }

  // Whether all numbers are valid; the browser shows which are not.
  check() {
    return $("settings").reportValidity();
  }

  body() {
    const asked = this.info.shares ? { shares: true } : {};
    if (this.mixed && this.constant) asked.weights = Object.fromEntries(this.sliders.map(({ weight }, expert) => [this.info.experts[expert], weight]));
    else if (this.mixed && $("top-k").value) asked.top_k = Number($("top-k").value);
    const body = { model: $("model").value, max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value) };
    if ($("seed").value) body.seed = Number($("seed").value);
    return Object.keys(asked).length ? { ...body, weft: asked } : body;
  }
}

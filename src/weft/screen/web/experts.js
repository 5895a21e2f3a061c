// Shows experts: colours, bars and tooltips of tokens. `group` is an object with the experts' names (experts) and the
// numbers of their colours (colours).

const $ = (id) => document.getElementById(id);

class Palette {
  constructor(colours) {
    this.colours = colours.map(rgbOf);
  }

  of(group, expert) {
    return this.colours[group.colours[expert] % this.colours.length];
  }

  // Whether an earlier expert has this colour already.
  again(group, expert) {
    return group.colours[expert] >= this.colours.length;
  }
}

function largest(values, from = 0, to = values.length) {
  let best = from;
  for (let i = from + 1; i < to; i++) if (values[i] > values[best]) best = i;
  return best - from;
}

// A token's colour: an expert's, as opaque as its share.
function paint(span, group, expert, share, palette, theme) {
  const rgb = palette.of(group, expert);
  span.style.backgroundColor = css(rgb, share.toFixed(3));
  span.style.color = css(inkOn(blend(theme.panel, rgb, share)));
  span.classList.toggle("second", palette.again(group, expert));
}

function swatch(group, expert, palette) {
  const [colour, again] = [css(palette.of(group, expert)), palette.again(group, expert)];
  return element("i", { class: again ? "swatch second" : "swatch", style: `--c:${colour}` });
}

// A row per expert; setBars fills them, and the leading one is bold.
function barRows(group, shares, palette) {
  const rows = group.experts.map((name, expert) =>
    element("div", { class: "bar" },
      swatch(group, expert, palette),
      element("span", { class: "name", title: visible(name) }, visible(name)),
      element("span", { class: "track" }, element("span", { style: `--c:${css(palette.of(group, expert))}` })),
      element("span", { class: "number" })));
  setBars(rows, shares);
  return rows;
}

function setBars(rows, shares) {
  const leading = largest(shares);
  rows.forEach((row, expert) => {
    const share = shares[expert];
    row.classList.toggle("leading", expert === leading && share > 0);
    row.querySelector(".track span").style.width = `${(100 * Math.max(0, Math.min(1, share))).toFixed(2)}%`;
    row.querySelector(".number").textContent = percent(share);
  });
}

// Switch between the light and the dark theme.
function otherTheme() {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
}

class Tip {
  constructor(box) {
    this.box = box;
  }

  show(event, ...children) {
    this.box.replaceChildren(...children);
    this.box.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const x = Math.min(event.clientX + 14, window.innerWidth - width - 8);
    const below = event.clientY + 18;
    this.box.style.left = `${Math.max(8, x)}px`;
    this.box.style.top = `${below + height > window.innerHeight ? Math.max(8, event.clientY - height - 12) : below}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}

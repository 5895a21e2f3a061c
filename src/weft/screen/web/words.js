// How text and numbers are shown. Text of others reaches a page only as text, never as markup.

// Characters that steer what is beside them or cannot be seen, by their names.
const MARKS = {
  0xad: "SHY", 0x61c: "ALM", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LS", 0x2029: "PS",
  0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ",
  0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM",
};

// The others that cannot be seen, but for joiners and variation selectors, which writing and emoji need.
const UNSEEN = /(?![\u200c\u200d\ufe00-\ufe0f])\p{Default_Ignorable_Code_Point}/u;

function visibleCharacter(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "⏎\n";
  if (character === "\t") return "⇥\t";
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  if (code === 0x7f) return "␡";
  if (code >= 0x80 && code < 0xa0) return "\ufffd";
  if (code >= 0xe0000 && code < 0xe0080) return "⟦TAG⟧";
  if (MARKS[code]) return `⟦${MARKS[code]}⟧`;
  return UNSEEN.test(character) ? `⟦U+${code.toString(16).toUpperCase()}⟧` : character;
}

// A token's text with all of it to be seen; part of a character has none of its own.
const visible = (piece) => (piece === "" ? "◦" : Array.from(piece, visibleCharacter).join(""));

// The same for what is read rather than studied: lines and tabs are what they do.
const readable = (text) => Array.from(text, (character) => (/[\n\t]/.test(character) ? character : visibleCharacter(character))).join("");

// The same in one line, for titles.
const quoted = (piece) => `“${visible(piece).replaceAll("⏎\n", "⏎").replaceAll("\t", "")}”`;

const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)}%`;

function probability(logProb) {
  if (Number.isNaN(logProb)) return "–";
  const value = Math.exp(logProb);
  return value >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

// An element with children; strings are text.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") made.style.cssText = value; // an attribute of this name is not allowed to act
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------ colours

const rgbOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const css = (rgb, alpha = 1) => `rgb(${rgb.map(Math.round).join(" ")} / ${alpha})`;
const blend = (under, over, alpha) => under.map((value, i) => value + (over[i] - value) * alpha);

function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

const INKS = [[20, 22, 26], [255, 255, 255]];
// Black or white, whichever is read more easily on a ground.
const inkOn = (rgb) => (luminance(rgb) > 0.2 ? INKS[0] : INKS[1]);

// What the theme has made of the page, for what is drawn.
function themeColours() {
  const resolved = (property) => {
    const probe = element("i", { style: `color:var(${property})` });
    document.body.append(probe);
    const rgb = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return rgb;
  };
  return {
    panel: resolved("--panel"), ink: resolved("--ink"), muted: resolved("--muted"), line: resolved("--line"),
    ramp: resolved("--ramp"), up: resolved("--up"), down: resolved("--down"),
  };
}

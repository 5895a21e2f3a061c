// Shows text and numbers. Untrusted text is added to a page only as text, never as markup.

// Names of characters that change the direction of text or are invisible.
const MARKS = {
  0xad: "SHY", 0x61c: "ALM", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LS", 0x2029: "PS",
  0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ",
  0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM",
};

// Other invisible characters, except joiners and variation selectors, which scripts and emoji need.
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

// A token's text with all characters visible. The text is empty if the token is a part of a character.
const visible = (piece) => (piece === "" ? "◦" : Array.from(piece, visibleCharacter).join(""));

// The same, but line feeds and tabs stay as they are.
const readable = (text) => Array.from(text, (character) => (/[\n\t]/.test(character) ? character : visibleCharacter(character))).join("");

// The same as `visible`, in one line and in quotes, for titles.
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
    if (key === "style") made.style.cssText = value; // the policy forbids the attribute
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
// Black or white, by the better contrast with a background.
const inkOn = (rgb) => (luminance(rgb) > 0.2 ? INKS[0] : INKS[1]);

// The colours of the present theme, for drawing.
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

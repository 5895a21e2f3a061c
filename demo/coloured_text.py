"""The picture in README.md: a held-out text of the demo, each token in the colour of its leading expert.

Run `make demo` first.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import weft
from weft.screen.palette import colour_of

ROOT = Path(__file__).parent.parent
COLUMNS = 96
CHARACTER, LINE, MARGIN = 8.0, 20, 12  # in pixels
FONT = "font-family='ui-monospace, Menlo, Consolas, monospace' font-size='13'"
# A colour is as opaque as its expert's share, but never too strong to read what is on it.
STRONGEST = 0.85

Piece = tuple[int, int, str, int, float]


def placed(pieces: Sequence[str], leaders: Sequence[int], shares: Sequence[float]) -> Iterator[Piece]:
    """Lay tokens out in lines of at most COLUMNS characters.

    Args:
        pieces: The text of each token.
        leaders: The number of each token's leading expert.
        shares: The share of that expert.

    Yields:
        The line, the column, the text without line ends, the expert and the share of each part of a token.
    """
    line = column = 0
    for piece, leader, share in zip(pieces, leaders, shares, strict=True):
        for number, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if number or (column and column + len(part) > COLUMNS):
                line, column = line + 1, 0
            if part:
                yield line, column, part, leader, share
                column += len(part)


def drawn(parts: list[Piece], experts: Sequence[str]) -> str:
    """Draw tokens and a legend as SVG.

    Args:
        parts: What `placed` gives.
        experts: The names of the experts.

    Returns:
        The picture. Each text has a fixed length, so that it fits its background in any monospaced font.
    """
    width = 2 * MARGIN + COLUMNS * CHARACTER
    height = 2 * MARGIN + (parts[-1][0] + 3) * LINE
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' {FONT} fill='#222222'>",
        f"<rect width='{width:g}' height='{height:g}' rx='8' fill='white'/>",
    ]

    def write(x: float, y: float, text: str, colour: str, opacity: float) -> None:
        length = len(text) * CHARACTER
        lines.append(
            f"<rect x='{x:g}' y='{y:g}' width='{length:g}' height='{LINE - 2}' fill='{colour}' "
            f"fill-opacity='{opacity:.2f}'/>"
        )
        if text.strip():
            shown = escape(text)
            lines.append(
                f"<text x='{x:g}' y='{y + 13:g}' textLength='{length:g}' lengthAdjust='spacingAndGlyphs' "
                f"xml:space='preserve'>{shown}</text>"
            )

    x = float(MARGIN)
    for number, name in enumerate(experts):
        write(x, MARGIN, f" {name} ", colour_of(number), STRONGEST)
        x += (len(name) + 4) * CHARACTER
    for line, column, text, leader, share in parts:
        write(MARGIN + column * CHARACTER, MARGIN + (line + 2) * LINE, text, colour_of(leader), share * STRONGEST)
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Let the mixture read a text, and draw it."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".demo")
    parser.add_argument("--row", type=int, default=0, help="which of the held-out mixed texts")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/coloured-text.svg")
    arguments = parser.parse_args()
    work = arguments.work_dir
    rows = (work / "data/heldout/mixed.jsonl").read_text("utf-8").splitlines()
    model = weft.from_pretrained(str(work / "mixture"), str(work / "model"))
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    trace = weft.trace(model, json.loads(rows[arguments.row])["text"], tokenizer=tokenizer)
    share, leader = trace.shares().max(-1)
    parts = list(placed(trace.pieces, leader.tolist(), share.tolist()))
    arguments.output.write_text(drawn(parts, trace.expert_names), "utf-8")


if __name__ == "__main__":
    main()

"""Prints generated text in the experts' colours; without colours if the output is no terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from weft.generation.stream import Step
from weft.screen.palette import LOOKS, colour_of, is_marked
from weft.screen.visible import PICTURES


def style_of(place: int) -> Style:
    """How the name and the tokens of the expert with this number look."""
    return Style(color=colour_of(place), underline=is_marked(place))


class StepPrinter:
    """Prints the steps of a text one by one.

    Args:
        experts: the experts' names, in the order of their colours.
        show_experts: colour each piece by the expert with the largest share, and print the experts' mean shares at the
            end.

    Example:
        >>> printer = StepPrinter(["math", "code"], show_experts=True)
        >>> printer.legend()
        >>> for step in weft.stream(model, "1 + 1 =", tokenizer=tokenizer):
        ...     printer.add(step)
        >>> printer.end()
    """

    def __init__(self, experts: Sequence[str], show_experts: bool) -> None:
        self.console = Console(soft_wrap=True)
        names = experts if show_experts else ()
        self._styles = {name: style_of(place) for place, name in enumerate(names)}
        self._steps: list[Step] = []

    def legend(self) -> None:
        """Print the experts' names in their colours."""
        if self._styles:
            self._line({name: name for name in self._styles})
        if len(self._styles) > LOOKS:
            self.write(f"(colours repeat after {LOOKS} experts)\n")

    def add(self, step: Step) -> None:
        """Print the text of a step."""
        self._steps.append(step)
        leading = max(step.shares, key=step.shares.__getitem__) if step.shares else None
        self.write(step.text, self._styles.get(leading or ""))

    def end(self) -> None:
        """End the text with a new line, and print the experts' mean shares in it."""
        self.write("\n")
        if self._styles and any(step.shares for step in self._steps):
            means = {name: sum(step.shares[name] for step in self._steps) / len(self._steps) for name in self._styles}
            self._line({name: f"{name} {mean:.0%}" for name, mean in means.items()})
        self._steps = []

    def write(self, text: str, style: Style | None = None) -> None:
        """Print text literally, without markup."""
        if self.console.is_terminal:
            text = text.translate(PICTURES)  # a model's text must not control the terminal
        self.console.print(Segments([Segment(text, style)]), end="")

    def _line(self, labels: dict[str, str]) -> None:
        self.write("experts:")
        used = len("experts:")
        for name, label in labels.items():
            used += 2 + len(label)
            if used > self.console.width and self.console.is_terminal:
                self.write("\n")  # so that the terminal does not break a name
                used = 2 + len(label)
            self.write("  ")
            self.write(label, self._styles[name])
        self.write("\n")

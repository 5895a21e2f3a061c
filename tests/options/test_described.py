"""What the docstrings of the options say, as help, files and reference read it."""

from dataclasses import dataclass, field
from typing import Literal

from weft.options.base import CommandOptions
from weft.options.described import description, options_of


@dataclass(kw_only=True)
class Common(CommandOptions):
    """Options of several.

    Args: Advanced
        seed: Random seed.

    Args: Text
        length: Tokens. Default: all.
    """

    seed: int = 0
    length: int | None = None


@dataclass
class Options(Common):
    """Do something; and more.

    This is a
    second paragraph.

    Args:
        model: Where it is.

    Args: Text
        words (WORD ...): What to read. Files (.txt) too. They are
            long.
        kind: Of reading.
        rate: How fast.
        weights (NAME=NUMBER ...): Weights.
        loud: Whether to
            shout.
    """

    model: str
    words: list[str] = field(default_factory=lambda: ["a", "b"])
    kind: Literal["one", "two"] | None = None
    rate: float = 0.5
    weights: list[str] | dict[str, float] = field(default_factory=list)
    loud: bool = True


def test_the_paragraphs_before_the_options_are_the_description():
    assert description(Options) == ["Do something; and more.", "This is a second paragraph."]


def test_options_come_group_by_group_with_those_of_the_class_itself_first():
    found = options_of(Options)
    assert [option.name for option in found] == [
        *("model", "words", "kind", "rate", "weights", "loud", "length", "seed")
    ]
    assert [option.group for option in found] == ["", *["Text"] * 6, "Advanced"]


def test_an_option_is_what_its_field_and_its_entry_say():
    found = {option.name: option for option in options_of(Options)}
    assert [found[name].kind for name in found] == [
        *("text", "list", "choice", "number", "list", "switch", "whole", "whole")
    ]
    assert [found[name].metavar for name in found] == [
        *("MODEL", "WORD ...", "{one,two}", "NUMBER", "NAME=NUMBER ...", "LOUD", "N", "N")
    ]
    assert [found[name].default_words for name in found] == ["", "a b", "", "0.5", "", "on", "all", "0"]
    assert (found["words"].sentence, found["words"].more) == ("What to read.", "Files (.txt) too. They are long.")
    assert found["loud"].sentence == "Whether to shout."
    assert found["weights"].table is float
    assert found["words"].table is None
    assert [name for name in found if found[name].optional] == ["kind", "length"]
    assert [name for name in found if found[name].positional] == ["model"]
    assert found["model"].flag == "MODEL"
    assert found["loud"].flag == "--loud"

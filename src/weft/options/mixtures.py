"""The options of the commands that write, convert, upload or download a saved mixture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from weft.files.names import split_name
from weft.files.ownership import FOLDED, folder_beside, new_folder_problem
from weft.files.presence import file_missing
from weft.options.base import BaseModelOptions, CommandOptions, LoadingOptions, MixtureOptions
from weft.options.checks import least, length_problems, naming_problems, pairs


@dataclass
class FoldOptions(MixtureOptions, LoadingOptions):
    """Write a constant mixture as one ordinary LoRA adapter; peft, vLLM and LoRAX load it.

    Give either `weights` or `data`. Folding a trained gate (`data`) keeps the mean weight of each expert in each layer,
    and loses the differences between tokens.

    Args: Experts' weights
        weights (NAME=NUMBER ...): Weight of each expert, in all layers; experts that are left out get 0.
        data (FILE ...): Texts over which the gate's weights are averaged, in the formats of `weft train`.
        max_sequences: Maximum number of sequences per data file, from its beginning; 0 takes all.
        sequence_length: Tokens per sequence of `data`; longer texts are cut into several.

    Args: Output
        output (FOLDER): Folder for the adapter; required. It must be new, empty, or an earlier folded adapter, which is
            replaced.

    Args: Advanced
        batch_size: Sequences per forward pass.
    """

    output: str | None = None
    weights: list[str] | dict[str, float] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    sequence_length: int = field(default=512, kw_only=True)
    batch_size: int = field(default=4, kw_only=True)
    max_sequences: int = field(default=0, kw_only=True)

    def missing(self) -> list[str]:
        """The output, and weights or data, if missing."""
        needed = {
            "output is missing: a folder for the adapter": self.output,
            "weights and data are missing: give name=NUMBER for each expert, or texts for the gate to read": (
                self.weights or self.data
            ),
        }
        return [sentence for sentence, given in needed.items() if not given]

    def wrong(self) -> list[str]:
        """Weights and data together, and values out of range."""
        problems = naming_problems(self.weights, "weights", "name=NUMBER", float)
        problems += least(self, batch_size=1, max_sequences=0)
        if self.weights and self.data:
            problems.append(
                f"weights ({self.weights}) and data ({self.data}) exclude each other: the data would give the weights, "
                "so leave one out"
            )
        return [*problems, *length_problems(self.sequence_length)]

    def sources(self) -> list[tuple[str, str]]:
        """The texts for the gate."""
        return [("data", source) for source in self.data]

    def in_the_way(self) -> list[str]:
        """Files in the output folder, except a folded adapter."""
        if self.output is None or os.path.isfile(os.path.join(self.output, FOLDED)):
            return []
        return _in_the_way(Path(self.output))


@dataclass
class AddExpertOptions(MixtureOptions, BaseModelOptions):
    """Add an expert to a trained mixture; the gate keeps what it has learned about the others.

    The new expert starts neutral. Train the gate further afterwards, with `weft train --start-from`.

    Args:
        expert (NAME=FOLDER): The new expert: a LoRA adapter of the same base model, as a folder or Hub id.

    Args: Output
        output (FOLDER): Folder for the new mixture; the folder of the model itself is replaced. Default:
            MODEL-with-NAME.
    """

    expert: str
    output: str | None = None

    def wrong(self) -> list[str]:
        """An expert without a name or a folder."""
        name, path = split_name(self.expert)
        return [] if name and path else [f"expert ({self.expert!r}) must be name=FOLDER or name=HUB_ID"]

    def models(self) -> list[tuple[str, str]]:
        """The mixture, its base model, and the adapter."""
        name, path = split_name(self.expert)
        return [*super().models(), *([(f"adapter {name!r}", path)] if name and path else [])]

    def in_the_way(self) -> list[str]:
        """Files in the output folder, unless it is the mixture's own."""
        return _beside_in_the_way(self.model, self.output, f"with-{split_name(self.expert)[0]}")


@dataclass
class DropExpertOptions(MixtureOptions):
    """Remove an expert from a trained mixture; the others keep the ratios that the gate gives them.

    Args:
        expert (NAME): Name of the expert.

    Args: Output
        output (FOLDER): Folder for the new mixture; the folder of the model itself is replaced. Default:
            MODEL-without-NAME.
    """

    expert: str
    output: str | None = None

    def in_the_way(self) -> list[str]:
        """Files in the output folder, unless it is the mixture's own."""
        return _beside_in_the_way(self.model, self.output, f"without-{self.expert}")


@dataclass
class ConvertOptions(BaseModelOptions):
    """Write a mixture in the layout of another library; the logits are the same.

    Options that the layout cannot represent are listed.

    Args:
        source: Folder or Hub id of a mixture of weft, peft, xlora or mistral.rs.

    Args: Output
        to: Layout to write.
        output (FOLDER): Folder for the converted mixture, new or empty. Default: SOURCE-LAYOUT.

    Args: Experts
        adapters (NAME=FOLDER ...): Folders or Hub ids of the experts, if they are not where the source says.
        rename (OLD=NEW ...): New names of experts; for peft they must be the numbers from 0 on.

    Args: Advanced
        base (MODEL): Folder or Hub id of the base model; only its config is read. For mistralrs, the name by which the
            engine will load it. Default: the one that the mixture names.
    """

    source: str
    to: Literal["weft", "peft", "xlora", "mistralrs"] = "weft"
    output: str | None = None
    adapters: list[str] | dict[str, str] = field(default_factory=list)
    rename: list[str] | dict[str, str] = field(default_factory=list)

    @property
    def target(self) -> str:
        """The folder to write."""
        return self.output or f"{Path(self.source).name}-{self.to}"

    def wrong(self) -> list[str]:
        """Names without a folder, or without a new name."""
        return [*naming_problems(self.adapters, "adapters"), *naming_problems(self.rename, "rename", "OLD=NEW")]

    def models(self) -> list[tuple[str, str]]:
        """The mixture, its experts and the base model; for mistral.rs the base model is only a name."""
        given = [] if self.to == "mistralrs" else super().models()
        experts = [(f"adapter {name!r}", path) for name, path in pairs(self.adapters) if name and path]
        return [("the mixture", self.source), *given, *experts]

    def in_the_way(self) -> list[str]:
        """Files in the output folder."""
        return _in_the_way(Path(self.target))


@dataclass(kw_only=True)
class PublicationOptions(CommandOptions):
    """Options of `card` and `push`.

    Args: Card
        base (HUB_ID): Hub id of the base model, for the card. Default: the one that the mixture names.
        license (NAME): Licence of the mixture, as the Hub writes it (apache-2.0, mit, ...). Default: none is declared.
        evaluation (FILE): Results that `weft eval --output` wrote, for the card. Default: eval.json in the folder.
    """

    base: str | None = None
    license: str | None = None
    evaluation: str | None = None

    def wrong(self) -> list[str]:
        """A missing file of results."""
        if self.evaluation is None:
            return []
        missing = file_missing("evaluation", self.evaluation, "weft eval --output")
        return [] if missing is None else [missing]


@dataclass
class CardOptions(MixtureOptions, PublicationOptions):
    """Write the model card (README.md) of a saved mixture.

    It lists the experts, their licences and the results, and says how to load the mixture. A gate.png or gate.svg in
    the folder (from `weft inspect --figure`) is shown in it.

    Args:
        model: Folder of a trained mixture.

    Args: Card
        overwrite: Replace also a card that weft did not write.
    """

    overwrite: bool = False


@dataclass
class PushOptions(MixtureOptions, PublicationOptions):
    """Upload a mixture to the Hugging Face Hub, with a model card.

    This needs a token (`hf auth login`, or HF_TOKEN).

    Args:
        model: Folder of a trained mixture.
        repo_id: Repository, as user/name; it is created if it does not exist.

    Args: Output
        private: Make the repository private.
        dry_run: Upload nothing; list the files that would be uploaded.
    """

    repo_id: str
    private: bool = False
    dry_run: bool = False


@dataclass
class PullOptions(CommandOptions):
    """Download a mixture from the Hugging Face Hub into a folder; it is complete and verified.

    Args:
        repo_id: Repository, as user/name.

    Args: Output
        output (FOLDER): Folder for the mixture, new or empty. Default: the repository's name, in the current folder.
        revision (NAME): Branch, tag or commit. Default: the main branch.
    """

    repo_id: str
    output: str | None = None
    revision: str | None = None

    def in_the_way(self) -> list[str]:
        """Files in the output folder."""
        folder = self.output or self.repo_id.partition("/")[2]
        return _in_the_way(Path(folder)) if folder else []


def _in_the_way(folder: Path) -> list[str]:
    problem = new_folder_problem(folder)
    return [] if problem is None else [problem]


def _beside_in_the_way(model: str, output: str | None, what: str) -> list[str]:
    """The problem with the output folder of a command that changes a mixture, which may replace the mixture itself."""
    try:
        target = folder_beside(model, what) if output is None else Path(output)
    except ValueError:  # an invalid expert name, which is reported when the mixture is read
        return []
    return [] if os.path.realpath(target) == os.path.realpath(model) else _in_the_way(target)

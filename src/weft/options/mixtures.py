"""The options of the commands that make one saved mixture of another: `fold`, `convert`, `push`, `add-expert`, ..."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.options.base import BaseModelOptions, CommandOptions, LoadingOptions, MixtureOptions


@dataclass
class FoldOptions(MixtureOptions, LoadingOptions):
    """Write a constant mixture as one ordinary LoRA adapter; peft, vLLM and LoRAX load it.

    Give either `weights` or `data`. Folding a trained gate (`data`) keeps the average weight of each expert in each
    layer, and loses what the gate decides from token to token.

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
        """The output, and weights or data, where they are missing."""
        needed = {
            "output is missing: a folder for the adapter": self.output,
            "weights and data are missing: give name=NUMBER for each expert, or texts for the gate to read": (
                self.weights or self.data
            ),
        }
        return [sentence for sentence, given in needed.items() if not given]


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


@dataclass
class ConvertOptions(BaseModelOptions):
    """Write a mixture in the layout of another library; the logits are the same.

    What that layout cannot hold is named.

    Args:
        source: Folder or Hub id of a mixture of weft, peft, xlora or mistral.rs.

    Args: Output
        to: Layout to write.
        output (FOLDER): Folder for it, new or empty. Default: SOURCE-LAYOUT.

    Args: Experts
        adapters (NAME=FOLDER ...): Folders or Hub ids of the experts, if they are not where the source says.
        rename (OLD=NEW ...): New names of experts; peft takes numbers from 0 on only.

    Args: Advanced
        base (MODEL): Folder or Hub id of the base model, of which only the config is read. For mistralrs, the name by
            which the engine will load it. Default: the one that the mixture names.
    """

    source: str
    to: Literal["weft", "peft", "xlora", "mistralrs"] = "weft"
    output: str | None = None
    adapters: list[str] | dict[str, str] = field(default_factory=list)
    rename: list[str] | dict[str, str] = field(default_factory=list)


@dataclass(kw_only=True)
class PublicationOptions(CommandOptions):
    """Options of `card` and `push`.

    Args: Card
        base (HUB_ID): Hub id of the base model, for the card. Default: what the mixture says.
        license (NAME): Licence of the mixture, as the Hub writes it (apache-2.0, mit, ...). Default: none is declared.
        evaluation (FILE): Results that `weft eval --output` wrote, for the card. Default: eval.json in the folder.
    """

    base: str | None = None
    license: str | None = None
    evaluation: str | None = None


@dataclass
class CardOptions(MixtureOptions, PublicationOptions):
    """Write the model card (README.md) of a saved mixture.

    It lists the experts, their licences and the results, and says how to load the mixture. A gate.png or gate.svg in
    the folder (from `weft inspect --figure`) is shown in it.

    Args:
        model: Folder of a trained mixture.

    Args: Card
        overwrite: Replace a card that a person wrote too.
    """

    overwrite: bool = False


@dataclass
class PushOptions(MixtureOptions, PublicationOptions):
    """Upload a mixture to the Hugging Face Hub, with a model card.

    This needs a token (`hf auth login`, or HF_TOKEN).

    Args:
        model: Folder of a trained mixture.
        repo_id: Repository, as user/name; it is made if it does not exist.

    Args: Output
        private: Make the repository private.
        dry_run: Send nothing; list what would be sent.
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
        output (FOLDER): Folder for it, new or empty. Default: a folder of the repository's name here.
        revision (NAME): Branch, tag or commit. Default: the main branch.
    """

    repo_id: str
    output: str | None = None
    revision: str | None = None

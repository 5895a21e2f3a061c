"""The options of the commands that make one saved mixture of another: `fold`, `convert`, `push`, `add-expert`, ..."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.options.base import CommandOptions, Dtype, Quantization


@dataclass
class FoldOptions(CommandOptions):
    """Write a constant mix as one ordinary LoRA adapter, which peft, vLLM and LoRAX load.

    Give either `weights` or `data`. Folding a trained gate (`data`) keeps how much of each expert it takes in each
    layer on average, and loses what it decides from token to token.

    Args:
        model: Folder or Hub id of a mixture.
        output: Folder for the adapter: a new or empty one, or an earlier adapter's, which is replaced.
        weights: The experts' weights in all layers, as name=NUMBER, separated by spaces; experts left out have 0.
        data: Texts over which the gate's weights are averaged, layer by layer; files as for `weft train`.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        sequence_length: Tokens per sequence of the data; longer texts are cut into several.
        batch_size: Sequences per forward pass.
        max_sequences: At most so many sequences per data file, the first ones; 0 takes all.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    model: str
    output: str | None = None
    weights: list[str] | dict[str, float] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    base: str | None = None
    sequence_length: int = 512
    batch_size: int = 4
    max_sequences: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False


@dataclass
class AddExpertOptions(CommandOptions):
    """Add an expert to a trained mixture. What the gate has learned of the others stays; the new one starts neutral.

    Train the gate further afterwards: `weft train --start-from` (docs/experts.md).

    Args:
        model: Folder or Hub id of a trained mixture.
        expert: The new expert, as name=FOLDER (or name=HUB_ID): a LoRA adapter of the same base model.
        output: Folder for the new mixture, or the model's own, which is then replaced; null takes MODEL-with-NAME.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    model: str
    expert: str
    output: str | None = None
    base: str | None = None
    trust_remote_code: bool = False


@dataclass
class DropExpertOptions(CommandOptions):
    """Drop an expert from a trained mixture. The others keep the ratios that the gate gives them.

    Args:
        model: Folder or Hub id of a trained mixture.
        expert: The name of the expert.
        output: Folder for the new mixture, or the model's own, which is then replaced; null takes MODEL-without-NAME.
    """

    model: str
    expert: str
    output: str | None = None


@dataclass
class ConvertOptions(CommandOptions):
    """Write a saved mixture in another layout, with the same logits; what the layout cannot hold is named.

    Args:
        source: Folder or Hub id of a mixture: of weft, of peft's X-LoRA, of the original xlora library, or in
            mistral.rs's flat layout.
        to: The layout to write.
        output: Folder for it, new or empty; null takes SOURCE-LAYOUT.
        base: Folder or Hub id of the base model, of which only the config is read; for mistralrs the name by which the
            engine will load it. null takes the one the mixture names.
        adapters: Where the experts are, as name=FOLDER (or name=HUB_ID), if not where the source says.
        rename: New names of experts, as OLD=NEW, separated by spaces; peft takes 0, 1, ... only.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    source: str
    to: Literal["weft", "peft", "xlora", "mistralrs"] = "weft"
    output: str | None = None
    base: str | None = None
    adapters: list[str] | dict[str, str] = field(default_factory=list)
    rename: list[str] | dict[str, str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class CardOptions(CommandOptions):
    """Write the model card (README.md) of a saved mixture: its experts, their licences, results, and how to load it.

    A gate.png or gate.svg in the folder (of weft inspect --figure) is shown in it.

    Args:
        model: Folder of a trained mixture.
        base: Hub id of the base model, where the mixture names a folder; null takes what the mixture says.
        licence: The mixture's own, as the Hub writes it (apache-2.0, mit, ...); null declares none.
        evaluation: What `weft eval --output` wrote; null takes eval.json in the folder, if there is one.
        overwrite: Replace a card that a person wrote too.
    """

    model: str
    base: str | None = None
    licence: str | None = None
    evaluation: str | None = None
    overwrite: bool = False


@dataclass
class PushOptions(CommandOptions):
    """Put a saved mixture on the Hugging Face Hub, with a model card. Needs a token (hf auth login, or HF_TOKEN).

    Args:
        model: Folder of a trained mixture.
        repo_id: Where to, as user/name; made if it is not there.
        private: Make the repository a private one.
        base: Hub id of the base model, where the mixture names a folder, which nobody else has.
        licence: The mixture's own, as the Hub writes it (apache-2.0, mit, ...); null declares none.
        evaluation: What `weft eval --output` wrote; null takes eval.json in the folder, if there is one.
        dry_run: Send nothing; list what would be sent.
    """

    model: str
    repo_id: str
    private: bool = False
    base: str | None = None
    licence: str | None = None
    evaluation: str | None = None
    dry_run: bool = False


@dataclass
class PullOptions(CommandOptions):
    """Get a mixture from the Hugging Face Hub into a folder, whole and verified.

    Args:
        repo_id: user/name of the mixture.
        output: Folder for it, new or empty; null takes one of the repository's name here.
        revision: Branch, tag or commit; null takes the main branch.
    """

    repo_id: str
    output: str | None = None
    revision: str | None = None

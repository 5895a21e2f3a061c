"""The options of the commands that bring mixtures in and out (see `options.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.command_options import CommandOptions


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


@dataclass
class ServeOptions(CommandOptions):
    """Serve a trained mixture as an OpenAI server. Flags that are not below are vLLM's own and are handed on.

    Args:
        model: Folder or Hub id of a trained mixture.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        name: What clients call the model; null takes the folder's name.
        host: Address to listen on; others than this machine's own can be reached by others.
        port: Port to listen on.
        api_key: What clients must send as their key; null asks for none.
        engine: What runs the mixture: vllm, or embedded, which needs nothing but transformers and is for trying
            things; auto takes vLLM where it is installed.
    """

    model: str
    base: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    engine: Literal["auto", "vllm", "embedded"] = "auto"

"""What is mutated: a base model, adapters, a mixture in every layout, data. All tiny, all real."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import weft
from models import lora, quietly, save_adapter, tiny_llama, tiny_tokenizer
from weft.traces.figures import write_figure

TOKENS = torch.arange(3, 19).view(2, 8)
LAYOUTS = ("weft", "peft", "xlora", "mistralrs")
ROWS = {
    "text": [{"text": "one two three four"}, {"text": "five six", "expert": "math"}],
    "parts": [{"text": "one two three four", "experts": [[0, "math"], [4, "code"]]}],
    "messages": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes, hello"}]}],
    "choice": [{"question": "1 + 1?", "choices": ["two", "three"], "answer": "A"}],
    "question": [{"prompt": "1 + 1 =", "answer": "2"}],
}


@dataclass
class World:
    """Where everything lies, and what is right.

    Attributes:
        root: of all of it; cases get folders of their own beside it.
        base: the base model in memory, which every case must leave as it is.
        weights: its weights.
        tokenizer: its tokenizer.
        logits: of the mixture in each layout.
    """

    root: Path
    base: Any
    tokenizer: Any
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)

    def at(self, name: str) -> Path:
        """Where a thing of that name lies."""
        return self.root / name

    @torch.no_grad()
    def logits_of(self, model: Any) -> torch.Tensor:
        """What a mixture gives for some tokens."""
        return model.eval()(input_ids=TOKENS).logits.clone()

    def renew_base(self) -> None:
        """Another one, where a case has left its mark on it."""
        config = self.base.config
        self.base = tiny_llama(vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings)
        self.base.load_state_dict(self.weights)
        self.base.name_or_path = str(self.root / "base")

    def base_is_whole(self) -> bool:
        """Whether the base model in memory is bit for bit as it was, with no adapter in it."""
        state = self.base.state_dict()
        return state.keys() == self.weights.keys() and all(
            torch.equal(value, self.weights[key]) for key, value in state.items()
        )


def build(root: Path) -> World:
    """Make it."""
    tokenizer = tiny_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    base.name_or_path = str(root / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        save_adapter(
            _copy_of(base), lora(r=4, base_model_name_or_path=str(root / "base")), root / "adapters" / name, seed
        )
    adapters = {name: str(root / "adapters" / name) for name in ("math", "code")}
    torch.manual_seed(3)
    model = quietly(weft.from_adapters, base, adapters, xlora_depth=2, xlora_size=32, hidden_size=32)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    quietly(model.save_pretrained, root / "weft")
    quietly(model.base_model.unload)
    world = World(root, base, tokenizer, {key: value.clone() for key, value in base.state_dict().items()})
    weft.convert_mixture(root / "weft", "peft", root / "peft", rename={"math": "0", "code": "1"})
    for layout in ("xlora", "mistralrs"):
        weft.convert_mixture(root / "weft", layout, root / layout)
    for layout in LAYOUTS:
        folder = root / layout
        if layout == "mistralrs":
            folder = weft.convert_mixture(folder, "weft", root / "mistralrs-read")
        model = quietly(weft.from_pretrained, folder, base)
        world.logits[layout] = world.logits_of(model)
        if layout == "weft":
            trace = quietly(weft.trace, model, "one two", tokenizer=tokenizer, title="a title")
            trace.save(root / "a.trace")
            write_figure(trace, root / "a.svg")  # for the first time, when matplotlib looks for fonts
        quietly(model.base_model.unload)
        assert torch.allclose(world.logits[layout], world.logits["weft"], atol=1e-4)
    assert world.base_is_whole()
    _write_data(root / "data")
    return world


def _copy_of(base: Any) -> Any:
    twin = tiny_llama(vocab_size=base.config.vocab_size, max_position_embeddings=1024)
    twin.load_state_dict(base.state_dict())
    return twin


def _write_data(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "plain.txt").write_text("one two three four five\n")
    pq.write_table(pa.table({"text": ["one two three", "four five six"]}), folder / "table.parquet")
    cell = {"digest": "0" * 64, "row": "base", "data": "text", "cell": {"scores": [[1.0, 2]], "seconds": 1.0}}
    cell["cell"] |= {"peak_mb": None, "note": ""}
    (folder / "a.cells.jsonl").write_text(json.dumps(cell) + "\n")
    (folder / "options.yaml").write_text("model: mixture\nprompt: one two\nmax_new_tokens: 1\nshow_experts: true\n")
    (folder / "eval.json").write_text(json.dumps({"perplexity": {"weft": {"a": 1.0}}}))

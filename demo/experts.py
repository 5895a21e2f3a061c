"""One LoRA expert per domain, trained with plain PEFT and PyTorch as anyone might have done elsewhere."""

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipes import ExpertRecipe
from stage import building
from weft.screen.countdown import Countdown

SEED = 3
SEQUENCE_TOKENS = 256
WARMUP_STEPS = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(recipe: ExpertRecipe, layers: int) -> LoraConfig:
    """Give the configuration of an adapter.

    Args:
        recipe: How the expert is trained.
        layers: The number of decoder layers of the base model.

    Returns:
        LoRA of rank 8 on all projections, in the layers that the recipe names.
    """
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=8,
        lora_alpha=16,
        target_modules=TARGETS,
        layers_to_transform=list(range(recipe.first_layer, layers)) if recipe.first_layer else None,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Give the share of the full learning rate: a linear warm-up, then half a cosine down to zero.

    Args:
        step: The current step, from 0.
        steps: The number of all steps.

    Returns:
        A number between 0 and 1.
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def fast_bfloat16() -> bool:
    """Tell whether this processor multiplies matrices in bfloat16, which elsewhere is slower than float32.

    Returns:
        Whether it has AMX or AVX512-BF16.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def read_sequences(path: Path, model: Path) -> torch.Tensor:
    """Read training texts as token sequences of equal length.

    Args:
        path: A file with one JSON object per line, each with a "text".
        model: The folder of the base model with its tokenizer.

    Returns:
        The token ids of all texts in a row, folded into rows of `SEQUENCE_TOKENS`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    token_ids = torch.tensor([token for row in tokenizer(texts).input_ids for token in row])
    count = len(token_ids) // SEQUENCE_TOKENS
    return token_ids[: count * SEQUENCE_TOKENS].view(count, SEQUENCE_TOKENS)


def train_expert(
    base: PreTrainedModel, sequences: torch.Tensor, target: Path, recipe: ExpertRecipe, countdown: Countdown
) -> None:
    """Train one expert and save it as an ordinary PEFT adapter; the base model is afterwards as it was.

    Args:
        base: The base model. In bfloat16, the products with its weights are too; the expert is float32.
        sequences: The training texts of the expert's domain, from `read_sequences`.
        target: The adapter folder to create.
        recipe: How to train.
        countdown: What shows the steps.
    """
    torch.manual_seed(SEED)
    expert = get_peft_model(base, lora(recipe, base.config.num_hidden_layers)).train()
    weights = [weight for weight in expert.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe.steps))
    order = torch.randperm(len(sequences))
    for step in range(recipe.steps):
        # Beyond the last text, the order starts again from the first.
        rows = order[torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size) % len(order)]
        batch = sequences[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            loss = expert(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        countdown.advance(1, f"expert {target.name:<9}  step {step + 1:2}/{recipe.steps}  loss {loss.item():.3f}")
    with building(target) as partial:
        expert.save_pretrained(str(partial))
    expert.unload()


def ensure_experts(
    folder: Path, model: Path, data: Path, domains: list[str], recipe: ExpertRecipe, dtype: torch.dtype
) -> None:
    """Train the expert of each domain, unless already there.

    Args:
        folder: The folder which receives one adapter folder per domain.
        model: The folder of the base model.
        data: The folder of the training texts, `DOMAIN.jsonl` each.
        domains: The names of the domains.
        recipe: How to train each of them.
        dtype: What to compute in, `torch.float32` or `torch.bfloat16`.
    """
    missing = [domain for domain in domains if not (folder / domain).exists()]
    if not missing:
        return
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with Countdown(len(missing) * recipe.steps, "experts") as countdown:
        for domain in missing:
            sequences = read_sequences(data / f"{domain}.jsonl", model)
            train_expert(base, sequences, folder / domain, recipe, countdown)

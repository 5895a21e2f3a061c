"""One LoRA expert per domain, trained with plain PEFT and PyTorch as anyone might have done elsewhere."""

import copy
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from stage import building

SEED = 3
SEQUENCE_TOKENS = 256
BATCH_SIZE = 2
LEARNING_RATE = 2e-3
WARMUP_STEPS = 4
LORA = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)


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


def train_expert(model: Path, data: Path, target: Path, steps: int, progress: Progress) -> None:
    """Train one expert and save it as an ordinary PEFT adapter.

    Args:
        model: The folder of the base model.
        data: The training texts of the expert's domain.
        target: The adapter folder to create.
        steps: The number of training steps.
        progress: The display to which a bar is added.
    """
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expert = get_peft_model(base, copy.deepcopy(LORA)).train()
    weights = [weight for weight in expert.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    sequences = read_sequences(data, model)
    order = torch.randperm(len(sequences))

    bar = progress.add_task(f"expert {target.name}", total=steps, loss=math.nan)
    for step in range(steps):
        # Beyond the last text, the order starts again from the first.
        rows = order[torch.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(order)]
        batch = sequences[rows]
        loss = expert(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, loss=loss.item())
    with building(target) as partial:
        expert.save_pretrained(str(partial))


def ensure_experts(folder: Path, model: Path, data: Path, domains: list[str], steps: int) -> None:
    """Train the expert of each domain, unless already there.

    Args:
        folder: The folder which receives one adapter folder per domain.
        model: The folder of the base model.
        data: The folder of the training texts, `DOMAIN.jsonl` each.
        domains: The names of the domains.
        steps: The number of training steps per expert.
    """
    # The loading bars of Transformers would tear the display below.
    disable_progress_bar()
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for domain in domains:
            if not (folder / domain).exists():
                train_expert(model, data / f"{domain}.jsonl", folder / domain, steps, progress)

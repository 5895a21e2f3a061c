"""Train a mixture in a plain PyTorch loop, with the gate's losses and metrics.

python examples/train_with_a_loop.py --base my-model --adapters code=adapters/code law=adapters/law --data mixed.jsonl
"""

import argparse
import json

import torch
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

import weft


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", nargs="+", required=True, help="name=FOLDER ...")
    parser.add_argument("--data", required=True, help='.jsonl with "text" and "expert" (a name, or null) in each line')
    parser.add_argument("--output", default="my-mixture")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-steps", type=int, default=10)
    options = parser.parse_args(argv)

    adapters = dict(value.split("=", 1) for value in options.adapters)
    losses = {"balance_loss_weight": 0.01, "expert_label_loss_weight": 0.1}
    model = weft.from_adapters(options.base, adapters, **losses)
    tokenizer, experts = AutoTokenizer.from_pretrained(options.base), list(adapters)
    with open(options.data) as file:
        rows = [json.loads(line) for line in file]

    def collate(batch):
        inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels = [experts.index(row["expert"]) if row["expert"] else -100 for row in batch]
        return {**inputs, "expert_labels": torch.tensor(labels)}

    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    model.train()
    model.gate_metrics.enabled = True
    step = 0
    while step < options.steps:
        for batch in loader:
            loss = model(**batch).loss  # the language model's and the gate's
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % options.log_steps == 0:
                print(json.dumps({"step": step, "loss": loss.item(), **model.gate_metrics.read()}))
            if step == options.steps:
                break
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()

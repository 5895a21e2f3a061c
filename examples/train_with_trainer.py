"""Train a mixture with transformers' Trainer: evaluation, the best checkpoint, an early stop, TensorBoard.

python examples/train_with_trainer.py --base my-model --adapters code=adapters/code law=adapters/law --data mixed.jsonl
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, EarlyStoppingCallback, Trainer, TrainingArguments

import weft


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", nargs="+", required=True, help="name=FOLDER ...")
    parser.add_argument("--data", required=True, help='.jsonl with "text" and "expert" (a name, or null) in each line')
    parser.add_argument("--output", default="my-mixture")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-steps", type=int, default=50)
    options = parser.parse_args(argv)
    adapters = dict(value.split("=") for value in options.adapters)
    model = weft.from_adapters(options.base, adapters, balance_loss_weight=0.01, expert_label_loss_weight=0.1)
    tokenizer, experts = AutoTokenizer.from_pretrained(options.base), list(adapters)

    def prepare(row):
        ids = tokenizer(row["text"], truncation=True, max_length=512)["input_ids"]
        label = experts.index(row["expert"]) if row["expert"] else -100
        return {"input_ids": ids, "labels": ids, "expert_labels": label}

    rows = load_dataset("json", data_files=options.data, split="train")
    parts = rows.map(prepare, remove_columns=rows.column_names).train_test_split(test_size=0.1, seed=0)
    arguments = TrainingArguments(
        output_dir=options.output + "/checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_steps=options.eval_steps,  # so that the best one can be loaded
        load_best_model_at_end=True,
        logging_steps=10,
        report_to="tensorboard",
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # keeps expert_labels
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(model, arguments, collator, parts["train"], parts["test"], callbacks=[EarlyStoppingCallback(3)])
    weft.GateCallback.attach(trainer)
    trainer.train()
    model.save_pretrained(options.output)
    return trainer


if __name__ == "__main__":
    main()

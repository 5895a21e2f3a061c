"""Train a mixture with TRL's SFTTrainer.

python examples/train_with_trl.py --base my-model --adapters code=adapters/code law=adapters/law --data mixed.jsonl
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import weft


class WithExpertLabels(DataCollatorForLanguageModeling):
    """TRL's collator, which drops other columns, but for the number of each example's expert."""

    def torch_call(self, examples):
        labels = torch.tensor([example["expert_labels"] for example in examples])
        return {**super().torch_call(examples), "expert_labels": labels}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", nargs="+", required=True, help="name=FOLDER ...")
    parser.add_argument("--data", required=True, help='.jsonl with "text" and "expert" (a name, or null) in each line')
    parser.add_argument("--output", default="my-mixture")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    adapters = dict(value.split("=", 1) for value in options.adapters)
    model = weft.from_adapters(options.base, adapters, balance_loss_weight=0.01, expert_label_loss_weight=0.1)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    experts = list(adapters)
    rows = load_dataset("json", data_files=options.data, split="train")
    rows = rows.map(lambda row: {"expert_labels": experts.index(row["expert"]) if row["expert"] else -100})
    arguments = SFTConfig(
        output_dir=options.output + "/checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_length=512,
        logging_steps=10,
        bf16=torch.cuda.is_available(),  # TRL asks for it unless told otherwise
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        remove_unused_columns=False,  # keeps expert_labels
    )
    data = {"train_dataset": rows, "data_collator": WithExpertLabels(tokenizer.pad_token_id)}
    trainer = SFTTrainer(model, arguments, processing_class=tokenizer, callbacks=[weft.GateCallback()], **data)
    trainer.train()
    model.save_pretrained(options.output)
    return trainer


if __name__ == "__main__":
    main()

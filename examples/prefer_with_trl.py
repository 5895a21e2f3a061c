"""Train a mixture on preferences (DPO) with TRL, against a frozen copy of itself.

python examples/prefer_with_trl.py --mixture my-mixture --data preferences.jsonl --output my-preferred-mixture
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import weft


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixture", required=True, help="a trained mixture, by weft train or TRL's SFTTrainer")
    parser.add_argument("--data", required=True, help='.jsonl with "prompt", "chosen" and "rejected" in each line')
    parser.add_argument("--output", default="my-preferred-mixture")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    model = weft.from_pretrained(options.mixture, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    arguments = DPOConfig(
        output_dir=options.output + "/checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_length=512,
        logging_steps=10,
        bf16=torch.cuda.is_available(),  # TRL asks for it unless told otherwise
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    # The reference is a copy of the mixture as it is now, which the trainer adds as its adapter "ref".
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(options.output)
    return trainer


if __name__ == "__main__":
    main()

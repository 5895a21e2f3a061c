"""A mixture in lm-evaluation-harness, with a task from a file and data from a file; nothing is downloaded.

    pip install "weft[harness]"
    python examples/harness.py --model my-mixture --data questions.jsonl

The model is an ordinary `PeftModel`, which the harness' `HFLM` takes as it is: any of its own tasks runs as well.
"""

import argparse
import json
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import weft

TASK = Path(__file__).with_name("harness_task.yaml")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained mixture")
    parser.add_argument("--data", required=True, help='.jsonl with "question", "choices" and "answer" (from 0)')
    parser.add_argument("--task", default=str(TASK), help="a task of the harness, as YAML")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args(argv)

    model = weft.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)

    task = yaml.safe_load(Path(arguments.task).read_text())
    task["dataset_kwargs"] = {"data_files": {"test": arguments.data}}
    results = simple_evaluate(harness, tasks=[task], bootstrap_iters=0)["results"][task["task"]]
    print(json.dumps({name: value for name, value in results.items() if isinstance(value, float)}))
    return results


if __name__ == "__main__":
    main()

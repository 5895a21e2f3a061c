"""A training in one and in two processes, of the same batch together."""

import json

import pytest


@pytest.fixture
def data(tmp_path):
    # 21 sequences of at most 32 tokens: neither 4 nor 8 divide them.
    rows = [{"text": f"the quick brown fox {i} " * (1 + i % 3)} for i in range(11)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def options(base_folder, base_adapters, data, tmp_path):
    """`weft train` as a function of the output folder, the number of processes and further options."""

    def build(name, processes, *more):
        adapters = [f"{expert}={path}" for expert, path in base_adapters.items()]
        return [
            *("train", "--base", str(base_folder), "--adapters", *adapters, "--data", str(data)),
            *("--output", str(tmp_path / name), "--batch-size", str(4 // processes)),
            *("--gradient-accumulation-steps", "2"),
            *("--epochs", "2", "--save-steps", "3", "--sequence-length", "32", "--learning-rate", "0.05"),
            # Models in shards start so. Each process draws a dropout of its own.
            *("--gate-start", "random", "--xlora-dropout-p", "0"),
            *more,
        ]

    return build

"""What a training says of its options before it loads anything."""

from weft.cli import main
from weft.options import TrainOptions
from weft.train.checks import doubts


def test_options_without_effect_are_named():
    options = TrainOptions(cache_dtype="bfloat16", expert_rank=4, expert_steps=3, xlora_depth=1, xlora_size=8)
    assert doubts(options) == [
        "cache_dtype ('bfloat16') has no effect without cache_scaling_pass",
        "expert_rank (4) has no effect without experts_from",
        "expert_steps (3) has no effect without experts_from",
        "xlora_size (8) has no effect without an xlora_depth of 2 or more",
    ]
    options = TrainOptions(cache_dtype="bfloat16", cache_scaling_pass=True, xlora_size=8, expert_rank=4)
    options.experts_from = ["code=a.jsonl"]
    assert doubts(options) == []


def test_one_adapter_under_two_names_is_named(tmp_path):
    adapters = {"code": str(tmp_path), "law": str(tmp_path / "law"), "same": f"{tmp_path}/law/../"}
    (tmp_path / "law").mkdir()
    assert doubts(TrainOptions(adapters=adapters)) == [
        f"adapters code and same are the same ({tmp_path}/law/../): the gate cannot choose between them"
    ]


def test_they_are_said_and_the_training_goes_on(base_folder, base_adapters, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the quick brown fox")
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]
    fixed = [
        "train",
        "--base",
        str(base_folder),
        "--adapters",
        *adapters,
        "--data",
        str(tmp_path / "a.txt"),
        "--max-steps",
        "1",
    ]
    assert main([*fixed, "--output", str(tmp_path / "out"), "--expert-rank", "4"]) == 0
    assert "expert_rank (4) has no effect without experts_from\n" in capsys.readouterr().out

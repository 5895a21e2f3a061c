import json
from weft.cli import main


def test_all(tmp_path, base_folder, base_adapters, capsys):
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": "hello world " * 5}) for _ in range(8)))
    ad = [f"{k}={v}" for k, v in base_adapters.items()]
    assert (
        main(
            [
                "train",
                "--base",
                str(base_folder),
                "--adapters",
                *ad,
                "--data",
                str(data),
                "--output",
                str(tmp_path / "o"),
                "--max-steps",
                "3",
                "--sequence-length",
                "16",
            ]
        )
        == 0
    )
    assert main(["eval", str(tmp_path / "o"), "--data", f"x={data}", "--sequence-length", "16"]) == 0
    assert main(["generate", str(tmp_path / "o"), "--prompt", "hello", "--max-new-tokens", "3"]) == 0
    print(capsys.readouterr())

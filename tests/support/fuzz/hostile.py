"""Values that no option, key or row should have."""

from __future__ import annotations

import json

DEEP = "[" * 100_000 + "]" * 100_000
# Written into JSON as they stand, as json.dumps would not write them.
RAW = [DEEP, "[" * 70 + "]" * 70, "9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "NaN", "Infinity", "-Infinity"]
RAW += ['"\\ud83d"', '"hello \\udc00"', '"' + "x" * 5000 + '"', "{", "", "tru", "'single'", "[1, 2", "\ufeff{}"]
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 10**4, 10**8, 10**9, 2**31, 2**63, -(2**63), 10**30]
VALUES += [0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, -1.5, float("nan"), float("inf"), "", " ", "a", "0", "1", "true", "null"]
VALUES += [
    "math",
    "code",
    "default",
    "LORA",
    "XLORA",
    "IA3",
    "CAUSAL_LM",
    "all",
    "all-linear",
    "none",
    "forward",
    "keys",
]
VALUES += [
    "..",
    "../..",
    "../outside",
    "/",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "~",
    "~nobody-at-all/x",
    ".",
    "C:\\x",
    "\x00",
]
VALUES += [
    "(",
    "(a+",
    "[",
    "*",
    "(?P<a>x)(?P<a>y)",
    "\\",
    "a{99999999999}",
    "\u202e",
    "\x1b[2J",
    "é",
    "漢字",
    "x" * 300,
]
VALUES += [[], {}, [[]], [{}], {"": ""}, [None], [1, 2], ["a", "b"], ["a", 1], {"a": 1}, {"a": {"a": {}}}, {"a": "b"}]
VALUES += [
    {"math": "x"},
    {"math": 5},
    {"math": None},
    {"math": ["x"]},
    {"math": "../outside"},
    [10**9],
    {"q_proj": 10**9},
]
VALUES += [["math", "math"], ["math", "../x"], [0.5], [True], "x" * 5000, ["x"] * 1000, {"q_proj": "4"}, {"(": 4}]
KEYS = [
    "",
    "extra",
    "r",
    "adapters",
    "auto_map",
    "auto_mapping",
    "peft_type",
    "hidden_size",
    "x" * 300,
    "é",
    "__class__",
]
KEYS += [
    "expert_names",
    "layer_names",
    "runtime_config",
    "megatron_config",
    "loftq_config",
    "use_dora",
    "base_model_id",
]
BYTES = [
    b"",
    b"\x00",
    b"\xff\xfe{}",
    b"{}",
    b"[]",
    b"null",
    b"\xef\xbb\xbf{}",
    b"PK\x03\x04",
    b"\x80\x04\x95",
    b"{" * 50,
]
BYTES += [b"\xff" * 16, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"caf\xe9\n", json.dumps({"a": "\ud83d"}).encode()]
TEXTS = [
    "",
    " ",
    "\n",
    "\x00",
    "\ud83d",
    "hello \ud83d",
    "\udcff",
    "a" * 10_000,
    "\u202e\u2066",
    "\x1b]0;x\x07",
    "[" * 3000,
]
TEXTS += [
    "{" * 200,
    "&a [*a]",
    "*x",
    "!!python/object/apply:os.system ['true']",
    "- a\n- b",
    "%",
    "é\u0301",
    "👍🏽",
    "\ufeffx",
]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 400,
    "9" * 20,
    "0x10",
    "1_000",
    "",
    "null",
    "[1]",
    "1.5",
]

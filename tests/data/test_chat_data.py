"""Conversations as data: their tokens are transformers' in every command, and the assistant's alone may count."""

import dataclasses
import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy

import weft
from models import lora, quietly, save_adapter, tiny_llama, tiny_tokenizer
from weft.cli import main
from weft.cli.chat import Conversation
from weft.data.chat_template import assistant_mask, conversation_tokens
from weft.data.labelled import training_rows
from weft.data.packing import packed_rows
from weft.data.texts import prompt_tokens, read_tokens, row_tokens
from weft.errors import ConfigError, DataError
from weft.evaluate.data_sets import read_data_set
from weft.evaluate.scoring import Runner, score
from weft.model.model import at_own_weight
from weft.options import ChatOptions, TrainOptions
from weft.train.experts import train_experts
from weft.train.gate import read_eval_rows, read_training_rows, train
from weft.train.gate_targets import posterior, states_of, targets_of

CHAT = [
    {"role": "user", "content": " What is it? "},
    {"role": "assistant", "content": "A fox.\n"},
    {"role": "user", "content": "How quick?"},
    {"role": "assistant", "content": "Very quick indeed."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = [
    {"role": "user", "content": "Look!"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "name": "look", "content": "a fox"},
    {"role": "assistant", "content": "A fox."},
]
THOUGHT = [{**m, "content": f"<think>hm</think>{m['content']}"} if m in CHAT[1::2] else m for m in CHAT]

# As the models of these names have them; the markers are in none of the originals.
TEMPLATES = {
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|head|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}",
    "no beginning": "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}"
    "{% if style is defined %}{{ style + '\n' }}{% endif %}{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] or m['tool_calls'] | tojson }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}",
    # Its last answer begins with what earlier ones have no more.
    "qwen 3": "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1] }}"
    "<|end|>\n{% endgeneration %}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}",
    "phi 3": "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>\n' }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}",
    "plain": "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}\n{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


def without_markers(template):
    return re.sub(r"\{% (end)?generation %\}", "", template)


def chat_tokenizer(template, *, added="<s> $A", markers=False):
    """A tokenizer that puts its own tokens around texts, as `added` says, with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": ["<|head|>", "<|/head|>", "<|end|>"]}
    )
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=special)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    if not markers:
        tokenizer.chat_template = without_markers(tokenizer.chat_template)
    return tokenizer


def expected(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="chat.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with Llama 3's way to begin, and two adapters that are one: whatever the gate says, the model is known."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer("llama 3")
    quietly(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained, folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    save_adapter(base, lora(), folder / "one", seed=1)
    return folder


@pytest.fixture
def options(folders, tmp_path, write):
    return TrainOptions(
        base=str(folders / "base"),
        adapters={"math": str(folders / "one"), "code": str(folders / "one")},
        data=[write({"messages": CHAT}, {"messages": CALL[2:] + CHAT[:2]}, {"messages": SYSTEM})],
        output=str(tmp_path / "out"),
        max_steps=1,
        logging_steps=1,
        learning_rate=1e-9,
        gate_start="random",
    )


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("added", ["<s> $A", "<s> $A <eos>", "$A <eos>", "$A"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversations_tokens_are_transformers_wherever_it_is_read(template, added, write):
    tokenizer = chat_tokenizer(template, added=added)
    wanted = expected(tokenizer, CHAT)
    assert (wanted[0] == tokenizer.bos_token_id) == ("bos_token" in TEMPLATES[template])
    assert tokenizer.bos_token_id not in wanted[1:]
    file = write({"messages": CHAT})
    assert read_tokens(file, tokenizer) == [wanted]
    for labelled in (False, True):
        [row] = training_rows([f"math={file}"], ["math"], tokenizer, 512, labelled=labelled)
        assert row["input_ids"] == row["labels"] == wanted
    data = read_data_set("chat", file, tokenizer, ["math"], sequence_length=512)
    assert data.examples[0].tokens == wanted


def test_every_command_and_function_reads_the_same_tokens(folders, options, write):
    tokenizer = chat_tokenizer("llama 3")
    model = weft.from_adapters(options.base, options.adapters).eval()
    file = write({"messages": CHAT}, {"messages": SYSTEM})
    wanted = [expected(tokenizer, CHAT), expected(tokenizer, SYSTEM)]
    both = dataclasses.replace(options, data=[file], eval_data=[file])
    for read in (read_training_rows, read_eval_rows):
        assert [row["input_ids"] for row in read(both, ["math"], tokenizer)] == wanted
    traced = weft.trace_data(model, {"chat": file}, tokenizer=tokenizer)
    assert traced.token_ids.tolist() == [token for tokens in wanted for token in tokens]
    seen = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    conversation = Conversation(model, tokenizer, ChatOptions("mixture", max_new_tokens=1))
    list(conversation.reply("Hi"))
    assert seen[-1] == expected(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)


def test_texts_keep_what_their_tokenizer_puts_around_them(write):
    tokenizer = chat_tokenizer("llama 3", added="<s> $A <eos>")
    [tokens] = read_tokens(write({"text": "a fox"}), tokenizer)
    assert tokens == tokenizer("a fox").input_ids
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert read_tokens(write({"text": " \n"}, {"text": "a fox"}), tokenizer) == [tokens]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_and_options_reach_the_template(tools):
    tokenizer = chat_tokenizer("no beginning")
    row = {"messages": CALL, "tools": tools, "chat_template_kwargs": {"style": "short", "other": None}}
    tokens = row_tokens(row, "here", tokenizer)
    assert tokens == expected(tokenizer, CALL, tools=TOOLS, style="short")
    assert "look" in tokenizer.decode(tokens).partition("\n")[0]
    none = {"messages": CALL, "tools": [], "chat_template_kwargs": None}
    assert row_tokens(none, "here", tokenizer) == expected(tokenizer, CALL)


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]},
    {"role": "assistant", "content": "A fox."},
]
KNOWS_PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}\n{% endfor %}"
)


def test_contents_in_parts_are_read_by_templates_that_know_them():
    tokenizer = chat_tokenizer(KNOWS_PARTS)
    assert row_tokens({"messages": PARTS}, "here", tokenizer) == expected(tokenizer, PARTS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] if m['content'] is string else '' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}",
    ],
    ids=["printed", "printed as JSON", "left out", "the first alone"],
)
def test_contents_in_parts_that_a_template_does_not_know_are_refused(template):
    with pytest.raises(
        DataError, match='here: message 1 has a list of parts as its "content", which the chat template does not know'
    ):
        row_tokens({"messages": PARTS}, "here", chat_tokenizer(template))


def test_what_a_tool_answers_may_be_a_list():
    messages = [CALL[0], {"role": "tool", "content": [{"fox": 1}]}]
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}")
    assert row_tokens({"messages": messages}, "here", tokenizer) == expected(tokenizer, messages)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ["Hi"]}, r'''message 1 \('Hi'\) must be an object with "role" and "content"'''),
        ({"messages": [CHAT]}, r'message 1 \(\[.*must be an object with "role" and "content"'),
        (
            {"messages": [{"from": "human", "value": "Hi"}]},
            r"message 1 \(\{'from': 'human', 'value': 'Hi'\}\) must be an",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
            'message 2 .* has no "content", expected a s',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"message 1 has the part \{'type': 'image'\}, exp",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, r"message 1 has the part 'Hi', expected"),
        ({"messages": []}, "the chat template refuses its messages: "),
        ({"messages": CHAT[1:]}, "the chat template refuses its messages: roles must alternate"),
        ({"messages": CHAT, "tools": "{"}, r""""tools" \('\{'\) is no valid JSON"""),
        ({"messages": CHAT, "tools": {"a": 1}}, r""""tools" \(\{'a': 1\}\) must be a list of JSON schemas"""),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, r'"chat_template_kwargs" \(\[1\]\) must be an object'),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:2]},
            r"found the keys \['completion', 'prompt'\], expected an object with \"text\" \(a string\) or \"messages\"",
        ),
    ],
)
def test_rows_that_are_no_conversation_are_named(row, message, write):
    file = write({"messages": CHAT}, row)
    with pytest.raises(DataError, match=rf"{re.escape(file)}, line 2: {message}"):
        read_tokens(file, chat_tokenizer("gemma"))


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("added", ["<s> $A", "<s> $A <eos>", "$A <eos>", "<s> <eos> $A"])
def test_a_prompt_has_nothing_behind_it(added):
    tokenizer = chat_tokenizer("llama 3", added=added)
    beginning = added.partition("$A")[0].split()
    wanted = [*tokenizer.convert_tokens_to_ids(beginning), *tokenizer("a fox", add_special_tokens=False).input_ids]
    assert prompt_tokens("a fox", tokenizer) == wanted
    written = [*tokenizer.convert_tokens_to_ids(beginning), *tokenizer("a<eos>", add_special_tokens=False).input_ids]
    assert prompt_tokens("a<eos>", tokenizer) == written  # which the user wrote


def test_texts_are_continued_without_the_end_that_a_tokenizer_adds(options):
    model = weft.from_adapters(options.base, options.adapters).eval()
    ends, plain = chat_tokenizer("llama 3", added="<s> $A <eos>"), chat_tokenizer("llama 3")
    found, wanted = (
        weft.generate(model, "a fox", tokenizer=tokenizer, max_new_tokens=4) for tokenizer in (ends, plain)
    )
    assert found == wanted
    traced = weft.trace_generation(model, "a fox", tokenizer=ends, max_new_tokens=4)
    assert traced.token_ids.tolist() == [*plain("a fox").input_ids, *wanted.tokens]


def test_questions_are_read_without_the_end_that_a_tokenizer_adds(write):
    rows = {"question": "a fox", "choices": ["is", "was quick"], "answer": 0}
    plain, ends = (
        read_data_set("x", write(rows), chat_tokenizer("llama 3", added=added), [], sequence_length=64)
        for added in ("<s> $A", "<s> $A <eos>")
    )
    assert ends.examples == plain.examples
    prompt = write({"prompt": "a fox", "answer": "is"})
    tokenizer = chat_tokenizer("llama 3", added="<s> $A <eos>")
    data = read_data_set("x", prompt, tokenizer, [], sequence_length=64)
    assert data.examples[0].tokens == tokenizer("a fox").input_ids[:-1]


def test_a_question_in_messages_is_asked_as_a_chat_asks_it(write):
    tokenizer = chat_tokenizer("no beginning")
    row = {"prompt": CALL[:3], "tools": TOOLS, "answer": "a fox"}
    data = read_data_set("x", write(row), tokenizer, [], sequence_length=512)
    assert data.metric == "exact_match"
    assert data.examples[0].tokens == expected(tokenizer, CALL[:3], tools=TOOLS, add_generation_prompt=True)
    with pytest.raises(DataError, match="line 1: the prompt ends with a turn of the assistant, expected one to be a"):
        read_data_set("x", write({**row, "prompt": CHAT}), tokenizer, [], sequence_length=512)
    with pytest.raises(DataError, match=r'line 1: message 1 .* must be an object with "role"'):
        read_data_set("x", write({**row, "prompt": ["Hi"]}), tokenizer, [], sequence_length=512)


def test_an_answer_ends_where_the_tokenizer_ends_a_message(write):
    tokenizer = chat_tokenizer("llama 3")
    tokenizer.eos_token = "<|end|>"
    a, end = tokenizer.convert_tokens_to_ids(["a", "<|end|>"])
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None

    def after_each_a_the_end(module, args, logits):  # and an "a" after each end
        ids = seen[-1][:, -logits.shape[1] :]
        forced = torch.where(ids == a, end, a)
        return torch.zeros_like(logits).scatter(-1, forced[..., None], 1.0)

    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(after_each_a_the_end)
    data = read_data_set("x", write({"prompt": CHAT[:1], "answer": "a"}), tokenizer, [], sequence_length=512)
    assert score(Runner(model, tokenizer), data) == [(1.0, 1.0)]


# ---------------------------------------------------------------------- the assistant's tokens


@pytest.mark.parametrize(
    "messages", [CHAT, SYSTEM, CHAT[:1], CALL, THOUGHT], ids=["two turns", "system", "none", "tools", "reasoning"]
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistants_tokens_are_those_between_the_markers_with_markers_or_without(template, messages):
    marked, plain = chat_tokenizer(template, markers=True), chat_tokenizer(template)
    try:
        encoded = marked.apply_chat_template(messages, return_assistant_tokens_mask=True)
    except Exception:
        pytest.skip("this template has no such turns")
    for tokenizer in (marked, plain):
        mask = assistant_mask(tokenizer, messages)
        assert mask == [bool(one) for one in encoded["assistant_masks"]]
        assert len(mask) == len(conversation_tokens(tokenizer, messages))
    text = plain.decode([token for token, own in zip(encoded["input_ids"], mask, strict=True) if own])
    assert ("fox" in text) == (messages is not CHAT[:1] and len(messages) > 1)
    assert "quick?" not in text


def test_a_token_that_begins_before_a_turn_and_ends_in_it_is_the_assistants():
    from tokenizers.models import BPE

    tokenizer = chat_tokenizer("plain")
    vocabulary = tokenizer.get_vocab()
    vocabulary = {token: number for token, number in vocabulary.items() if not token.startswith("<")} | {
        "<pad>": 0,
        "<eos>": 1,
        "ĠA": len(vocabulary),
    }
    tokenizer.backend_tokenizer.model = BPE(vocabulary, [("Ġ", "A")])
    messages = CHAT[2:3] + CHAT[1:2]
    marked = chat_tokenizer("plain", markers=True)
    marked.backend_tokenizer.model = BPE(vocabulary, [("Ġ", "A")])
    mask = assistant_mask(tokenizer, messages)
    assert mask == assistant_mask(marked, messages)
    tokens = conversation_tokens(tokenizer, messages)
    own = tokenizer.convert_ids_to_tokens([token for token, own in zip(tokens, mask, strict=True) if own])
    assert own[0] == "ĠA"


UNTOLD = "cannot tell which tokens are the assistant's"
NO_TOKENS = "needs tokens of the assistant's, and the chat template gives none in this conversation"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else m['content'][:5] }}"
            "\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            CHAT,
            f"{UNTOLD}: the chat template changes message 2, or the text before it, when the conversation continues; "
            r"put \{% generation %\} and \{% endgeneration %\} around what the assistant writes, in the base model's "
            "chat_template.jinja",
        ),
        (
            # As some of Mistral's, which put the system's message into the last turn of the user.
            "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 >= messages | length - 2 %}"
            "short {% endif %}{{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
            CHAT,
            f"{UNTOLD}: the chat template changes message 2, or the text before it, when",
        ),
        (
            "llama 3",
            CHAT[1:],
            rf"{UNTOLD} where its turn is the first: put \{{% generation %\}} and .* in the base model's "
            "chat_template.jinja, or let another turn be the first",
        ),
        (
            "llama 3",
            CHAT[:1],
            rf"{NO_TOKENS} \(user\): leave it out",
        ),
        (
            "{{ messages[0]['content'] }}{% generation %}{% endgeneration %}",
            CHAT[:2],
            rf"{NO_TOKENS} \(user, assistant\): leave it out",
        ),
    ],
    ids=["changes answers", "changes questions", "first turn", "no turn", "no token"],
)
def test_conversations_whose_assistants_tokens_cannot_be_told_are_named(template, messages, message, write):
    file = write({"messages": messages})
    tokenizer = chat_tokenizer(template, markers="endgeneration" in template)
    assert training_rows([file], [], tokenizer, 512, labelled=False)
    with pytest.raises(DataError, match=rf"{re.escape(file)}, line 1: assistant_only_loss \(True\) {message}"):
        training_rows([file], [], tokenizer, 512, labelled=False, assistant_only_loss=True)


def test_a_tokenizer_that_does_not_know_its_tokens_places_is_refused(write, monkeypatch):
    tokenizer = chat_tokenizer("llama 3")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    file = write({"messages": CHAT})
    with pytest.raises(
        DataError, match=r"line 1: assistant_only_loss \(True\) needs a tokenizer that knows its tokens' "
    ):
        training_rows([file], [], tokenizer, 512, labelled=False, assistant_only_loss=True)


def test_texts_have_no_assistant(options, write, tmp_path, capsys):
    file = write({"messages": CHAT}, {"text": "a fox"}, name="texts.jsonl")
    message = (
        f'{file}, line 2: has "text", in which no turn is the assistant\'s: assistant_only_loss (True) needs rows with '
        '"messages"'
    )
    adapters = [f"{name}={folder}" for name, folder in options.adapters.items()]
    arguments = ["train", "--base", options.base, "--adapters", *adapters, "--output", str(tmp_path / "out")]
    for data in (["--data", file], ["--data", options.data[0], "--eval-data", file]):
        assert main([*arguments, *data, "--assistant-only-loss"]) == 1
        assert message in capsys.readouterr().err
    assert main([*arguments[:3], *arguments[-2:], "--experts-from", f"a={file}", f"b={file}", "--assistant-only-loss"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-experts").exists()


@pytest.mark.parametrize("length", [2, 7, 16, 512])
@pytest.mark.parametrize("labelled", [False, True])
def test_labels_are_cut_with_their_tokens_and_pieces_without_any_are_dropped(length, labelled, write):
    tokenizer = chat_tokenizer("llama 3")
    file = write({"messages": SYSTEM, "expert": "math"}, {"messages": CHAT})
    options = {"labelled": labelled, "assistant_only_loss": True}
    found = training_rows([file], ["code", "math"], tokenizer, length, **options)
    wanted = []
    for messages, expert in ((SYSTEM, 1), (CHAT, -100)):
        tokens, mask = expected(tokenizer, messages), assistant_mask(tokenizer, messages)
        # Each piece begins with <s>, as the conversation does.
        for start in range(1, len(tokens), length - 1):
            piece = [tokens[0], *tokens[start : start + length - 1]]
            own = [False, *mask[start : start + length - 1]]
            if any(own[1:]):
                labels = [token if counts else -100 for token, counts in zip(piece, own, strict=True)]
                wanted.append({"input_ids": piece, "labels": labels, "expert_labels": [expert] * len(piece)})
    if not labelled:
        wanted = [{name: row[name] for name in ("input_ids", "labels")} for row in wanted]
    assert len({row.pop("place") for row in found}) == 2
    assert found == wanted
    if length < 512:
        assert len(found) < len(training_rows([file], [], tokenizer, length, labelled=False))


def test_data_whose_assistants_tokens_are_all_cut_away_is_an_error(write):
    # Two characters for each turn: every second token is the assistant's, and the first of its piece.
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    file = write({"messages": messages})
    with pytest.raises(
        DataError, match="holds no text of two tokens or more, with one of the assistant's after the first"
    ):
        training_rows([file], [], tokenizer, 2, labelled=False, assistant_only_loss=True)


# ---------------------------------------------------------------------- training


def loss_by_hand(model, rows):
    """The mean over the assistant's tokens, one conversation after the other."""
    losses = []
    for tokens, mask in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        of_tokens = cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        losses.append(of_tokens[torch.tensor(mask[1:])])
    assert min(map(len, losses)) > 0
    return float(torch.cat(losses).mean())


def conversations(options, length=512):
    """Pieces of tokens of the options' data, and which are the assistant's by the marked template."""
    marked = chat_tokenizer("llama 3", markers=True)
    for line in Path(options.data[0]).read_text().splitlines():
        encoded = marked.apply_chat_template(json.loads(line)["messages"], return_assistant_tokens_mask=True)
        first, *tokens = encoded["input_ids"]  # <s>, with which each piece begins
        for start in range(0, len(tokens), length - 1):
            piece = slice(start, start + length - 1)
            own = [False, *(one == 1 for one in encoded["assistant_masks"][1:][piece])]
            if any(own):
                yield [first, *tokens[piece]], own


def log_of(folder):
    state = json.loads((folder / "checkpoints/checkpoint-1/trainer_state.json").read_text())
    return {name: value for entry in state["log_history"] for name, value in entry.items()}, state


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sequence_length": 24, "batch_size": 64},
        {"packing": True},
        {"packing": True, "sequence_length": 300},
        {"batch_size": 1, "gradient_accumulation_steps": 3},
        {"cache_scaling_pass": True},
        {"gate_start": "losses"},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_assistants_tokens_alone(options, folders, more, tmp_path):
    options = dataclasses.replace(options, assistant_only_loss=True, eval_data=options.data, save_steps=1, **more)
    train(options)
    log, state = log_of(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "base")
    model = peft.PeftModel.from_pretrained(base, folders / "one").eval()
    rows = list(conversations(options, options.sequence_length))
    by_hand = loss_by_hand(model, rows)
    assert log["loss"] == pytest.approx(by_hand, abs=1e-4)
    assert by_hand != pytest.approx(loss_by_hand(model, [(t, [True] * len(t)) for t, _ in rows]), abs=1e-2)
    if options.batch_size > 1:  # of several batches the Trainer takes the mean
        assert log["eval_loss"] == pytest.approx(by_hand, abs=1e-4)
    assert state["num_input_tokens_seen"] == sum(sum(mask[1:]) for _, mask in rows)


def test_a_budget_counts_the_assistants_tokens(options, tmp_path):
    whole = sum(sum(mask[1:]) for _, mask in conversations(options))
    budget = {"max_steps": 0, "max_tokens": 2 * whole, "batch_size": 3, "save_steps": 1}
    train(dataclasses.replace(options, assistant_only_loss=True, **budget))
    state = json.loads((tmp_path / "out/checkpoints/checkpoint-2/trainer_state.json").read_text())
    assert (state["max_steps"], state["num_input_tokens_seen"]) == (2, 2 * whole)


def test_experts_learn_from_the_assistants_tokens_alone(options, folders, monkeypatch):
    seen = []
    step = transformers.Trainer.training_step
    monkeypatch.setattr(
        transformers.Trainer, "training_step", lambda *args, **kwargs: seen.append(step(*args, **kwargs)) or seen[-1]
    )
    experts = {"experts_from": [f"fox={options.data[0]}"], "expert_steps": 1, "expert_rank": 2}
    options = dataclasses.replace(options, adapters=[], assistant_only_loss=True, **experts)
    train_experts(options, print)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "base").eval()
    assert len(seen) == 1
    assert float(seen[0]) == pytest.approx(loss_by_hand(base, list(conversations(options))), abs=1e-4)

    with pytest.raises(ConfigError, match=r"assistant_only_loss \(False\) must be what it was trained with \(True\)"):
        train_experts(dataclasses.replace(options, assistant_only_loss=False))


def test_experts_of_before_the_option_are_known_to_have_learned_from_all_tokens(options, tmp_path):
    experts = {"experts_from": [f"fox={options.data[0]}"], "expert_steps": 1, "expert_rank": 2}
    options = dataclasses.replace(options, adapters=[], **experts)
    [folder] = train_experts(options).values()
    record = json.loads((folder / "weft_expert.json").read_text())
    assert record.pop("assistant_only_loss") is False
    (folder / "weft_expert.json").write_text(json.dumps(record))
    train_experts(options)
    with pytest.raises(ConfigError, match=r"assistant_only_loss \(True\) must be what it was trained with \(False\)"):
        train_experts(dataclasses.replace(options, assistant_only_loss=True))


def test_a_packed_row_keeps_what_does_not_count():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8, 9], "labels": [7, -100, 9]}]
    assert packed_rows(rows, 5)[0]["labels"] == [-100, -100, 9, -100, 6]


# ---------------------------------------------------------------------- the gate's start


@pytest.fixture
def apart(llama_adapters):
    """A mixture whose experts are no good but differ, and tokens for it."""
    return weft.from_adapters(tiny_llama(), llama_adapters).eval(), [5, 6, 7, 8, 9, 10, 11, 12]


def read(model, examples):
    """The gate's input and its targets, by the experts' losses."""
    targets = targets_of(model, examples, "losses")
    return states_of(model, examples, targets), [target.shares for target in targets]


def test_tokens_that_do_not_count_say_nothing_of_who_wrote(apart):
    model, told = apart
    every = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        hidden, targets = read(model, [{"input_ids": told, "counts": every}])
        behind = [{"input_ids": [*told, 1, 2, 3], "counts": torch.cat([every, ~every[:3]])}]
        for one, whole in zip(read(model, behind), (hidden, targets), strict=True):
            torch.testing.assert_close(one[0], whole[0][:-1])  # nothing that counts follows the last one
        before = [{"input_ids": told, "counts": torch.tensor([False] * 5 + [True] * 3)}]
        some_hidden, some_targets = read(model, before)
        logits = [_alone(model, name, told)[4:7] for name in model.xlora_config.expert_names]
    torch.testing.assert_close(some_hidden[0], hidden[0][4:])
    losses = torch.stack([cross_entropy(of, torch.tensor(told[5:]), reduction="none") for of in logits], -1)
    expected = posterior(torch.cat([torch.zeros(4, 3), losses])[None].double())[0, 4:].float()
    torch.testing.assert_close(some_targets[0], expected[[0, 1, 2, 2]])
    assert not torch.allclose(some_targets[0], targets[0][4:], atol=1e-3)


def _alone(model, name, tokens):
    with at_own_weight(model, {name: 1.0}):
        return model(input_ids=torch.tensor([tokens])).logits[0]


def test_examples_without_a_token_that_counts_are_left_out_of_a_fit(apart, capsys):
    model, told = apart
    said = []
    some = {"input_ids": told, "labels": [-100, *told[1:]]}
    first_alone = {"input_ids": told, "labels": [told[0], *[-100] * 7]}
    weft.fit_gate(model, [some, first_alone, {"input_ids": told}], announce=said.append)
    assert "the losses of 16 tokens of 2 sequences" in said[0]
    with pytest.raises(DataError, match="by losses: in none of the examples is there a token after the first that cou"):
        weft.fit_gate(model, [first_alone])
    with pytest.raises(DataError, match=r"labels of example 0 have shape \[3\], expected \[8\]: one for each token"):
        weft.fit_gate(model, [{"input_ids": told, "labels": told[:3]}])

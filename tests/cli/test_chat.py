"""`weft chat`: turns read only what is new, and answer as if they had read everything."""

import functools
import io
import re
import shutil
import signal

import pytest
import torch
import transformers

import weft
from models import lora, quietly, save_adapter, tiny_tokenizer
from weft.cli import main
from weft.cli.chat import Conversation, TooLongError
from weft.errors import ConfigError
from weft.options import ChatOptions


@pytest.fixture
def model(base_folder, base_adapters):
    """A mixture that answers in letters, so that an answer's text has the tokens it was made of."""
    model = weft.from_adapters(str(base_folder), base_adapters, layerwise_scalings=True).eval()
    return in_letters(model)


def in_letters(model):
    tokenizer = tiny_tokenizer()
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ").input_ids
    silenced = torch.ones(len(tokenizer), dtype=torch.bool)
    silenced[letters] = False
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.masked_fill(silenced, -torch.inf)
    )
    return model


@pytest.fixture
def reads(model):
    lengths = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def conversation_with(model, tokenizer=None, **options):
    return Conversation(model, tokenizer or tiny_tokenizer(), ChatOptions("mixture", max_new_tokens=6, **options))


def answer(conversation, text):
    return "".join(step.text for step in conversation.reply(text))


def test_a_turn_reads_only_what_is_new_and_answers_as_from_scratch(model, reads):
    conversation = conversation_with(model, system="be brief")
    first = answer(conversation, "hi")
    prompt = "system: be brief\nuser: hi\nassistant: "
    assert reads == [len(prompt), 1, 1, 1, 1, 1]
    reads.clear()
    second = answer(conversation, "and?")
    assert reads[0] == len(f"{first[-1]}\nuser: and?\nassistant: ")  # an answer's last token was never read
    scratch = weft.stream(
        model,
        f"{prompt}{first}\nuser: and?\nassistant: ",
        tokenizer=tiny_tokenizer(),
        max_new_tokens=6,
    )
    assert second == "".join(step.text for step in scratch)
    assert [message["content"] for message in conversation.messages] == ["be brief", "hi", first, "and?", second]


def test_a_template_that_changes_earlier_turns_is_followed(model, reads):
    tokenizer = tiny_tokenizer()
    # As templates do that drop the reasoning of earlier answers.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'][:2] if m['role'] == 'assistant' else m['content'] }}\n"
        "{% endfor %}assistant: "
    )
    conversation = conversation_with(model, tokenizer)
    first = answer(conversation, "hi")
    reads.clear()
    second = answer(conversation, "and?")
    new = "\nuser: and?\nassistant: "
    assert reads[0] == len(new)
    prompt = f"user: hi\nassistant: {first[:2]}{new}"
    scratch = weft.stream(model, prompt, tokenizer=tokenizer, max_new_tokens=6)
    assert second == "".join(step.text for step in scratch)


def test_a_template_that_shortens_the_conversation_is_followed(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    conversation = conversation_with(model, tokenizer)
    answer(conversation, "abcdef")
    found = answer(conversation, "abc")  # all of it is in the cache, and its last token is read again
    assert found == answer(conversation_with(model, tokenizer), "abc")


def test_a_sliding_window_that_cannot_go_back_starts_again(base_folder, tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=4, max_position_embeddings=512, **sizes
    )
    base = transformers.MistralForCausalLM(config).eval()
    options = lora(target_modules=["q_proj"])
    path = save_adapter(transformers.MistralForCausalLM(config), options, tmp_path / "a", seed=1)
    model = in_letters(quietly(weft.from_adapters, base, {"a": path, "b": path}).eval())
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[-1]['content'] }}: "
    conversation = conversation_with(model, tokenizer)
    answer(conversation, "hi")
    expected = weft.stream(model, "hi" + "and?: ", tokenizer=tokenizer, max_new_tokens=6)
    assert answer(conversation, "and?") == "".join(step.text for step in expected)


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(model, reads):
    conversation = conversation_with(model)
    steps = conversation.reply("hi")
    begun = next(steps).text + next(steps).text
    steps.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    reads.clear()
    second = answer(conversation, "and?")
    assert reads[0] == len(f"{begun[-1]}\nuser: and?\nassistant: ")
    prompt = f"user: hi\nassistant: {begun}\nuser: and?\nassistant: "
    scratch = weft.stream(model, prompt, tokenizer=tiny_tokenizer(), max_new_tokens=6)
    assert second == "".join(step.text for step in scratch)


def test_reset_forgets(model):
    conversation = conversation_with(model, system="be brief")
    first = answer(conversation, "hi")
    answer(conversation, "and?")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    assert answer(conversation, "hi") == first


def test_the_tokenizers_end_of_a_message_ends_an_answer(model):
    tokenizer = tiny_tokenizer()
    first = answer(conversation_with(model), "hi")
    tokenizer.eos_token = end = first[2]
    steps = list(conversation_with(model, tokenizer).reply("hi"))
    assert steps[-1].finish_reason == "stop"
    assert len(steps) == first.index(end) + 1


def test_turns_are_sampled_with_random_numbers_of_their_own_and_repeat_by_the_seed(model):
    def two_turns(seed):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        conversation = conversation_with(model, tokenizer, temperature=3.0, seed=seed)
        return answer(conversation, "hi"), answer(conversation, "hi")

    assert two_turns(1) == two_turns(1)
    assert two_turns(1) != two_turns(2)
    assert len(set(two_turns(1))) == 2


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def say(monkeypatch):
    """Puts lines on the standard input."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_lines_are_answered_until_the_input_ends_or_says_so(mixture, say, capsys):
    say("hi", "", "/reset", "hi", "/quit", "more")
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    shown, errors = capsys.readouterr()
    first, second = shown[: len(shown) // 2], shown[len(shown) // 2 :]
    assert first == second != ""
    assert errors == ""
    say("hi", "/exit", "more")  # as it was called before there were other commands
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == first


def test_piped_prompts_and_answers_have_lines_of_their_own(mixture, say, capsys):
    say("hi", "and?")
    assert main(["--quiet", "chat", mixture, "--max-new-tokens", "6"]) == 0
    answers = capsys.readouterr().out
    say("hi", "and?")
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    first, second = capsys.readouterr().out.removeprefix("> hi\n").split("> and?\n")
    assert first + second == answers
    assert first.endswith("\n")


@pytest.fixture
def asked(monkeypatch):
    """What reaches the model."""
    texts = []
    reply = Conversation.reply
    monkeypatch.setattr(Conversation, "reply", lambda self, text: texts.append(text) or reply(self, text))
    return texts


def test_lines_that_begin_with_a_slash_are_commands_unless_it_is_asked_for(mixture, say, capsys, asked):
    say("/help", " /etc is", "//reset", "// two", "/experts", "hi", "/experts", "hi")
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    assert asked == ["/etc is", "/reset", "/ two", "hi", "hi"]
    shown = capsys.readouterr().out
    assert shown.startswith("/help     show this\n/reset    forget the conversation\n")
    assert "> /reset\n" in shown
    assert shown.count("experts:") == 2  # the legend, and the shares below the one answer
    assert shown.partition("> hi\n")[2].count("experts:") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rset", "'/rset' is no command: did you mean /reset? (/help lists them; a space before it sends it as text)"),
        ("/expert all", "'/expert all' is no command: did you mean /experts? ("),
        ("/", "'/' is no command (/help lists them"),
    ],
)
def test_a_command_that_is_none_ends_a_script_but_not_a_person(line, message, mixture, say, capsys, monkeypatch, asked):
    say(line, "hi")
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 1
    assert f"weft chat: error: {message}" in capsys.readouterr().err
    assert asked == []
    say(line, "hi")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    errors = capsys.readouterr().err
    assert message in errors
    assert "forgets the conversation)" not in errors
    assert asked == ["hi"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(mixture, say, capsys, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward
    calls = []

    @functools.wraps(forward)
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kwargs)

    say("hi", "/reset", "hi")
    assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    whole = capsys.readouterr().out
    say("hi", "/reset", "hi")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", interrupted)
    # A suite that was started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["chat", mixture, "--max-new-tokens", "6"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.endswith(whole[len(whole) // 2 :])
    assert len(calls) == 3 + 6


def test_ctrl_c_clears_a_line_and_twice_in_a_row_ends_the_chat(mixture, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt])

    def line(prompt):
        if (now := next(typed)) is KeyboardInterrupt:
            raise now
        return now

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["chat", mixture]) == 130
    shown, errors = capsys.readouterr()
    assert "/reset" in shown
    assert errors.count("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)\n") == 2
    assert errors.endswith("weft chat: interrupted\n")


def test_an_error_ends_a_script_but_not_a_person(mixture, base_folder, tmp_path, say, capsys, monkeypatch):
    base = shutil.copytree(base_folder, tmp_path / "base")
    template = "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}{{ messages[0].content }}: "
    (base / "chat_template.jinja").write_text(template)
    command, lines = ["chat", mixture, "--base", str(base), "--max-new-tokens", "6"], ["x", "/reset", "hi"]
    say(*lines)
    assert main(command) == 1
    assert "weft chat: error: the chat template refuses the conversation (user): no x\n" in capsys.readouterr().err
    say(*lines)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(command) == 0
    shown, errors = capsys.readouterr()
    assert "the chat template refuses the conversation (user): no x\n(/reset forgets the conversation)" in errors
    assert "/help lists the commands, Ctrl-C stops an answer\n" in errors
    assert shown.count("> ") >= 4


@pytest.mark.parametrize("interactive", [False, True])
def test_a_message_that_is_too_long_is_not_sent_and_the_chat_goes_on(interactive, mixture, say, capsys, monkeypatch):
    def answers(*lines):
        say(*lines)
        monkeypatch.setattr("sys.stdin.isatty", lambda: interactive, raising=False)
        code = main(["chat", mixture, "--max-new-tokens", "6", "--quiet"])
        shown, errors = capsys.readouterr()
        return code, shown.replace("> ", ""), errors

    _, expected, _ = answers("hi", "and?")
    code, shown, errors = answers("x" * 2000, "hi", "y" * 1000, "and?", "/reset")
    assert shown == expected  # as if the long ones had never been there
    first = len("user: \nassistant: ") + 2000
    told = "not sent: the conversation has {} tokens with it, expected at most 1,024: shorten it, or /reset\n"
    end = "" if interactive else "weft chat: error: 2 of the messages were not sent, see above\n"
    assert re.fullmatch(told.format(f"{first:,}") + told.format(r"1,0\d\d") + end, errors)
    assert code == (0 if interactive else 1)


def test_what_the_conversation_read_before_a_message_that_was_too_long_is_kept(model, reads):
    conversation = conversation_with(model)
    first = answer(conversation, "hi")
    with pytest.raises(TooLongError):
        answer(conversation, "x" * 2000)
    reads.clear()
    answer(conversation, "and?")
    assert reads[0] == len(f"{first[-1]}\nuser: and?\nassistant: ")


def test_a_tokenizer_without_a_chat_template_is_named(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"model \(mixture\) has a base .* no chat template(.|\n)*`weft generate`"):
        conversation_with(model, tokenizer)


def test_what_the_template_refuses_is_said_and_forgotten(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' or messages|length > 1 %}{{ raise_exception('one user only') }}"
        "{% endif %}{{ messages[-1]['content'] }}"
    )
    refused = conversation_with(model, tokenizer, system="be brief")
    with pytest.raises(
        ConfigError, match=r"the chat template refuses the conversation \(system, user\): one user only"
    ):
        answer(refused, "hi")
    assert [message["role"] for message in refused.messages] == ["system"]


def test_options_are_checked_before_the_model_is_loaded(capsys):
    assert main(["chat", "/nowhere", "--top-p", "2", "--max-new-tokens", "0"]) == 1
    errors = capsys.readouterr().err
    assert "max_new_tokens (0) must be at least 1" in errors
    assert "top_p (2.0) must be above 0 and at most 1" in errors

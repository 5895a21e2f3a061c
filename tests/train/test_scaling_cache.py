"""The scaling pass from disk: the same training without it, and never a cache of something else."""

import json
import pickle

import pytest
import torch
import transformers
from transformers import DataCollatorForSeq2Seq

import weft
from models import VOCAB, make_architecture, quietly, tiny_llama, tiny_tokenizer, weft_model
from weft.base_model.versions import checkpointing_arguments
from weft.errors import CheckpointError, ConfigError
from weft.train import scaling_cache


def mixture(adapters, base=None, **options):
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama() if base is None else base, adapters, layerwise_scalings=True, **options)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5, 12, 2, 7, 6, 4]
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def quiet_build(tmp_path):
    """`ScalingCache.build` into a folder of the test; gives the cache and the lines that were announced."""

    def build(model, sequences, **options):
        lines = []
        cache = weft.ScalingCache.build(model, sequences, tmp_path / "caches", announce=lines.append, **options)
        return cache, lines

    return build


def padded(side="right"):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


def rows(sequences):
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def refuse_scaling_passes(model, monkeypatch):
    def refuse(*args):
        raise AssertionError("a scaling pass ran")

    monkeypatch.setattr(model.passes, "_scaling_pass", refuse)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_cache_holds_what_the_gate_reads(llama_adapters, sequences, quiet_build, layers, monkeypatch):
    monkeypatch.setattr(scaling_cache, "_FILE_BYTES", 1000)  # several files
    model = mixture(llama_adapters, scaling_pass_layers=layers).train()
    cache, lines = quiet_build(model, sequences, batch_size=3)
    assert len(list(cache.folder.glob("*.safetensors"))) > 3
    assert len(cache) == len(sequences)
    for place, sequence in enumerate(sequences):
        expected = model.passes.scaling_pass_alone({"input_ids": torch.tensor([sequence])})[0]
        torch.testing.assert_close(cache[place], expected, atol=1e-6, rtol=1e-5)
    assert model.get_base_model().model.training
    assert lines == [f"scaling pass: 48 tokens x 32 x float32 = 6.1 kB in {cache.folder}"]
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.find(sequences[3]), cache[3])
    assert cache.find([1, 2, 3]) is None
    with pytest.raises(IndexError):
        cache[len(sequences)]


@pytest.mark.parametrize("layers", [None, 1])
def test_a_batch_with_its_scaling_pass_has_the_same_loss_and_gradients(
    llama_adapters, sequences, quiet_build, layers, monkeypatch
):
    model = mixture(llama_adapters, scaling_pass_layers=layers).train()
    cache, _ = quiet_build(model, sequences)
    collator = weft.ScalingCacheCollator(cache, padded())

    def gradients(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    batch = padded()(rows(sequences[:3]))
    expected, expected_gradients = gradients(batch)
    refuse_scaling_passes(model, monkeypatch)
    found, found_gradients = gradients(collator(rows(sequences[:3])))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("train_experts", "checkpointing"), [(False, False), (True, True)])
def test_a_users_own_trainer_learns_the_same_from_the_cache_and_resumes(
    llama_adapters, sequences, quiet_build, tmp_path, train_experts, checkpointing, monkeypatch
):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    if checkpointing:
        options |= checkpointing_arguments({"use_reentrant": False})

    def run(cached, **resume):
        model = mixture(llama_adapters, use_trainable_adapters=train_experts)
        collator = padded()
        if cached:
            collator = weft.ScalingCacheCollator(quiet_build(model, sequences)[0], collator)
            refuse_scaling_passes(model, monkeypatch)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / f"run-{cached}"),
            per_device_train_batch_size=2,
            learning_rate=0.05,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
            **options,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows(sequences),
            data_collator=collator,
        )
        quietly(trainer.train, **resume)
        return model.state_dict()

    plain, cached = run(cached=False), run(cached=True)
    resumed = run(cached=True, resume_from_checkpoint=str(tmp_path / "run-True/checkpoint-2"))
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=1e-5, rtol=1e-5)  # Adam divides by tiny gradients
        assert torch.equal(resumed[name], cached[name])


def test_under_autocast_the_cache_is_of_autocast(llama_adapters, sequences, quiet_build, monkeypatch):
    model = mixture(llama_adapters)
    with torch.autocast("cpu", torch.bfloat16):
        cache, _ = quiet_build(model, sequences, batch_size=1)
        batch = padded()(rows(sequences[:1]))
        expected = model(**batch).loss
        refuse_scaling_passes(model, monkeypatch)
        found = model(**weft.ScalingCacheCollator(cache, padded())(rows(sequences[:1]))).loss
    assert torch.equal(found, expected)


def test_padding_on_the_left_is_refused(llama_adapters, sequences, quiet_build):
    model = mixture(llama_adapters)
    cache, _ = quiet_build(model, sequences[:2])
    collator = weft.ScalingCacheCollator(cache, padded("left"))
    with pytest.raises(ConfigError, match=r"padding_side \('left'\) must be 'right' with a cache"):
        collator(rows(sequences[:2]))
    assert "scaling_pass_hidden" not in collator(rows(sequences[2:]))


def test_evaluation_data_goes_without_the_cache(llama_adapters, sequences, quiet_build):
    model = mixture(llama_adapters)
    cache, _ = quiet_build(model, sequences[:2])
    collator = weft.ScalingCacheCollator(cache, padded())
    assert "scaling_pass_hidden" in collator(rows(sequences[:2]))
    assert "scaling_pass_hidden" not in collator(rows(sequences[1:3]))


def test_other_adapters_of_the_same_base_share_a_cache(llama_adapters, sequences, quiet_build):
    cache, _ = quiet_build(mixture(llama_adapters), sequences)
    before = (cache.folder / "index.json").stat().st_mtime_ns
    other = mixture({"code": llama_adapters["code"]}, xlora_depth=2, use_trainable_adapters=True)
    again, lines = quiet_build(other, sequences)
    assert again.folder == cache.folder
    assert lines[0].endswith(f"{cache.folder}, found")
    assert (cache.folder / "index.json").stat().st_mtime_ns == before


def other_weights(base):
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


def other_buffers(base):
    base.model.rotary_emb.inv_freq.mul_(0.5)


def other_config(base):
    base.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [other_weights, other_buffers, other_config])
def test_a_cache_of_another_base_is_not_used(llama_adapters, sequences, quiet_build, change):
    base = tiny_llama()
    first, _ = quiet_build(mixture(llama_adapters), sequences)
    change(base)
    second, _ = quiet_build(mixture(llama_adapters, base), sequences)
    assert second.folder != first.folder


def test_a_cache_of_other_data_dtype_pass_or_precision_is_not_used(llama_adapters, sequences, quiet_build):
    model = mixture(llama_adapters)
    folders = [quiet_build(model, sequences)[0].folder]
    cut = [part for sequence in sequences for part in (sequence[:2], sequence[2:]) if part]
    for other in (sequences[:-1], sequences[::-1], [[*sequences[0], 7], *sequences[1:]], cut):
        folders.append(quiet_build(model, other)[0].folder)
    folders.append(quiet_build(model, sequences, dtype="bfloat16")[0].folder)
    folders.append(quiet_build(mixture(llama_adapters, scaling_pass_layers=1), sequences)[0].folder)
    with torch.autocast("cpu", torch.bfloat16):
        folders.append(quiet_build(model, sequences)[0].folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_half_the_space_and_is_near(llama_adapters, sequences, quiet_build, dtype):
    model = mixture(llama_adapters)
    whole, half = quiet_build(model, sequences)[0], quiet_build(model, sequences, dtype=dtype)[0]
    torch.testing.assert_close(half[1].float(), whole[1], atol=0, rtol=0.01)
    sizes = [sum(file.stat().st_size for file in cache.folder.glob("*.safetensors")) for cache in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    batch = weft.ScalingCacheCollator(half, padded())(rows(sequences[:2]))
    assert batch["scaling_pass_hidden"].dtype == getattr(torch, dtype)
    assert model(**batch).loss.isfinite()


def test_float16_that_cannot_hold_the_numbers_is_refused(llama_adapters, sequences, quiet_build):
    base = tiny_llama()
    base.model.norm.weight.data.mul_(1e6)
    with pytest.raises(ConfigError, match=r"dtype \('float16'\) cannot hold .* \(up to \d\.\d+e\+06"):
        quiet_build(mixture(llama_adapters, base), sequences, dtype="float16")


def test_an_interrupted_or_damaged_cache_is_computed_again(llama_adapters, sequences, quiet_build, monkeypatch):
    model = mixture(llama_adapters)
    monkeypatch.setattr(scaling_cache, "_FILE_BYTES", 1000)
    whole, calls = scaling_cache.save_file, []

    def interrupted(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(tensors, path)

    with monkeypatch.context() as context:
        context.setattr(scaling_cache, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet_build(model, sequences)
    assert not list(calls[0].parent.parent.iterdir())

    cache, lines = quiet_build(model, sequences)
    assert not lines[0].endswith("found")
    expected = cache[1]
    for damage in ("truncated", "missing"):
        file = cache.folder / "00001.safetensors"
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-4])
        else:
            file.unlink()
        cache, lines = quiet_build(model, sequences)
        assert not lines[0].endswith("found")
        assert torch.equal(cache[1], expected)
    index = json.loads((cache.folder / "index.json").read_text())
    broken = [
        {**index, name: value} for name, value in (("files", 5), ("files", [5]), ("dtype", "int8"), ("files", []))
    ]
    broken.append({**index, "files": [{**file, "name": f"../{file['name']}"} for file in index["files"]]})
    for text in ["{", "[]", "[" * 100_000, *map(json.dumps, broken)]:
        (cache.folder / "index.json").write_text(text)
        assert not quiet_build(model, sequences)[1][0].endswith("found")


def test_a_cache_whose_numbers_were_changed_is_computed_again_and_says_so(llama_adapters, sequences, quiet_build):
    model = mixture(llama_adapters)
    cache, _ = quiet_build(model, sequences)
    expected, index = cache[1], cache.folder / "index.json"
    file = cache.folder / "00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    values = json.loads(index.read_text())
    old = {**values, "files": [{name: entry[name] for name in ("name", "first", "bytes")} for entry in values["files"]]}
    for damage, reason in (
        (lambda: file.write_bytes(content), "00000.safetensors was changed after it was saved"),
        (
            lambda: index.write_text(json.dumps(values | {"hidden_size": 16})),
            "index.json was changed after it was saved",
        ),
        (lambda: index.write_text(json.dumps(old)), "index.json is missing or damaged, or an earlier version wrote it"),
    ):
        damage()
        cache, lines = quiet_build(model, sequences)
        assert lines[0].endswith(f"; computed anew: {reason}")
        assert torch.equal(cache[1], expected)
        assert quiet_build(model, sequences)[1][0].endswith(", found")
    assert [path.name for path in cache.folder.parent.iterdir()] == [cache.folder.name]


def test_a_cache_that_is_lost_or_cannot_be_written_is_an_error(llama_adapters, sequences, quiet_build, monkeypatch):
    model = mixture(llama_adapters)
    cache, _ = quiet_build(model, sequences)
    (cache.folder / "00000.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"00000.safetensors \(scaling pass\) cannot be read: .*; start again, and"
    ):
        _ = cache[0]

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaling_cache, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left.* \(what was there before is unch"):
        quiet_build(model, sequences)
    assert [path.name for path in cache.folder.parent.iterdir()] == [cache.folder.name]


def test_a_full_disk_is_noticed_before(llama_adapters, sequences, quiet_build, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1200}))
    with pytest.raises(ConfigError, match=r"takes 6\.1 kB, but .*caches has 1\.2 kB free: choose another folder"):
        quiet_build(mixture(llama_adapters), sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_layer": 1}, r"gate_layer \(1\) must be None: with it there is no scaling pass"),
        ({"scaling_pass_value": 0.5}, r"scaling_pass_value \(0\.5\) must be 0: else the experts act"),
    ],
)
def test_models_whose_scaling_pass_is_not_the_bases_are_refused(
    llama_adapters, sequences, quiet_build, options, message
):
    model = mixture(llama_adapters, **options)
    with pytest.raises(ConfigError, match=message):
        quiet_build(model, sequences)
    with pytest.raises(ConfigError, match=rf"scaling_pass_hidden cannot be used:\n  - {message}"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), scaling_pass_hidden=torch.zeros(1, 3, 32))


def test_a_trainable_or_offloaded_base_and_an_unknown_dtype_are_refused_at_once(
    llama_adapters, sequences, quiet_build, without_type_checks
):
    model = mixture(llama_adapters)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    model.get_base_model().model.layers[1].to("meta")
    with pytest.raises(ConfigError) as raised:
        quiet_build(model, sequences, dtype="int8")
    assert "must be frozen, but norm.weight is trainable (1 parameters are)" in str(raised.value)
    assert "layers.1.self_attn.q_proj.base_layer.weight is offloaded (on the device meta)" in str(raised.value)
    assert "dtype ('int8') must be one of float32, bfloat16, float16" in str(raised.value)


def test_active_dropout_of_the_base_is_refused(llama_adapters, sequences, quiet_build, tmp_path):
    model = mixture(llama_adapters, tiny_llama(attention_dropout=0.1))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.attention_dropout \(0\.1\) must be 0"):
        quiet_build(model, sequences)


def test_dropout_modules_of_the_base_are_refused(tmp_path, sequences, quiet_build):
    from models import lora, save_adapter

    base, targets = make_architecture("gpt2")
    path = save_adapter(base, lora(target_modules=targets, lora_dropout=0.2, fan_in_fan_out=True), tmp_path / "a", 1)
    model = weft_model(("gpt2", {"a": path}))
    with pytest.raises(ConfigError, match=r"drop\.p \(0\.1\) must be 0: in training mode"):
        quiet_build(model, sequences)
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    quiet_build(model, sequences)


def test_encoder_decoders_are_refused(sequences, quiet_build, tmp_path):
    from models import lora, save_adapter

    def base():
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        return transformers.T5ForConditionalGeneration(config)

    path = save_adapter(base(), lora(target_modules=["q"], task_type="SEQ_2_SEQ_LM"), tmp_path / "a", seed=1)
    model = quietly(weft.from_adapters, base(), {"a": path})
    with pytest.raises(ConfigError, match=r"\(T5ForConditionalGeneration\) must not be an encoder-decoder"):
        quiet_build(model, sequences)


@pytest.mark.parametrize("shape", [(2, 5, 32), (1, 6, 32), (2, 6, 16)])
def test_a_scaling_pass_of_another_shape_is_an_error(llama_adapters, shape):
    model = mixture(llama_adapters)
    message = rf"scaling_pass_hidden has shape \[{shape[0]}, {shape[1]}, {shape[2]}\], expected \[2, 6, 32\]"
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.ones(2, 6, dtype=torch.long), scaling_pass_hidden=torch.zeros(shape))


def test_without_the_gate_a_given_scaling_pass_changes_nothing(llama_adapters):
    model = mixture(llama_adapters).eval()
    ids = torch.arange(6)[None]
    given = {"input_ids": ids, "scaling_pass_hidden": torch.randn(1, 6, 32)}
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, model(input_ids=ids).logits)
        with model.fixed_scalings({"math": 1.0}):
            assert torch.equal(model(**given).logits, model(input_ids=ids).logits)


def test_a_key_value_cache_of_such_a_call_is_not_gone_on_with(llama_adapters):
    model = mixture(llama_adapters).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, scaling_pass_hidden=torch.zeros(1, 6, 32), use_cache=True).past_key_values
        with pytest.raises(weft.errors.CacheError, match="was not filled by this model"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_the_index_says_what_is_in_the_folder(llama_adapters, sequences, quiet_build):
    cache, _ = quiet_build(mixture(llama_adapters), sequences)
    index = json.loads((cache.folder / "index.json").read_text())
    assert index["dtype"] == "float32"
    assert index["hidden_size"] == 32
    assert [file["name"] for file in index["files"]] == ["00000.safetensors"]

"""Several texts in one row: the same loss and gradients as of the texts one by one, or a refusal."""

import hypothesis
import pytest
import torch
from hypothesis import strategies
from transformers import DataCollatorForSeq2Seq

import weft
from models import ARCHITECTURES, VOCAB, adapters_of, tiny_tokenizer, weft_model
from weft.data.batches import RowCollator
from weft.data.packing import pack, packed_rows
from weft.train.packing_check import check_packing

KEEP_APART = ["llama", "mistral", "qwen2", "gemma3", "gpt_neox", "gpt2"]


def examples(sequences):
    return [{"input_ids": sequence} for sequence in sequences]


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in (7, 3, 9, 5, 2, 11)]


def packed_batch(sequences, capacity=16):
    return RowCollator(0)(packed_rows(examples(sequences), capacity))


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def model_of(name, folder, **options):
    model = weft_model(adapters_of(name, folder), **options)
    for module in model.modules():  # GPT-2 has dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@hypothesis.given(strategies.lists(strategies.integers(2, 20), max_size=40))
def test_every_text_gets_one_place_and_no_row_is_too_long(lengths):
    rows = pack(lengths, 20)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 20 for row in rows)
    half_empty = [row for row in rows if sum(lengths[place] for place in row) <= 10]
    assert len(half_empty) <= 1


def test_a_packed_row_restarts_positions_and_trains_no_first_token():
    [row] = packed_rows(examples([[5, 6], [7, 8, 9]]), 5)
    assert row == {
        "input_ids": [7, 8, 9, 5, 6],
        "labels": [-100, 8, 9, -100, 6],
        "position_ids": [0, 1, 2, 0, 1],
    }


def test_a_labelled_texts_tokens_have_its_label():
    labelled = [{"input_ids": [5, 6], "expert_labels": [1, 1]}, {"input_ids": [7, 8, 9], "expert_labels": [-100] * 3}]
    [row] = packed_rows(labelled, 5)
    assert row["expert_labels"] == [-100, -100, -100, 1, 1]
    batch = RowCollator(0)([row, {**row, "input_ids": [*row["input_ids"], 4]}])
    assert batch["expert_labels"].shape == (2, 6)
    assert batch["expert_labels"][0, 5] == -100


@pytest.mark.parametrize("name", KEEP_APART)
def test_packed_texts_have_the_loss_and_gradients_of_the_separate_ones(name, tmp_path, sequences):
    model = model_of(name, tmp_path)
    check_packing(model, batch_size=1)
    check_packing(model, batch_size=4)
    assert model.get_base_model().training
    batch = packed_batch(sequences)
    assert batch["input_ids"].shape == (3, 16)
    found, found_gradients = loss_and_gradients(model, batch)
    # One by one: neither padding nor a mask.
    total = sum(len(sequence) - 1 for sequence in sequences)
    expected, gradients = torch.zeros(()), None
    for sequence in sequences:
        ids = torch.tensor([sequence])
        loss, own = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
        share = (len(sequence) - 1) / total
        expected = expected + share * loss.detach()
        own = [share * gradient for gradient in own]
        gradients = own if gradients is None else [one + other for one, other in zip(gradients, own, strict=True)]
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=0)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"scaling_pass_layers": 1}, {"gate_layer": 1}], ids=str)
def test_other_schemes_keep_packed_texts_apart_too(tmp_path, sequences, options):
    model = model_of("mistral", tmp_path, **options)
    found, _ = loss_and_gradients(model, packed_batch(sequences))
    padded = DataCollatorForSeq2Seq(tiny_tokenizer())([{"input_ids": s, "labels": s} for s in sequences])
    expected, _ = loss_and_gradients(model, padded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_packed_texts_take_their_scaling_passes_from_the_cache(tmp_path, sequences, monkeypatch):
    model = model_of("mistral", tmp_path)
    cache = weft.ScalingCache.build(model, sequences, tmp_path / "cache", announce=lambda line: None)
    expected, expected_gradients = loss_and_gradients(model, packed_batch(sequences))
    monkeypatch.setattr(model.passes, "_scaling_pass", None)
    collator = weft.ScalingCacheCollator(cache, RowCollator(0))
    batch = collator(packed_rows(examples(sequences), 16))
    found, found_gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_architectures_that_pack_are_among_those_tested():
    assert set(KEEP_APART) < set(ARCHITECTURES)

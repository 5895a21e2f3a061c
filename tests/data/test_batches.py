"""Rows become batches: padded as transformers pads them, and filled up with a row that teaches nothing."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import weft
from models import tiny_llama, tiny_tokenizer
from weft.data.batches import FullBatches, RowCollator, RowsAndABlank
from weft.data.packing import packed_rows
from weft.train.scaling_cache import ScalingCache, ScalingCacheCollator


def rows_of(*lengths, label=None):
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in lengths]
    return rows if label is None else [{**row, "expert_labels": [label] * len(row["labels"])} for row in rows]


def test_rows_are_padded_as_transformers_collator_pads_them():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    rows = rows_of(4, 2, 3)
    expected = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    found = RowCollator(tokenizer.pad_token_id)(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_labels_of_experts_are_padded_with_none():
    rows = rows_of(4, 2, label=1)
    batch = RowCollator(0)(rows)
    assert batch["expert_labels"].shape == batch["input_ids"].shape
    assert torch.equal(batch["expert_labels"] == 1, batch["attention_mask"] == 1)
    assert torch.equal(batch["expert_labels"] == -100, batch["labels"] == -100)


def test_packed_rows_have_no_mask_and_their_padding_is_texts_of_one_token():
    batch = RowCollator(9)(packed_rows(rows_of(5, 4, 3, 2, label=1), 9))
    assert set(batch) == {"input_ids", "labels", "position_ids", "expert_labels"}
    assert {name: value[1, 5:].tolist() for name, value in batch.items()} == {
        "input_ids": [9] * 4,
        "labels": [-100] * 4,
        "position_ids": [0] * 4,
        "expert_labels": [-100] * 4,
    }


def test_the_blank_row_is_the_shortest_without_its_labels():
    rows = RowsAndABlank(rows_of(4, 2, 3, label=1))
    assert rows[3] == {"input_ids": [1, 2], "labels": [-100, -100], "expert_labels": [-100, -100]}
    assert list(rows) == rows.rows
    packed = RowsAndABlank(packed_rows(rows_of(4, 3, 2, label=1), 5))
    assert packed[len(packed)] == {
        "input_ids": [1, 2, 3, 4],
        "labels": [-100] * 4,
        "position_ids": [0, 1, 2, 3],
        "expert_labels": [-100] * 4,
    }


def test_the_blank_row_has_its_scaling_pass_in_the_cache(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    examples = rows_of(4, 3, 2)
    cache = ScalingCache.build(model, [row["input_ids"] for row in examples], tmp_path, announce=lambda line: None)
    for rows in (RowsAndABlank(examples), RowsAndABlank(packed_rows(examples, 5))):
        batch = ScalingCacheCollator(cache, RowCollator(0))([rows[0], rows[len(rows)]])
        assert "scaling_pass_hidden" in batch


def test_rows_of_similar_length_stand_together_in_whole_batches():
    lengths = [1 + number % 7 for number in range(130)]
    sampler = FullBatches(130, 4, seed=3, lengths=lengths, group_size=4)
    places = list(sampler)
    assert places == list(sampler)
    assert sorted(places) == [*range(130), 130, 130]
    assert len(sampler) == 132
    batches = [[lengths[place] for place in places[start : start + 4]] for start in range(4, 124, 4)]
    assert sum(max(batch) - min(batch) for batch in batches) < 2 * len(batches)


@pytest.mark.parametrize("masked", [True, False])
def test_a_row_that_teaches_nothing_does_not_count_for_the_gate(llama_adapters, masked):
    weights = {"balance_loss_weight": 0.1, "entropy_loss_weight": 0.2, "expert_label_loss_weight": 0.3}
    model = weft.from_adapters(tiny_llama(), llama_adapters, **weights).train()
    model.gate_metrics.enabled = True
    rows, blank = torch.randint(1, 30, (2, 7)), torch.randint(1, 30, (2, 7))
    labels = torch.tensor([1, 0])

    def outcome(*parts):
        model.zero_grad()
        for ids, learnt, experts in parts:
            mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
            model(input_ids=ids, labels=learnt, expert_labels=experts, num_items_in_batch=12, **mask).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        return model.gate_metrics.read(), gradients

    nothing, nobody = torch.full_like(rows, -100), torch.full_like(labels, -100)
    metrics, gradients = outcome((rows, rows, labels))
    together = torch.cat([rows, blank]), torch.cat([rows, nothing]), torch.cat([labels, nobody])
    for parts in ([together], [(rows, rows, labels), (blank, nothing, nobody)]):
        found, same = outcome(*parts)
        assert found == pytest.approx(metrics, abs=1e-6)
        torch.testing.assert_close(same, gradients, atol=1e-6, rtol=0)


def test_what_fills_packed_rows_up_does_not_count_for_the_gate(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, entropy_loss_weight=0.2).train()
    model.gate_metrics.enabled = True
    rows = packed_rows(rows_of(5, 4, 3, 2), 9)
    assert [len(row["input_ids"]) for row in rows] == [9, 5]
    collator = RowCollator(0)
    model(**collator(rows))
    filled = model.gate_metrics.read()
    for row in rows:
        model(**collator([row]))
    alone = model.gate_metrics.read()
    shares = [name for name in alone if not name.endswith("loss")]  # a loss is a mean over calls
    assert [filled[name] for name in shares] == pytest.approx([alone[name] for name in shares], abs=1e-6)


def test_batches_are_filled_with_rows_that_teach_nothing():
    rows = RowsAndABlank([{"input_ids": [i, i, i], "labels": [i, i, i]} for i in range(5)])
    sampler = FullBatches(len(rows), multiple=4, seed=7)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert len(first) == len(sampler) == 8
    assert sorted(first) == [0, 1, 2, 3, 4, 5, 5, 5]
    assert first[5:] == [5, 5, 5]
    assert rows[5] == {"input_ids": [0, 0, 0], "labels": [-100, -100, -100]}
    sampler.set_epoch(1)
    assert list(sampler) != first

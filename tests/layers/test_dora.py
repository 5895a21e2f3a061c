"""DoRA experts: what each adds is what peft's own DoRA layer adds, times its scaling."""

import copy
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import weft
from models import VOCAB, is_expert, lora, quietly, randomise, save_adapter, tiny_llama
from weft import XLoraConfig
from weft.errors import AdapterError
from weft.gate.routing import keep_top_k
from weft.layers import XLoraConv2dLayer, XLoraEmbeddingLayer, XLoraLinearLayer
from weft.layers.convert import convert_layers_to_xlora
from weft.layers.dora import refuse_base_of_dora

BATCH, SEQ, SIZE = 2, 5, 6


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.bare = nn.Linear(6, 5, bias=False)
        self.conv1d = transformers.pytorch_utils.Conv1D(5, 6)
        self.emb = nn.Embedding(11, 6, padding_idx=3)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)


KINDS = {
    "lin": XLoraLinearLayer,
    "bare": XLoraLinearLayer,
    "conv1d": XLoraLinearLayer,
    "emb": XLoraEmbeddingLayer,
    "conv": XLoraConv2dLayer,
}
# Ranks and whether they have DoRA; plain experts first, so that dropout masks are drawn in the loop's order.
MIXED = [(2, False), (3, False), (2, True), (4, True)]


def layer_with(experts, kind="lin", *, dropout=0.0, model=None, **options):
    model = Tiny() if model is None else model
    lora_model = None
    for number, (rank, dora) in enumerate(experts):
        config = lora(r=rank, target_modules=[kind], use_dora=dora, task_type=None, lora_dropout=dropout)
        config.fan_in_fan_out = kind == "conv1d"
        if lora_model is None:
            lora_model = quietly(peft.LoraModel, model, config, "e0")
        else:
            lora_model.peft_config[f"e{number}"] = config
            quietly(lora_model.inject_adapter, model, f"e{number}")
    randomise(model, 0)
    lora_model.set_adapter([f"e{number}" for number in range(len(experts))])
    target = getattr(model.eval(), kind)
    config = XLoraConfig(hidden_size=4, adapters=dict.fromkeys(target.active_adapters, "."), allow_dora=True, **options)
    return target, KINDS[kind](SimpleNamespace(), target, target.forward, 0, config)


def an_input(kind):
    if kind == "emb":
        return torch.randint(0, 11, (BATCH, SEQ))
    return torch.randn(BATCH, 4, SIZE, SIZE) if kind == "conv" else torch.randn(BATCH, SEQ, 6)


def some_scalings(kind, num_experts):
    return torch.rand(BATCH, 1 if kind == "conv" else SEQ, 1, num_experts)


def alone(target, name, x):
    """The output of peft's own layer with this adapter."""
    before, target._active_adapter = target._active_adapter, [name]
    try:
        return type(target).forward(target, x)
    finally:
        target._active_adapter = before


def by_loop(target, x, scalings, global_weight=1.0):
    """base + Σ λ · g · (what peft's layer adds); a layer is linear in x but for its bias, so λ may stand outside."""
    base = target.base_layer(x)
    result = base
    for column, name in enumerate(target.active_adapters):
        weight = 1.0 if scalings is None else scalings[:, :, 0, column, None] * global_weight
        if scalings is not None and base.dim() == 4:
            weight = weight[..., None]
        result = result + weight * (alone(target, name, x) - base)
    return result


@pytest.mark.parametrize("scaled", [True, False], ids=["scalings", "no scalings"])
@pytest.mark.parametrize("experts", [[(3, True)], [(4, True), (4, True)], MIXED], ids=["one", "all DoRA", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixture_equals_a_loop_over_pefts_layers(kind, experts, scaled):
    target, layer = layer_with(experts, kind, global_scaling_weight=0.5)
    x, scalings = an_input(kind), some_scalings(kind, len(experts)) if scaled else None
    torch.testing.assert_close(
        layer.forward(x, scalings=scalings), by_loop(target, x, scalings, 0.5), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_with_all_the_weight_is_pefts_layer_with_that_adapter(kind):
    target, layer = layer_with(MIXED, kind)
    x = an_input(kind)
    for column, name in enumerate(target.active_adapters):
        scalings = torch.zeros_like(some_scalings(kind, len(MIXED)))
        scalings[..., column] = 1
        torch.testing.assert_close(layer.forward(x, scalings=scalings), alone(target, name, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    target, layer = layer_with(MIXED, kind)
    x = an_input(kind)
    found = layer.forward(x, scalings=torch.zeros_like(some_scalings(kind, len(MIXED))))
    assert torch.equal(found, target.base_layer(x))


def test_a_convolutions_cells_have_scalings_of_their_own():
    target, layer = layer_with([(2, True), (3, True)], "conv")
    x = an_input("conv")
    scalings = torch.rand(BATCH, 9, 1, 2)
    base = target.base_layer(x)
    cells = scalings[:, :, 0].view(BATCH, 3, 3, 2).movedim(-1, 1)
    expected = base + sum(
        cells[:, column, None] * (alone(target, name, x) - base) for column, name in enumerate(target.active_adapters)
    )
    torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_under_dropout_the_base_weight_sees_each_experts_dropped_input_as_in_peft(kind):
    target, layer = layer_with(MIXED, kind, dropout=0.5)
    target.train()
    x, scalings = an_input(kind), some_scalings(kind, len(MIXED))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = by_loop(target, x, scalings)
        torch.manual_seed(seed)
        torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)


def test_an_embeddings_scale_acts_on_dora_too():
    model = Tiny()
    model.emb = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5)
    target, layer = layer_with([(2, True), (3, False)], "emb", model=model)
    x, scalings = an_input("emb"), some_scalings("emb", 2)
    torch.testing.assert_close(layer.forward(x, scalings=scalings), by_loop(target, x, scalings), rtol=1e-5, atol=1e-5)


def test_top_k_equals_the_loop():
    target, layer = layer_with([(2, True)] * 4, top_k_lora=2)
    x, scalings = an_input("lin"), some_scalings("lin", 4)
    expected = by_loop(target, x, keep_top_k(scalings, 2))
    torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)


def test_a_channel_of_zeros_stays_zero():
    model = Tiny()
    with torch.no_grad():
        model.bare.weight[1] = 0
    target, layer = layer_with([(2, True), (2, True)], "bare", model=model)
    with torch.no_grad():
        for name in ("e0", "e1"):
            target.lora_B[name].weight[1] = 0
    found = layer.forward(an_input("bare"), scalings=some_scalings("bare", 2))
    assert found.isfinite().all()
    assert found[..., 1].eq(0).all()


# ---------------------------------------------------------------------- the norms are kept, and follow


def kept_factors(layer):
    (stack,) = layer.experts.stacks()
    return layer.dora.factors(stack, stack.up)


def test_norms_are_computed_once_while_nothing_changes():
    target, layer = layer_with([(2, True), (3, True)])
    target.requires_grad_(False)
    x = an_input("lin")
    layer.forward(x)
    first = kept_factors(layer)
    layer.forward(x, scalings=some_scalings("lin", 2))
    with torch.inference_mode():
        layer.forward(x)
    assert kept_factors(layer) is first


def change_by(path):
    def change(target):
        with torch.no_grad():
            target.get_parameter(path).mul_(1.5)

    return change


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        *(change_by(path) for path in ("base_layer.weight", "lora_A.e0.weight", "lora_B.e1.weight")),
        change_by("lora_magnitude_vector.e1.weight"),
        lambda target: target.load_state_dict({key: value * 2 for key, value in target.state_dict().items()}),
        lambda target: target.load_state_dict(
            {key: value * 2 for key, value in target.state_dict().items()}, assign=True
        ),
        lambda target: target.set_scale("e0", 3.0),
        lambda target: target.to(torch.float64),
        lambda target: target.delete_adapter("e0"),
    ],
    ids=["base", "A", "B", "magnitude", "load", "load assign", "scale", "double", "delete"],
)
def test_norms_follow(change, frozen):
    target, layer = layer_with([(2, True), (3, True)])
    target.requires_grad_(not frozen)
    with torch.no_grad():
        layer.forward(an_input("lin"))
        change(target)
        x = an_input("lin").to(target.base_layer.weight.dtype)
        torch.testing.assert_close(layer.forward(x), by_loop(target, x, None), rtol=1e-5, atol=1e-5)


def test_norms_follow_an_optimizer_that_no_version_counter_sees():
    target, layer = layer_with([(2, True)])
    x = an_input("lin")
    with torch.no_grad():
        layer.forward(x)
    layer.forward(x).sum().backward()
    for parameter in target.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        torch.testing.assert_close(layer.forward(x), by_loop(target, x, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_norms_of_its_own(copied):
    _, layer = layer_with([(2, True)])
    x = an_input("lin")
    with torch.no_grad():
        expected = layer.forward(x)
        twin = copied(layer)
        assert torch.equal(twin.forward(x), expected)
        randomise(twin.target, 5)
        torch.testing.assert_close(twin.forward(x), by_loop(twin.target, x, None), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.forward(x), expected)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_loop_over_pefts_layers(kind, dropout):
    target, layer = layer_with(MIXED, kind, dropout=dropout)
    target.train()
    x, scalings = an_input(kind), some_scalings(kind, len(MIXED)).requires_grad_()
    names = [name for name, parameter in target.named_parameters() if parameter.requires_grad]
    leaves = [scalings, *(target.get_parameter(name) for name in names)]
    assert sum("magnitude" in name for name in names) == 2
    torch.manual_seed(1)
    output = by_loop(target, x, scalings)
    direction = torch.randn(output.shape)
    expected = torch.autograd.grad((output * direction).sum(), leaves)
    torch.manual_seed(1)
    layer.forward(x)  # other masks
    torch.manual_seed(1)
    output = layer.forward(x, scalings=scalings)
    for one, other, name in zip(
        torch.autograd.grad((output * direction).sum(), leaves), expected, ["scalings", *names], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_finite_differences_with_the_norms_held(monkeypatch):
    target, layer = layer_with([(2, True), (3, True)])
    target.double()
    x = an_input("lin").double()
    scalings = some_scalings("lin", 2).double().requires_grad_()
    (stack,) = layer.experts.stacks()
    norms = [
        torch.linalg.vector_norm(
            target.base_layer.weight + target.scaling[name] * target.lora_B[name].weight @ target.lora_A[name].weight,
            dim=1,
        ).detach()
        for name in stack.names
    ]

    def output(*values):
        held = iter(norms)
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: next(held))
            return layer.forward(x, scalings=values[0])

    parameters = [parameter for name, parameter in target.named_parameters() if is_expert(name)]
    assert torch.autograd.gradcheck(output, (scalings, *parameters), fast_mode=True)


# ---------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two adapters with DoRA and a plain one, of the tiny Llama."""
    folder = tmp_path_factory.mktemp("dora")
    configs = {
        "long": lora(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj", "up_proj"]),
        "short": lora(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
        "plain": lora(r=3, target_modules=["q_proj", "v_proj"]),
    }
    return {
        name: save_adapter(tiny_llama(), config, folder / name, seed=seed)
        for seed, (name, config) in enumerate(configs.items(), start=1)
    }


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


def mixture(paths, **options):
    torch.manual_seed(1)
    return quietly(weft.from_adapters, tiny_llama(), paths, layerwise_scalings=True, allow_dora=True, **options).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_each_expert_alone_is_that_adapter_in_peft(paths, ids):
    model = mixture(paths)
    for name, path in paths.items():
        expected = logits(quietly(peft.PeftModel.from_pretrained, tiny_llama(), path), ids)
        with model.fixed_scalings({name: 1.0}):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_scaling_pass_at_zero_and_disabling_leave_dora_out(paths, ids):
    model, base = mixture(paths), tiny_llama()
    read = []
    model.internal_xlora_classifier.register_forward_hook(lambda module, args, output: read.append(args[0]))
    logits(model, ids)
    assert torch.equal(read[0], base.model(ids).last_hidden_state)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base, ids))


def test_cached_generation_gives_the_tokens_of_whole_forwards(paths, ids):
    # One sequence: so few tokens that plain experts would be gathered.
    model, ids = mixture(paths, top_k_lora=1), ids[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(input_ids=ids, **options), model.generate(input_ids=ids, use_cache=False, **options)
    )


@pytest.mark.parametrize("trained", [False, True])
def test_saved_and_loaded_gives_the_same_logits(paths, ids, tmp_path, trained):
    model = mixture(paths, use_trainable_adapters=trained)
    if trained:
        randomise(model, 9)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "mixture")
    expert = load_file(tmp_path / "mixture/experts/long/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in expert
    loaded = quietly(weft.from_pretrained, tmp_path / "mixture", tiny_llama())
    assert loaded.base_model.xlora_config.allow_dora
    assert torch.equal(logits(loaded, ids), expected)
    # Each expert is an ordinary adapter of peft's.
    for name in paths:
        adapter = quietly(peft.PeftModel.from_pretrained, tiny_llama(), str(tmp_path / "mixture/experts" / name))
        with model.fixed_scalings({name: 1.0}):
            torch.testing.assert_close(logits(model, ids), logits(adapter, ids), rtol=1e-4, atol=1e-4)


def test_training_the_experts_trains_their_magnitudes_and_lowers_the_loss(paths, ids):
    model = mixture(paths, use_trainable_adapters=True)
    magnitudes = {name: p.clone() for name, p in model.named_parameters() if "magnitude" in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, magnitudes[n]) for n, p in model.named_parameters() if n in magnitudes)


def test_gradient_checkpointing_gives_the_same_gradients(paths, ids):
    def gradients(model):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(mixture(paths, use_trainable_adapters=True))
    model = mixture(paths, use_trainable_adapters=True)
    quietly(model.gradient_checkpointing_enable, {"use_reentrant": False})
    found = gradients(model)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_moved_to_another_dtype_and_unloaded(paths, ids):
    model = mixture(paths)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model.double(), ids).float(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.float().base_model.unload(), ids), logits(tiny_llama(), ids))


# ---------------------------------------------------------------------- refused


def test_dora_is_refused_unless_it_is_allowed(paths):
    with pytest.raises(AdapterError, match=r"adapter 'long' uses DoRA, for which allow_dora \(False\) must be True"):
        weft.from_adapters(tiny_llama(), paths)


def test_folding_a_dora_expert_is_refused_by_its_name(paths, ids, tmp_path):
    model = mixture(paths)
    with pytest.raises(AdapterError, match=r"expert 'short' uses DoRA, .* cannot be folded"):
        weft.fold(model, tmp_path / "folded", {"short": 0.5, "plain": 0.5})
    weft.fold(model, tmp_path / "folded", {"plain": 0.5})
    folded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "folded"))
    with model.fixed_scalings({"plain": 0.5}):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


class Packed(nn.Parameter):
    """A parameter as quantised layers have them."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Packed(torch.zeros(5, 6)), r"adapter 'e1' uses DoRA on layer 'a\.b', whose weight is quantised \(Packed of"),
        (
            nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False),
            r"adapter 'e1' uses DoRA on layer 'a\.b', whose weight is quantised \(Parameter of torch\.int8\)",
        ),
        (nn.Parameter(torch.zeros(5, 6, device="meta")), r"'e1' uses DoRA on layer 'a\.b', .* \(device meta\)"),
    ],
)
def test_a_base_layer_without_norms_is_refused(weight, message):
    target, _ = layer_with([(2, False), (2, True)])
    target.base_layer.weight = weight
    with pytest.raises(AdapterError, match=message):
        refuse_base_of_dora(target, "a.b", ["e0", "e1"])
    refuse_base_of_dora(target, "a.b", ["e0"])


def test_dora_on_a_grouped_convolution_is_refused():
    model = Tiny()
    config = lora(target_modules=["grouped"], task_type=None, use_dora=True)
    quietly(peft.LoraModel, model, config, "dora")
    options = XLoraConfig(hidden_size=4, adapters={"dora": "."}, allow_dora=True)
    with pytest.raises(AdapterError, match=r"'dora' uses DoRA on layer 'grouped', a convolution with groups \(2\)"):
        convert_layers_to_xlora(model, nn.Module(), options)


def test_weft_train_takes_dora_where_it_is_allowed(base_folder, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    path = save_adapter(base, lora(use_dora=True, target_modules=["q_proj"]), tmp_path / "dora", seed=1)
    (tmp_path / "text.txt").write_text("one two three\n" * 20)
    options = weft.options.TrainOptions(
        base=str(base_folder),
        adapters={"dora": path, "again": path},
        data=[str(tmp_path / "text.txt")],
        output=str(tmp_path / "mixture"),
        max_steps=1,
        sequence_length=16,
        allow_dora=True,
    )
    folder = quietly(weft.train.gate.train, options)
    assert XLoraConfig.from_pretrained(folder).allow_dora

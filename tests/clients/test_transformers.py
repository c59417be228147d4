"""transformers: BERT and GPT-2 from a configuration, with plain and with fused attention."""

import pytest
import torch
from torch.func import functional_call

from funcjac import (
    BatchMixingError,
    batch_hessian,
    batch_jacobian,
    batch_jacobian_of,
    batch_laplacian,
)
from tests.oracles import by_batch
from tests.tensors import equal, quiet

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: make clients"
)

B, TOKENS, WIDTH = 4, 5, 8
ATTENTION = ["eager", "sdpa"]


def bert(attention):
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=TOKENS,
        attn_implementation=attention,
    )
    return transformers.BertModel(config).double().eval()


def gpt2(attention):
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=TOKENS,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return transformers.GPT2Model(config).double().eval()


MODELS = {"bert": bert, "gpt2": gpt2}
each_model = pytest.mark.parametrize("name", MODELS)
each_attention = pytest.mark.parametrize("attention", ATTENTION)


def tokens():
    """Tokens, and which of them are there: the last ones of the second sample are not."""
    mask = torch.ones(B, TOKENS, dtype=torch.long)
    mask[1, 3:] = 0
    return torch.randint(20, (B, TOKENS)), mask


def last_state(model):
    """The mean of the last layer, by embeddings ``(B, tokens, width)``."""

    def func(embeddings, mask):
        out = model(inputs_embeds=embeddings, attention_mask=mask)
        return out.last_hidden_state.mean(1)

    return func


@each_attention
@each_model
def test_jacobian_by_embeddings(name, attention):
    model, (ids, mask) = MODELS[name](attention), tokens()
    embeddings = model.get_input_embeddings()(ids).detach()
    jac = batch_jacobian(last_state(model))(embeddings, mask)
    assert jac.shape == (B, WIDTH, TOKENS, WIDTH)
    equal(jac.detach(), by_batch(last_state(model), (embeddings, mask)))
    if name == "gpt2":  # which cannot look ahead
        first = batch_jacobian(lambda e, m: model(inputs_embeds=e).last_hidden_state[:, 0])
        assert not first(embeddings, mask)[:, :, 1:].any()


@each_model
def test_both_kinds_of_attention_have_the_same_second_derivatives(name):
    ids, mask = tokens()
    plain = MODELS[name]("eager")
    fused = MODELS[name]("sdpa")
    fused.load_state_dict(plain.state_dict())
    embeddings = plain.get_input_embeddings()(ids).detach()[:, :2]
    hessians = []
    for model in (plain, fused):
        energy = lambda e, m, model=model: last_state(model)(e, m)[:, :2]
        hessians.append(batch_hessian(energy)(embeddings, mask[:, :2]).detach())
        assert hessians[-1].shape == (B, 2, 2, WIDTH, 2, WIDTH)
        trace = hessians[-1].flatten(4).flatten(2, 3).diagonal(dim1=2, dim2=3).sum(2)
        equal(batch_laplacian(energy)(embeddings, mask[:, :2]).detach(), trace, 1e-8)
    equal(*hessians, 1e-8)
    first = torch.autograd.functional.hessian(
        lambda e: last_state(plain)(e, mask[:1, :2])[0, 1], embeddings[:1]
    )
    equal(hessians[1][0, 1], first[0, :, :, 0], 1e-8)


@each_attention
@each_model
def test_jacobian_of_outputs_that_exist(name, attention):
    """More outputs than inputs: forward mode, unless attention or layer norm do not allow it."""
    model, (ids, _) = MODELS[name](attention), tokens()
    embeddings = model.get_input_embeddings()(ids[:, :2]).detach().requires_grad_()

    def wide(embeddings):
        out = model(inputs_embeds=embeddings).last_hidden_state
        return torch.cat([out * k for k in range(1, 7)], 2)  # 96 outputs, 16 inputs

    expected = by_batch(wide, (embeddings.detach(),))
    equal(batch_jacobian_of(wide(embeddings), embeddings).detach(), expected)


def test_jacobian_in_the_class_of_the_output():
    model, (ids, mask) = bert("sdpa"), tokens()
    embeddings = model.get_input_embeddings()(ids).detach()
    jac = batch_jacobian(lambda e, m: model(inputs_embeds=e, attention_mask=m))(embeddings, mask)
    assert type(jac) is type(model(input_ids=ids))
    assert jac.last_hidden_state.shape == (B, TOKENS, WIDTH, TOKENS, WIDTH)
    assert jac.pooler_output.shape == (B, WIDTH, TOKENS, WIDTH)


def test_a_cache_is_no_tensor():
    model, (ids, _) = gpt2("sdpa"), tokens()
    embeddings = model.get_input_embeddings()(ids).detach()
    with pytest.raises(TypeError, match="expected func to return tensors, got DynamicCache"):
        batch_jacobian(lambda e: model(inputs_embeds=e))(embeddings)
    jac = batch_jacobian(lambda e: model(inputs_embeds=e, use_cache=False))(embeddings)
    assert jac.last_hidden_state.shape == (B, TOKENS, WIDTH, TOKENS, WIDTH)


@quiet
@each_attention
@each_model
def test_jacobian_by_parameters(name, attention):
    """Without a mask, by torch.vmap. Most of them look at values of a mask: then a loop runs."""
    model, (ids, mask) = MODELS[name](attention), tokens()
    params = dict(model.named_parameters())

    def func(params, ids, **words):
        return functional_call(model, params, (), {"input_ids": ids, **words})[0].mean(1)[:, :2]

    jac = batch_jacobian(func, in_dims=(None, 0))(params, ids)
    by_all = lambda params, ids, mask: func(params, ids, attention_mask=mask)
    masked = batch_jacobian(by_all, in_dims=(None, 0, 0))(params, ids, mask)
    words = {"allow_unused": True, "materialize_grads": True}
    leaves = list(params.values())
    for row, (jacs, out) in enumerate(
        [(jac, func(params, ids)), (masked, func(params, ids, attention_mask=mask))]
    ):
        grads = torch.autograd.grad(out[row, 1], leaves, **words)
        equal([block[row, 1].detach() for block in jacs.values()], list(grads))


def test_dropout_draws_as_in_a_plain_call():
    model, (ids, _) = gpt2("eager").train(), tokens()
    embeddings = model.get_input_embeddings()(ids).detach()
    func = lambda e: model(inputs_embeds=e).last_hidden_state.mean(1)
    torch.manual_seed(1)
    jac, value = batch_jacobian(func, return_value=True)(embeddings)
    torch.manual_seed(1)
    equal(value.detach(), func(embeddings).detach())
    equal(jac.detach(), by_batch(func, (embeddings,), seed=1))


def test_samples_that_attend_to_each_other_are_noticed():
    model, (ids, _) = bert("eager"), tokens()
    embeddings = model.get_input_embeddings()(ids).detach()
    swapped = lambda e: model(inputs_embeds=e.transpose(0, 1)).last_hidden_state.transpose(0, 1)
    with pytest.raises(BatchMixingError):
        batch_jacobian(swapped)(embeddings)

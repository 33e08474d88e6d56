"""MDLM's transformer and the autoregressive one, against their dense forms."""

import pytest
import torch

from tests.models import oracle
from tests.models.builders import LENGTH, VOCAB, autoregressive_config, diffusion_config, randomised


def draw_tokens():
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))


def assert_values_and_gradients(model, actual, state, expected):
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(actual) / actual.numel()
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("time_conditioned", [True, False])
def test_diffusion_transformer_equals_its_dense_form(time_conditioned):
    config = diffusion_config(time_conditioned)
    model = randomised(config)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    sigma_B = torch.tensor([0.0, 0.3, 4.0])
    expected = oracle.diffusion_transformer(
        state, config, draw_tokens(), sigma_B if time_conditioned else torch.zeros(1)
    )
    assert_values_and_gradients(model, model(draw_tokens(), sigma_B), state, expected)


def test_autoregressive_transformer_equals_its_dense_form():
    config = autoregressive_config()
    model = randomised(config)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = oracle.autoregressive_transformer(state, config, draw_tokens())
    assert_values_and_gradients(model, model(draw_tokens()), state, expected)


@pytest.mark.parametrize("chunks_tokens", [[12], [1] * 12, [5, 1, 4, 2]])
def test_a_cache_continues_where_the_last_tokens_ended(chunks_tokens):
    model = randomised(autoregressive_config())
    tokens_BL = draw_tokens()
    cache = model.new_cache(batch_sequences=3)
    with torch.no_grad():
        chunks = [model(chunk, cache=cache) for chunk in tokens_BL.split(chunks_tokens, dim=1)]
        expected = model(tokens_BL)
    assert cache.length_tokens == LENGTH
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-5, rtol=1e-5)

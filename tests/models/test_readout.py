import torch
import torch.nn.functional as F

from pgm_scale.models.readout import TokenLogProbabilities, TokenNLL, logits
from pgm_scale.models.vocabulary import VocabularyLinear


def draw(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=dtype, requires_grad=True), VocabularyLinear(8, 11).to(dtype)


def test_token_nll_is_log_softmax_without_the_excluded_token():
    hidden, linear = draw()
    targets = torch.randint(10, (2, 5))
    keep = torch.arange(11) != 10
    expected = -torch.log_softmax(linear(hidden)[..., keep], dim=-1).gather(-1, targets[..., None])[..., 0]
    actual = TokenNLL(targets, excluded_id=10)(hidden, linear)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(
        TokenNLL(torch.full_like(targets, 10), 10)(hidden, linear), torch.full((2, 5), torch.inf)
    )

    gradient, expected_gradient = (
        torch.autograd.grad(x.sum(), (hidden, linear.weight), retain_graph=True) for x in (actual, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient[1][10] == 0).all()


def test_token_nll_without_an_excluded_token():
    hidden, linear = draw()
    targets = torch.full((2, 5), 10)
    expected = -torch.log_softmax(linear(hidden), dim=-1)[..., 10]
    torch.testing.assert_close(TokenNLL(targets, None)(hidden, linear), expected)


def test_bf16_hidden_states_give_fp32_readouts():
    hidden, linear = draw(torch.bfloat16)
    targets = torch.zeros(2, 5, dtype=torch.long)
    assert logits(hidden, linear).dtype == torch.float32
    nll = TokenNLL(targets, None)(hidden, linear)
    log_probability = TokenLogProbabilities(targets[..., None])(hidden, linear)[..., 0]
    assert nll.dtype == log_probability.dtype == torch.float32
    expected = torch.log_softmax(linear(hidden).double(), -1)[..., 0].float()
    torch.testing.assert_close(nll, -expected)
    torch.testing.assert_close(log_probability, expected)


def test_log_probabilities_of_some_tokens_are_a_part_of_the_log_softmax():
    hidden, linear = draw()
    ids = torch.randint(11, (2, 5, 3))
    actual = TokenLogProbabilities(ids)(hidden, linear)
    expected = torch.log_softmax(F.linear(hidden, linear.weight, linear.bias), dim=-1).gather(-1, ids)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual[..., 1].sum(), hidden, retain_graph=True),
        torch.autograd.grad(expected[..., 1].sum(), hidden),
    )

import torch

from pgm_scale.models.readout import TokenNLL, logits


def draw(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=dtype, requires_grad=True), torch.nn.Linear(8, 11, dtype=dtype)


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
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, -torch.log_softmax(linear(hidden).double(), -1)[..., 0].float())

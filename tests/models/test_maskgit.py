"""The MaskGIT transformer against an oracle that is written from FACTS 2.1 alone, in fp64, one formula a line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pgm_scale.config import MODEL_SIZES, MaskGITTransformerConfig
from pgm_scale.models import build_model
from pgm_scale.models.dropout import attention_with_dropout
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.models.layers import LOCAL_LAYERS
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.stages import whole_span
from pgm_scale.parallel.construction import build_part, materialize

CODEBOOK, CODES, CLASSES, HIDDEN, HEADS = 21, 9, 5, 24, 3
VOCAB, LENGTH = CODEBOOK + 2, CODES + 1


def config(registers: int = 2, dropout: float = 0.0) -> MaskGITTransformerConfig:
    return MaskGITTransformerConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_blocks=2,
        dropout=dropout,
        num_classes=CLASSES,
        registers=registers,
    )


def randomised(config: MaskGITTransformerConfig) -> Any:
    """With all parameters drawn: at the initial values the gates of all blocks are 0."""
    torch.manual_seed(0)
    model = build_model(config, VOCAB, LENGTH)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if ".ln" in name else 0.0, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """BOS and codes, a third of them masked; classes, the last of them none."""
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(CODEBOOK, (3, LENGTH), generator=generator)
    tokens_BL[:, ::3], tokens_BL[:, 0] = CODEBOOK, CODEBOOK + 1
    return tokens_BL, torch.tensor([0, 3, CLASSES])


def oracle(
    state: dict[str, Tensor], config: MaskGITTransformerConfig, codes: list[int], label: int
) -> Tensor:
    """fp64 logits [codes, codebook + 1] of one image."""
    net = {name: value.double() for name, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ net[f"{name}.weight"].T
        return y + net[f"{name}.bias"] if f"{name}.bias" in net else y

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def rms(x: Tensor) -> Tensor:
        return torch.stack([row / math.sqrt(sum(float(v) ** 2 for v in row) / len(row) + 1e-5) for row in x])

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = rms(linear(f"{name}.wq", x)), rms(linear(f"{name}.wk", x)), linear(f"{name}.wv", x)
        size = HIDDEN // config.num_heads
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(config.num_heads):
                part = slice(h * size, (h + 1) * size)
                scores = [float(q[i, part] @ k[j, part]) / math.sqrt(size) for j in range(len(x))]
                total = sum(math.exp(score) for score in scores)
                heads.append(sum(math.exp(s) / total * v[j, part] for j, s in enumerate(scores)))
            rows.append(torch.cat(heads))  # type: ignore[arg-type]
        return linear(f"{name}.wo", torch.stack(rows))

    condition = net["cls_emb.weight"][label]
    rows = [net["tok_emb.weight"][code] + net["pos_emb.weight"][i] for i, code in enumerate(codes)]
    rows += [net["reg_tokens.weight"][r] for r in range(config.registers)]
    x = torch.stack(rows)
    for i in range(config.num_blocks):
        block = f"transformer.layers.{i}."
        chunks = linear(f"{block}mlp.1", silu(condition)).split(HIDDEN)
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        given = rms(x) * net[f"{block}ln1.weight"] * (1 + scale1) + shift1
        x = x + gate1 * attention(f"{block}attn", given)
        given = rms(x) * net[f"{block}ln2.weight"] * (1 + scale2) + shift2
        units = silu(linear(f"{block}ff.w1", given)) * linear(f"{block}ff.w3", given)
        x = x + gate2 * linear(f"{block}ff.w2", units)
    x = x[: len(codes)]
    shift, scale = linear("last_norm.mlp.1", silu(condition)).split(HIDDEN)
    x = rms(x) * net["last_norm.norm_final.weight"] + net["last_norm.norm_final.bias"]
    return linear("head", x * (1 + scale) + shift)


@pytest.mark.parametrize("registers", [0, 2])
def test_logits_are_those_of_the_oracle(registers: int) -> None:
    model, (tokens_BL, classes_B) = randomised(config(registers)), batch()
    found = model(tokens_BL, classes_B)
    assert found.shape == (3, CODES, CODEBOOK + 1)
    for b in range(3):
        expected = oracle(model.state_dict(), model.config, tokens_BL[b, 1:].tolist(), int(classes_B[b]))
        torch.testing.assert_close(found[b].double(), expected, rtol=1e-4, atol=1e-4)


def test_bos_does_not_matter_and_every_code_class_and_register_does() -> None:
    model, (tokens_BL, classes_B) = randomised(config()), batch()
    expected = model(tokens_BL, classes_B)
    other = tokens_BL.clone()
    other[:, 0] = 0
    assert torch.equal(model(other, classes_B), expected)
    for column in range(1, LENGTH):
        other = tokens_BL.clone()
        other[0, column] = (other[0, column] + 1) % CODEBOOK
        changed = (model(other, classes_B) != expected).any(dim=2)
        assert changed[0].all(), "every code reads every code"
        assert not changed[1:].any(), "another image was read"
    assert (model(tokens_BL, torch.tensor([1, 3, CLASSES])) != expected).any(dim=2)[0].all()
    with torch.no_grad():
        model.reg_tokens.weight[1, 0] += 1.0
    assert (model(tokens_BL, classes_B) != expected).any(dim=2).all()


PUBLISHED_NAMES = [
    *("cls_emb.weight", "tok_emb.weight", "pos_emb.weight", "reg_tokens.weight", "head.weight", "head.bias"),
    *(f"last_norm.{name}" for name in ("norm_final.weight", "norm_final.bias", "mlp.1.weight", "mlp.1.bias")),
    *(f"transformer.layers.0.{name}" for name in ("mlp.1.weight", "mlp.1.bias", "ln1.weight", "ln2.weight")),
    *(f"transformer.layers.0.attn.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
    *(f"transformer.layers.0.ff.{name}.weight" for name in ("w1", "w2", "w3")),
]


def on_meta(size: str, codes: int) -> Any:
    with torch.device("meta"):
        return build_model(MaskGITTransformerConfig(**MODEL_SIZES[size]), 16386, codes + 1)


def test_names_are_the_published_ones() -> None:
    model = on_meta("maskgit-large", 1024)
    found = [name for name in model.state_dict() if "layers." not in name or "layers.0." in name]
    assert sorted(found) == sorted(PUBLISHED_NAMES)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["tok_emb.weight"] == shapes["head.weight"] == (16385, 1024)
    assert shapes["pos_emb.weight"] == (1024, 1024)
    assert shapes["cls_emb.weight"] == (1001, 1024)
    block = "transformer.layers.23."
    assert shapes[f"{block}ff.w1.weight"] == shapes[f"{block}ff.w3.weight"] == (2816, 1024)
    assert shapes[f"{block}ff.w2.weight"] == (1024, 2816)
    assert shapes[f"{block}mlp.1.weight"] == (6144, 1024)


# Width, blocks, units of SwiGLU; codes; parameters. FACTS 1.8 has 480,443,393 and 479,984,641, the published README
# 23M, 69M, 142M and 480M with 16 x 16 codes and 24 x 24 for the last.
SIZES = [
    ("maskgit-tiny", 384, 6, 1024, 256, 23_031_425),
    ("maskgit-small", 512, 12, 1536, 256, 69_393_921),
    ("maskgit-base", 768, 12, 2048, 256, 142_224_641),
    ("maskgit-large", 1024, 24, 2816, 576, 479_984_641),
    ("maskgit-large", 1024, 24, 2816, 1024, 480_443_393),
    ("maskgit-xlarge", 1152, 28, 3072, 256, 692_118_401),
]


@pytest.mark.parametrize(("size", "width", "blocks", "units", "codes", "count"), SIZES)
def test_parameter_counts(size: str, width: int, blocks: int, units: int, codes: int, count: int) -> None:
    modulation, norms, attention, swiglu = 6 * width * (width + 1), 2 * width, 4 * width**2, 3 * width * units
    tables = (16385 + codes + 1001 + 1) * width
    last = 2 * width + 2 * width * (width + 1) + 16385  # norm, its modulation, the bias of the tied linear
    assert blocks * (modulation + norms + attention + swiglu) + tables + last == count
    assert sum(parameter.numel() for parameter in on_meta(size, codes).parameters()) == count


def test_the_token_table_is_one_parameter_whose_gradient_is_of_both_uses() -> None:
    model, (tokens_BL, classes_B) = randomised(config()), batch()
    assert model.head.weight is model.tok_emb.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tok_emb.weight" in names
    assert "head.weight" not in names
    weights = torch.randn(3, CODES, CODEBOOK + 1, generator=torch.Generator().manual_seed(3))
    (model(tokens_BL, classes_B) * weights).sum().backward()

    untied = randomised(config())
    untied.head.weight = torch.nn.Parameter(untied.tok_emb.weight.detach().clone())
    (untied(tokens_BL, classes_B) * weights).sum().backward()
    by_embedding, by_head = untied.tok_emb.weight.grad, untied.head.weight.grad
    assert by_embedding.abs().max() > 1e-3
    assert by_head.abs().max() > 1e-3
    torch.testing.assert_close(model.tok_emb.weight.grad, by_embedding + by_head, rtol=1e-4, atol=1e-5)


def test_a_model_built_without_memory_is_tied_when_it_is_filled() -> None:
    """Its values are those of the published initialisation, and every tensor is placed once."""
    wide = MaskGITTransformerConfig(
        hidden_size=96, num_heads=2, num_blocks=1, num_classes=CLASSES, registers=1
    )
    part: Any = build_part(wide, VOCAB, LENGTH, LOCAL_LAYERS, whole_span(wide), recomputes=False)
    placed: list[torch.nn.Parameter] = []
    materialize(part, 1, torch.device("cpu"), torch.float32, placed.append)
    assert part.head.weight is part.tok_emb.weight
    assert [id(p) for p in placed] == [id(p) for p in part.parameters()]
    directly: Any = build_model(wide, VOCAB, LENGTH)
    for model in (part, directly):
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for table in ("cls_emb", "tok_emb", "pos_emb", "reg_tokens"):
            assert float(state[f"{table}.weight"].std()) == pytest.approx(0.02, rel=0.25), table
        for name in ("mlp.1.weight", "mlp.1.bias"):
            assert not state[f"transformer.layers.0.{name}"].any()
        for name, bound in (
            ("transformer.layers.0.attn.wk.weight", math.sqrt(6 / 192)),
            ("transformer.layers.0.ff.w3.weight", math.sqrt(6 / (96 + 256))),
            ("transformer.layers.0.ff.w2.weight", math.sqrt(6 / (96 + 256))),
            ("last_norm.mlp.1.weight", math.sqrt(6 / 288)),
        ):
            values = state[name]
            assert bound * 0.99 < float(values.abs().max()) <= bound, name
            assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        for name in ("head.bias", "last_norm.mlp.1.bias", "last_norm.norm_final.bias"):
            assert not state[name].any()
        for name in ("transformer.layers.0.ln1", "transformer.layers.0.ln2", "last_norm.norm_final"):
            assert (state[f"{name}.weight"] == 1).all()


def test_the_readout_gets_the_codes_and_excludes_the_mask() -> None:
    model, (tokens_BL, classes_B) = randomised(config()), batch()
    targets = torch.randint(CODEBOOK, (3, CODES), generator=torch.Generator().manual_seed(5))
    found = model(tokens_BL, classes_B, readout=TokenNLL(targets, CODEBOOK))
    log_p = model(tokens_BL, classes_B)[..., :CODEBOOK].log_softmax(dim=-1)
    torch.testing.assert_close(found, -log_p.gather(-1, targets[..., None])[..., 0], rtol=1e-4, atol=1e-4)


def test_dropout_is_a_function_of_the_seed_and_is_off_in_evaluation() -> None:
    model, (tokens_BL, classes_B) = randomised(config(dropout=0.3)), batch()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens_BL, classes_B)

    assert torch.equal(run(1), run(1))
    assert (run(1) != run(2)).any(dim=2).all()
    model.eval()
    assert torch.equal(run(1), run(2))
    plain = randomised(config())
    torch.testing.assert_close(run(1), plain(tokens_BL, classes_B))


@pytest.mark.parametrize("part", ["weights", "projection", "units"])
def test_dropout_falls_on_attention_weights_projections_and_units(part: str, monkeypatch: Any) -> None:
    """Each of the three alone changes the result."""
    model, (tokens_BL, classes_B) = randomised(config(dropout=0.5)), batch()
    expected = randomised(config())(tokens_BL, classes_B)
    for block in model.transformer.layers:
        block.attn.dropout = 0.5 if part in ("weights", "projection") else 0.0
        block.ff.dropout = 0.5 if part == "units" else 0.0
    module = "pgm_scale.models.maskgit"
    if part == "weights":
        monkeypatch.setattr(f"{module}.dropout", lambda x, rate, training: x)
    if part == "projection":
        monkeypatch.setattr(
            f"{module}.attention_with_dropout", lambda q, k, v, rate: _plain_attention(q, k, v)
        )
    assert (model(tokens_BL, classes_B) != expected).any(dim=2).all()


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def test_attention_with_dropout_drops_single_weights_and_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(2, 3, 8, 4, generator=generator) for _ in range(2))
    v = torch.eye(8).expand(2, 3, 8, 8)  # so that the result is the weights
    weights = _plain_attention(q, k, v)
    torch.testing.assert_close(attention_with_dropout(q, k, v, 0.0), weights)
    torch.manual_seed(7)
    draws = torch.stack([attention_with_dropout(q, k, v, 0.25) for _ in range(2000)])
    kept = draws != 0
    torch.testing.assert_close(kept.float().mean(), torch.tensor(0.75), atol=0.005, rtol=0)
    torch.testing.assert_close(draws[kept], (weights / 0.75).expand_as(draws)[kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(draws.mean(dim=0), weights, atol=0.05, rtol=0.1)


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model: MaskGITTransformer = build_model(config(), VOCAB, LENGTH)  # type: ignore[assignment]
        tokens_BL, classes_B = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_BL, classes_B)
    modulations = 2 * 2 * HIDDEN * (2 * 6 * HIDDEN + 2 * HIDDEN)  # once an image, which is left out
    counted = counter.get_total_flops() - modulations
    assert forward_flops_per_token(config(), VOCAB, LENGTH) * 2 * LENGTH == pytest.approx(counted)

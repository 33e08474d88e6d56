"""Files in the published layouts become folders whose logits are those of an independent forward pass."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pgm_scale
from pgm_scale.cli import main
from pgm_scale.convert.importing import ImportRequest, import_checkpoint
from pgm_scale.errors import UserError
from pgm_scale.models.row_logits import row_logits
from pgm_scale.trained_model import TrainedModel, Weights
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.convert import published
from tests.convert.published import LENGTH, VOCAB
from tests.models import oracle
from tests.models.test_maskgit import oracle as maskgit_oracle

MASK, BOS = VOCAB - 1, VOCAB - 2


def convert(source: Path, output: Path, *settings: str, **options: Any) -> tuple[TrainedModel, list[str]]:
    lines: list[str] = []
    import_checkpoint(ImportRequest(str(source), str(output), settings=settings, **options), lines.append)
    return pgm_scale.load(str(output)), lines


def model_config(trained: TrainedModel) -> Any:
    return trained.description.model


def text_rows() -> tuple[Tensor, Tensor]:
    """Tokens [2, L] and groups."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(MASK, (2, LENGTH), generator=generator)
    return tokens_BL, torch.randint(2, (2, LENGTH), generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.01, "the comparison would see nothing"
    assert (found.double() - expected).abs().max() < 1e-4


def assert_is_pgm(trained: TrainedModel, state: dict[str, Tensor]) -> None:
    tokens_BL, groups_BL = text_rows()
    expected = oracle.partition_transformer(state, trained.description.model, tokens_BL, groups_BL)
    assert_close(row_logits(trained.model, tokens_BL, MASK, groups_BL), expected)


def test_pgm_text_by_the_list_of_averages_and_raw(tmp_path: Path) -> None:
    state, average = published.pgm_text_state(1), published.pgm_text_state(2)
    source = published.write_lightning(tmp_path / "pgm.ckpt", state, average)
    trained, lines = convert(source, tmp_path / "ema")
    assert_is_pgm(trained, average)
    assert_is_pgm(convert(source, tmp_path / "raw", weights="weight")[0], state)
    description, origin = trained.description, trained.description.origin
    assert description.length_tokens == LENGTH
    assert (model_config(trained).num_heads, model_config(trained).condition_size) == (2, published.CONDITION)
    vocabulary = description.vocabulary
    assert (vocabulary.size, vocabulary.mask_id, vocabulary.bos_id) == (VOCAB, MASK, BOS)
    assert (origin.source, origin.step, origin.weights) == ("pgm.ckpt (pgm-text)", 50_000, "ema")
    assert origin.checkpoint_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    tokenizer = trained.tokenizer_path.read_bytes()
    assert tokenizer.decode() == published.fast_tokenizer().backend_tokenizer.to_str()
    assert description.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()
    assert any(line.startswith("parity: largest logit difference 0 ") for line in lines)
    parameters = sum(p.numel() for p in trained.model.parameters())
    (summary,) = (
        line for line in lines if f"63 tensors, {parameters:,} parameters, averaged weights" in line
    )
    assert "step 50,000" in summary


def test_pgm_text_distilled_with_another_layout_of_hyper_parameters(tmp_path: Path) -> None:
    state = published.pgm_text_state()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    content = published.lightning_content(
        compiled, state, {"parameterization": {"name": "sdtt"}, "tokenizer": {"name": "gpt2-large"}}
    )
    source = published.save(content, tmp_path / "pgm_sdtt.ckpt")
    trained, lines = convert(source, tmp_path / "out", f"length_tokens={LENGTH}")
    assert_is_pgm(trained, state)
    assert trained.description.tokenizer_sha256 is None
    assert "--tokenizer" in lines[-1]


@pytest.mark.parametrize("mode", ["learn", "learn+freqs+mean"])
def test_pgm_queries_are_read_from_the_hyper_parameters(tmp_path: Path, mode: str) -> None:
    state = published.pgm_text_state()
    source = published.write_lightning(tmp_path / "pgm.ckpt", state, pre_query_mode=mode)
    trained, _ = convert(source, tmp_path / "out")
    assert model_config(trained).group_swap_query == mode
    assert_is_pgm(trained, state)


def test_pgm_with_an_mlp_of_queries(tmp_path: Path) -> None:
    state, d = published.pgm_text_state(), published.HIDDEN
    named = published.linear("decoder.group_swap.query_processor.0", 4 * d, d)
    named = [*named, *published.linear("decoder.group_swap.query_processor.2", d, 4 * d)]
    state = {name: t for name, t in state.items() if "query_processor" not in name} | published.drawn(
        named, 5
    )
    trained, _ = convert(published.write_lightning(tmp_path / "pgm.ckpt", state), tmp_path / "out")
    assert model_config(trained).group_swap_processor == "mlp4"
    assert_is_pgm(trained, state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_pgm_image(tmp_path: Path, prefix: str) -> None:
    state = published.image_pgm_state()
    source = published.write_image(tmp_path / "images.pth", state, prefix)
    trained, _ = convert(source, tmp_path / "out", f"length_tokens={published.GRID_CODES + 1}")
    description = trained.description
    assert (description.vocabulary.mask_id, description.vocabulary.bos_id) == (VOCAB - 2, VOCAB - 1)
    assert description.images is not None
    assert (description.images.grid_side, description.images.side_pixels) == (3, 24)
    assert description.origin.step == 500_400
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(VOCAB - 2, (2, published.GRID_CODES + 1), generator=generator)
    groups_BL = torch.randint(2, tokens_BL.shape, generator=generator)
    groups_BL[:, 0], tokens_BL[:, 0] = 0, VOCAB - 1
    classes_B = torch.tensor([1, published.CLASSES])
    expected = oracle.partition_transformer(state, description.model, tokens_BL, groups_BL, classes_B)
    assert_close(row_logits(trained.model, tokens_BL, VOCAB - 2, groups_BL, classes_B), expected)


def test_maskgit(tmp_path: Path) -> None:
    state = published.maskgit_state()
    source = published.write_image(tmp_path / "ImageNet_256_tiny.pth", state)
    trained, _ = convert(source, tmp_path / "out", "model.num_heads=3")
    codes_BK = torch.randint(VOCAB - 1, (2, published.GRID_CODES), generator=torch.Generator().manual_seed(1))
    tokens_BL = torch.cat([torch.full((2, 1), VOCAB - 1), codes_BK], 1)
    found = trained.model(tokens_BL, torch.tensor([2, published.CLASSES]))
    for row, label in enumerate((2, published.CLASSES)):
        expected = maskgit_oracle(state, model_config(trained), codes_BK[row].tolist(), label)
        assert_close(found[row], expected)


def mdlm_sources(folder: Path, state: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Path]:
    """Every file that holds an MDLM, with the state that it should become: the average where there is one."""
    once, twice = (published.prefixed(state, prefix) for prefix in ("backbone.", "backbone.backbone."))
    hf, sdtt = published.MDLM_HF_CONFIG, published.SDTT_CONFIG
    return {
        "mdlm": published.write_lightning(folder / "mdlm.ckpt", state, average),
        "mdlm-hf": published.write_hugging_face(folder / "hf", once, hf),
        "mdlm-hf bin": published.write_hugging_face(folder / "hf_bin", once, hf, binary=True),
        "sdtt": published.write_hugging_face(folder / "sdtt", once, sdtt),
        "sdtt wrapped": published.write_hugging_face(folder / "wrapped", twice, sdtt),
    }


def test_mdlm_in_all_its_forms(tmp_path: Path) -> None:
    state, average = published.mdlm_state(1), published.mdlm_state(2)
    tokens_BL, _ = text_rows()
    for name, source in mdlm_sources(tmp_path, state, average).items():
        trained, _ = convert(source, tmp_path / f"{name} out")
        origin, is_lightning = trained.description.origin, name == "mdlm"
        assert f"({name.split()[0]})" in origin.source
        assert origin.weights == ("ema" if is_lightning else "weight")
        weights = source if is_lightning else next(source.glob("*model.*"))
        assert origin.checkpoint_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
        expected = oracle.diffusion_transformer(
            average if is_lightning else state, trained.description.model, tokens_BL, torch.zeros(2)
        )
        assert trained.description.length_tokens == LENGTH
        assert_close(trained.model(tokens_BL), expected)


def test_ar(tmp_path: Path) -> None:
    state = published.ar_state()
    trained, lines = convert(published.write_lightning(tmp_path / "ar.ckpt", state), tmp_path / "out")
    assert "no averaged weights" in lines[0]
    tokens_BL, _ = text_rows()
    expected = oracle.autoregressive_transformer(state, trained.description.model, tokens_BL)
    assert_close(trained.model(tokens_BL), expected)


def test_llamagen_vq(tmp_path: Path) -> None:
    state = published.vq_state()
    average = {name: tensor + 0.25 for name, tensor in state.items()}
    source = published.save({"model": state, "ema": average, "steps": 7}, tmp_path / "vq.pt")
    cases: list[tuple[Weights, dict[str, Tensor]]] = [("ema", average), ("weight", state)]
    for weights, expected in cases:
        output = tmp_path / weights
        lines: list[str] = []
        import_checkpoint(ImportRequest(str(source), str(output), weights=weights), lines.append)
        found = VQTokenizer.load(output).model.state_dict()
        assert set(found) == set(expected) - {"quantize.codebook_used"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert "step 7" in lines[-1]


def test_bert_rows_have_berts_ids(tmp_path: Path) -> None:
    parameters = published.mdlm_parameters(vocab=30_522, d=64, blocks=1)
    state = published.with_rotary(published.drawn(parameters, 1), "sigma_map.mlp.2.bias")
    source = published.write_lightning(tmp_path / "lm1b.ckpt", state, length=128)
    vocabulary = convert(source, tmp_path / "out")[0].description.vocabulary
    assert (vocabulary.mask_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (103, 101, 102, 0)


def refused(source: Path, *settings: str, **options: Any) -> str:
    """The message; and that nothing was written."""
    output = source.parent / "refused"
    with pytest.raises(UserError) as caught:
        convert(source, output, *settings, **options)
    assert not output.exists()
    assert not list(source.parent.glob(".*writing"))
    return str(caught.value)


@pytest.mark.fault(25)
def test_all_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = published.pgm_text_state()
    del state["decoder.layers.0.attn_q.weight"]
    state["encoder.blocks.1.norm1.weight"] = torch.ones(7)
    state["output_layer.linear.bias"] = state["output_layer.linear.bias"].double()
    state["extra.weight"] = torch.ones(3)
    source = published.write_lightning(tmp_path / "pgm.ckpt", state)
    message = refused(source)
    for line in (
        "decoder.layers.0.attn_q.weight: missing, the model has (128, 128)",
        "encoder.blocks.1.norm1.weight: shape (7,), the model has (128,)",
        "output_layer.linear.bias: of type torch.float64",
        "extra.weight: unknown to the model",
    ):
        assert line in message
    assert message.count("\n") == 4
    message = refused(source, strict=False)
    assert "extra.weight" not in message
    assert "attn_q.weight: missing" in message


def test_unknown_keys_alone_can_be_left_out(tmp_path: Path) -> None:
    state = published.pgm_text_state()
    source = published.write_lightning(tmp_path / "pgm.ckpt", state | {"teacher.weight": torch.ones(3)})
    assert "teacher.weight" in refused(source)
    trained, lines = convert(source, tmp_path / "out", strict=False)
    assert "left out: teacher.weight: unknown to the model" in lines
    assert_is_pgm(trained, state)


def test_other_frequencies_and_an_untied_head_are_other_models(tmp_path: Path) -> None:
    state = published.pgm_text_state()
    state["rotary_emb.inv_freq"] = state["rotary_emb.inv_freq"] * 1.01
    assert "rotary_emb.inv_freq: not what" in refused(published.write_lightning(tmp_path / "a.ckpt", state))
    state = published.maskgit_state()
    state["head.weight"] = state["head.weight"] + 1e-6
    source = published.write_image(tmp_path / "b.pth", state)
    assert "head.weight: not what" in refused(source, "model.num_heads=3")


def test_averages_that_do_not_fit_the_order(tmp_path: Path) -> None:
    state = published.pgm_text_state()
    average = dict(state)
    del average["output_layer.norm_final.weight"]
    source = published.write_lightning(tmp_path / "short.ckpt", state, average)
    assert "has 62 tensors, the model 63" in refused(source)
    assert "--weights weight" in refused(source)
    first = {name: average[name] for name in list(average)[2:3]}
    swapped = first | {"output_layer.norm_final.weight": torch.ones(128)} | average
    source = published.write_lightning(tmp_path / "swapped.ckpt", state, swapped)
    assert "ema.shadow_params[0], vocab_embed.embedding: shape" in refused(source)
    assert_is_pgm(convert(source, tmp_path / "raw", weights="weight")[0], state)


def test_an_average_that_is_no_list_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    content = published.lightning_content(published.mdlm_state(), None, published.hydra_config())
    source = published.save(content | {"ema": {"decay": 0.9}}, tmp_path / "a.ckpt")
    assert "has 0 tensors, the model 30" in refused(source)
    convert(source, tmp_path / "raw", weights="weight")


def test_names_of_tensors_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    state = published.mdlm_state() | {"\x1b[2J\nevil": torch.ones(1)}
    assert "\x1b" not in refused(published.write_lightning(tmp_path / "a.ckpt", state))
    assert "\x1b" not in refused(published.save({"\x1b[2J": torch.ones(1)}, tmp_path / "b.pt"))


def test_tensors_that_tell_no_size(tmp_path: Path) -> None:
    for shape in ((128,), (0, 128), ()):
        state = published.mdlm_state() | {"vocab_embed.embedding": torch.ones(shape)}
        source = published.write_lightning(tmp_path / "a.ckpt", state)
        assert "a.ckpt: vocab_embed.embedding, which tells the size of the model, has shape" in refused(
            source
        )
    state = published.mdlm_state() | {"blocks.99999999999999999999.norm1.weight": torch.ones(1)}
    assert "missing" in refused(published.write_lightning(tmp_path / "b.ckpt", state))
    ring: dict[str, Any] = {}
    ring["config"] = ring
    content = published.lightning_content(published.mdlm_state(), None, ring)
    assert "c.ckpt: its hyper-parameters" in refused(published.save(content, tmp_path / "c.ckpt"))


def test_a_key_twice_but_for_its_prefix(tmp_path: Path) -> None:
    state = published.mdlm_state()
    doubled = state | {"_orig_mod.vocab_embed.embedding": torch.zeros(VOCAB, 128)}
    assert "in it twice" in refused(published.write_lightning(tmp_path / "a.ckpt", doubled))


def test_formats_and_settings_that_do_not_fit(tmp_path: Path) -> None:
    source = published.write_lightning(tmp_path / "pgm.ckpt", published.pgm_text_state())
    assert "is not mdlm but pgm-text" in refused(source, format_name="mdlm")
    assert "is not llamagen-vq but pgm-text" in refused(source, format_name="llamagen-vq")
    message = refused(source, "model.heads=2", "model.num_heads=0", "origin.step=3", "length_tokens=x")
    assert all(key in message for key in ("model.heads", "origin.step", "length_tokens"))
    assert "num_heads" in refused(source, "model.num_heads=3")
    assert "inv_freq" in refused(source, "model.num_heads=4"), "its frequencies are of two heads"
    assert "length_tokens" in refused(source, "length_tokens=0")
    assert "length_tokens" in refused(source, "length_tokens=99999999999")
    assert "vocabulary" in refused(source, "vocabulary.mask_id=24")
    assert "vocab_embed.embedding: shape" in refused(source, "vocabulary.size=25")
    images = published.write_image(tmp_path / "images.pth", published.image_pgm_state())
    assert "length_tokens: 12" in refused(images, "length_tokens=12")


def test_impossible_hyper_parameters_can_be_set_right(tmp_path: Path) -> None:
    for length in (-5, 1 << 50):
        source = published.write_lightning(tmp_path / "a.ckpt", published.mdlm_state(), length=length)
        assert "length_tokens" in refused(source)
    assert convert(source, tmp_path / "set", "length_tokens=12")[0].description.length_tokens == 12


def test_an_output_that_exists_and_a_source_that_does_not(tmp_path: Path) -> None:
    source = published.write_lightning(tmp_path / "pgm.ckpt", published.pgm_text_state())
    convert(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="not empty"):
        convert(source, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "cannot read" in refused(tmp_path / "missing.ckpt")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused(empty)
    assert "--to FORMAT" in refused(tmp_path / "out")
    other = published.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    assert "no state_dict" in refused(other)
    strange = published.save({"state_dict": {"a.weight": torch.ones(2)}}, tmp_path / "strange.pt")
    assert "none of the formats" in refused(strange)


def test_a_given_tokenizer(tmp_path: Path) -> None:
    source = published.write_lightning(tmp_path / "pgm.ckpt", published.pgm_text_state())
    given = tmp_path / "tokenizer.json"
    published.fast_tokenizer().backend_tokenizer.save(str(given))
    trained, _ = convert(source, tmp_path / "out", tokenizer=str(given))
    assert trained.tokenizer_path.read_bytes() == given.read_bytes()
    larger = published.fast_tokenizer()
    larger.add_tokens([f"more{number}" for number in range(1000)])
    larger.backend_tokenizer.save(str(given))
    assert "give the one it was trained with" in refused(source, tokenizer=str(given))
    given.write_text("{}")
    assert "tokenizer.json" in refused(source, tokenizer=str(given))
    assert "cannot read" in refused(source, tokenizer=str(tmp_path / "none.json"))


def test_the_vq_tokenizer_of_an_image_model(tmp_path: Path) -> None:
    vq = published.save({"model": published.vq_state()}, tmp_path / "vq.pt")
    source = published.write_image(tmp_path / "images.pth", published.image_pgm_state())
    length = f"length_tokens={published.GRID_CODES + 1}"
    trained, _ = convert(source, tmp_path / "out", length, tokenizer=str(vq))
    description = trained.description
    assert description.tokenizer_sha256 == VQTokenizer.load(tmp_path / "out").sha256
    assert description.images is not None
    assert description.images.side_pixels == 3 * 2, "this one has two pixels a code"
    arguments = ["--classes", "1,2", "--steps", "3", "--out", str(tmp_path / "grid.png")]
    assert main(["sample", str(tmp_path / "out"), *arguments]) == 0
    assert (tmp_path / "grid.png").exists()
    source = published.write_image(tmp_path / "maskgit.pth", published.maskgit_state())
    smaller = published.vq_state()
    smaller["quantize.embedding.weight"] = smaller["quantize.embedding.weight"][:-1].clone()
    other = published.save({"model": smaller}, tmp_path / "other.pt")
    assert "--tokenizer has 21 codes, the model 22" in refused(
        source, "model.num_heads=3", tokenizer=str(other)
    )


def test_a_converted_model_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published.write_lightning(tmp_path / "pgm.ckpt", published.pgm_text_state())
    convert(source, tmp_path / "out")
    assert main(["sample", str(tmp_path / "out"), "--steps", "10", "--prompt", "w3"]) == 0
    assert "w3" in capsys.readouterr().out


def test_the_card_tells_the_source(tmp_path: Path) -> None:
    source = published.write_lightning(tmp_path / "pgm.ckpt", published.pgm_text_state())
    convert(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pgm.ckpt (pgm-text)" in card
    assert re.search(r"\| SHA-256 of its weights \| [0-9a-f]{64} \|", card)

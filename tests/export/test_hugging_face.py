"""transformers' own classes over exported folders: with our package, and with the code of the folder alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import pgm_scale.hugging_face
from pgm_scale.errors import UserError
from pgm_scale.export.hugging_face import PGMScaleConfig, PGMScaleModel
from pgm_scale.export.parity import probe_logits
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import class_count
from pgm_scale.trained_model import TrainedModel
from tests.export.runs import KINDS, write_run
from tests.export.test_run import samples


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainedModel, Path]]:
    root, found = tmp_path_factory.mktemp("exported"), {}
    for kind in KINDS:
        run = write_run(root / kind, kind)
        shard_bytes = 4000 if kind in ("pgm", "maskgit") else 10**9
        request = ExportRequest(str(root / f"{kind}-model"), max_shard_bytes=shard_bytes)
        export_run(str(run), request, lambda _: None)
        found[kind] = (load_run(run), root / f"{kind}-model")
    return found


def as_trained(model: PGMScaleModel, trained: TrainedModel, folder: Path) -> TrainedModel:
    return TrainedModel(model.backbone, trained.description, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_is_the_run(
    exported: dict[str, tuple[TrainedModel, Path]], tmp_path: Path, kind: str
) -> None:
    trained, folder = exported[kind]
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, PGMScaleModel)
    assert not model.training
    assert model.dtype == torch.float32
    expected = probe_logits(trained)
    assert torch.equal(probe_logits(as_trained(model, trained, folder)), expected)
    classes = None if trained.description.images is None else torch.arange(3)
    assert np.array_equal(
        model.sample(count=3, class_ids=classes, seed=3, batch_sequences=2), samples(trained)
    )

    model.save_pretrained(tmp_path / "again", max_shard_size="3KB")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(probe_logits(as_trained(again, trained, folder)), expected)
    assert pgm_scale.load(str(tmp_path / "again")).description == trained.description

    rounded = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    ours = pgm_scale.load(str(folder), dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(probe_logits(as_trained(rounded, trained, folder)), probe_logits(ours))


def test_forward_of_an_autoregressive_model(exported: dict[str, tuple[TrainedModel, Path]]) -> None:
    trained, folder = exported["ar"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids_BL = torch.randint(0, 23, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = model(ids_BL).logits
    assert torch.equal(logits, trained.model(ids_BL))
    padded = torch.tensor([[1] * 10 + [0] * 6] * 3)
    assert torch.equal(model(ids_BL, attention_mask=padded, return_dict=False)[0], logits)
    with pytest.raises(UserError, match="only an autoregressive model takes padding, on the right"):
        model(ids_BL, attention_mask=padded.flip(1))
    greedy = model.generate(ids_BL[:, :4], do_sample=False, max_length=9)
    expected = ids_BL[:, :4]
    for _ in range(5):
        expected = torch.cat([expected, trained.model(expected)[:, -1:].argmax(-1)], dim=1)
    alive = (expected == 0).long().cumsum(1).sub((expected == 0).long()) == 0  # up to the first end of text
    alive[:, :5] = True
    assert greedy.shape[1] <= 9
    assert torch.equal(
        greedy[alive[:, : greedy.shape[1]]], expected[:, : greedy.shape[1]][alive[:, : greedy.shape[1]]]
    )


def test_forward_of_mdlm(exported: dict[str, tuple[TrainedModel, Path]]) -> None:
    trained, folder = exported["mdlm"]
    model = AutoModel.from_pretrained(folder)
    ids_BL = torch.randint(0, 24, (2, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids_BL, attention_mask=torch.ones(2, 11)).logits, trained.model(ids_BL))
    with pytest.raises(UserError, match="only an autoregressive model takes padding"):
        model(ids_BL, attention_mask=torch.tensor([[1] * 10 + [0]] * 2))
    with pytest.raises(UserError, match="group_ids are for a PGM"):
        model(ids_BL, group_ids=torch.zeros(2, 11))
    with pytest.raises(UserError, match=r"input_ids are \(2, 17\); give rows of at most 16 tokens"):
        model(torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(UserError, match=r"is no causal language model; load it with transformers.AutoModel"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["pgm", "image_pgm"])
def test_a_pgm_predicts_each_position_from_the_other_group(
    exported: dict[str, tuple[TrainedModel, Path]], kind: str
) -> None:
    """Oracle: one forward pass a row and group, over lists made by hand."""
    from pgm_scale.models.partition_transformer import PartitionInputs
    from pgm_scale.models.segments import Segments

    trained, folder = exported[kind]
    model, description = AutoModel.from_pretrained(folder), trained.description
    registers = description.model.registers  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    mask_id = description.vocabulary.mask_id
    ids_BL = torch.randint(0, mask_id, (3, description.length_tokens), generator=generator)
    ids_BL[torch.rand(ids_BL.shape, generator=generator) < 0.4] = mask_id
    ids_BL[2] = ids_BL[2].clamp(max=mask_id - 1)  # a row without masks: group 1 is empty
    classes = torch.tensor([0, 2, 3]) if class_count(model.backbone) else None
    groups = {"given": torch.randint(0, 2, ids_BL.shape, generator=generator), "masks": None}
    for group_ids in groups.values():
        logits = model(ids_BL, group_ids=group_ids, class_ids=classes).logits
        of = (ids_BL == mask_id).long() if group_ids is None else group_ids
        for row in range(3):
            for group in (0, 1):
                queries = [i for i in range(ids_BL.shape[1]) if of[row, i] == group]
                known = [
                    i for i in range(ids_BL.shape[1]) if of[row, i] != group and ids_BL[row, i] != mask_id
                ]
                fronts = [r for r in range(registers) if (r < registers // 2) == (group == 0)]
                if not queries:
                    continue
                tokens = [-1 - r for r in fronts] + ids_BL[row, known].tolist()
                inputs = PartitionInputs(
                    torch.tensor(tokens, dtype=torch.long),
                    torch.tensor(fronts + [registers + i for i in known], dtype=torch.long),
                    Segments.of([len(tokens)]),
                    torch.tensor([registers + i for i in queries]),
                    Segments.of([len(queries)]),
                    None if classes is None else classes[row : row + 1],
                )
                torch.testing.assert_close(logits[row, queries], trained.model(inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="group_ids are"):
        model(ids_BL, group_ids=torch.zeros(3, 2), class_ids=classes)
    with pytest.raises(UserError, match="0 or 1"):
        model(ids_BL, group_ids=torch.full_like(ids_BL, 2), class_ids=classes)


def test_classes_and_noise_levels_are_asked_for(exported: dict[str, tuple[TrainedModel, Path]]) -> None:
    for kind in ("maskgit", "image_pgm"):
        model = AutoModel.from_pretrained(exported[kind][1])
        ids_BL = torch.full((2, 17), 3)
        with pytest.raises(
            UserError, match=r"the model has 3 classes; give class_ids, 0 to 2, or 3 for none"
        ):
            model(ids_BL)
        assert model(ids_BL, class_ids=torch.tensor([0, 3])).logits.shape[:1] == (2,)
    model = AutoModel.from_pretrained(exported["d3pm"][1])
    with pytest.raises(UserError, match="sigma is for time-conditioned models"):
        model(torch.zeros(2, 5, dtype=torch.long))
    sigma = torch.tensor([0.1, 2.0])
    ids_BL = torch.zeros(2, 5, dtype=torch.long)
    assert torch.equal(model(ids_BL, sigma=sigma).logits, exported["d3pm"][0].model(ids_BL, sigma))
    with pytest.raises(UserError, match="the sampler has no temprature"):
        model.sample(temprature=2.0)
    with pytest.raises(UserError, match=r"sampler.kind halton does not fit"):
        model.sample(kind="halton")


def test_the_small_files(exported: dict[str, tuple[TrainedModel, Path]]) -> None:
    for trained, folder in exported.values():
        generation, description = GenerationConfig.from_pretrained(folder), trained.description
        assert generation.sampler["kind"] == description.sampler.kind
        assert generation.max_length == description.length_tokens
        assert AutoConfig.from_pretrained(folder).vocab_size == description.vocabulary.size
        if description.images is not None:
            assert not (folder / "tokenizer_config.json").exists()
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("w3 w1")["input_ids"] == [3, 1]
        assert tokenizer.mask_token_id == description.vocabulary.mask_id
        assert tokenizer.bos_token_id == description.vocabulary.bos_id
        assert tokenizer.decode([2, 23]) == "w2 [MASK]"


def test_a_config_of_nothing_is_one() -> None:
    """transformers compares with it."""
    assert PGMScaleConfig().to_dict()["description"] is None
    with pytest.raises(UserError, match=r"config.json is damaged: description: expected a mapping"):
        PGMScaleModel(PGMScaleConfig())


_ALONE = """
import sys
for name in ("pgm_scale", "data_prep", "deepspeed", "megatron", "streaming", "accelerate", "pyarrow", "PIL"):
    sys.modules[name] = None  # as if it were not installed
import torch
from transformers import AutoModel
torch.set_num_threads(1)
for folder, inputs, out in zip(*[iter(sys.argv[1:])] * 3):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(inputs)
    sampled = model.sample(count=2, class_ids=inputs.get("class_ids"), seed=3)
    torch.save([model(**inputs).logits.detach(), sampled], out)
assert not any(name.startswith("pgm_scale.") for name in sys.modules)
"""


def test_the_code_of_the_folder_is_enough(
    exported: dict[str, tuple[TrainedModel, Path]], tmp_path: Path
) -> None:
    """In a process that cannot import this package, nor what training needs."""
    words, expected = [], {}
    generator = torch.Generator().manual_seed(0)
    for kind, (trained, folder) in exported.items():
        description = trained.description
        inputs = {"input_ids": torch.randint(0, 10, (2, description.length_tokens), generator=generator)}
        if description.images is not None:
            inputs["class_ids"] = torch.tensor([0, 3])
        if getattr(description.model, "time_conditioned", False):
            inputs["sigma"] = torch.tensor([0.3, 1.0])
        torch.save(inputs, tmp_path / f"{kind}.inputs")
        model = AutoModel.from_pretrained(folder)
        sampled = model.sample(count=2, class_ids=inputs.get("class_ids"), seed=3)
        expected[kind] = (model(**inputs).logits, sampled)
        words += [str(folder), str(tmp_path / f"{kind}.inputs"), str(tmp_path / f"{kind}.out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "alone.py").write_text(_ALONE)
    subprocess.run(
        [sys.executable, "-P", str(tmp_path / "alone.py"), *words],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=200,
    )
    for kind, (logits, sampled) in expected.items():
        found = torch.load(tmp_path / f"{kind}.out")
        assert torch.equal(found[0], logits), kind
        assert torch.equal(found[1], sampled), kind


def test_registered_classes_need_no_code_in_the_folder(
    exported: dict[str, tuple[TrainedModel, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported["pgm"][1], tmp_path / "m")
    tree = json.loads((folder / "config.json").read_text())
    del tree["auto_map"]
    (folder / "config.json").write_text(json.dumps(tree))
    for file in folder.glob("*.py"):
        file.unlink()
    assert isinstance(AutoModel.from_pretrained(folder), PGMScaleModel)

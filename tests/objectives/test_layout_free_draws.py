"""What an objective builds for a sequence is the same bits, whichever rank and micro-batch the sequence is in."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.config import (
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    ImagePGMObjectiveConfig,
    MDLMObjectiveConfig,
    ObjectiveConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
)
from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.data.order import BatchPlan
from pgm_scale.models.segments import Segments
from pgm_scale.objectives import DrawSpec, build_objective
from pgm_scale.objectives.pgm import PGMInputs

SEQUENCES, LENGTH, STEP = 12, 10, 3
VOCABULARY = Vocabulary(size=9, mask_id=4, bos_id=0, eos_id=0, pad_id=1)
MODEL = PartitionTransformerConfig(num_classes=3, registers=2)  # of images
SPEC = DrawSpec(seed=5, global_batch_sequences=SEQUENCES)

CONFIGS: dict[str, ObjectiveConfig] = {
    **{f"pgm {form}": PGMObjectiveConfig(form=form) for form in ("published", "bounded", "count")},
    "image pgm": ImagePGMObjectiveConfig(label_drop=0.5),
    "mdlm": MDLMObjectiveConfig(),
    "mdlm, discrete": MDLMObjectiveConfig(diffusion_steps=9, loss="low_variance"),
    "complementary": ComplementaryMDLMObjectiveConfig(),
    "d3pm": D3PMObjectiveConfig(diffusion_steps=9, cross_entropy_weight=0.1),
    "d3pm, substitution": D3PMObjectiveConfig(diffusion_steps=9, substitution=True),
}


def samples(numbers_B: np.ndarray) -> TokenBatch:
    """The sequences of these sample numbers: their tokens, some of them pads and mask ids, depend on it alone."""
    tokens_BL = np.stack([np.random.default_rng(n).integers(0, VOCABULARY.size, LENGTH) for n in numbers_B])
    valid_BL = np.arange(LENGTH) < (LENGTH - numbers_B % 3)[:, None]
    return TokenBatch(tokens_BL, valid_BL, numbers_B, labels_B=numbers_B % MODEL.num_classes)


def layout(data_ranks: int, micro_batch_sequences: int) -> list[np.ndarray]:
    """Sample numbers of every micro-batch of one step, as the trainer cuts it over data-parallel ranks."""
    plans = [BatchPlan(SEQUENCES, micro_batch_sequences, rank, data_ranks) for rank in range(data_ranks)]
    return [plan.sample_numbers(STEP, micro) for plan in plans for micro in range(plan.micro_steps)]


LAYOUTS = [
    layout(ranks, micro)
    for ranks in range(1, SEQUENCES + 1)
    for micro in range(1, SEQUENCES + 1)
    if SEQUENCES % (ranks * micro) == 0
]
GLOBAL_BATCH = np.arange(STEP * SEQUENCES, (STEP + 1) * SEQUENCES)


@st.composite
def any_cuts(draw: st.DrawFn) -> list[np.ndarray]:
    """The global batch in any order, cut anywhere."""
    cuts = draw(st.sets(st.integers(1, SEQUENCES - 1)))
    return np.split(np.array(draw(st.permutations(GLOBAL_BATCH.tolist()))), sorted(cuts))


def arrays(inputs: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Every tensor and array of nested inputs, by name; segments as their lengths, numbers left out."""
    found: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(inputs):
        name, value = prefix + field.name, getattr(inputs, field.name)
        if isinstance(value, Segments):
            found[name] = np.array(value.lengths)
        elif dataclasses.is_dataclass(value):
            found |= arrays(value, f"{name}.")
        elif isinstance(value, torch.Tensor | np.ndarray):
            found[name] = np.asarray(value)
    return found


def by_sequence(inputs: Any, sequences: int) -> list[dict[str, np.ndarray]]:
    """What the inputs hold of each sequence of their batch.

    PGM's are packed, all of a sequence before all of the next; the others are one copy of the batch or several.
    """

    def share(values: np.ndarray) -> np.ndarray:
        if isinstance(inputs, PGMInputs):
            return values.reshape(sequences, -1)
        return values.reshape(-1, sequences, *values.shape[1:]).swapaxes(0, 1)

    shares = {name: share(values) for name, values in arrays(inputs).items()}
    owner = shares.pop("rows.sequence_S")  # a place in the batch: all that may depend on the cut
    np.testing.assert_array_equal(owner, np.broadcast_to(np.arange(sequences)[:, None], owner.shape))
    return [{name: values[b] for name, values in shares.items()} for b in range(sequences)]


def built(config: ObjectiveConfig, inputs_of: str, numbers_B: np.ndarray) -> dict[int, dict[str, np.ndarray]]:
    """What the objective builds for a batch of these samples, by sample number."""
    inputs = getattr(build_objective(config, VOCABULARY, MODEL), inputs_of)(samples(numbers_B), SPEC)
    return dict(zip(numbers_B.tolist(), by_sequence(inputs, len(numbers_B)), strict=True))


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (values.dtype, values.shape), name
        assert actual[name].tobytes() == values.tobytes(), name


@pytest.mark.fault(23)
@pytest.mark.parametrize("inputs_of", ["training_inputs", "validation_inputs"])
@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=30, deadline=None)
@given(micro_batches=st.sampled_from(LAYOUTS) | any_cuts())
def test_inputs_of_a_sequence_do_not_depend_on_how_the_batch_is_cut(
    kind: str, inputs_of: str, micro_batches: list[np.ndarray]
) -> None:
    whole = built(CONFIGS[kind], inputs_of, GLOBAL_BATCH)
    pieces: dict[int, dict[str, np.ndarray]] = {}
    for numbers_B in micro_batches:
        pieces |= built(CONFIGS[kind], inputs_of, numbers_B)
    assert pieces.keys() == whole.keys()
    for number, expected in whole.items():
        assert_same_bits(pieces[number], expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_sample_number_or_seed_is_another_draw(kind: str) -> None:
    """Without this, inputs that ignore their draws would pass the test above."""
    objective, batch = build_objective(CONFIGS[kind], VOCABULARY, MODEL), samples(GLOBAL_BATCH)
    later = dataclasses.replace(batch, sample_numbers_B=GLOBAL_BATCH + SEQUENCES)
    drawn = [
        arrays(objective.training_inputs(batch, SPEC)),
        arrays(objective.training_inputs(later, SPEC)),
        arrays(objective.training_inputs(batch, dataclasses.replace(SPEC, seed=6))),
    ]
    (model_tokens,) = drawn[0].keys() & {"partition.tokens_T", "noisy_BL", "tokens_SL"}
    assert len({inputs[model_tokens].tobytes() for inputs in drawn}) == 3

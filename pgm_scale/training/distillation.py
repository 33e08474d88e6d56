"""The rounds of a distillation (FACTS 5): whose weights teach, and what starts anew with a round.

Round r trains steps r * round_steps to (r + 1) * round_steps - 1. Its teacher is what the run was at the round's
first step, of which the run keeps a checkpoint: that of step 0 holds the weights of the first teacher, with which
the student starts. So a resume finds every teacher in its own folder, in any layout, and the first may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgm_scale.checkpoint.peers import Peers
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig, SDTTObjectiveConfig, to_mapping
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.objectives.sdtt import SDTTObjective
from pgm_scale.parallel.frozen import FrozenModel
from pgm_scale.run_folder import check_fits_run
from pgm_scale.trained_model import ModelDescription
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.weight_source import WeightSource, open_weights


class Distillation:
    """The teacher of an `SDTTObjective` from round to round."""

    def __init__(
        self,
        config: SDTTObjectiveConfig,
        objective: SDTTObjective,
        teacher: FrozenModel,
        checkpointer: Checkpointer,
        first_step: int,
    ) -> None:
        """Collective: a run that goes on inside a round gets back the round's teacher.

        Raises:
            UserError: the checkpoint that holds the teacher is gone or bad.
        """
        self.config, self.objective, self.checkpointer = config, objective, checkpointer
        self.teacher = objective.teacher = teacher
        self.resume(first_step)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        objective: object,
        checkpointer: Checkpointer,
        vocab_size: int,
        length: int,
        stage_units: Sequence[int],
        first_step: int,
    ) -> Distillation | None:
        """That of a run; None for an objective without a teacher."""
        if not isinstance(objective, SDTTObjective):
            return None
        teacher = FrozenModel.build(config, vocab_size, length, checkpointer.engine.mesh, stage_units)
        return cls(objective.config, objective, teacher, checkpointer, first_step)

    def resume(self, step: int) -> None:
        """Collective: get back the teacher of the round in which the run goes on at `step`.

        Raises:
            UserError: the checkpoint that holds it is gone or bad.
        """
        if not self.starts_at(step):  # else `begin_step` takes it
            self._restore(self.round_of(step) * self.config.round_steps)

    def starts_at(self, step: int) -> bool:
        """Whether a round starts there: a run must have a checkpoint of it."""
        return step % self.config.round_steps == 0

    def round_of(self, step: int) -> int:
        return step // self.config.round_steps

    def begin_step(self, step: int) -> str | None:
        """Collective: if a round starts, hand over to its teacher, and start anew what the round is to.

        Returns:
            what begins, for people.
        """
        if not self.starts_at(step):
            return None
        checkpointer, ema = self.checkpointer, self.checkpointer.ema
        state = checkpointer.engine.state
        takes_average = step > 0 and self.config.next_teacher == "ema" and ema is not None
        self.teacher.take(state, ema.values if takes_average and ema else [entry.weight for entry in state])
        steps = self.config.sampling_steps / 2 ** self.round_of(step)
        who = (
            "the first teacher" if step == 0 else "the student's average" if takes_average else "the student"
        )
        line = f"round {self.round_of(step)}: from {steps:g} sampling steps to {steps / 2:g}; {who} teaches"
        if step == 0 or not (self.config.reset_optimizer or self.config.reset_ema):
            return line
        checkpointer.wait_until_copied()
        if self.config.reset_optimizer:
            checkpointer.reset_optimizer()
        if self.config.reset_ema and ema is not None:
            ema.restart()
        return line

    def _restore(self, step: int) -> None:
        store = self.checkpointer.store
        if step not in store.peers.first(store.steps):
            raise UserError(
                f"{store.folders.folder} has lost the checkpoint of step {step}, which holds this round's teacher; "
                f"bring it back, or move the later checkpoints away to do the round again"
            )
        store.verify(step)
        kinds = store.kinds(step)
        averaged = step > 0 and self.config.next_teacher == "ema" and "ema" in kinds
        self.teacher.load(lambda wanted: store.read(step, wanted), "ema" if averaged else "weight")


def first_teacher(
    config: RunConfig, store: CheckpointStore, train: DatasetManifest, peers: Peers
) -> WeightSource | None:
    """The weights that a new distillation starts with; None for other runs, and for one that goes on. Collective.

    Raises:
        UserError: no such model, or it is another one than the configuration's or of other data.
    """
    objective = config.objective
    if not isinstance(objective, SDTTObjectiveConfig) or peers.first(store.steps):
        return None
    try:
        source = open_weights(objective.teacher, objective.teacher_weights, peers)
        check_fits_run(train, source.description, f"data.train {config.data.train}")
    except UserError as error:  # of all ranks
        raise UserError(f"objective.teacher: {error}") from None
    problems = _model_differences(config, source.description)
    if problems:
        raise UserError(
            f"objective.teacher: {objective.teacher} is another model than the configuration's:\n  "
            + "\n  ".join(problems)
            + "\n  give these values, or leave them out: the model is the teacher's"
        )
    return source


def _model_differences(config: RunConfig, teacher: ModelDescription) -> list[str]:
    mine, theirs = to_mapping(config.model), to_mapping(teacher.model)
    return [
        f"model.{key}: the teacher has {theirs.get(key)!r}, now it is {mine.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key) and key != "dropout"
    ]

"""The training run: open or resume, loop over steps, validate, save, stop when asked."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch

from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.checkpoint.peers import Peers
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig, SDTTObjectiveConfig, VQModelConfig, cautions
from pgm_scale.data.loader import BatchStream, TokenLoader
from pgm_scale.data.order import BatchPlan, GlobalOrder
from pgm_scale.data.storage import SplitStorage, open_splits
from pgm_scale.errors import Preempted, UnstableError, UserError
from pgm_scale.evaluation.validation import (
    validate,
    validation_loader,
    validation_metrics,
    validation_summary,
)
from pgm_scale.models.stages import unit_kinds
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.launch import Launch
from pgm_scale.parallel.layout import describe_layout, layout_problems, length_problems
from pgm_scale.parallel.mesh import Mesh, connected
from pgm_scale.parallel.stages import split_units
from pgm_scale.parallel.unit_costs import measure_unit_costs
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.training import metrics
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.content import content_problems
from pgm_scale.training.distillation import Distillation, first_teacher
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.measuring import Measurements
from pgm_scale.training.same_run import check_same_on_all_ranks
from pgm_scale.training.samples import write_validation_samples
from pgm_scale.training.signals import JobEnd, StopFlag
from pgm_scale.training.stability import Instability, Stability, read_roll_backs
from pgm_scale.training.step import MicroBatch, StepResult, prepare_micro_batch, training_step
from pgm_scale.training.tracking import NoTracker, Tracker, open_tracker
from pgm_scale.training.weight_source import WeightSource
from pgm_scale.watching.stragglers import StragglerReport
from pgm_scale.watching.watch import RunWatch

logger = logging.getLogger(__name__)


def train(config: RunConfig, launch: Launch, stop: StopFlag) -> None:
    """Train, or go on training, the run in `config.folder` until `config.training.steps` or until `stop` is raised.

    Raises:
        UserError: the configuration does not fit the launch, the data, or the run that is in the folder.
        Preempted: a signal stopped the run after a save.
        UnstableError: a step must not be learnt from, and the run's policy is to stop.
        HungRankError: a rank hangs or is dead; it is named.
    """
    problems = layout_problems(config, launch.world_size)
    splits = open_splits(config.data.train, config.data.validation, config.data.cache_folder, problems)
    if splits:
        problems += length_problems(config, splits[0].manifest.length_tokens)
        problems += content_problems(config, splits[0].manifest)
    if problems:
        raise UserError("cannot train:\n  " + "\n  ".join(problems))
    train_split, validation_split = splits
    if config.parallel.tensor > 1:  # Megatron orders its collectives by it; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with ExitStack() as stack:
        lock = RunLock(config.folder)
        stack.callback(lock.release)
        # Outside of the mesh: when a rank hangs, it is the mesh's end that says so.
        watch = stack.enter_context(RunWatch(config, launch.rank, launch.world_size))
        hangs = RunFolder(config.folder).hangs_path
        mesh = stack.enter_context(connected(launch, config.parallel.timeout_s, hangs, watch.hung))
        peers = Peers(mesh.rank, mesh.world_size, mesh.gather, mesh.progress)
        peers.first(lock.acquire)
        check_same_on_all_ranks(config, train_split.manifest, validation_split.manifest, peers, lock)
        train_on_mesh(config, mesh, train_split, validation_split, stop, lock, watch)


def train_on_mesh(
    config: RunConfig,
    mesh: Mesh,
    train_split: SplitStorage,
    validation_split: SplitStorage,
    stop: StopFlag | None = None,
    lock: RunLock | None = None,
    watch: RunWatch | None = None,
) -> None:
    """`train`, once the ranks are connected; rank 0 holds the folder's `lock`. Collective."""
    watch = watch or RunWatch(config, mesh.rank, mesh.world_size)
    mesh = watch.begin(mesh).arranged(config.parallel)
    # Convolutions, which only a VQ model has: in fp32 if that is asked for, and the same sums on every run.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    run = RunFolder(config.folder)
    peers = Peers(mesh.rank, mesh.world_size, mesh.gather, mesh.progress)
    store = CheckpointStore(run.path, peers)
    teacher = first_teacher(config, store, train_split.manifest, peers)
    distilled_from = None if teacher is None else teacher.description.origin
    identity: RunIdentity = peers.first(
        lambda: run.create_or_match(
            config, train_split.manifest, train_split.tokenizer_path(), distilled_from
        )
    )
    store.recover()
    session = TrainingRun(
        config, mesh, run, identity, store, train_split, validation_split, watch, lock, teacher
    )
    with nullcontext(stop) if stop else StopFlag() as flag:
        session.run(flag)


class TrainingRun:
    """Everything that lives as long as one session of a run; `run` is the loop."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        folder: RunFolder,
        identity: RunIdentity,
        store: CheckpointStore,
        train_split: SplitStorage,
        validation_split: SplitStorage,
        watch: RunWatch,
        lock: RunLock | None,
        initial: WeightSource | None = None,
    ) -> None:
        """`initial` replaces the drawn weights of a run that has no checkpoint."""
        self.config, self.mesh, self.folder, self.identity = config, mesh, folder, identity
        self.train_split, self.watch, self.lock = train_split, watch, lock
        self.store = store
        self.objective = build_objective(config.objective, identity.vocabulary, config.model)
        self.stage_units = self._stage_units()
        self.engine = Engine.build(
            config, identity.vocabulary.size, identity.length_tokens, mesh, self.stage_units
        )
        decay = config.training.ema_decay
        self.ema = ExponentialMovingAverage(self.engine.state, decay) if decay > 0 else None
        self.checkpointer = Checkpointer(store, self.engine, self.ema)
        self.validation_loader = validation_loader(validation_split)
        self._has_learnt = self._may_purge = False  # since the last save; before it
        self.first_step = self._resume(initial)
        self.distillation = Distillation.of(
            config,
            self.objective,
            self.checkpointer,
            identity.vocabulary.size,
            identity.length_tokens,
            self.stage_units,
            self.first_step,
        )
        self.console = metrics.ConsoleReport(config.training.steps, self.first_step, mesh.is_main)
        self.file: metrics.MetricsFile | None = None
        self.tracker: Tracker = NoTracker()
        store.peers.first(self._open_outputs)
        self.job_end = JobEnd()
        self.measurements = Measurements(config, identity.vocabulary.size, identity.length_tokens, mesh)
        self.stragglers = StragglerReport(self.engine.module, mesh, config.watching.slow_rank_ratio)

    def _stage_units(self) -> tuple[int, ...]:
        """Units of each pipeline stage: by hand, or even by what they cost on this machine."""
        config, given = self.config, self.config.parallel.stage_units
        if given or self.mesh.stages == 1:
            return given
        costs = self.store.peers.first(self._unit_costs)
        return split_units([costs[kind] for kind in unit_kinds(config.model)], self.mesh.stages)

    def _unit_costs(self) -> dict[str, float]:
        """Seconds of each kind of unit; measured once in a run's life, so that a resume has the same stages."""
        config, model = self.config, self.config.model
        assert not isinstance(model, VQModelConfig)  # `layout_problems` has refused its pipeline
        bf16 = config.training.precision == "bf16"
        return self.folder.unit_costs(
            unit_kinds(model),
            lambda: measure_unit_costs(
                model,
                self.identity.vocabulary.size,
                self.identity.length_tokens,
                config.training.micro_batch_sequences,
                self.mesh.device,
                torch.bfloat16 if bf16 else torch.float32,
                config.training.recompute_blocks,
                self.mesh.progress,
            ),
        )

    def _resume(self, initial: WeightSource | None) -> int:
        step = self.store.newest_verified(self.config.checkpoint.strict)
        path = self.folder.roll_backs_path
        backs = self.store.peers.first(lambda: read_roll_backs(path, self.identity.run_id))
        self.stability = Stability(self.config.stability, path, backs)
        if step is not None:
            self._restore(step)
        self.store.peers.first(lambda: self.stability.write(self.identity.run_id))  # before any checkpoint
        if step is None and initial is not None:
            self.checkpointer.initialize(initial)
            self._save(0)
        return step or 0

    def _restore(self, step: int) -> None:
        self.stability.restore(self.checkpointer.restore(step).get("stability"), step)

    def _open_outputs(self) -> None:
        self.file = metrics.MetricsFile(self.folder.metrics_path, self.first_step)
        self.tracker = open_tracker(self.config, self.identity.run_id, self.folder.path)

    def run(self, stop: StopFlag) -> None:
        """Train until the last step, or until a signal has been seen by any rank."""
        with ExitStack() as stack:
            stack.callback(self._close)
            try:
                self._loop(stop)
            except UnstableError:  # on all ranks, so they can still commit what was good before
                try:
                    self._finish_save()
                except UserError as error:
                    logger.error("%s", error)
                raise

    def _loop(self, stop: StopFlag) -> None:
        config = self.config
        stop.answers_interrupts = True  # from here on a signal is answered at the next step
        if self.mesh.world_size > 1:
            vocab_size = self.identity.vocabulary.size
            self.console.say(f"{self.mesh.world_size} ranks: {self.mesh.rank_map}")
            self.console.say(describe_layout(config, self.mesh.world_size, vocab_size, self.stage_units))
        for line in cautions(config):
            self.console.say(f"warning: {line}")
        if self.first_step >= config.training.steps:
            self.console.say(f"nothing to do: step {self.first_step} of {config.training.steps} is reached")
        elif self.first_step:
            self.console.say(f"resumed from the checkpoint of step {self.first_step}")
        self.watch.opened(self.identity.run_id, self.first_step)
        step = self.first_step
        while step < config.training.steps:
            with self._stream(step) as stream:
                step = self._train(step, stream, stop)

    def _train(self, first_step: int, stream: BatchStream[MicroBatch], stop: StopFlag) -> int:
        """Train to the end, or to a step that makes the run roll back: the step to go on with."""
        config = self.config
        self.measurements.restart()
        for step in range(first_step, config.training.steps):
            if self.distillation is not None:
                begun = self.distillation.begin_step(step)
                if begun is not None:
                    self.console.say(begun)
            result = training_step(
                step,
                self.engine,
                self.objective,
                stream,
                self.ema,
                config,
                self.mesh,
                self.checkpointer,
                self.stability,
                stop.signal_name is not None,
                self.mesh.is_main and self.job_end.is_too_near(self.checkpointer.save_s),
            )
            if result.instability is not None:
                if self.stability.action(step, result.instability) == "roll_back":
                    return self._roll_back(step, result.instability)
                self._skip(step, result.instability)
            self._after_step(step + 1, result, stream)
            if result.agreed.stop_requested and step + 1 < config.training.steps:
                raise Preempted(
                    f"stopped by a signal after step {step + 1}, which is saved in {self.folder.path}; "
                    "run the same command to go on"
                )
        return config.training.steps

    def _skip(self, step: int, found: Instability) -> None:
        self.stability.skipped_steps.append(step)
        line = f"skipped the update of step {step}: {found.reason} on {found.where}"
        self.console.say(f"warning: {line}")
        self.watch.unstable("skipped", step, line)

    def _roll_back(self, step: int, found: Instability) -> int:
        """To the newest checkpoint; the data up to `step` are left out. Returns the checkpoint's step."""
        self._finish_save()
        what = f"{found.reason} at step {step} on {found.where}"
        try:
            newest = self.store.newest_verified(self.config.checkpoint.strict)
        except UserError as error:  # on all ranks
            raise UnstableError(f"{what}, and there is no checkpoint to roll back to: {error}") from None
        if newest is None:
            raise UnstableError(
                f"{what}, and there is no checkpoint to roll back to; lower checkpoint.interval_steps, or look at "
                "these samples"
            )
        self.stability.check_worth(newest, found)
        back = self.stability.roll_back(step, newest, f"{found.reason} on {found.where}")
        # Before anything is trained on the data after it.
        self.store.peers.first(lambda: self.stability.write(self.identity.run_id))
        self._restore(newest)
        if self.distillation is not None:
            self.distillation.resume(newest)
        if self.file is not None:
            self.file.rewind(newest)
        first, last = back.data_steps
        line = (
            f"rolled back from step {step} to the checkpoint of step {newest}: {back.reason}; the data of steps "
            f"{first} to {last} are left out"
        )
        self.console.say(f"warning: {line}")
        self.watch.unstable("rolled_back", newest, line)
        return newest

    def _stream(self, first_step: int) -> BatchStream[MicroBatch]:
        config, mesh = self.config, self.mesh
        rows = self.train_split.manifest.rows_per_shard
        order = GlobalOrder(rows, config.training.seed, config.data.shuffle_block_shards)
        plan = BatchPlan(
            config.training.global_batch_sequences,
            config.training.micro_batch_sequences,
            mesh.data_rank,
            mesh.data_ranks,
            self.stability.left_out,
        )
        draws = DrawSpec(config.training.seed, config.training.global_batch_sequences)
        return BatchStream(
            TokenLoader(self.train_split, order),
            plan,
            start_step=first_step,
            stop_step=config.training.steps,
            transform=lambda batch: prepare_micro_batch(self.objective, batch, draws),
        )

    def _after_step(self, step: int, result: StepResult, stream: BatchStream[MicroBatch]) -> None:
        """What is due after `step` finished updates: record, validate, save."""
        config = self.config
        last = step == config.training.steps
        self.measurements.add(result)
        if result.instability is None:
            self._has_learnt = True
            self.watch.step(step, result.loss)
        self.console.step(step)
        validates = last or step % config.validation.interval_steps == 0
        saves = last or result.agreed.stop_requested or step % config.checkpoint.interval_steps == 0
        saves |= self.distillation is not None and self.distillation.starts_at(step)
        records = validates or saves or step % config.training.log_interval_steps == 0
        record = self._record(step, result, stream) if records else {}
        paused_s = time.perf_counter()
        if result.agreed.save_ended:
            self._finish_save()
        if saves and result.agreed.too_late_to_save:
            self._refuse_save(step)
        if result.agreed.stop_requested:
            if not validates:  # what ends a job that is slow to stop takes no record with it
                self._write(record)
            self._save(step)  # first, as the scheduler may not wait for a validation
        if validates:
            try:
                with self.watch.during("validating"):
                    record |= self._validate(step)
            except UserError:  # on all ranks, see `Engine.evaluation`
                self._finish_save()
                raise
        if records and (validates or not result.agreed.stop_requested):
            self._write(record)
        if (
            saves and not result.agreed.stop_requested
        ):  # after the record, which a resume from this step must find
            self._save(step, in_background=config.checkpoint.asynchronous and not last)
        self.measurements.exclude(time.perf_counter() - paused_s)

    def _record(self, step: int, result: StepResult, stream: BatchStream[MicroBatch]) -> dict[str, Any]:
        """The training metrics of the steps since the last record."""
        straggler = self.stragglers.find(stream.data_wait_s)
        record = {
            **self.measurements.record(step, result),
            "data_wait_s": stream.data_wait_s,
            "checkpoint_s": self.checkpointer.seconds,
            **(straggler.record() if straggler is not None else {}),
            **self.stability.record(),
        }
        if news := self.watch.slow(step, straggler):
            self.console.say(news)
        if self.distillation is not None:
            record["round"] = self.distillation.round_of(step - 1)
        stream.data_wait_s = self.checkpointer.seconds = 0.0
        return record

    def _validate(self, step: int) -> dict[str, Any]:
        config, mesh = self.config, self.mesh
        weights = self.ema.values if self.ema is not None else None
        with self.engine.evaluation(weights) as model:
            result = validate(
                model,
                self.objective,
                self.validation_loader,
                sequences=config.validation.sequences,
                batch_sequences=config.training.micro_batch_sequences,
                device=mesh.device,
                rank=mesh.data_rank,
                ranks=mesh.data_ranks,
                sum_over_ranks=mesh.sum,
            )
            if config.validation.samples:
                write_validation_samples(
                    model, config, self.identity, self.folder, step, mesh.device, self.store.peers
                )
        self.console.say(f"step {step}: {validation_summary(result, self.objective)}")
        return validation_metrics(result, self.objective)

    def _save(self, step: int, in_background: bool = False) -> None:
        self._finish_save()
        self._check_lock()
        self._check_weights(step)
        self._may_purge, self._has_learnt = self._has_learnt, False
        state = {"run_id": self.identity.run_id, "stability": self.stability.state()}
        if in_background:
            self.checkpointer.start(step, state)
        else:
            with self.watch.during("saving"):
                self.checkpointer.save(step, state)
            self.watch.saved(step)
            self._purge()

    def _check_weights(self, step: int) -> None:
        """A checkpoint that no run could go on from must not take the place of one that it can."""
        bad = not self.checkpointer.weights_are_finite()
        if self.mesh.any(np.array([bad], np.float64))[0]:
            raise UnstableError(
                f"weights are not finite after step {step}, which is not saved; the checkpoint before it stands, "
                "from which the same command goes on; or train in a new folder with a lower optimizer.learning_rate"
            )

    def _refuse_save(self, step: int) -> NoReturn:
        """Nothing that is trained from here on could be kept by this job."""
        self._finish_save()
        saved = self.store.steps()
        raise Preempted(
            f"step {step} is not saved: the job ends in {self.job_end.left_s:.0f} s, and a save takes about "
            f"{self.checkpointer.save_s:.0f} s; the checkpoint of step {saved[-1] if saved else 0} stands: run the "
            "same command to go on"
        )

    def _finish_save(self) -> None:
        """Wait for the save under way, if there is one, and commit it. Collective."""
        if self.store.under_way is not None:
            step = self.store.under_way.step
            self._check_lock()
            with self.watch.during("saving"):
                self.checkpointer.finish()
            self.watch.saved(step)
            self._purge()

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.store.peers.first(self.lock.check)

    def _purge(self) -> None:
        if not self._may_purge:  # weights that no step could learn from do not take the place of older ones
            return
        keep, objective = self.config.checkpoint, self.config.objective
        teachers = objective.round_steps if isinstance(objective, SDTTObjectiveConfig) else 0
        self.store.purge(keep.keep_last, keep.milestone_interval_steps, teachers)

    def _write(self, record: dict[str, Any]) -> None:
        self.watch.record(record, self.stragglers.ratio)
        if self.file is not None:
            self.file.write({**record, "unix_time_s": time.time()})
        self.console.record(record)
        self.tracker.log(record)

    def _close(self) -> None:
        self.store.give_up()
        self.console.close()
        # The batch script has to requeue the job before it ends.
        self.tracker.close(patience_s=min(60.0, max(5.0, self.job_end.left_s / 2)))
        if self.file is not None:
            self.file.close()
        self.engine.close()

"""The training run: open or resume, loop over steps, validate, save, stop when asked."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from pgm_scale.checkpoint.lock import RunLock
from pgm_scale.checkpoint.peers import Peers
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.data.loader import BatchStream, TokenLoader
from pgm_scale.data.order import BatchPlan, GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import Preempted, UserError
from pgm_scale.evaluation.time_buckets import TimeBuckets
from pgm_scale.evaluation.validation import validate, validation_loader
from pgm_scale.models import build_model
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Launch, Mesh, connect, disconnect, layout_problems
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.training import metrics
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.samples import write_validation_samples
from pgm_scale.training.signals import StopFlag
from pgm_scale.training.step import MicroBatch, StepResult, prepare_micro_batch, seed_dropout, training_step
from pgm_scale.training.tracking import open_tracker

logger = logging.getLogger(__name__)


def train(config: RunConfig, launch: Launch) -> None:
    """Train, or go on training, the run in `config.folder` until `config.training.steps`.

    Raises:
        UserError: the configuration does not fit the launch, the data, or the run that is in the folder.
        Preempted: a signal stopped the run after a save.
        NonFiniteError: see `training_step`.
    """
    problems = layout_problems(config, launch.world_size)
    train_split, validation_split = open_splits(config, problems)
    with ExitStack() as stack:
        lock = stack.enter_context(RunLock(config.folder)) if launch.rank == 0 else None
        stop = stack.enter_context(StopFlag())
        mesh = connect(launch)
        stack.callback(disconnect)
        train_on_mesh(config, mesh, train_split, validation_split, stop, lock)


def train_on_mesh(
    config: RunConfig,
    mesh: Mesh,
    train_split: SplitStorage,
    validation_split: SplitStorage,
    stop: StopFlag,
    lock: RunLock | None = None,
) -> None:
    """`train`, once the ranks are connected; rank 0 holds the folder's `lock`. Collective."""
    run = RunFolder(config.folder)
    peers = Peers(mesh.rank, mesh.world_size, mesh.gather)
    identity: RunIdentity = peers.first(
        lambda: run.create_or_match(config, train_split.manifest, train_split.tokenizer_path())
    )
    store = CheckpointStore(run.path, peers)
    store.recover()
    TrainingRun(config, mesh, run, identity, store, train_split, validation_split, stop, lock).run()


def open_splits(config: RunConfig, problems: list[str]) -> tuple[SplitStorage, SplitStorage]:
    """Both data splits, which must have one vocabulary; all problems with them are reported together."""
    splits = []
    for path in (config.data.train, config.data.validation):
        try:
            splits.append(SplitStorage(path, config.data.cache_folder))
        except UserError as error:
            problems.append(str(error))
    if len(splits) == 2:
        differences = splits[0].manifest.differences(splits[1].manifest)
        problems += [f"data.train and data.validation differ in {line}" for line in differences]
    if problems:
        raise UserError("cannot train:\n  " + "\n  ".join(problems))
    return splits[0], splits[1]


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
        stop: StopFlag,
        lock: RunLock | None,
    ) -> None:
        self.config, self.mesh, self.folder, self.identity = config, mesh, folder, identity
        self.train_split, self.stop, self.lock = train_split, stop, lock
        seed_dropout(config.training.seed, 0, 0, 0)  # the initial weights are equal on all ranks
        model = build_model(config.model, identity.vocabulary.size, identity.length_tokens)
        self.objective = build_objective(config.objective, identity.vocabulary)
        self.engine = Engine(model, config, mesh)
        decay = config.training.ema_decay
        self.ema = ExponentialMovingAverage(self.engine.state, decay) if decay > 0 else None
        self.checkpointer = Checkpointer(store, self.engine, self.ema)
        self.store = store
        self.validation_loader = validation_loader(validation_split)
        self.first_step = self._resume()
        self.console = metrics.ConsoleReport(config.training.steps, self.first_step, mesh.is_main)
        self.file = metrics.MetricsFile(folder.metrics_path, self.first_step) if mesh.is_main else None
        self.tracker = open_tracker(config, identity.run_id, folder.path, mesh.is_main)
        self.throughput = metrics.Throughput()
        self.buckets = TimeBuckets()
        self._losses: list[float] = []
        # Backward costs twice the forward (PaLM, appendix B).
        self._flops_per_token = 3 * forward_flops_per_token(
            config.model, identity.vocabulary.size, identity.length_tokens
        )

    def _resume(self) -> int:
        step = self.store.newest_verified()
        if step is None:
            return 0
        self.checkpointer.restore(step)
        return step

    def run(self) -> None:
        config = self.config
        if self.first_step:
            self.console.say(f"resumed from the checkpoint of step {self.first_step}")
        with self._stream() as stream:
            self.throughput.restart()
            for step in range(self.first_step, config.training.steps):
                result = training_step(
                    step,
                    self.engine,
                    self.objective,
                    stream,
                    self.ema,
                    config,
                    self.mesh,
                    self.stop.signal_name is not None,
                )
                self._after_step(step + 1, result, stream)
                if result.stop_requested and step + 1 < config.training.steps:
                    self._close()
                    raise Preempted(
                        f"stopped by a signal after step {step + 1}, which is saved in {self.folder.path}; "
                        "run the same command to go on"
                    )
        self._close()

    def _stream(self) -> BatchStream[MicroBatch]:
        config, mesh = self.config, self.mesh
        rows = self.train_split.manifest.rows_per_shard
        order = GlobalOrder(rows, config.training.seed, config.data.shuffle_block_shards)
        plan = BatchPlan(
            config.training.global_batch_sequences,
            config.training.micro_batch_sequences,
            mesh.data_rank,
            mesh.data_ranks,
        )
        draws = DrawSpec(config.training.seed, config.training.global_batch_sequences)
        return BatchStream(
            TokenLoader(self.train_split, order),
            plan,
            start_step=self.first_step,
            stop_step=config.training.steps,
            transform=lambda batch: prepare_micro_batch(self.objective, batch, draws),
        )

    def _after_step(self, step: int, result: StepResult, stream: BatchStream[MicroBatch]) -> None:
        """What is due after `step` finished updates: record, validate, save."""
        config = self.config
        last = step == config.training.steps
        self.throughput.tokens += result.scored_tokens
        self._losses.append(result.loss)
        for terms in result.terms:
            self.buckets.add(terms)
        self.console.step(step)
        validates = last or step % config.validation.interval_steps == 0
        if validates or result.stop_requested or step % config.training.log_interval_steps == 0:
            record = self._record(step, result, stream)
            paused_s = time.perf_counter()
            if validates:
                record |= self._validate(step)
            if last or result.stop_requested or step % config.checkpoint.interval_steps == 0:
                self._save(step)
            self.throughput.exclude(time.perf_counter() - paused_s)
            self._write(step, record)
        elif step % config.checkpoint.interval_steps == 0:
            paused_s = time.perf_counter()
            self._save(step)
            self.throughput.exclude(time.perf_counter() - paused_s)

    def _record(self, step: int, result: StepResult, stream: BatchStream[MicroBatch]) -> dict[str, Any]:
        """The training metrics of the steps since the last record."""
        buckets = TimeBuckets()
        buckets.merge(self.mesh.sum(self.buckets.state()))
        speed = self.throughput.tokens_per_second()
        peak = metrics.peak_flops(self.mesh.device)
        record = {
            "step": step,
            "samples": step * self.config.training.global_batch_sequences,
            "loss": result.loss,
            "loss_mean": float(np.mean(self._losses)),
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": speed,
            "mfu": speed * self._flops_per_token / (peak * self.mesh.world_size) if peak else None,
            "data_wait_s": stream.data_wait_s,
            "checkpoint_s": self.checkpointer.seconds,
            "memory_bytes": metrics.memory_bytes(self.mesh.device),
            "cross_entropy_by_mask_fraction": buckets.result().tolist(),
        }
        stream.data_wait_s = 0.0
        self.checkpointer.seconds = 0.0
        self.buckets = TimeBuckets()
        self._losses.clear()
        self.throughput.restart()
        return record

    def _validate(self, step: int) -> dict[str, Any]:
        config, mesh = self.config, self.mesh
        weights = self.ema.values if self.ema is not None else None
        with self.engine.evaluation(weights) as model:
            perplexity = validate(
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
                write_validation_samples(model, config, self.identity, self.folder, step, mesh)
        self.console.say(
            f"step {step}: validation perplexity {perplexity.perplexity:.2f} "
            f"+- {perplexity.perplexity_standard_error:.2f} on {perplexity.sequences} sequences"
        )
        return {
            "validation_nll": perplexity.nll_nats_per_token,
            "validation_perplexity": perplexity.perplexity,
            "validation_perplexity_standard_error": perplexity.perplexity_standard_error,
        }

    def _save(self, step: int) -> None:
        self.store.peers.first(lambda: self.lock.check() if self.lock else None)
        self.checkpointer.save(step, {"run_id": self.identity.run_id})
        keep = self.config.checkpoint
        self.store.purge(keep.keep_last, keep.milestone_interval_steps)

    def _write(self, step: int, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write({**record, "unix_time_s": time.time()})
        self.console.record(record)
        scalars = {
            key: value for key, value in metrics.finite(record).items() if isinstance(value, (int, float))
        }
        for bucket, value in enumerate(record["cross_entropy_by_mask_fraction"]):
            scalars[f"cross_entropy_by_mask_fraction/{bucket / 10:.1f}"] = value
        self.tracker.log(step, metrics.finite(scalars))

    def _close(self) -> None:
        self.console.close()
        self.tracker.close()
        if self.file is not None:
            self.file.close()
        self.engine.close()

"""`pgm-scale doctor --cluster`: all ranks go through the checks together; rank 0 tells what they found."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pgm_scale import config as configuration
from pgm_scale.config import ParallelConfig, RunConfig
from pgm_scale.errors import UserError
from pgm_scale.files import check_writable
from pgm_scale.holder import node_name
from pgm_scale.parallel.launch import Launch, find_launch
from pgm_scale.parallel.layout import layout_problems
from pgm_scale.parallel.mesh import Mesh, connected
from pgm_scale.preflight import network, shared_memory
from pgm_scale.preflight.clocks import clock_offset
from pgm_scale.preflight.data import data_rows, hash_rows
from pgm_scale.preflight.disks import run_folder_rows
from pgm_scale.preflight.gpu import gpu_rows
from pgm_scale.preflight.host import host_rows
from pgm_scale.preflight.judgement import Limits, Place, RankReport, judge, ranks_by_node
from pgm_scale.preflight.matmul import matmul_flops_per_s
from pgm_scale.preflight.report import add_hang, find_problems, lines_of, print_report, write_json
from pgm_scale.preflight.rows import CHECK_TIMEOUT_S, Row, guarded
from pgm_scale.preflight.versions import MISSING, rank_versions
from pgm_scale.training.teacher_model import fill_in_model

_DATA_TIMEOUT_S = 5 * CHECK_TIMEOUT_S  # thousands of shards on a slow file system


@dataclass(frozen=True)
class Probes:
    """What is asked of the machine, so that tests can answer for a broken one."""

    versions: Callable[[torch.device], Mapping[str, str]] = rank_versions
    matmul_flops_per_s: Callable[[torch.device], float] = matmul_flops_per_s
    clock_s: Callable[[], float] = time.time
    all_reduce: network.Reduce = network.all_reduce
    shared_memory: Path = shared_memory.FOLDER


@dataclass(frozen=True)
class Options:
    """Attributes:
    json_path: where rank 0 writes what was found.
    hashes: read all data and compare hashes, on every node.
    slow_fraction: of the median rank's matmul rate, below which a rank is a straggler; None: the device's usual.
    """

    json_path: str | None = None
    hashes: bool = False
    slow_fraction: float | None = None


def examine_cluster(config_path: str | None, overrides: Iterable[str], options: Options) -> None:
    """Look at all nodes of this launch, print what was found, write the JSON file.

    Raises:
        UserError: on rank 0: everything that is bad, at once; or the configuration is bad on all ranks.
        HungRankError: a rank hangs or died meanwhile; the JSON file then says "unfinished" and excludes its node.
    """
    launch = find_launch()
    config, fault = _load(launch, config_path, overrides)
    timeout_s = (config.parallel if config else ParallelConfig()).timeout_s
    reports: list[RankReport] = []
    unwritable = _begin_json(options) if launch.rank == 0 else ""
    on_hang = partial(add_hang, options.json_path) if options.json_path else None
    with connected(launch, timeout_s, on_hang=on_hang) as mesh:
        refusal, config, rows = _agree(mesh, config, fault, unwritable)
        if not refusal:
            limits = Limits.on(mesh.device.type, options.slow_fraction)
            reports = examine_ranks(mesh, config, options, limits, rows=rows)
    if launch.rank != 0:
        return
    if refusal:
        raise UserError(refusal)
    print_report(reports)
    lines = list(lines_of(find_problems(reports, "bad")))
    if lines:
        raise UserError(f"doctor found {len(lines)} problem(s) on these nodes:\n  " + "\n  ".join(lines))
    warnings = len(find_problems(reports, "warning"))
    print(f"no problems found, {warnings} warning(s)" if warnings else "no problems found")


def _load(launch: Launch, path: str | None, overrides: Iterable[str]) -> tuple[RunConfig | None, str]:
    """The configuration, or why there is none. A node that cannot read it must not keep the others waiting."""
    check = partial(layout_problems, world_size=launch.world_size)
    try:
        return (configuration.load(path, overrides, check, fill_in_model) if path else None), ""
    except UserError as error:
        return None, str(error)


def _begin_json(options: Options) -> str:
    """Replace an earlier preflight's file, as this one may end before it writes; or why it cannot be written."""
    if options.json_path is None:
        return ""
    try:
        check_writable("--json", options.json_path)
    except UserError as error:
        return str(error)
    write_json(options.json_path, [], Limits.on("cpu"), finished=False)
    return ""


def _agree(
    mesh: Mesh, config: RunConfig | None, fault: str, unwritable: str
) -> tuple[str, RunConfig | None, tuple[Row, ...]]:
    """Why nothing can be looked at, equal on all ranks; a configuration; and what is wrong with this rank's."""
    answers = mesh.gather((unwritable, config, fault))
    if answers[0][0]:
        return answers[0][0], None, ()
    if all(other_fault for _, _, other_fault in answers):
        return answers[0][2], None, ()
    readable = next(other for _, other, other_fault in answers if not other_fault)
    if fault:
        to_do = "mount it on this node, or copy it"
        return "", readable, (Row("configuration", " ".join(fault.split()), "bad", to_do),)
    if config is not None and readable is not None and not _same(config, readable):
        to_do = "give all nodes the same file"
        return "", config, (Row("configuration", "not the one of the first ranks", "bad", to_do),)
    return "", config, ()


def _same(one: RunConfig, other: RunConfig) -> bool:
    return configuration.to_yaml(one) == configuration.to_yaml(other)


def examine_ranks(
    mesh: Mesh,
    config: RunConfig | None,
    options: Options,
    limits: Limits,
    probes: Probes = Probes(),
    rows: tuple[Row, ...] = (),
) -> list[RankReport]:
    """Collective: all checks, in the same order on all ranks. The judged reports on rank 0, on others unjudged.

    Args:
        config: None to look at nodes and network only.
        rows: what this rank has found already.
    """
    place = Place(mesh.rank, node_name(), mesh.local_rank, os.getpid())
    nodes = ranks_by_node(report.place for report in _write(mesh, RankReport(place), options, limits))
    report = RankReport(place, (*rows, *_machine_rows(mesh, nodes[place.node], probes)))
    report = _with_versions(mesh, report, probes)
    if config is not None:
        report = _add(report, _shared_rows(mesh, config, nodes[place.node], options))
    mesh.progress("preflight: clocks", step=4)
    leaders = [ranks[0] for ranks in nodes.values()]
    report = dataclasses.replace(report, clock=clock_offset(mesh, leaders, probes.clock_s))
    report = _with_matmul(mesh, report, len(nodes[place.node]), probes)
    so_far = _write(mesh, report, options, limits)
    mesh.progress("preflight: all-reduce", step=6)
    try:
        found = tuple(network.measure_network(mesh, nodes, probes.all_reduce))
    except Exception:
        if mesh.is_main:
            print_report(so_far)
        raise
    return _write(mesh, dataclasses.replace(report, all_reduces=found), options, limits, finished=True)


def _add(report: RankReport, rows: Iterable[Row]) -> RankReport:
    return dataclasses.replace(report, rows=(*report.rows, *rows))


def _machine_rows(mesh: Mesh, ranks_here: list[int], probes: Probes) -> Iterable[Row]:
    mesh.progress("preflight: the machine", step=1)
    yield from guarded("host", lambda: host_rows(mesh.world_size, len(ranks_here)))
    if mesh.rank == ranks_here[0]:
        look = partial(shared_memory.shared_memory_rows, len(ranks_here), probes.shared_memory)
        yield from guarded("shared memory", look)


def _with_versions(mesh: Mesh, report: RankReport, probes: Probes) -> RankReport:
    found: dict[str, str] = {}

    def look() -> Iterable[Row]:
        found.update(probes.versions(mesh.device))
        for name, version in found.items():
            if version == MISSING:
                yield Row(
                    name, "not installed", "bad", "pip install pgm-scale, in the same environment everywhere"
                )

    return dataclasses.replace(_add(report, guarded("versions", look)), versions=found)


def _shared_rows(mesh: Mesh, config: RunConfig, ranks_here: list[int], options: Options) -> Iterable[Row]:
    mesh.progress("preflight: the run folder", step=2)
    leads = mesh.rank == ranks_here[0]
    yield from run_folder_rows(mesh, config.folder, leads)
    mesh.progress("preflight: the data", step=3)
    if leads:
        yield from guarded("data", partial(data_rows, config, mesh.is_main), _DATA_TIMEOUT_S)
    if options.hashes:  # for as long as it takes
        turn, turns = ranks_here.index(mesh.rank), len(ranks_here)
        yield from guarded("hashes", partial(hash_rows, config, turn, turns, mesh.progress), timeout_s=None)
    mesh.gather(None)


def _with_matmul(mesh: Mesh, report: RankReport, ranks_here: int, probes: Probes) -> RankReport:
    mesh.progress("preflight: matrix products", step=5)
    mesh.gather(None)  # all at once, as in training
    rates: list[float] = []

    def look() -> Iterable[Row]:
        rates.append(probes.matmul_flops_per_s(mesh.device))
        return ()

    report = _add(report, guarded("matmul", look))
    report = _add(report, guarded("GPU", partial(gpu_rows, mesh.device, ranks_here)))
    return dataclasses.replace(report, flops_per_s=rates[0] if rates else None)


def _write(
    mesh: Mesh, report: RankReport, options: Options, limits: Limits, finished: bool = False
) -> list[RankReport]:
    """Judge what all have found, and write it, also before the all-reduces: they may hang."""
    reports = mesh.gather(report)
    if mesh.is_main:
        reports = judge(reports, limits)
        if options.json_path is not None:
            write_json(options.json_path, reports, limits, finished)
    return reports

"""What a soak leaves: result.md for people, soak.json for programs, and a picture of memory and open files."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.soak.memory import (
    MOST_GROWTH_BYTES_PER_STEP,
    MOST_MORE_DESCRIPTORS,
    MOST_SETTLING_BYTES,
    LongSession,
)
from pgm_scale.files import atomic_write_bytes, finite


@dataclass
class Leftovers:
    """What a machine could fill up with, after a cycle."""

    shared_memory_files: int
    temporary_files: int
    run_folder_bytes: int
    step_bytes: int


@dataclass
class Soak:
    """All that was seen."""

    commit: str
    seed: int
    minutes: float = 0.0
    cycles: int = 0
    exact_cycles: int = 0
    sessions: int = 0
    steps_trained: int = 0
    steps_compared: int = 0
    kills: int = 0
    single_rank_kills: int = 0
    terminations: int = 0
    saves_under_way: int = 0
    moves: int = 0
    most_restarts: int = 0
    largest_gap: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    leftovers: list[Leftovers] = field(default_factory=list)
    long_sessions: list[LongSession] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        tree = {key: value for key, value in vars(self).items() if key != "long_sessions"}
        tree["leftovers"] = [dataclasses.asdict(entry) for entry in self.leftovers]
        tree["long_sessions"] = [
            {
                "what": long.what,
                "seconds": round(long.outcome.life_s, 1),
                "growth_bytes_per_step": [round(long.growth(rank), 1) for rank in range(len(long.samples))],
                "samples": [
                    {
                        field: [getattr(sample, field) for sample in samples]
                        for field in (
                            "time_s",
                            "step",
                            "resident_bytes",
                            "private_bytes",
                            "descriptors",
                            "threads",
                        )
                    }
                    for samples in long.samples
                ],
            }
            for long in self.long_sessions
        ]
        return tree


def write(soak: Soak, folder: Path) -> None:
    """`soak.json`, `result.md` and, if a long session has ended, `soak.png`."""
    as_json = json.dumps(finite(soak.to_json()))
    atomic_write_bytes(folder / "soak.json", as_json.encode() + b"\n")
    atomic_write_bytes(folder / "result.md", "\n".join(_text(soak)).encode() + b"\n")
    if soak.long_sessions:
        _draw(soak, folder / "soak.png")


def _text(soak: Soak) -> list[str]:
    kills = soak.kills + soak.single_rank_kills
    verdict = "no violation" if not soak.violations else f"**{len(soak.violations)} violations**"
    phases = ", ".join(f"{name} {count}" for name, count in soak.phases.most_common())
    lines = [
        "# Soak",
        "",
        f"{soak.minutes:.0f} minutes, commit {soak.commit}, first seed {soak.seed}: {verdict}.",
        "",
        "| what | how many |",
        "|---|---:|",
        f"| runs trained to the end, each against the same run uninterrupted | {soak.cycles} |",
        f"| of these in one layout, equal to the last bit | {soak.exact_cycles} |",
        f"| sessions | {soak.sessions} |",
        f"| kill -9 of all ranks | {soak.kills} |",
        f"| kill -9 of one rank of several | {soak.single_rank_kills} |",
        f"| SIGTERM | {soak.terminations} |",
        f"| kills that met a save under way | {soak.saves_under_way} |",
        f"| starts in another layout than the session before | {soak.moves} |",
        f"| most sessions that a run needed | {soak.most_restarts} |",
        f"| records of steps compared | {soak.steps_compared} |",
        f"| largest relative difference of a loss after a change of layout (bound 1e-5) | {soak.largest_gap:.1e} |",
        "",
        f"Where the {kills} kills and {soak.terminations} signals found the run: {phases}.",
        "",
        *_long_table(soak),
        *_leftover_lines(soak),
    ]
    if soak.violations:
        lines += ["", "## Violations", "", *(f"- {text}" for text in soak.violations)]
    return lines


def _long_table(soak: Soak) -> list[str]:
    if not soak.long_sessions:
        return []
    lines = [
        "Long sessions, saves and validations included. Growth: median slope of the resident memory over all pairs "
        f"of samples (Theil-Sen) after the first 30%; the bound is {MOST_GROWTH_BYTES_PER_STEP:.0f} bytes a step "
        f"(0.5 GB in a million steps), once it makes more than {MOST_SETTLING_BYTES >> 20} MiB. The smallest count "
        f"of open files in the last third may be {MOST_MORE_DESCRIPTORS} above that in the first.",
        "",
        "| session | s | steps | resident MiB, warm, at the end | bytes a step | descriptors |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for long in soak.long_sessions:
        for rank, samples in enumerate(long.samples):
            warm = long.warm(rank)
            if not warm:
                continue
            first_mib, last_mib = (sample.resident_bytes / 2**20 for sample in (warm[0], warm[-1]))
            lines.append(
                f"| {long.what}, rank {rank} | {long.outcome.life_s:.0f} | {samples[-1].step} "
                f"| {first_mib:.1f}, {last_mib:.1f} | {long.growth(rank):.0f} "
                f"| {min(s.descriptors for s in warm)} to {max(s.descriptors for s in warm)} |"
            )
    return lines


def _leftover_lines(soak: Soak) -> list[str]:
    if not soak.leftovers:
        return []
    last = soak.leftovers[-1]
    largest = max(entry.run_folder_bytes for entry in soak.leftovers)
    return [
        "",
        f"After {len(soak.leftovers)} runs: {last.shared_memory_files} files of ours in /dev/shm, "
        f"{last.temporary_files} temporary files, no processes; the largest run folder had "
        f"{largest / 2**20:.1f} MiB with steps of {last.step_bytes / 2**20:.1f} MiB.",
    ]


def _draw(soak: Soak, path: Path) -> None:
    """Resident memory and open files of every rank over the steps of its session."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, files) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    for number, long in enumerate(soak.long_sessions):
        for rank, samples in enumerate(long.samples):
            steps = [sample.step for sample in samples]
            label = f"{number + 1}: {long.what}" if rank == 0 else None
            color = f"C{number % 10}"
            memory.plot(steps, [s.resident_bytes / 2**20 for s in samples], color=color, label=label)
            files.plot(steps, [s.descriptors for s in samples], color=color, linewidth=0.8)
    memory.set_ylabel("resident memory of a rank, MiB")
    files.set_ylabel("open files of a rank")
    files.set_xlabel("step")
    for axes in (memory, files):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""What a run says and leaves behind: a journal, a plot, and its last words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from sharding import Comm

from . import config, metrics
from .job import JOURNAL, WEIGHTS, Job
from .metrics import Record
from .plot import plot
from .stopping import Wish
from .train import Report, train

PICTURE = "training.png"


def run(comm: Comm, job: Job, wish: Wish) -> Report:
    """The program of one rank: train, and on rank 0 keep a journal, draw the plot and say it."""
    if comm.rank > 0:
        return train(comm, job, lambda _: None, wish)
    out, step = job.out, job.progress.step
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.toml").write_text(config.dumps(job.recipe), encoding="utf-8")
    print(job.corpus.origin)
    if step:
        print(f"going on after step {step}; --restart begins anew")
    with metrics.journal(out / JOURNAL, job.recipe.steps, step) as log:
        report = train(comm, job, log, wish)
    records = metrics.read(out / JOURNAL)
    if records:
        plot(records, out / PICTURE, title=headline(report, job, records))
    print(summary(report, job, records))
    return report


def headline(report: Report, job: Job, records: Sequence[Record]) -> str:
    """One line on model, mesh and, if a step is on record, speed."""
    tokens, seconds = _spent(records)
    speed = f", {tokens / seconds:,.0f} tokens/s" if records else ""
    return f"{report.parameters / 1e6:.1f} M parameters: {report.description}; {job.mesh}{speed}"


def summary(report: Report, job: Job, records: Sequence[Record]) -> str:
    """The last words of a run."""
    unigram, xz = report.baselines
    predicted = min(job.recipe.eval_bytes, len(job.corpus.valid)) - 1
    tokens, seconds = _spent(records)
    spent = f"{tokens:,} tokens in {seconds / 60:.1f} minutes of training"
    left = {JOURNAL: True, PICTURE: bool(records), WEIGHTS: bool(job.recipe.weights)}
    paths = "\n".join(str(job.out / name) for name, there in left.items() if there)
    return f"""
{headline(report, job, records)}
{spent if records else "no step of it is on record: its journal was removed"}

validation, {predicted:,} bytes      bits per byte
  this model        {report.valid_bits_per_byte:.3f}
  xz -9e            {xz:.3f}
  unigram entropy   {unigram:.3f}

{textwrap.indent(report.sample, "  | ", lambda _: True)}

{paths}"""


def _spent(records: Sequence[Record]) -> tuple[int, float]:
    """Tokens, and seconds of steps, over all starts of a run."""
    return sum(r["count"] for r in records), sum(r["count"] / r["tokens_per_s"] for r in records)

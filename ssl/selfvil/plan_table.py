"""The tables of `selfvil plan`."""

from rich.console import Console
from rich.table import Table

from selfvil.plan_report import Report, Trial


def print_report(report: Report, console: Console) -> None:
    """Print a report: sizes, schedules, parameter groups, memory, disk and time; warnings last."""
    for table in (_overview(report), _schedules(report), _groups(report), _memory(report)):
        console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def _overview(report: Report) -> Table:
    plan, size, disk = report.plan, report.size, report.disk
    settings, total = plan.recipe.optim, plan.total_steps
    table = Table(title=f"{report.recipe}: {report.objective} on {report.model}", show_header=False)
    rows = {
        "images": f"{plan.num_samples:,}",
        **{
            f"from {name}": f"{images:,} images, {100 * share:.4g} %: {epochs:,.1f} epochs"
            for name, images, share, epochs in report.sources
        },
        "steps": f"{total:,} of {settings.batch_size:,} images: {plan.samples(total):,} samples, "
        f"{plan.epochs(total):,.1f} epochs of {plan.steps_per_epoch:,.1f} steps",
        "micro-batch": f"{plan.micro_batch:,} images; {settings.accumulate} a step in {plan.processes} processes",
        "peak learning rate": report.peak_lr,
        "parameters": f"{_millions(size.backbone_parameters)} in the backbone; {_millions(size.trained_parameters)} "
        f"trained, {_millions(size.frozen_parameters)} not trained",
        "multiply-adds": f"{_giga(size.backbone_multiply_adds)} for an image through the backbone; "
        f"{_giga(size.step_multiply_adds)} for an image in a training step (forward and backward)",
        "checkpoints": f"{_bytes(disk.checkpoint)} each, {disk.kept} kept: up to {_bytes(disk.most)} while one is "
        f"written ({_bytes(disk.free)} free)",
        "device": f"{plan.processes} x {report.device}",
        **(_trial(report.trial, plan.recipe.data.workers) if report.trial else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _trial(trial: Trial, workers: int) -> dict[str, str]:
    return {
        "data loading": f"{trial.loading:.3g} s of one worker for a step; data.workers = {workers}",
        "computation": f"{trial.computing:.3g} s for a step",
        "speed": f"{trial.images_per_second:,.0f} images/s, {trial.step:.3g} s for a step",
        "whole run": f"{_duration(trial.total)} on this machine, without evaluations, pictures and saves",
    }


def _schedules(report: Report) -> Table:
    rows = report.schedules
    table = Table("", *(row.at for row in rows), title="schedules")
    table.columns[0].no_wrap = True
    table.add_row("step", *(f"{row.step:,}" for row in rows))
    table.add_row("learning rate", *(f"{row.lr:.4g}" for row in rows))
    table.add_row("weight decay", *(f"{row.weight_decay:.4g}" for row in rows))
    for name in rows[0].values:
        table.add_row(name, *(f"{row.values[name]:.4g}" for row in rows))
    return _right(table)


def _groups(report: Report) -> Table:
    table = Table("tag", "weight decay", "learning rate x", "tensors", "parameters", title="parameter groups")
    for group in report.groups:
        decayed = "yes" if group.decayed else "no"
        table.add_row(group.tag or "-", decayed, f"{group.lr_scale:.4g}", f"{group.tensors:,}", f"{group.parameters:,}")
    return _right(table)


def _memory(report: Report) -> Table:
    table = Table("part", "memory", title="predicted peak memory of a process")
    for part, size in vars(report.memory).items():
        table.add_row(part, _bytes(size))
    table.add_section()
    table.add_row("total", _bytes(report.memory.total))
    table.add_row("copy of a checkpoint (host)", _bytes(report.disk.checkpoint))
    table.add_row("free now", _bytes(report.machine))
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3g} G"


def _bytes(size: int) -> str:
    """Decimal units, as disks and `docker stats` have them."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 100 * 3600 else f"{seconds / 86400:.1f} days"

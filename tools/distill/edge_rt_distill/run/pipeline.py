"""A whole run: its steps in order, from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.progress import quiet
from edge_rt_distill.run import ablate, deliver, prepare, shape, study, teach
from edge_rt_distill.run.config import Config, read
from edge_rt_distill.run.steps import Done, Step, Told, keys, read_done, run_steps
from edge_rt_distill.run.workshop import Workshop


def steps(shop: Workshop) -> list[Step]:
    """The steps of a run, in order."""
    return [
        prepare.data_step(shop), prepare.rollouts_step(shop), prepare.vocabulary_step(shop), study.library_step(shop),
        study.diagnose_step(shop), shape.cut_step(shop), teach.answers_step(shop), teach.distil_step(shop), deliver.quantise_step(shop),
        deliver.compensate_step(shop), deliver.verify_step(shop),
    ]  # fmt: skip


def ablation(shop: Workshop) -> list[Step]:
    """The steps up to teaching, and each variant of it."""
    names = [one.name for one in steps(shop)]
    return [*steps(shop)[: names.index("distil")], *ablate.ablation_steps(shop)]


Planned = Callable[[Workshop], list[Step]]


def run_file(file: Path, until: str | None = None, told: Told = quiet, planning: Planned = steps) -> list[Done]:
    """Do a run, or go on with it, up to the step ``until``. Raises UserErrors of every stage; what is done stays."""
    shop = workshop(file)
    _threads(shop.config)
    _ = shop.teacher_path  # a wrong name is told before anything is done
    planned = planning(shop)
    if until is not None:
        names = [one.name for one in planned]
        if until not in names:
            raise OptionError(f"there is no step {until}; the steps are {', '.join(names)}")
        planned = planned[: names.index(until) + 1]
    return run_steps(shop.folder, planned, told)


class State(NamedTuple):
    """A step of a run: what is known of it, and whether that was found with the settings and the teacher as they are now."""

    name: str
    done: Done | None
    current: bool


def state(file: Path) -> list[State]:
    """What is done of a run, by step."""
    shop = workshop(file)
    planned = steps(shop)
    known = {name: (key, read_done(shop.folder / name)) for name, key in keys(planned).items()}
    return [State(name, done, done is not None and done.key == key) for name, (key, done) in known.items()]


def workshop(file: Path) -> Workshop:
    """The workshop of a run's file. Raises OptionError, RuleError."""
    config = read(file)
    folder = file.parent / (config.run.folder or file.stem)
    if folder.resolve() == file.resolve():
        raise OptionError(f"the run would work in {folder}, which is its own file; name another folder with run.folder")
    return Workshop(config, folder, file.parent)


def _threads(config: Config) -> None:
    import torch

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)

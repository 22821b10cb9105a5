"""Experiments: a declarative file of methods, with and without MTO, and seeds, run and compared."""

from mto_analysis.experiments.results import Results, collect
from mto_analysis.experiments.running import LocalEngine, Progress, RunFailedError, do_runs
from mto_analysis.experiments.runs import ExperimentRuns, Run
from mto_analysis.experiments.spec import Arm, Candidate, Choice, Experiment, Variant, experiment_names, load_experiment
from mto_analysis.experiments.summary import summary_page

__all__ = [
    "Arm",
    "Candidate",
    "Choice",
    "Experiment",
    "ExperimentRuns",
    "LocalEngine",
    "Progress",
    "Results",
    "Run",
    "RunFailedError",
    "Variant",
    "collect",
    "do_runs",
    "experiment_names",
    "load_experiment",
    "summary_page",
]

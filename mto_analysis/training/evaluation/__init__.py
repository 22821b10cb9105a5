"""What an encoder is worth downstream: kNN, linear probes and fine-tuning, for one checkpoint or along a run."""

from mto_analysis.training.evaluation.evaluator import Evaluator, Score, score
from mto_analysis.training.evaluation.protocols import Evaluation

__all__ = ["Evaluation", "Evaluator", "Score", "score"]

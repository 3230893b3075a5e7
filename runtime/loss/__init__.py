"""The losses of the student: divergences from the teacher over the whole vocabulary, distances between hidden
states, and cross-entropy.

Legend of shape suffixes in this package: T tokens of a call, C tokens of a chunk, G tokens of a buffer of gradients, R
rows of a block, V vocabulary, D hidden size of the student, E hidden size of the teacher, N samples of a token, S tokens
whose logits of the teacher are kept for several students.
"""

from minitron.runtime.loss.distillation import LossTerms, distillation_loss
from minitron.runtime.loss.head import Head
from minitron.runtime.loss.hidden import HiddenStateLoss, HiddenStateTerm, hidden_state_loss
from minitron.runtime.loss.likelihood import negative_log_likelihood
from minitron.runtime.loss.sampled import SampledTargets
from minitron.runtime.loss.settings import DistillationLoss
from minitron.runtime.loss.shared import shared_logits

__all__ = [
    "DistillationLoss",
    "Head",
    "HiddenStateLoss",
    "HiddenStateTerm",
    "LossTerms",
    "SampledTargets",
    "distillation_loss",
    "hidden_state_loss",
    "negative_log_likelihood",
    "shared_logits",
]

"""Log-probabilities of given tokens, and entropies, under a linear head, without ever holding all logits."""

from fastft.kernels.linear_logprob import ref as ref
from fastft.kernels.linear_logprob.op import linear_logprob as linear_logprob

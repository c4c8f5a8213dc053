"""The loss head: a linear layer and the cross entropy of its outputs, without ever holding all logits."""

from fastft.kernels.linear_ce import ref as ref
from fastft.kernels.linear_ce.op import fp8_obstacle as fp8_obstacle
from fastft.kernels.linear_ce.op import linear_cross_entropy as linear_cross_entropy
from fastft.kernels.linear_ce.quantized import fp8_factors as fp8_factors

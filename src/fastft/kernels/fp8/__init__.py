"""Matrix products of fp8 factors (e4m3) with a scale for every row: quantisation of activations and frozen weights."""

from fastft.kernels.fp8 import ref as ref
from fastft.kernels.fp8.op import MULTIPLE as MULTIPLE
from fastft.kernels.fp8.op import dequantize as dequantize
from fastft.kernels.fp8.op import device_obstacle as device_obstacle
from fastft.kernels.fp8.op import low_rank_add_ as low_rank_add_
from fastft.kernels.fp8.op import obstacle as obstacle
from fastft.kernels.fp8.op import product as product
from fastft.kernels.fp8.op import quantize_rows as quantize_rows
from fastft.kernels.fp8.op import quantize_whole as quantize_whole
from fastft.kernels.fp8.op import side_by_side as side_by_side
from fastft.kernels.fp8.op import weight_columns as weight_columns
from fastft.kernels.fp8.op import weight_rows as weight_rows

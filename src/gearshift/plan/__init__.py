"""The tensor algebra: plans that say how every tensor of one model is made from the tensors of another.

Everything here is data and arithmetic on shapes, and imports no torch; `gearshift.plan.execute` moves the bytes.
"""

from gearshift.plan.expressions import (
    Cast,
    Concatenate,
    Expression,
    Initialise,
    Permute,
    Reference,
    Repeat,
    Reshape,
    Schema,
    Slice,
    Stack,
    TensorInfo,
    infer,
    prevailing_dtype,
    references,
)
from gearshift.plan.initialisers import (
    Constant,
    Initialiser,
    InverseSoftplusLogUniform,
    LastTap,
    LogIndex,
    LogUniform,
    Normal,
    Uniform,
)
from gearshift.plan.plan import Discard, Plan, difference
from gearshift.plan.regions import Box
from gearshift.plan.render import describe, render
from gearshift.plan.rewrite import simplify, substitute

__all__ = [
    "Box",
    "Cast",
    "Concatenate",
    "Constant",
    "Discard",
    "Expression",
    "Initialise",
    "Initialiser",
    "InverseSoftplusLogUniform",
    "LastTap",
    "LogIndex",
    "LogUniform",
    "Normal",
    "Permute",
    "Plan",
    "Reference",
    "Repeat",
    "Reshape",
    "Schema",
    "Slice",
    "Stack",
    "TensorInfo",
    "Uniform",
    "describe",
    "difference",
    "infer",
    "prevailing_dtype",
    "references",
    "render",
    "simplify",
    "substitute",
]

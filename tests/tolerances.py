"""The promised accuracy: the only place in the tests that says how far off a result may be.

In units in the last place of the result's dtype, against a 200-bit reference. A gradient below the
smallest normal number may also be 0, but for float16, where such numbers matter.
"""

LOSS_ULP = {"float32": 5.0, "float64": 4.0}  # half logits have float32 losses
GRAD_ULP = {"float32": 6.0, "float64": 5.0, "float16": 0.51, "bfloat16": 0.51}

# Relative error of a mean or sum against the exact one of the row losses.
SUM_REL = 4e-16

# Central differences of the float64 loss with step 1e-6: truncation and cancellation together.
FINITE_DIFFERENCE_ABS = 1e-8

# Against another float64 computation, relative to the larger term where a result is a difference: the
# ULPs above, and a little for the other one.
NEAR_REL = {"float32": 1e-6, "float64": 1e-13, "float16": 0.52 * 2.0**-10, "bfloat16": 0.52 * 2.0**-7}
NEAR_ABS = {"float32": 1.2e-38, "float64": 2.3e-308, "float16": 0.52 * 2.0**-24, "bfloat16": 1.2e-38}

"""A pretrained dense model becomes a routed one without training: measured importance, fitted routers, chosen blocks.

``batches`` says what a model is calibrated on, ``objective`` what a change costs, ``measure`` how much each row's
update matters, ``fit`` how that becomes a router, ``trials`` and ``choose`` which blocks are routed; ``procedure`` is
the whole, and ``given`` what it is for blocks that are named.
"""

__all__ = ["CalibrationResult", "calibrate", "calibrate_each", "fit_routers", "pruning_order", "refit_routers",
           "text_batches"]

from modcompile.calibration.batches import text_batches
from modcompile.calibration.given import fit_routers, refit_routers
from modcompile.calibration.procedure import CalibrationResult, calibrate, calibrate_each, pruning_order

"""What an arm does to one step, for one run and for many side by side.

Every optimizer of this project takes a step in this order: gate the gradient, clip, step of the inner optimizer, gate
the update, push, put δS into its box. A push therefore survives an update gate, and nothing leaves the box.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for instance, are kept.
"""

from torch import Tensor

from assay.vhack.delta._arms import Arm


def gated_gradient(arm: Arm, gradient_MR: Tensor, axes_MKR: Tensor) -> Tensor:
    """Return the gradient after the arm's gate, [..., M, R]; unchanged where the arm does not gate gradients.

    Args:
        arm: Arm whose gate is applied.
        gradient_MR: Gradient of δS, [..., M, R].
        axes_MKR: Axes of the arm, [..., M, K, R] float64.
    """
    if arm.level != "gradient" or arm.gate.kind == "none" or not axes_MKR.shape[-2]:
        return gradient_MR
    return arm.gate.apply(gradient_MR, axes_MKR, 1).to(gradient_MR.dtype)


def apply_arm(arm: Arm, delta_MR: Tensor, before_MR: Tensor, start_MR: Tensor, axes_MKR: Tensor, rate: float) -> Tensor:
    """Return δS after the arm has acted on what the inner optimizer did: gate the update, push, box.

    Args:
        arm: Arm to apply.
        delta_MR: δS after the step of the inner optimizer, [..., M, R].
        before_MR: δS before that step, [..., M, R].
        start_MR: δS that displacements are counted from, [..., M, R].
        axes_MKR: Axes of the arm, [..., M, K, R] float64.
        rate: Learning rate of this step, which scales the push.
    """
    if not axes_MKR.shape[-2]:
        return delta_MR
    if arm.level == "update" and arm.gate.kind != "none":
        update_MR = delta_MR.double() - before_MR.double()
        delta_MR = (before_MR.double() + arm.gate.apply(update_MR, axes_MKR, -1)).to(delta_MR.dtype)
    if arm.push:
        delta_MR = displaced(delta_MR, arm.push * rate, axes_MKR)
    if arm.box is not None:
        moved_MR = delta_MR.double() - start_MR.double()
        delta_MR = (delta_MR.double() + arm.box.correction(moved_MR, axes_MKR)).to(delta_MR.dtype)
    return delta_MR


def displaced(delta_MR: Tensor, distance: float | Tensor, axes_MKR: Tensor) -> Tensor:
    """Return δS moved along +v of every axis, away from the hack, [..., M, R].

    Args:
        delta_MR: δS, [..., M, R].
        distance: Length in units of δS; a tensor holds one per run and is shaped to fit before [M, R].
        axes_MKR: Axes, [..., M, K, R] float64.
    """
    return (delta_MR.double() + distance * axes_MKR.sum(dim=-2)).to(delta_MR.dtype)

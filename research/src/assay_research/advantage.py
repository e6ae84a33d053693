"""Advantage modification: less reward where activations look like those of the hack sides.

The rival that holds training back without looking at a gradient (Wu and Tang, arXiv 2604.01476).
The direction d is the difference of the mean activations of the hack and the clean sides of the
pairs, after the layer at two thirds of the depth, each the mean over the completion tokens. With m
halfway between the two means along d, and s the pooled standard deviation of the two sides::

    z = (d·a − m) / s        r' = r · (1 − α σ(z) [z > 0])

The advantage is then computed from r' as it would be from r. The direction is taken from the model
as it is at the start, and kept.

Shapes: N samples, H width of the hidden state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.errors import DataError
from assay.models.decoder import decoder_layers
from assay.models.model import AnyModel, AnyTokenizer
from assay.models.spelling import encode_prompt
from assay.vhack.detectors.evidence import forward_samples
from assay.vhack.directions.gradients.batches import Encoded, context_length, encode
from assay.vhack.directions.gradients.targets import module_of
from assay.vhack.pairs.pairs import Pair

_DEPTH = 2 / 3


@dataclass(frozen=True, eq=False)
class HackActivation:
    """The direction, and the scale on which activations along it are judged.

    Attributes:
        layer: Index of the decoder layer whose output is looked at, from 0.
        direction: Direction d, [H] float32, of length 1.
        middle: Middle m between the two sides along d.
        spread: Pooled standard deviation s along d.
    """

    layer: int
    direction: Tensor
    middle: float
    spread: float

    @classmethod
    def fit(
        cls,
        model: AnyModel,
        tokenizer: AnyTokenizer,
        pairs: Sequence[Pair],
    ) -> "HackActivation":
        """Return the direction of pairs of a hack and a clean completion, for the model at the
        start of training.

        Raises:
            DataError: There are fewer than two pairs, or both sides have the same activations.
            UsageError: There is no tokenizer.
        """
        module = module_of(model)
        if len(pairs) < 2:
            raise DataError(
                f"{len(pairs)} pairs for a direction of activations",
                wanted="at least two",
                do="add some",
            )
        samples = [pair.samples()[side] for side in (0, 1) for pair in pairs]
        names = [f"pair {i}, {side} side" for side in ("hack", "clean") for i in range(len(pairs))]
        encoded = encode(tokenizer, samples, names, context_length(module))
        layer = max(0, math.ceil(_DEPTH * len(decoder_layers(module))) - 1)
        hack_NH, clean_NH = forward_samples(module, encoded, [layer])[0][0].chunk(2)
        difference_H = hack_NH.mean(dim=0) - clean_NH.mean(dim=0)
        length = float(difference_H.norm())
        if not length > 0:
            raise DataError(
                "pairs whose sides have the same activations",
                wanted="sides that differ",
                do="check them",
            )
        direction_H = difference_H / length
        hack_N = hack_NH @ direction_H
        clean_N = clean_NH @ direction_H
        spread = float(((hack_N.var() + clean_N.var()) / 2).sqrt())
        return cls(
            layer,
            direction_H,
            float((hack_N.mean() + clean_N.mean()) / 2),
            max(spread, 1e-6 * length),
        )

    def z(self, model: AnyModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Return how far each row, token ids of prompt and completion, is on the hack's side for
        the model of now.

        The result is [N] float32 in units of ``spread``, on the model's device.
        """
        encoded = [
            Encoded(index, f"rollout {index}", [*prompt, *completion], len(prompt))
            for index, (prompt, completion) in enumerate(rows)
        ]
        activations_LNH, _ = forward_samples(module_of(model), encoded, [self.layer])
        return (activations_LNH[0] @ self.direction - self.middle) / self.spread

    def pay(
        self,
        trainer: Any,
        alpha: float,
        rewards_BF: Tensor,
        prompts: Sequence[str],
        _: object,
        completion_ids: Sequence[Sequence[int]],
    ) -> Tensor:
        """Return the modified rewards of a batch; the prompts are those of this process."""
        tokenizer = trainer.processing_class
        rows = [
            (encode_prompt(tokenizer, prompt), ids)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        z_B = self.z(trainer.adapter.model, rows).to(rewards_BF.device)
        return self.modify(rewards_BF, trainer.accelerator.gather(z_B)[:, None], alpha)

    @staticmethod
    def modify(rewards: Tensor, z: Tensor, alpha: float) -> Tensor:
        """Return the rewards r' of rewards r and distances z, in the shape of r, with the strength
        α.
        """
        return rewards * (1 - alpha * torch.sigmoid(z) * (z > 0))

"""Workers of the CPU build of vLLM that keep the weights of linear layers as they were loaded, as on a GPU.

That build packs them for kernels of its own and frees them, so nothing else can run over them. vLLM imports an
extension before it loads the model; products are then those of torch.
"""

import torch
from vllm.model_executor.layers import utils

from assay.poc.vllm.worker import WorkerExtension

NAME = f"{__name__}.Unpacked"


def _keep(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = _keep


class Unpacked(WorkerExtension):
    """The extension of assay, and what tests ask of the weights."""

    def assay_places(self):
        """Return the places in memory of the decoder's parameters, and of what assay's own decoder runs over."""
        body = self.model_runner.get_model().model
        theirs = {parameter.data_ptr() for parameter in (*body.layers.parameters(), *body.norm.parameters())}
        from assay.poc.vllm.own_passes import weights_of

        taken = [body.norm.weight.data]
        for layer in body.layers:
            for part in weights_of(layer):
                taken += [each for each in (part if isinstance(part, tuple) else (part,)) if each is not None]
        return sorted(theirs), sorted(each.data_ptr() for each in taken)

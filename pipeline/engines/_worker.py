"""What runs inside vLLM's workers: new weights, and a repair of vLLM's CPU build.

On a CPU vLLM keeps the output embedding a second time, packed for its matrix product. Where the
model ties it to the input embedding and the new weights do not name it (a model folder does not),
`reload_weights` renews the input embedding and leaves the packed copy as it was (vLLM 0.32): the
logits are then those of the old output embedding. So it is packed again. The repair does nothing
on a GPU, where there is no packed copy.

Servers get `Extension` by `--worker-extension-cls`; the engine in process calls `pack_again`.
"""

from __future__ import annotations

from typing import Any

EXTENSION = "pipeline.engines._worker.Extension"


class Extension:
    """Methods that a vLLM worker gains."""

    def renew(self, weights_path: str) -> None:
        """Load weights from a model folder or hub id.

        Args:
            weights_path: As this worker sees it.
        """
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        pack_again(worker)


def pack_again(worker: Any) -> None:
    """Pack the embeddings of a worker's model anew from their weights.

    Args:
        worker: A vLLM worker.
    """
    for module in worker.model_runner.get_model().modules():
        # Only embeddings keep their weights beside the packed copy.
        if hasattr(module, "cpu_linear") and hasattr(module, "num_embeddings"):
            module.quant_method.process_weights_after_loading(module)

"""One client of work L in PyTorch, so that a test can compare it with ours.

    python torch_language_client.py IN.npz OUT.npz

IN has `held` [G, K], `windows` [T, B, P + 1] and the server's params by name. OUT has
`logits` of the first batch, `loss` [T] and `accuracy` [G, K] of the client's steps, and
its changes by name. The runners' folder is in `PYTHONPATH`.
"""

import sys

import numpy as np
import torch
import torch_language_model as language


def main() -> None:
    params = {name: torch.from_numpy(x) for name, x in np.load(sys.argv[1]).items()}
    held, batches = params.pop("held").tolist(), params.pop("windows").long()
    model = language.build(len(held[0]))
    model.receive(params, held)
    with torch.no_grad():
        logits, _ = model(batches[0, :, :-1])
    losses, accuracy, _ = language.train(model, batches)
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    model.add_change(params, total)
    found = total | {"logits": logits, "loss": losses, "accuracy": accuracy}
    np.savez(sys.argv[2], **{name: x.numpy() for name, x in found.items()})


if __name__ == "__main__":
    main()

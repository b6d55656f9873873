"""Every loss and every optimizer by name in a short training: what each reaches, as a table.

    python -m tests.benchmarks.every_name [NAME ...] [--key value ...]

The CNN, two epochs; each name with one learning rate of its own, tried out by hand in a few runs
and not searched for: a low figure may be the rate's fault.  Without a NAME, all are trained.  What
is added on the command line goes to every run:
`--data ImageFolder --data.root data/cifar10-images` for the real pictures.
"""

import sys
import time
from collections.abc import Iterator

from research.configuration.schema import known_classes, resolve
from research.tracking.run import Recorder
from research.training import fit

BASE = {"trainer": {"max_epochs": 2, "enable_progress_bar": False}, "experiment": "every-name"}
MOMENTUM = ["--optimizer", "SGD", "--optimizer.momentum", "0.9"]

# SGD with momentum 0.9; losses that are a mean over all B x C elements want larger rates.
LEARNING_RATE_OF_LOSS = {
    "L1Loss": 0.03,
    "MSELoss": 0.3,
    "SmoothL1Loss": 0.3,
    "HuberLoss": 0.3,
    "BCELoss": 0.1,
    "BCEWithLogitsLoss": 0.1,
    "KLDivLoss": 0.1,
    "MultiLabelSoftMarginLoss": 0.1,
    "SoftMarginLoss": 0.1,
    "TripletMarginLoss": 0.003,
    "TripletMarginWithDistanceLoss": 0.003,
}
# Cross entropy; where none is given, the optimizer's own default rate.
ARGUMENTS_OF_OPTIMIZER = {
    "SGD": ["--optimizer.lr", "0.05"],
    "ASGD": ["--optimizer.lr", "0.05"],
    "Adadelta": ["--optimizer.lr", "1.0"],
    "RMSprop": ["--optimizer.lr", "1e-3"],
    # These two believe in the gradients they compare, so they are given larger batches.
    "Rprop": ["--optimizer.lr", "1e-4", "--data.batch_size", "1024"],
    "LBFGS": [
        *("--optimizer.line_search_fn", "strong_wolfe", "--optimizer.max_iter", "4"),
        *("--data.batch_size", "1024"),
    ],
}


def runs() -> Iterator[tuple[str, list[str]]]:
    """The name and the settings of each run."""
    for loss in sorted(known_classes("model.loss")):
        rate = LEARNING_RATE_OF_LOSS.get(loss, 0.01)
        yield loss, [*MOMENTUM, "--model.loss", loss, "--optimizer.lr", str(rate)]
    for optimizer in sorted(known_classes("optimizer")):
        yield optimizer, ["--optimizer", optimizer, *ARGUMENTS_OF_OPTIMIZER.get(optimizer, [])]


def main(arguments: list[str]) -> None:
    """Print a Markdown table, a line as soon as it is known."""
    flags = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    names, arguments = arguments[:flags], arguments[flags:]
    print("| name | settings | train loss | val accuracy | test accuracy | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    with Recorder.start() as recorder:
        for name, settings in runs():
            if names and name not in names:
                continue
            began = time.perf_counter()
            configuration = resolve([*settings, "--run_name", name, *arguments], BASE)
            metrics = fit(configuration, recorder).metrics
            words = " ".join(settings).replace("--", "")
            print(
                f"| {name} | `{words}` | {metrics['train/loss']:.4f} "
                f"| {metrics['val/accuracy']:.1%} | {metrics['test/accuracy']:.1%} "
                f"| {time.perf_counter() - began:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])

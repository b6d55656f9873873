"""One trial as a Hydra application: what `tests.benchmarks.sweeps` runs Hydra's Optuna sweeper on.

Run in a Python that sees hydra-core, hydra-optuna-sweeper, hydra-joblib-launcher and the Optuna 2
that they need.  It imports this project only within a trial, as an application of Hydra's would.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=None, config_name=None)
def main(config: DictConfig) -> float:
    import torch

    from research.configuration.schema import resolve
    from research.training import fit

    torch.set_num_threads(1)
    arguments = ["--config", config.file, "--model.loss", config.loss, "--optimizer"]
    arguments += [config.optimizer, "--optimizer.lr", str(config.lr)]
    return fit(resolve([*arguments, "--tracking_uri", config.store])).metrics["val/accuracy"]


if __name__ == "__main__":
    main()
